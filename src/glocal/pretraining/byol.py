"""BYOL: one view of a slice predicts what a slow copy of the network makes of the other (Grill et al., NeurIPS 2020).

Nothing repels: that the copy follows slowly, and the prediction in between, keep the embeddings from collapsing.
"""

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
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.pretraining.simsiam import negative_cosine
from glocal.teacher import Teacher, rising
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """The paper's symbols and defaults; the learning rate is not divided, see its description."""

    method: Literal["byol"] = "byol"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "lars"
    learning_rate: float = Field(
        0.2, gt=0, description="the paper's 0.2 times batch / 256 would hardly move the weights in so few steps"
    )
    weight_decay: float = Field(1.5e-6, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1, description="slices per step; each is seen in two views")
    momentum: float = Field(0.996, ge=0, le=1, description="tau_base: how slowly the target follows, rising to 1")
    hidden: int = Field(4096, ge=1, description="hidden width of projector and predictor")
    outputs: int = Field(256, ge=1, description="width of the embedding")
    augmentation: ViewOptions = AUGMENTATION

    _preset = presets({"paper": {"batch": 256}})  # slices that its learning rate is for


def prediction_error(q: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos(q, z), the mean over the batch: the squared distance of unit vectors, Eq. 2; z gets no gradient.

    Args:
        q: (N, C) predictions.
        z: (N, C) projections of the target.

    Returns:
        Scalar in [0, 4], in float32 or finer.
    """
    return 2 + 2 * negative_cosine(q, z)


class Encoder(Stage):
    """Trains the encoder; heads and target are dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.head = NormedHead(network.encoder_channels[-1], options.hidden, options.outputs)
        self.predictor = Predictor(options.outputs, options.hidden)
        self.target = Teacher(self.network, self.head)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 2 for both views: each predicts the target's projection of the other."""
        o: Options = self.options
        if step:  # the update that ends the step before
            self.target.follow((self.network, self.head), rising(o.momentum, step - 1, o.max_iterations))
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        views = torch.cat([self.view(o.augmentation, images, step, role, len(slices)) for role in range(2)])
        q = whole(self.predictor(self.head(self.network.encode(views)[-1])), len(slices))  # (2B, outputs)
        with torch.no_grad():
            z = whole(self._projected(views), len(slices))
        (q1, q2), (z1, z2) = q.chunk(2), z.chunk(2)
        self.watch(q)
        return {"loss": prediction_error(q1, z2) + prediction_error(q2, z1)}

    def _projected(self, images: Tensor) -> Tensor:
        network: Any
        network, head = self.target
        projected: Tensor = head(network.encode(images)[-1])
        return projected


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


BYOL = Method(
    paper="J.-B. Grill et al.: Bootstrap your own latent: a new approach to self-supervised learning. NeurIPS 2020.",
    summary="one view of a slice predicts what a slow copy of the network makes of the other; nothing repels",
    version=1,
    options=Options,
    stages=_stages,
)
