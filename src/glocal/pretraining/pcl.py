"""PCL: positional contrastive learning (Zeng D. et al., MICCAI 2021).

Slices at nearly the same relative position of any two volumes show the same anatomy: they attract each other, all
others repel. With `labels=partition` the neighbours are those of the same quarter of the volume ("GCL" in PCL's and
JCL's tables).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import on_lattice, pcl_partition, position_of, positional, same_label
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import GlobalHead, PooledHead
from glocal.networks.pcl_unet import PCLUNetOptions
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

# The threshold is that for CHD; the factor of the loss and the warm-up are not in the text.
PAPER = {
    "network": PCLUNetOptions(),
    "learning_rate": 0.1,
    "warmup_iterations": 0,
    "threshold": 0.1,
    "scale": "none",
}


class Options(TrainingOptions):
    """Defaults as the paper and its code have them, but for a lower learning rate with warm-up (no collapse)."""

    method: Literal["pcl"] = "pcl"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd"] = "sgd"
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=2, description="slices per step; each is seen in two views")
    threshold: float = Field(
        0.11, gt=0, lt=1, description="t: positions nearer than this attract; keep off multiples of 1/n"
    )
    position: Literal["pcl", "centre"] = Field("pcl", description="(i + 1) / n as the code, or (i + 0.5) / n")
    labels: Literal["position", "partition"] = "position"
    temperature: float = Field(0.1, gt=0)
    scale: Literal["supcon", "none"] = Field("supcon", description="supcon: the loss times temperature / 0.07")
    head: Literal["pooled", "flat"] = Field("pooled", description="average pooling as in PCL, or flattening as in GCL")
    hidden: int = Field(512, ge=1, description="hidden width of the flat head")
    outputs: int = Field(512, ge=1, description="width of the embedding")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=180, scale=(0.7, 1.3), elastic=4, flip=(0.5, 0.5), probability=0.67),
        intensity=IntensityOptions(),
    )

    _preset = presets({"paper": PAPER})


class Encoder(Stage):
    """Trains the encoder on slices of all volumes."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        if int(pool.store.count_of[pool.slices].max()) < 2:
            raise GlocalError(
                "PCL compares places within volumes, and every volume here is a single slice: use gcl, strategy=random."
            )
        channels, height, width = self.bottleneck_size()
        self.head = (
            PooledHead(channels, options.outputs)
            if options.head == "pooled"
            else GlobalHead(channels * height * width, options.hidden, options.outputs)
        )

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 2 of the paper: the SupCon loss with positions instead of classes."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        views = [self.view(o.augmentation, images, step, role, len(slices)) for role in range(2)]
        embeddings = whole(self.head(self.network.encode(torch.cat(views))[-1]), len(slices))
        number, count = slices.number.repeat(2), slices.count.repeat(2)
        if o.labels == "position":
            image = torch.arange(len(slices)).repeat(2)
            positive, negative = positional(image, position_of(number, count, o.position), o.threshold)
        else:
            positive, negative = same_label(pcl_partition(number, count))
        loss = contrastive_loss(embeddings, positive, negative, o.temperature, denominator="all")
        self.watch(embeddings)
        return {"loss": loss * (o.temperature / 0.07 if o.scale == "supcon" else 1.0)}

    def warning(self) -> str | None:
        """Collapse, or a threshold whose neighbours hang on rounding."""
        o: Options = self.options
        return super().warning() or (borderline(o.threshold, self.pool) if o.labels == "position" else None)


def borderline(threshold: float, pool: Pool) -> str | None:
    """A warning where rounding decides which slices of the pool's volumes are nearer than the threshold."""
    counts = torch.unique(pool.store.count_of[pool.slices])
    hit = counts[on_lattice(threshold, counts)]
    if not len(hit):
        return None
    near = (0.9 * threshold, min(1.1 * threshold, 0.9999))
    # The last of each is a multiple of 1/10000 alone.
    choices = ((round(value, 2), round(value, 3), round(value, 3) - 0.0003) for value in near)
    less, more = (next(t for t in found if 0 < t < 1 and not on_lattice(t, counts).any()) for found in choices)
    return (
        f"threshold={threshold} is a multiple of 1/n for volumes of {int(hit[0])} slices: whether neighbours attract "
        f"hangs on rounding; take {less:g} or {more:g}."
    )


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


PCL = Method(
    paper="D. Zeng et al.: Positional contrastive learning for volumetric medical image segmentation. MICCAI 2021.",
    summary="slices at the same relative position of any volumes attract each other",
    version=1,
    options=Options,
    stages=_stages,
)
