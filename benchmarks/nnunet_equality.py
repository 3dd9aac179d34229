"""Our nnU-Net networks beside nnU-Net's own: the same weights give the same logits and the same gradients.

The package they come from needs timm, and that torchvision, only for networks that are not compared here:

    .venv-peers/bin/pip install --no-deps dynamic_network_architectures==0.4.4
    .venv-peers/bin/python -m benchmarks.nnunet_equality
"""

from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from glocal.networks.nnunet import NNUNet, PlainOptions, ResidualOptions, to_dynamic_network_architectures

CHANNELS, CLASSES, SIZE = 2, 4, (96, 128)
OPTIONS = (
    PlainOptions(widths=(8, 16, 32, 32)),
    PlainOptions(),
    ResidualOptions(widths=(8, 16, 32, 32)),
    ResidualOptions(depths=(1, 3, 4, 6, 6, 6)),
)


def theirs(options: PlainOptions | ResidualOptions) -> nn.Module:
    """The package's network as nnU-Net's plans ask for it in 2-D."""
    levels = len(options.widths)
    common: dict[str, Any] = {
        "input_channels": CHANNELS,
        "n_stages": levels,
        "features_per_stage": options.widths,
        "conv_op": nn.Conv2d,
        "kernel_sizes": [[3, 3]] * levels,
        "strides": [[1, 1], *[[2, 2]] * (levels - 1)],
        "num_classes": CLASSES,
        "n_conv_per_stage_decoder": [options.decoder_convolutions] * (levels - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    if isinstance(options, PlainOptions):
        return PlainConvUNet(n_conv_per_stage=[options.convolutions] * levels, **common)
    depths = [options.depths[min(level, len(options.depths) - 1)] for level in range(levels)]
    return ResidualEncoderUNet(n_blocks_per_stage=depths, **common)


def compare(options: PlainOptions | ResidualOptions) -> tuple[float, float, int]:
    """Largest relative difference of logits and of gradients, and how many weights were compared."""
    torch.manual_seed(0)
    ours = NNUNet(CHANNELS, CLASSES, options).double()
    for parameter in ours.parameters():  # norms too, some of which start at 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    other = theirs(options).double()
    other.load_state_dict(to_dynamic_network_architectures(ours.state_dict()))  # strict: all names, all shapes
    images = torch.rand(2, CHANNELS, *SIZE, dtype=torch.float64)
    logits = [network(images) for network in (ours, other)]
    target = torch.randn_like(logits[0])
    for of_one in logits:
        (of_one * target).mean().backward()
    gradients = to_dynamic_network_architectures({name: _gradient(p) for name, p in ours.named_parameters()})
    pairs = [(gradients[name], p.grad) for name, p in other.named_parameters() if p.grad is not None]
    if sum(gradient.numel() for gradient, _ in pairs) != sum(p.numel() for p in ours.parameters()):
        raise SystemExit("Some weights of the two networks have no counterpart.")
    scale = max(float(gradient.abs().max()) for gradient, _ in pairs)
    worst = max(float((gradient - other).abs().max()) for gradient, other in pairs if other is not None) / scale
    return _difference(*logits), worst, sum(p.numel() for p in ours.parameters())


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _difference(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def main() -> None:
    """Print one line per network; fail if any differs."""
    for options in OPTIONS:
        logits, gradients, count = compare(options)
        widths = " ".join(map(str, options.widths))
        print(f"{options.name:16} {widths:24} {count:>11,} weights  logits {logits:.1e}  gradients {gradients:.1e}")
        if max(logits, gradients) > 1e-9:
            raise SystemExit(f"{options.name} differs from dynamic_network_architectures.")


if __name__ == "__main__":
    main()
