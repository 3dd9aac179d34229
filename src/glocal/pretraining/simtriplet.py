"""SimTriplet: a view of a slice predicts another view of it and one of the slice beside it (Liu et al., MICCAI 2021).

The paper's triplets are of patches of histological slides and the patches beside them; of volumes they are slices.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import NormedHead, Predictor
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.pretraining.simsiam import negative_cosine
from glocal.randomness import generator
from glocal.views.view import ViewOptions

ALONE = (
    "Every volume here is a single slice, so no slice has another beside it: simtriplet sees three views of each, and "
    "simsiam does the same with two."
)


class Options(TrainingOptions):
    """The paper's symbols and defaults; what its code leaves open is as in SimSiam."""

    method: Literal["simtriplet"] = "simtriplet"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "sgd"
    learning_rate: float = Field(
        0.05 * 32 / 256, gt=0, description="SimSiam's 0.05 for 256 slices, in proportion: another batch, another rate"
    )
    weight_decay: float = Field(1e-4, ge=0)
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1, description="slices per step; each is seen in two views, its neighbour in one")
    outputs: int = Field(2048, ge=1, description="width of the projector in f and of the embedding")
    hidden: int = Field(512, ge=1, description="hidden width of the predictor h, narrower than the embedding")
    augmentation: ViewOptions = AUGMENTATION


def triplet_loss(p: Sequence[Tensor], z: Sequence[Tensor]) -> Tensor:
    """½ [D(p1, z2) + D(p2, z1)] + ½ [D(p1, z3) + D(p3, z1)]; between x2 and x3 nothing (Liu et al. 2021).

    Args:
        p: three times (N, C), the predictions of x1 (a view), x2 (of its neighbour), x3 (the other view).
        z: three times (N, C), their embeddings; they get no gradient.

    Returns:
        Scalar in [-2, 2], in float32 or finer.
    """
    (p1, p2, p3), (z1, z2, z3) = p, z
    between_slices = negative_cosine(p1, z2) + negative_cosine(p2, z1)
    within_slice = negative_cosine(p1, z3) + negative_cosine(p3, z1)
    return between_slices / 2 + within_slice / 2


class Encoder(Stage):
    """Trains the encoder; projector and predictor are dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.head = NormedHead(network.encoder_channels[-1], options.outputs, options.outputs, layers=3, normed=True)
        self.predictor = Predictor(options.outputs, options.hidden)
        self.steady = {"predictor": options.learning_rate}

    def losses(self, step: int) -> dict[str, Tensor]:
        """The loss of the triplets of a batch."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        beside = self.pool.neighbours(slices, generator(o.seed, step, "neighbours"))
        own = share(len(slices))
        shown = [self.pool.images(which[own]) for which in (slices, beside, slices)]
        views = [self.view(o.augmentation, images, step, role, len(slices)) for role, images in enumerate(shown)]
        z = self.head(self.network.encode(torch.cat(views))[-1])  # (3b, outputs)
        p = whole(self.predictor(z), len(slices))
        z = whole(z.detach(), len(slices))
        self.watch(z)
        return {"loss": triplet_loss(p.chunk(3), z.chunk(3))}

    def warning(self) -> str | None:
        """Collapse, or no neighbours."""
        single = int(self.pool.store.count_of[self.pool.slices].max()) == 1
        return super().warning() or (ALONE if single else None)


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


SIMTRIPLET = Method(
    paper="Q. Liu et al.: SimTriplet: Simple triplet representation learning with a single GPU. MICCAI 2021.",
    summary="a view of a slice predicts another view of it and one of the slice beside it; nothing repels",
    version=1,
    options=Options,
    stages=_stages,
)
