"""Global and local contrastive learning with anatomical partitions (Chaitanya et al., NeurIPS 2020).

Stage 1 trains the encoder: slices of one partition of the volumes attract each other, other partitions repel.
Stage 2 freezes it and trains the first decoder blocks: a region attracts the same region of the other view. With one
stage (an ablation of the paper) both losses train encoder and decoder blocks together.
"""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import g_d, g_d_minus, g_random, partition_of
from glocal.contrast.regions import (
    local_loss,
    local_masks,
    pairs_local_d,
    pairs_local_random,
    region_positions,
    region_vectors,
)
from glocal.data.sampling import Pool, Slices
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import DenseHead, GlobalHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

# Two layers of 3200 and 128; regions repel all others, unprojected; forty images a step in the second stage, too.
PAPER = {"hidden": 3200, "negatives": "all", "projection": False, "local_batch": 20}


class Options(TrainingOptions):
    """Defaults as paper and code have them; the proposed method is G^D with L^R."""

    method: Literal["gcl"] = "gcl"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1, description="optimiser steps of each stage")
    temperature: float = Field(0.1, gt=0)
    stages: Literal[1, 2] = Field(2, description="1: both losses at once, L_g + lambda2 L_l, with nothing frozen")
    lambda2: float = Field(100.0, gt=0, description="stages=1: weight of L_l; 1, 10, 100 and 1000 in the paper")
    # L_g: stage 1
    strategy: Literal["random", "D-", "D"] = Field("D", description="G^R, G^D- or G^D")
    batch: int = Field(20, ge=2, description="G^R: slices per step")
    volumes: int = Field(5, ge=1, description="m: volumes per step, G^D-, G^D and L^D")
    partitions: int = Field(4, ge=1, description="S: partitions of a volume")
    originals: bool = Field(True, description="G^D-, G^D: the untransformed slices are network inputs too")
    views: PositiveInt | Literal["auto"] = Field(
        "auto", description="transformed versions of each slice: 2, with G^D 1"
    )
    hidden: int = Field(1024, ge=1, description="hidden width of g1")
    outputs: int = Field(128, ge=1, description="width of the embedding")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(crop=(0.52, 0.52)),
        intensity=IntensityOptions(brightness=0.3, contrast=0.3, clip=(0.0, 1.5)),
    )
    # L_l: stage 2
    local: Literal["none", "random", "D"] = Field("random", description="no stage 2, L^R or L^D")
    local_batch: int = Field(10, ge=1, description="L^R: slices per step")
    blocks: int = Field(3, ge=1, description="l: decoder blocks that are trained")
    regions: Literal[9, 13] = Field(13, description="A: regions per feature map")
    kernel: Literal[1, 3] = Field(3, description="K: side of a region")
    projection: bool = Field(True, description="K = 3: one shared linear layer after flattening, as the code")
    negatives: Literal["neighbours", "all"] = Field("neighbours", description="the code's list, or the paper's text")
    frozen_batch_norm: Literal["eval", "train"] = Field("eval", description="of the frozen encoder; train as the code")

    _preset = presets({"paper": PAPER})

    @model_validator(mode="after")
    def _one_stage_has_both_losses(self) -> "Options":
        if self.stages == 1 and self.local == "none":
            raise ValueError("stages=1 trains with both losses at once, and local=none leaves one: set stages=2")
        return self


class Global(Stage):
    """Stage 1: encoder and g1."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.g1 = global_head(self)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_g, Eq. 1 and 2."""
        loss, embeddings = global_contrast(self, step)
        self.watch(embeddings)
        return {"loss": loss}


class Local(Stage):
    """Stage 2: the first l decoder blocks and g2, on top of the frozen encoder."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        frozen = ("encoder",) if options.frozen_batch_norm == "eval" else ()
        super().__init__(network, pool, options, trained=blocks_of(options), frozen=frozen)
        self.g2, self.projection, self.positions = local_head(self)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_l, Eq. 3 and 4."""
        loss, vectors = local_contrast(self, step)
        self.watch(vectors)
        return {"loss": loss}


class Joint(Stage):
    """Both losses at once: encoder, the first l decoder blocks, g1 and g2."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder", *blocks_of(options)))
        self.g1 = global_head(self)
        self.g2, self.projection, self.positions = local_head(self)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_g + lambda L_l, each of slices and views of its own."""
        global_, embeddings = global_contrast(self, step)
        local, vectors = local_contrast(self, step, "joint")
        self.watch(embeddings, vectors)
        return {"loss": global_ + self.options.lambda2 * local, "L_g": global_, "L_l": local}


def blocks_of(options: Options) -> tuple[str, ...]:
    """The first l decoder blocks."""
    return tuple(f"decoder.{block}" for block in range(options.blocks))


