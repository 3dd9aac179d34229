"""Context restoration: small patches of a slice change places, encoder and decoder put them back.

L. Chen et al., Medical Image Analysis 2019; a baseline of Chaitanya et al. 2020, whose code swaps the patches and
leaves all else open.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.views.ranges import moved
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """Patches as in the code; trained as Chaitanya et al. train everything."""

    method: Literal["context-restoration"] = "context-restoration"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(40, ge=1, description="slices per step")
    pairs: int = Field(10, ge=1, description="pairs of patches that change places in each slice")
    patch: int = Field(5, ge=1, description="side of a patch, in pixels")
    tries: int = Field(100, ge=1, description="pairs that are drawn; those that overlap are left out")
    augmentation: ViewOptions = Field(ViewOptions(), description="before patches are swapped; nothing is said of any")


def swaps(
    size: tuple[int, int], batch: int, pairs: int, patch: int, tries: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which pixels of the images are written over, and by which.

    In each image the first `pairs` of `tries` random pairs of patches that do not overlap each other change places, one
    after the other. A patch is always copied from the image as it was; where two pairs meet, the later one is seen.

    Args:
        size: (H, W) of the images; a patch lies anywhere in them.
        batch: B.
        pairs: how many change places, at most.
        patch: side of a patch.
        tries: how many are drawn.
        rng: where random numbers come from, on the CPU.

    Returns:
        Two times (B, P) integer, places in the flattened image: of the pixels, and of those whose values they take. A
        pixel that is listed more than once takes the same value each time.
    """
    height, width = size
    free = torch.tensor([height - patch + 1, width - patch + 1])
    corners = (torch.rand(batch, tries, 2, 2, generator=rng, dtype=torch.float64) * free).long()  # pair, row and column
    apart = ((corners[:, :, 0] - corners[:, :, 1]).abs() >= patch).any(-1)  # (B, tries)
    chosen = apart & (apart.cumsum(1) <= pairs)
    # Those chosen come last and in order; before them come some that stay in place, if tries were too few.
    kept = chosen.int().argsort(dim=1, stable=True)[:, -pairs:]
    chosen, corners = chosen.gather(1, kept), corners.take_along_dim(kept[:, :, None, None], 1)
    steps = torch.arange(patch)
    window = (steps[:, None] * width + steps).flatten()
    here = (corners[..., 0] * width + corners[..., 1])[..., None] + window  # (B, pairs, 2, patch * patch)
    there = torch.where(chosen[..., None, None], here.flip(2), here)
    here, there = here.flatten(1), there.flatten(1)
    order = torch.arange(here.shape[1], dtype=torch.int32).expand_as(here)
    last = torch.zeros(batch, height * width, dtype=torch.int32).scatter_reduce(1, here, order, "amax")
    return here, there.gather(1, last.gather(1, here).long())


def rearranged(images: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Images `(B, C, H, W)` with the pixels `there` `(B, P)` copied to `here` `(B, P)`, all channels alike."""
    flat = images.flatten(2)
    here, there = (places[:, None].expand(-1, images.shape[1], -1) for places in (here, there))
    return flat.scatter(2, here, flat.gather(2, there)).view_as(images)


class Network(Stage):
    """Trains encoder and decoder; the convolution that makes an image of the last feature map is dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        blocks = tuple(f"decoder.{block}" for block in range(network.blocks))
        super().__init__(network, pool, options, trained=("encoder", *blocks))
        height, width = pool.store.plan.options.size
        if min(height, width) < options.patch or max(height, width) < 2 * options.patch:
            raise GlocalError(
                f"Two patches of {options.patch} x {options.patch} pixels do not fit beside each other into slices of "
                f"{height} x {width}: lower patch."
            )
        self.painter = nn.Conv2d(network.decoder_channels(network.blocks), network.in_channels, 3, padding=1)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Mean squared error of the restored slices (the L2 loss of Chen et al.)."""
        o: Options = self.options
        slices = self.pool.uniform(o.batch, generator(o.seed, step, "slices"))
        own = share(len(slices))
        images = self.view(o.augmentation, self.pool.images(slices[own]), step, 0, len(slices))
        height, width = images.shape[2:]
        rng = generator(o.seed, step, "swaps")
        places = swaps((height, width), len(slices), o.pairs, o.patch, o.tries, rng)
        features = self.network.encode(rearranged(images, *(moved(place[own], images.device) for place in places)))
        restored = self.painter(self.network.decode(features, self.network.blocks))[..., :height, :width]
        error = (restored.to(images.dtype) - images).square().mean((1, 2, 3))
        return {"loss": whole(error, len(slices)).mean()}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("network", Network)]


CONTEXT_RESTORATION = Method(
    paper="L. Chen et al.: Self-supervised learning for medical image analysis using image context restoration. "
    "Medical Image Analysis 58, 2019.",
    summary="put patches of the slice back that have changed places",
    version=1,
    options=Options,
    stages=_stages,
)
