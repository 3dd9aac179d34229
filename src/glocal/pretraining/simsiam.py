"""SimSiam: one view of a slice predicts the other, which is held still; nothing repels (Chen & He, CVPR 2021)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.contrast.losses import unit
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import NormedHead, Predictor
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """The paper's symbols and defaults."""

    method: Literal["simsiam"] = "simsiam"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "sgd"
    learning_rate: float = Field(
        0.05 * 32 / 256, gt=0, description="the paper's 0.05 for 256 slices, in proportion: another batch, another rate"
    )
    weight_decay: float = Field(1e-4, ge=0)
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1, description="slices per step; each is seen in two views")
    outputs: int = Field(2048, ge=1, description="width of the projector f and of the embedding")
    hidden: int = Field(512, ge=1, description="hidden width of the predictor h, narrower than the embedding")
    augmentation: ViewOptions = AUGMENTATION

    _preset = presets({"paper": {"batch": 256, "learning_rate": 0.05}})  # slices that this rate is for


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z), Eq. 1 and 3: minus the mean cosine; z gets no gradient.

    Args:
        p: (N, C) predictions.
        z: (N, C) embeddings that they should meet.

    Returns:
        Scalar in [-1, 1], in float32 or finer.
    """
    return -(unit(p) * unit(z.detach())).sum(-1).mean()


class Encoder(Stage):
    """Trains the encoder; projector and predictor are dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.head = NormedHead(network.encoder_channels[-1], options.outputs, options.outputs, layers=3, normed=True)
        self.predictor = Predictor(options.outputs, options.hidden)
        self.steady = {"predictor": options.learning_rate}  # it has to follow what it predicts to the end

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 4: each view predicts the other."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        views = [self.view(o.augmentation, images, step, role, len(slices)) for role in range(2)]
        z = self.head(self.network.encode(torch.cat(views))[-1])  # (2b, outputs)
        p = whole(self.predictor(z), len(slices))
        z = whole(z.detach(), len(slices))
        (p1, p2), (z1, z2) = p.chunk(2), z.chunk(2)
        self.watch(z)
        return {"loss": negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


SIMSIAM = Method(
    paper="X. Chen, K. He: Exploring simple Siamese representation learning. CVPR 2021.",
    summary="one view of a slice predicts the other; nothing repels",
    version=1,
    options=Options,
    stages=_stages,
)