def global_head(stage: Stage) -> GlobalHead:
    """g1 for the bottleneck of a stage's network.

    Raises:
        GlocalError: nothing attracts, or nothing repels, so that the loss is 0 whatever the weights; or views lose half
            of a z-scored image.
    """
    o: Options = stage.options
    clip = o.augmentation.intensity.clip
    if clip is not None and clip[0] >= 0 and stage.pool.store.plan.options.intensity == "zscore":
        raise GlocalError(
            f"augmentation.intensity.clip=[{clip[0]:g}, {clip[1]:g}] would blacken all that is below the mean, because "
            "the images of this store are z-scored: set augmentation.intensity.clip=null, or preprocess with "
            "intensity=percentile."
        )
    if o.strategy == "random" and len(stage.pool) < 2:
        raise GlocalError("strategy=random tells slices apart, and there is only one here: add volumes.")
    across = o.strategy == "D" and min(o.volumes, len(stage.pool.volumes)) > 1
    if len(roles(o)) < 2 and not across:
        raise GlocalError("Each slice would be seen once, so that nothing attracts it: set views=2.")
    if o.strategy != "random" and min(o.partitions, int(stage.pool.store.count_of[stage.pool.slices].max())) < 2:
        raise GlocalError(
            f"strategy={o.strategy} needs two partitions or more, and a volume of two slices or more, to have "
            "anything to repel: raise partitions, or set strategy=random."
        )
    channels, height, width = stage.bottleneck_size()
    return GlobalHead(channels * height * width, o.hidden, o.outputs)


def roles(o: Options) -> list[int]:
    """The versions of each slice that L_g sees; 0 is the untransformed slice."""
    views = o.views if o.views != "auto" else (1 if o.strategy == "D" else 2)
    return list(range(0 if o.originals and o.strategy != "random" else 1, views + 1))


def global_contrast(stage: Any, step: int) -> tuple[Tensor, Tensor]:
    """L_g of a batch of its own (Eq. 1 and 2), and the embeddings `(N, outputs)`."""
    o: Options = stage.options
    rng = generator(o.seed, step, "slices")
    slices = drawn(stage.pool, o.batch if o.strategy == "random" else None, o, rng)
    images = stage.pool.images(slices[share(len(slices))])
    versions = roles(o)
    inputs = [stage.view(o.augmentation, images, step, role, len(slices)) if role else images for role in versions]
    embeddings = whole(stage.g1(stage.network.encode(torch.cat(inputs))[-1]), len(slices))

    image = torch.arange(len(slices)).repeat(len(versions))
    original = (torch.tensor(versions) == 0).repeat_interleave(len(slices))
    volume = slices.volume.repeat(len(versions))
    partition = partition_of(slices.number, slices.count, o.partitions).repeat(len(versions))
    if o.strategy == "random":
        masks = g_random(image)
    elif o.strategy == "D-":
        masks = g_d_minus(image, partition)
    else:
        masks = g_d(image, volume, partition, original)
    return contrastive_loss(embeddings, *masks, o.temperature, denominator="one"), embeddings


def drawn(pool: Pool, batch: int | None, o: Options, rng: torch.Generator) -> Slices:
    """`batch` slices of all, or one of every partition of m volumes."""
    return pool.partitioned(o.volumes, o.partitions, rng) if batch is None else pool.uniform(batch, rng)


def local_head(stage: Stage) -> tuple[DenseHead, nn.Module, Tensor]:
    """g2 for the map after l decoder blocks, what projects its regions, and where they are."""
    o: Options = stage.options
    channels = stage.network.decoder_channels(o.blocks)
    # Only where the map shows the image, whose sides may have been padded: regions of padding would all be alike.
    sides = stage.pool.store.plan.options.size
    height, width = (-(-side * 2**o.blocks // stage.network.multiple) for side in sides)
    positions = region_positions(height, width, o.regions, o.kernel, o.negatives)
    g2 = DenseHead(channels)
    projected = o.kernel == 3 and o.projection
    return g2, nn.Linear(o.kernel**2 * channels, 128, bias=False) if projected else nn.Identity(), positions


def local_contrast(stage: Any, step: int, *keys: str) -> tuple[Tensor, Tensor]:
    """L_l of a batch of its own (Eq. 3 and 4), and the region vectors `(N, C)`; other `keys`, other draws."""
    o: Options = stage.options
    rng = generator(o.seed, step, "slices", *keys)
    slices = drawn(stage.pool, o.local_batch if o.local == "random" else None, o, rng)
    images = stage.pool.images(slices[share(len(slices))])
    # Intensity only: a region of one view shows the same place in the other.
    still = o.augmentation.model_copy(update={"spatial": SpatialOptions()})
    views = torch.cat([stage.view(still, images, step, role, len(slices), *keys) for role in (1, 2)])
    with torch.set_grad_enabled("encoder" in stage.trained and torch.is_grad_enabled()):
        features = stage.network.encode(views)
    maps = stage.g2(stage.network.decode(features, o.blocks))

    vectors = whole(stage.projection(region_vectors(maps, stage.positions, o.kernel)), len(slices))
    positive, negative = local_masks(o.regions, o.kernel, o.negatives)
    image, volume = torch.arange(len(slices)).repeat(2), slices.volume.repeat(2)
    if o.local == "random":
        pairs = pairs_local_random(image)
    else:
        pairs = pairs_local_d(image, volume, partition_of(slices.number, slices.count, o.partitions).repeat(2))
    loss = local_loss(vectors, pairs.to(maps.device), positive, negative, o.temperature)
    return loss, vectors.flatten(0, 1)


def _stages(options: Any) -> list[tuple[str, Any]]:
    if options.stages == 1:
        return [("joint", Joint)]
    return [("global", Global), *([] if options.local == "none" else [("local", Local)])]


GCL = Method(
    paper="K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features for "
    "medical image segmentation with limited annotations. NeurIPS 2020.",
    summary="slices of one anatomical partition attract each other; then regions of one slice, in the decoder",
    version=2,
    options=Options,
    stages=_stages,
)
