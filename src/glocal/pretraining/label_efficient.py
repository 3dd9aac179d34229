"""Semi-supervised contrastive learning for label-efficient segmentation (Hu et al., MICCAI 2021).

Stage 1 is SimCLR on all slices. Stage 2 sees the labelled volumes of one draw: pixels of one structure attract each
other, in whatever slice, and all other pixels repel. So its weights serve the fine-tuning on these volumes only.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.contrast.losses import contrastive_loss_in_chunks
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.pretraining import simclr
from glocal.pretraining.base import LabelOptions, Method, Stage
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions, draw_view

INTENSITY = IntensityOptions(brightness=0.3, gamma=(0.5, 2.0), noise=0.1, probability=0.5)


class Options(LabelOptions):
    """Defaults of the paper's code, which has two learning rates: 3e-4, and 1e-4 in stage 2."""

    method: Literal["label-efficient"] = "label-efficient"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adam"
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_iterations: int = Field(10_000, ge=1, description="optimiser steps of each stage")
    outputs: int = Field(128, ge=1, description="width of the embeddings, of slices and of pixels")
    # Stage 1
    batch: int = Field(120, ge=2, description="slices per step; each is seen in two views")
    slice_temperature: float = Field(0.5, gt=0, description="tau of SimCLR")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=180, scale=(0.7, 1.25), elastic=4, probability=0.5), intensity=INTENSITY
    )
    # Stage 2
    local_batch: int = Field(4, ge=1, description="labelled slices per step; each is seen in two views")
    temperature: float = Field(0.1, gt=0, description="tau of the pixels")
    pixels: Literal["stride", "block"] = Field(
        "stride", description="every so many rows and columns of the maps, or all pixels that lie in one block"
    )
    stride: int = Field(4, ge=1)
    block: int = Field(32, ge=1, description="side of a block, in pixels")
    hidden: int = Field(256, ge=1, description="channels between the two 1 x 1 convolutions of the head")
    local_augmentation: ViewOptions = ViewOptions(intensity=INTENSITY)


def slices_of_all_volumes(network: SegmentationNetwork, pool: Pool, options: Options, labelled: Pool) -> Stage:
    """Stage 1, SimCLR as it stands: it sees no label."""
    names = ("seed", "network", "batch", "outputs", "augmentation")
    alike = {name: getattr(options, name) for name in names}
    return simclr.Encoder(network, pool, simclr.Options(**alike, temperature=options.slice_temperature))


def pixel_loss(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of pixels: SupCon with structures as classes (Hu et al. 2021).

    Every other pixel of the same structure attracts, the background among others repels; it is no anchor itself.

    Args:
        vectors: (P, C) embeddings.
        labels: (P,) integer, 0 is background.
        temperature: tau > 0.

    Returns:
        Scalar, see `contrastive_loss` with the denominator `all`.
    """
    (anchors,) = labels.nonzero(as_tuple=True)

    def masks(rows: slice) -> tuple[Tensor, Tensor]:
        same = labels[anchors[rows], None] == labels
        return same.scatter(1, anchors[rows, None], False), ~same

    return contrastive_loss_in_chunks(vectors[anchors], masks, temperature, denominator="all", candidates=vectors)


def blocks_of(maps: Tensor, labels: Tensor, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks of all maps `(B, C, H, W)` and labels `(B, H, W)` that cover them; the last ones may be smaller."""
    for top in range(0, maps.shape[2], side):
        for left in range(0, maps.shape[3], side):
            yield maps[:, :, top : top + side, left : left + side], labels[:, top : top + side, left : left + side]


class Pixels(Stage):
    """Stage 2: trains encoder and decoder on labelled slices; its head is dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options, labelled: Pool) -> None:
        blocks = tuple(f"decoder.{block}" for block in range(network.blocks))
        super().__init__(network, pool, options, trained=("encoder", *blocks))
        self.labelled = labelled
        channels = network.decoder_channels(network.blocks)
        self.head = nn.Sequential(nn.Conv2d(channels, options.hidden, 1), nn.Conv2d(options.hidden, options.outputs, 1))

    def losses(self, step: int) -> dict[str, Tensor]:
        """`pixel_loss` of all views together, or its mean over blocks: one after the other, so memory is bounded."""
        o: Options = self.options
        slices = self.labelled.uniform(o.local_batch, generator(o.seed, step, "slices"))
        batch, own = len(slices), share(len(slices))
        images, labels = self.labelled.images(slices[own]), self.labelled.labels(slices)
        size = (images.shape[-2], images.shape[-1])
        rngs = [generator(o.seed, step, "view", role) for role in range(2)]
        views = [draw_view(o.local_augmentation, batch, size, rng) for rng in rngs]

        stride = o.stride if o.pixels == "stride" else 1
        features = self.network.encode(torch.cat([view[own].image(images) for view in views]))
        maps = self.network.decode(features, self.network.blocks)[..., : size[0] : stride, : size[1] : stride]
        maps = whole(self.head(maps), batch)  # (2B, outputs, h, w)
        labels = torch.cat([view.labels(labels) for view in views])[:, ::stride, ::stride]

        parts = blocks_of(maps, labels, o.block) if o.pixels == "block" else [(maps, labels)]
        losses = [
            pixel_loss(part.movedim(1, -1).flatten(0, -2), label.flatten(), o.temperature)
            for part, label in parts
            if label.any()
        ]
        self.watch(maps[0].flatten(1).T)
        # Slices without any structure teach nothing, but several processes wait for every gradient.
        return {"loss": torch.stack(losses).mean() if losses else 0 * maps.sum()}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", slices_of_all_volumes), ("pixels", Pixels)]


LABEL_EFFICIENT = Method(
    paper="X. Hu, D. Zeng, X. Xu, Y. Shi: Semi-supervised contrastive learning for label-efficient medical image "
    "segmentation. MICCAI 2021.",
    summary="SimCLR; then, with the labels of one draw, pixels of one structure attract each other",
    version=1,
    options=Options,
    stages=_stages,
    uses_labels=True,
)
