"""IDEAL: places of a slice attract each other across two views, and all other places repel (Basak et al., ICASSP 2023).

Contrastive learning without pooling: every cell of the encoder's map is an embedding. Which cell of the other view
shows the same is what the features say (DenseCL: Wang et al., CVPR 2021), or the transformations of the two views.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.contrast.losses import contrastive_loss_in_chunks, unit
from glocal.contrast.pairs import Masks
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.resnet50_unet import ResNet50UNetOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.randomness import generator
from glocal.teacher import Teacher
from glocal.views.correspondence import matching_cells
from glocal.views.view import View, ViewOptions, draw_view


class Options(TrainingOptions):
    """Optimiser and learning rate are the paper's; what it does not state is as in DenseCL."""

    method: Literal["ideal"] = "ideal"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "adam"
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_iterations: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1, description="slices per step; each is seen in two views")
    momentum: float = Field(0.999, ge=0, le=1, description="m: how slowly the key encoder follows")
    temperature: float = Field(0.2, gt=0, description="tau")
    outputs: int = Field(128, ge=1, description="width of the embedding of a cell")
    correspondence: Literal["similarity", "geometry"] = Field(
        "similarity", description="the key cell with the most similar features, or the one that holds the same pixel"
    )
    own_cells: bool = Field(True, description="the other cells of the same slice repel too, not those of others alone")
    symmetric: bool = Field(False, description="both views ask and answer, at twice the cost")
    augmentation: ViewOptions = AUGMENTATION

    _preset = presets({"paper": {"network": ResNet50UNetOptions()}})


@torch.no_grad()
def most_similar(query: Tensor, key: Tensor) -> Tensor:
    """For each cell of one map the cell of the other whose features have the largest cosine (DenseCL).

    Args:
        query: (B, C, h, w) features.
        key: (B, C, h, w) features of the same slices in another view.

    Returns:
        (B, P) int64, cells of `key` counted row after row, for the P = h w cells of `query`.
    """
    with torch.autocast(query.device.type, enabled=False):  # bfloat16 would make neighbours equal
        return (unit(_cells(query)) @ unit(_cells(key)).mT).argmax(-1)


def cell_masks(match: Tensor, found: Tensor, rows: slice, own_cells: bool) -> Masks:
    """Masks of cells against all cells of all key maps: the matching one attracts, all others repel: those of L_loc.

    Args:
        match: (..., B, P) which cell of the key map of its slice matches each cell.
        found: (..., B, P) bool, False for a cell without match: nothing attracts it.
        rows: the anchors that are asked for, of the B P cells.
        own_cells: whether other cells of the anchor's slice repel, or are neither.

    Returns:
        positive and negative, (..., n, B P) bool.
    """
    slices, cells = match.shape[-2:]
    anchor = torch.arange(rows.start, rows.stop, device=match.device) // cells
    candidate = torch.arange(slices * cells, device=match.device)
    mate = anchor * cells + match.flatten(-2)[..., rows]
    positive = (mate[..., None] == candidate) & found.flatten(-2)[..., rows, None]
    return positive, ~positive if own_cells else anchor[:, None] != candidate // cells


class Encoder(Stage):
    """Trains the encoder of the queries; that of the keys is in the checkpoint only."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        channels, height, width = self.bottleneck_size()
        if min(options.batch, len(pool)) < 2 and not (options.own_cells and height * width > 1):
            raise GlocalError(
                "IDEAL needs cells that repel, and here a step has one slice without any: raise batch, add volumes, "
                "or set own_cells=true with images of several cells."
            )
        self.head = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, options.outputs, 1))
        self.key = Teacher(self.network, self.head)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_loc: the mean over all cells that have a match."""
        o: Options = self.options
        if step:  # the update that ends the step before
            self.key.follow((self.network, self.head), o.momentum)
        slices = self.pool.epoch(o.batch, o.seed, step)
        batch, own = len(slices), share(len(slices))
        images = self.pool.images(slices[own])
        size = (images.shape[-2], images.shape[-1])
        draws = [draw_view(o.augmentation, batch, size, generator(o.seed, step, "view", role)) for role in range(2)]
        ways = 2 if o.symmetric else 1
        views = [draw[own].image(images) for draw in draws]
        features, key_features = (torch.cat(some[:ways]) for some in (views, views[::-1]))

        features = self.network.encode(features)[-1]
        queries = whole(_cells(self.head(features)), batch)  # (ways * B, P, outputs)
        with torch.no_grad():
            key_features, keys = self._keys(key_features)
            keys = whole(_cells(keys), batch)
        if o.correspondence == "similarity":
            match = whole(most_similar(features, key_features), batch).cpu()
            found = torch.ones_like(match, dtype=torch.bool)
        else:
            match, found = self._same_places(draws, size, ways)
        match, found = (x.view(ways, batch, -1) for x in (match, found))
        self.watch(queries.flatten(0, 1))
        loss = contrastive_loss_in_chunks(
            queries.reshape(ways, -1, o.outputs),
            lambda rows: cell_masks(match, found, rows, o.own_cells),
            o.temperature,
            denominator="one",
            candidates=keys.reshape(ways, -1, o.outputs),
        )
        return {"loss": loss}

    def _keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and head's maps of the key encoder."""
        network: Any
        network, head = self.key
        features: Tensor = network.encode(images)[-1]
        return features, head(features)

    def _same_places(self, draws: list[View], size: tuple[int, int], ways: int) -> tuple[Tensor, Tensor]:
        """Matches of the whole batch by geometry, (ways * B, P) each; on the CPU, where the draws are."""
        first, second = (draw.spatial for draw in draws)
        pairs = [(first, second), (second, first)][:ways]
        match, found = zip(*(matching_cells(*pair, size, self.network.multiple) for pair in pairs), strict=True)
        return torch.cat(match), torch.cat(found)


def _cells(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) as their cells, row after row: (B, h w, C)."""
    return maps.flatten(2).mT


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


IDEAL = Method(
    paper="H. Basak, S. Chattopadhyay, R. Kundu, S. Nag, R. Mallipeddi: IDEAL: Improved dense local contrastive "
    "learning for semi-supervised medical image segmentation. ICASSP 2023.",
    summary="a place of a slice is told from all places of all slices, in whatever view",
    version=1,
    options=Options,
    stages=_stages,
)
