"""Labels of a whole volume by a two-dimensional network, on one thread of the CPU, beside MONAI's sliding windows."""

from collections.abc import Callable, Iterator

import torch
from monai.inferers import SliceInferer
from torch import Tensor, nn

from benchmarks.harness import Row, compared, main
from glocal.inference import folded, slice_probabilities
from glocal.networks.unet import UNet, UNetOptions

WINDOW, CLASSES = 192, 4
UNDECIDED = 2e-5  # two probabilities nearer to each other may change places with the rounding


def rows() -> Iterator[Row]:
    """Slices of the size of one window, then larger ones, where windows overlap by a quarter."""
    network = _network()
    yield _row(network, slices=24, side=192, goal=1.5)
    yield _row(network, slices=4, side=320)


def _row(network: nn.Module, slices: int, side: int, goal: float | None = None) -> Row:
    images = torch.randn(slices, 1, side, side, generator=torch.Generator().manual_seed(2))

    def ours() -> Tensor:
        parts = slice_probabilities(folded(network), images, torch.device("cpu"))
        return torch.cat([part.max(1).indices for part in parts])

    theirs = {size: _monai(network, images, size) for size in (1, 4)}
    probabilities = torch.cat(list(slice_probabilities(folded(network), images, torch.device("cpu"))))
    differ = ours() != theirs[1]()
    assert ours().ravel().bincount(minlength=CLASSES).min() > 0.1 * differ.numel(), "a class is hardly there"
    if side == WINDOW:
        best, second = probabilities.topk(2, dim=1).values.unbind(1)
        assert ((best - second)[differ] < UNDECIDED).all(), "labels differ"
        note = f"same labels but for {int(differ.sum())} of {differ.numel()} voxels, all ties within {UNDECIDED:g}"
        note += "; the convolutions, which are the same for both, are two thirds of our time"
    else:
        assert differ.float().mean() < 0.3, "labels have nothing to do with each other"
        note = f"windows see less: {1 - float(differ.float().mean()):.1%} of labels agree (random weights)"
    what = f"labels of {slices} slices of {side} x {side}, U-Net, {CLASSES} classes"
    against = "MONAI SliceInferer, sw_batch_size={}"
    found = [compared(what, ours, against.format(size), peer, goal, note=note) for size, peer in theirs.items()]
    return min(found, key=lambda row: row.ratio or 0)  # beside the batch that suits the peer better


def _monai(network: nn.Module, images: Tensor, batch: int) -> Callable[[], Tensor]:
    """`SliceInferer` on a volume `(1, 1, z, y, x)`, as its documentation has it."""
    inferer = SliceInferer(roi_size=(WINDOW, WINDOW), sw_batch_size=batch, overlap=0.25, spatial_dim=0)
    volume = images[:, 0][None, None]

    @torch.inference_mode()
    def labels() -> Tensor:
        logits = inferer(volume, network)
        assert isinstance(logits, Tensor)
        return logits[0].max(0).indices

    return labels


def _network() -> nn.Module:
    """The U-Net of GLCL with random weights, and batch norms as after some training: far from the identity."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    network = UNet(1, CLASSES, UNetOptions())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for mean in (module.running_mean, module.bias.data):
                mean.normal_(0, 0.3, generator=generator)
            for scale in (module.running_var, module.weight.data):
                scale.uniform_(0.5, 1.5, generator=generator)
    filters = network.head[-1].weight.data
    filters -= filters.mean((2, 3), keepdim=True)  # a logit is a contrast then, and all classes occur
    return network.eval()


if __name__ == "__main__":
    main(rows)
