"""Rotation: by which of four right angles was a slice turned? (Gidaris et al., ICLR 2018).

A baseline of Chaitanya et al. 2020, whose code shows each slice in all four rotations and leaves all else open.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import PooledHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """Trained as Chaitanya et al. train everything: 40 images per step, Adam at a constant rate."""

    method: Literal["rotation"] = "rotation"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(10, ge=1, description="slices per step; each is seen in four rotations")
    augmentation: ViewOptions = Field(
        ViewOptions(), description="before a slice is turned; nothing, as nothing is said"
    )


def square(images: Tensor) -> Tensor:
    """The central square `(B, C, S, S)` of images `(B, C, H, W)`, S the shorter side.

    Bars that pad a slice to a square would tell how it was turned, and so would a slice of other proportions.
    """
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def turned(images: Tensor) -> Tensor:
    """All square images `(B, C, S, S)` turned by 0, then all by 90, by 180 and by 270 degrees: `(4B, C, S, S)`."""
    return torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)])


class Encoder(Stage):
    """Trains the encoder; the classifier on its averaged features is dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.classifier = PooledHead(network.encoder_channels[-1], outputs=4)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy over the four rotations, Eq. 2 and 3 of Gidaris et al.; how many were told right is logged."""
        o: Options = self.options
        slices = self.pool.uniform(o.batch, generator(o.seed, step, "slices"))
        images = self.view(o.augmentation, self.pool.images(slices[share(len(slices))]), step, 0, len(slices))
        features = self.network.encode(turned(square(images)))[-1]
        logits = whole(self.classifier(features), len(slices)).to(images.dtype)  # (4B, 4)
        turns = torch.arange(4, device=images.device).repeat_interleave(len(slices))
        return {"loss": cross_entropy(logits, turns), "accuracy": (logits.argmax(1) == turns).to(images.dtype).mean()}

    def warning(self) -> str | None:
        """Views that are turned already have no answer."""
        spatial = self.options.augmentation.spatial
        if spatial.rotation >= 45:
            return (
                f"augmentation.spatial.rotation={spatial.rotation:g} turns slices itself, so that nobody can tell by "
                "which of the right angles they were turned: keep it below 45."
            )
        if all(spatial.flip):
            return (
                "augmentation.spatial.flip mirrors slices along both axes, which is half a turn, so that nobody can "
                "tell 0 from 180 degrees: leave one of its two probabilities at 0."
            )
        return None


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


ROTATION = Method(
    paper="S. Gidaris, P. Singh, N. Komodakis: Unsupervised representation learning by predicting image rotations. "
    "ICLR 2018.",
    summary="tell by which of four right angles a slice was turned",
    version=1,
    options=Options,
    stages=_stages,
)
