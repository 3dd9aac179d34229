"""Global and local contrastive learning with anatomical partitions (Chaitanya et al., NeurIPS 2020).

Stage 1 trains the encoder: slices of one partition of the volumes attract each other, other partitions repel.
Stage 2 freezes it and trains the first decoder blocks: a region attracts the same region of the other view.
"""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
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
from glocal.pretraining.base import Method, Stage
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """Defaults as paper and code have them; the proposed method is G^D with L^R."""

    method: Literal["gcl"] = "gcl"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1, description="optimiser steps of each stage")
    temperature: float = Field(0.1, gt=0)
    # Stage 1
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
    # Stage 2
    local: Literal["none", "random", "D"] = Field("random", description="no stage 2, L^R or L^D")
    local_batch: int = Field(10, ge=1, description="L^R: slices per step")
    blocks: int = Field(3, ge=1, description="l: decoder blocks that are trained")
    regions: Literal[9, 13] = Field(13, description="A: regions per feature map")
    kernel: Literal[1, 3] = Field(3, description="K: side of a region")
    projection: bool = Field(True, description="K = 3: one shared linear layer after flattening, as the code")
    negatives: Literal["neighbours", "all"] = Field("neighbours", description="the code's list, or the paper's text")
    frozen_batch_norm: Literal["eval", "train"] = Field("eval", description="of the frozen encoder; train as the code")


class Global(Stage):
    """Stage 1: encoder and g1."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self._refuse_impossible()
        channels, height, width = self.bottleneck_size()
        self.g1 = GlobalHead(channels * height * width, options.hidden, options.outputs)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 1 and 2."""
        o: Options = self.options
        slices = self._slices(generator(o.seed, step, "slices"))
        images = self.pool.images(slices[share(len(slices))])
        roles = self._roles()  # 0 is the untransformed slice
        inputs = [self.view(o.augmentation, images, step, role, len(slices)) if role else images for role in roles]
        embeddings = whole(self.g1(self.network.encode(torch.cat(inputs))[-1]), len(slices))

        image = torch.arange(len(slices)).repeat(len(roles))
        original = (torch.tensor(roles) == 0).repeat_interleave(len(slices))
        volume = slices.volume.repeat(len(roles))
        partition = partition_of(slices.number, slices.count, o.partitions).repeat(len(roles))
        if o.strategy == "random":
            masks = g_random(image)
        elif o.strategy == "D-":
            masks = g_d_minus(image, partition)
        else:
            masks = g_d(image, volume, partition, original)
        self.watch(embeddings)
        return {"loss": contrastive_loss(embeddings, *masks, o.temperature, denominator="one")}

    def _refuse_impossible(self) -> None:
        """Without anything to attract, or anything to repel, the loss is 0 whatever the weights."""
        o: Options = self.options
        across = o.strategy == "D" and min(o.volumes, len(self.pool.volumes)) > 1
        if len(self._roles()) < 2 and not across:
            raise GlocalError("Each slice would be seen once, so that nothing attracts it: set views=2.")
        if o.strategy != "random" and min(o.partitions, int(self.pool.store.count_of[self.pool.slices].max())) < 2:
            raise GlocalError(
                f"strategy={o.strategy} needs two partitions or more, and a volume of two slices or more, to have "
                "anything to repel: raise partitions, or set strategy=random."
            )

    def _slices(self, rng: torch.Generator) -> Slices:
        o: Options = self.options
        if o.strategy == "random":
            return self.pool.uniform(o.batch, rng)
        return self.pool.partitioned(o.volumes, o.partitions, rng)

    def _roles(self) -> list[int]:
        o: Options = self.options
        views = o.views if o.views != "auto" else (1 if o.strategy == "D" else 2)
        return list(range(0 if o.originals and o.strategy != "random" else 1, views + 1))


class Local(Stage):
    """Stage 2: the first l decoder blocks and g2, on top of the frozen encoder."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        blocks = tuple(f"decoder.{block}" for block in range(options.blocks))
        frozen = ("encoder",) if options.frozen_batch_norm == "eval" else ()
        super().__init__(network, pool, options, trained=blocks, frozen=frozen)
        channels = network.decoder_channels(options.blocks)
        _, height, width = (side * 2**options.blocks for side in self.bottleneck_size())
        self.positions = region_positions(height, width, options.regions, options.kernel, options.negatives)
        self.g2 = DenseHead(channels)
        wide = options.kernel**2 * channels
        projected = options.kernel == 3 and options.projection
        self.projection = nn.Linear(wide, 128, bias=False) if projected else nn.Identity()

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 3 and 4."""
        o: Options = self.options
        rng = generator(o.seed, step, "slices")
        slices = (
            self.pool.uniform(o.local_batch, rng)
            if o.local == "random"
            else self.pool.partitioned(o.volumes, o.partitions, rng)
        )
        images = self.pool.images(slices[share(len(slices))])
        # Intensity only: a region of one view shows the same place in the other.
        still = o.augmentation.model_copy(update={"spatial": SpatialOptions()})
        views = torch.cat([self.view(still, images, step, role, len(slices)) for role in (1, 2)])
        with torch.no_grad():
            features = self.network.encode(views)
        maps = self.g2(self.network.decode(features, o.blocks))

        vectors = whole(self.projection(region_vectors(maps, self.positions, o.kernel)), len(slices))
        positive, negative = local_masks(o.regions, o.kernel, o.negatives)
        image, volume = torch.arange(len(slices)).repeat(2), slices.volume.repeat(2)
        if o.local == "random":
            pairs = pairs_local_random(image)
        else:
            pairs = pairs_local_d(image, volume, partition_of(slices.number, slices.count, o.partitions).repeat(2))
        self.watch(vectors.flatten(0, 1))
        return {"loss": local_loss(vectors, pairs.to(maps.device), positive, negative, o.temperature)}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("global", Global), *([] if options.local == "none" else [("local", Local)])]


GCL = Method(
    paper="K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features for "
    "medical image segmentation with limited annotations. NeurIPS 2020.",
    summary="slices of one anatomical partition attract each other; then regions of one slice, in the decoder",
    version=1,
    options=Options,
    stages=_stages,
)
