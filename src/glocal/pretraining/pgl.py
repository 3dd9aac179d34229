"""PGL: where two views of a slice overlap, their maps are made to agree, place by place (Xie et al., 2020).

BYOL on maps: the online network predicts what a slow copy of it, the target, makes of the other view. As the two views'
transformations are known, both maps are read on one grid over what the views share; crops, turns and mirrorings undone.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.contrast.losses import unit
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import DenseHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.teacher import Teacher, rising
from glocal.views.correspondence import interpolated, overlap_grid
from glocal.views.intensity import IntensityOptions
from glocal.views.ranges import moved
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions, draw_view


class Options(TrainingOptions):
    """LARS, its learning rate and the momentum as PXG (Zhang & Zhang 2022) reports them; the views are PXG's."""

    method: Literal["pgl"] = "pgl"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "lars"
    learning_rate: float = Field(0.2, gt=0)
    weight_decay: float = Field(1.5e-6, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1, description="slices per step; each is seen in two views")
    momentum: float = Field(0.996, ge=0, le=1, description="how slowly the target follows, rising to 1")
    outputs: int = Field(128, ge=1, description="width of the embedding of a cell, and of the predictor")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=30, crop=(0.55, 1.0), flip=(0.5, 0.5)),  # 0.3 of the area or more
        intensity=IntensityOptions(contrast=0.3, gamma=(0.7, 1.5)),
    )


def consistency(online: Tensor, target: Tensor, shown: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(online, target) over the places that both views show, of all slices together.

    Args:
        online: (B, C, P) predictions at P places of each slice.
        target: (B, C, P) projections of the other view at the same places.
        shown: (B, P) bool, whether both views show the place.

    Returns:
        Scalar in [0, 4], in float32 or finer; 0 with gradients of 0 if no place is shown.
    """
    distance = 2 - 2 * (unit(online.mT) * unit(target.mT)).sum(-1)  # (B, P)
    return (distance * shown.to(distance)).sum() / shown.sum().clamp_min(1)


class Encoder(Stage):
    """Trains the encoder; projector, predictor and target are dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.projector = DenseHead(network.encoder_channels[-1], options.outputs)
        self.predictor = DenseHead(options.outputs)
        self.target = Teacher(self.network, self.projector)

    def losses(self, step: int) -> dict[str, Tensor]:
        """The local consistency, of either view's prediction with the target's projection of the other."""
        o: Options = self.options
        if step:  # the update that ends the step before
            self.target.follow((self.network, self.projector), rising(o.momentum, step - 1, o.max_iterations))
        slices = self.pool.epoch(o.batch, o.seed, step)
        batch, own = len(slices), share(len(slices))
        images = self.pool.images(slices[own])
        size = (images.shape[-2], images.shape[-1])
        draws = [draw_view(o.augmentation, batch, size, generator(o.seed, step, "view", role)) for role in range(2)]
        *points, shown = overlap_grid(draws[0].spatial, draws[1].spatial, size, self.network.multiple)
        views = torch.cat([draw[own].image(images) for draw in draws])
        places = moved(torch.cat([some[own] for some in points]), views.device)

        online = self.predictor(self.projector(self.network.encode(views)[-1]))  # (2b, outputs, h, w)
        self.watch(online.flatten(2).mT.flatten(0, 1))
        online = whole(interpolated(online, places), batch)  # (2B, outputs, P)
        with torch.no_grad():
            target = whole(interpolated(self._projected(views), places), batch)
        loss = consistency(online, target.roll(batch, 0), moved(shown.repeat(2, 1), views.device))
        return {"loss": loss}

    def _projected(self, images: Tensor) -> Tensor:
        network: Any
        network, projector = self.target
        projected: Tensor = projector(network.encode(images)[-1])
        return projected


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


PGL = Method(
    paper="Y. Xie, J. Zhang, Z. Liao, Y. Xia, C. Shen: PGL: Prior-guided local self-supervised learning for 3D medical "
    "image segmentation. arXiv:2011.12640, 2020.",
    summary="where two views of a slice overlap, one predicts the map that a slow copy makes of the other",
    version=1,
    options=Options,
    stages=_stages,
)
