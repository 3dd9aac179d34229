"""Local regions (Chaitanya et al. 2020): where they lie in a feature map, which repel each other, and their loss."""

from typing import Literal

import torch
from torch import Tensor

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import Masks
from glocal.errors import GlocalError

Regions = Literal[9, 13]
Kernel = Literal[1, 3]
Negatives = Literal["neighbours", "all"]

# Top-left corners, row and column in quarters of the free height and width: a 3 x 3 lattice, the quarter points, and
# four points that are negatives of the 3 x 3 windows only.
PLACES = {
    **{"TL": (0, 0), "T": (0, 2), "TR": (0, 4)},
    **{"L": (2, 0), "C": (2, 2), "R": (2, 4)},
    **{"BL": (4, 0), "B": (4, 2), "BR": (4, 4)},
    **{"NW": (1, 1), "NE": (1, 3), "SW": (3, 1), "SE": (3, 3)},
    **{"t": (1, 2), "l": (2, 1), "r": (2, 3), "b": (3, 2)},
}

# The negatives of each region, in each of the two maps, for K = 3 and K = 1: the lists behind the paper's tables (its
# text says "all other regions"). The odd ones, such as SW for TR, are the authors'.
NEIGHBOURS = """
    TL : T  NW t  L  l  : T  L  C  NW NE
    T  : TL TR NW NE C  : TL TR C  NW NE
    TR : T  t  NE r  R  : T  C  R  SW NE
    L  : TL NW C  BL SW : TL C  BL NW SW
    C  : NW NE SW SE L  : NW NE SW SE L
    R  : TR C  BR NE SE : TR C  BR NE SE
    BL : L  l  B  SW b  : L  C  B  SW NW
    B  : C  BL BR SW SE : C  BL BR SW SE
    BR : r  R  B  SE b  : C  R  B  SE SW
    NW : TL T  L  C  NE : TL T  L  C  NE
    NE : T  TR NW C  R  : T  TR C  R  SE
    SW : L  C  BL B  SE : L  C  BL T  NW
    SE : C  R  B  BR SW : C  R  B  BR NE
"""


def region_names(regions: Regions = 13, kernel: Kernel = 3, negatives: Negatives = "neighbours") -> tuple[str, ...]:
    """Names of the regions to cut out of a map: the anchors first, then those that only serve as negatives.

    Args:
        regions: A, the anchors: 9 (lattice) or 13 (lattice and quarter points).
        kernel: K, the side of a region: 1 or 3.
        negatives: ``neighbours`` (five fixed neighbours, as the code) or ``all`` (all other anchors, as the text).

    Returns:
        R names, R >= A.
    """
    used = regions if negatives == "all" else 13 if kernel == 1 else 17
    return tuple(PLACES)[:used]


def region_positions(
    height: int, width: int, regions: Regions = 13, kernel: Kernel = 3, negatives: Negatives = "neighbours"
) -> Tensor:
    """Top-left corners of the regions in a map of any height and width (Chaitanya et al. 2020, and its code).

    Args:
        height: of the feature map, in its pixels.
        width: of the feature map, in its pixels.
        regions: A, see `region_names`.
        kernel: K, see `region_names`.
        negatives: see `region_names`.

    Returns:
        (R, 2) integer, on the CPU: row, column.

    Raises:
        GlocalError: the map is so small that two regions would coincide.
    """
    names = region_names(regions, kernel, negatives)
    margin = 4 if kernel == 3 else 1  # K = 3 leaves the last row and column out, as the code does
    smallest = margin + (2 if len(names) == 9 else 4)
    if min(height, width) < smallest:
        smaller = ", or regions of 1 x 1" if kernel == 3 else ""
        raise GlocalError(
            f"The local loss meets a feature map of {height} x {width}, but {regions} regions of {kernel} x {kernel} "
            f"need at least {smallest} x {smallest}: use larger images or more decoder blocks{smaller}."
        )
    free = torch.tensor([height - margin, width - margin])
    return torch.tensor([PLACES[name] for name in names]) * free // 4


def region_vectors(maps: Tensor, positions: Tensor, kernel: int) -> Tensor:
    """The K x K windows of every map, each flattened to one vector in the order row, column, channel.

    Args:
        maps: (B, C, h, w) dense features.
        positions: (R, 2) top-left corners, see `region_positions`.
        kernel: K.

    Returns:
        (B, R, K * K * C).
    """
    step = torch.arange(kernel, device=positions.device)
    rows, columns = positions[:, :1] + step, positions[:, 1:] + step  # (R, K)
    windows = maps[:, :, rows[:, :, None], columns[:, None, :]]  # (B, C, R, K, K)
    return windows.permute(0, 2, 3, 4, 1).flatten(2)


def local_masks(regions: Regions = 13, kernel: Kernel = 3, negatives: Negatives = "neighbours") -> Masks:
    """Masks of one ordered pair of maps (u, v): anchors in u against candidates [regions of u, regions of v].

    The same region of v attracts; the neighbours, or all other anchors, of both maps repel.

    Args:
        regions: A, see `region_names`.
        kernel: K, see `region_names`.
        negatives: see `region_names`.

    Returns:
        positive and negative, (A, 2R) bool, on the CPU.
    """
    names = region_names(regions, kernel, negatives)
    same = torch.eye(regions, len(names), dtype=torch.bool)
    repelling = ~same
    if negatives == "neighbours":
        lists = _neighbours(kernel)
        repelling = torch.tensor([[other in lists[anchor] for other in names] for anchor in names[:regions]])
    return torch.cat([torch.zeros_like(same), same], 1), torch.cat([repelling, repelling], 1)


def local_loss(vectors: Tensor, pairs: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Local loss: the mean over ordered pairs of maps and their anchors (Chaitanya et al. 2020, Eq. 3 and 4).

    Args:
        vectors: (B, R, C) region vectors, see `region_vectors`.
        pairs: (P, 2) integer, ordered pairs of maps: the anchors' map, the positives' map.
        positive: (A, 2R) bool, see `local_masks`.
        negative: (A, 2R) bool, see `local_masks`.
        temperature: tau > 0.

    Returns:
        Scalar, see `contrastive_loss`.
    """
    both = vectors[pairs].flatten(1, 2)  # (P, 2R, C)
    anchors = both[:, : len(positive)]
    return contrastive_loss(anchors, positive, negative, temperature, denominator="one", candidates=both)


def pairs_local_random(image: Tensor) -> Tensor:
    """L^R: the two views of one image, in both directions (Chaitanya et al. 2020).

    Args:
        image: (B,) id of the original image of each map.

    Returns:
        (P, 2) ordered pairs of maps.
    """
    return _ordered(image[:, None] == image)


def pairs_local_d(image: Tensor, volume: Tensor, partition: Tensor) -> Tensor:
    """L^D: as L^R, and all maps of one partition of different volumes, in both directions (Chaitanya et al. 2020).

    Args:
        image: (B,) id of the original image of each map.
        volume: (B,) id of its volume.
        partition: (B,) its partition.

    Returns:
        (P, 2) ordered pairs of maps.
    """
    across = (partition[:, None] == partition) & (volume[:, None] != volume)
    return _ordered(across | (image[:, None] == image))


def _ordered(related: Tensor) -> Tensor:
    return related.fill_diagonal_(False).nonzero()


def _neighbours(kernel: Kernel) -> dict[str, list[str]]:
    rows = (line.split(":") for line in NEIGHBOURS.strip().splitlines())
    return {name.strip(): (three if kernel == 3 else one).split() for name, three, one in rows}
