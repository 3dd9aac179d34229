"""Inpainting: a box of the slice is set to zero, encoder and decoder restore it (Pathak et al., CVPR 2016).

A baseline of Chaitanya et al. 2020, whose code makes the boxes and leaves all else open.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.views.ranges import ShareRange, moved, uniform
from glocal.views.view import ViewOptions

Place = Literal["random", "centre"]


class Options(TrainingOptions):
    """Boxes as in the code, 100 of 192 pixels wide; trained as Chaitanya et al. train everything."""

    method: Literal["inpainting"] = "inpainting"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(40, ge=1, description="slices per step")
    side: ShareRange = Field((0.52, 0.52), description="side of the box, as a share of the image's; drawn per image")
    place: Place = Field("random", description="where the box lies")
    over: Literal["image", "box"] = Field("image", description="the error is that of the image, or of the box alone")
    augmentation: ViewOptions = Field(ViewOptions(), description="before the box is cut out; nothing is said of any")


def boxes(side: tuple[float, float], place: Place, size: tuple[int, int], batch: int, rng: torch.Generator) -> Tensor:
    """One box per image.

    Args:
        side: limits of its sides as a share of the image's; height and width have the same share.
        place: anywhere within the image, each place equally likely, or in its centre.
        size: (H, W) of the images.
        batch: B.
        rng: where random numbers come from, on the CPU.

    Returns:
        (B, 1, H, W) bool, True inside.
    """
    part, *places = torch.rand(3, batch, generator=rng, dtype=torch.float64)
    inside = []
    for length, chance in zip(size, places, strict=True):
        long = (uniform(part, side) * length).round().clamp_min(1)
        free = length - long
        first = (chance * (free + 1)).floor() if place == "random" else (free / 2).floor()
        pixels = torch.arange(length)
        inside.append((pixels >= first[:, None]) & (pixels < (first + long)[:, None]))  # (B, length)
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def restoration_error(restored: Tensor, images: Tensor, where: Tensor) -> Tensor:
    """Mean squared error of each image over the pixels `where` (Pathak et al. 2016, Eq. 1).

    Args:
        restored: (B, C, H, W).
        images: (B, C, H, W), what it should be.
        where: (B, 1, H, W) or (1, 1, 1, 1) bool.

    Returns:
        (B,), in the type of the images.
    """
    weight = where.expand_as(images).to(images.dtype)
    error = (restored.to(images.dtype) - images).square() * weight
    return error.sum((1, 2, 3)) / weight.sum((1, 2, 3))


class Network(Stage):
    """Trains encoder and decoder; the convolution that makes an image of the last feature map is dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        blocks = tuple(f"decoder.{block}" for block in range(network.blocks))
        super().__init__(network, pool, options, trained=("encoder", *blocks))
        self.painter = nn.Conv2d(network.decoder_channels(network.blocks), network.in_channels, 3, padding=1)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Mean over the slices of `restoration_error`."""
        o: Options = self.options
        slices = self.pool.uniform(o.batch, generator(o.seed, step, "slices"))
        own = share(len(slices))
        images = self.view(o.augmentation, self.pool.images(slices[own]), step, 0, len(slices))
        height, width = images.shape[2:]
        box = boxes(o.side, o.place, (height, width), len(slices), generator(o.seed, step, "boxes"))
        box = moved(box[own], images.device)
        features = self.network.encode(images.masked_fill(box, 0))
        restored = self.painter(self.network.decode(features, self.network.blocks))[..., :height, :width]
        error = restoration_error(restored, images, box if o.over == "box" else box.new_ones(1, 1, 1, 1))
        return {"loss": whole(error, len(slices)).mean()}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("network", Network)]


INPAINTING = Method(
    paper="D. Pathak, P. Krahenbuhl, J. Donahue, T. Darrell, A. A. Efros: Context encoders: feature learning by "
    "inpainting. CVPR 2016.",
    summary="restore a box of the slice that was set to zero",
    version=1,
    options=Options,
    stages=_stages,
)
