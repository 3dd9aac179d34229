"""Who: every global strategy is a function that returns two boolean masks, `positive` and `negative`.

The inputs describe the N images that went through the network in one step, one number per image: the original `image`
it shows (an original and its views share one id, two draws of one slice do not), its `volume`, its `partition`, its
`position`. Row i of a mask belongs to anchor i. The masks are symmetric and their diagonal is False.
"""

from typing import Literal

import torch
from torch import Tensor

Masks = tuple[Tensor, Tensor]


def same_label(label: Tensor) -> Masks:
    """Everything with the anchor's label attracts, everything else repels (SupCon: Khosla et al. 2020, Eq. 2).

    With the partition as label and the ``all`` denominator, this is "GCL" as Zeng et al. 2021 (PCL) compare with it.

    Args:
        label: (N,) any integer.

    Returns:
        positive and negative, (N, N) bool.
    """
    same = _same(label)
    return same & ~_self(label), ~same


def g_random(image: Tensor) -> Masks:
    """G^R: the other views of one image attract, all else repels (Chaitanya et al. 2020; SimCLR, Chen et al. 2020).

    With two views per image the denominators ``one`` and ``all`` give the same loss.

    Args:
        image: (N,) id of the original image.

    Returns:
        positive and negative, (N, N) bool.
    """
    return same_label(image)


def g_d_minus(image: Tensor, partition: Tensor) -> Masks:
    """G^D-: an image and its views attract, all images of other partitions repel (Chaitanya et al. 2020, Eq. 2).

    Other images of the anchor's own partition are neither. Denominator ``one``.

    Args:
        image: (N,) id of the original image.
        partition: (N,) partition of its volume that the image comes from.

    Returns:
        positive and negative, (N, N) bool.
    """
    return _same(image) & ~_self(image), ~_same(partition)


def g_d(image: Tensor, volume: Tensor, partition: Tensor, original: Tensor) -> Masks:
    """G^D: as G^D-, and images of one partition of different volumes attract too (Chaitanya et al. 2020, Eq. 2).

    Across volumes the paper pairs original with original and view with view, every view being a transformation of its
    own; not original with view: such a pair, of one partition, is neither. Denominator ``one``.

    Args:
        image: (N,) id of the original image.
        volume: (N,) id of the volume the image comes from.
        partition: (N,) partition of its volume that the image comes from.
        original: (N,) bool, True for an untransformed original, False for a view.

    Returns:
        positive and negative, (N, N) bool.
    """
    positive, negative = g_d_minus(image, partition)
    return positive | (_same(partition) & ~_same(volume) & _same(original)), negative


def positional(image: Tensor, position: Tensor, threshold: float) -> Masks:
    """PCL: slices nearer than a threshold attract, all others repel (Zeng et al. 2021). Denominator ``all``.

    Other views of the anchor's own slice attract at any threshold; with threshold 0 this is SimCLR.

    Args:
        image: (N,) id of the original image.
        position: (N,) float64 relative place of the slice in its volume, see `position_of`.
        threshold: t of |p_i - p_j| < t, in the unit of the positions; the comparison is strict, in float64.

    Returns:
        positive and negative, (N, N) bool.
    """
    position = position.double()  # 0.3 - 0.2 < 0.1 holds in float64 and not in float32
    near = ((position[:, None] - position).abs() < threshold) | _same(image)
    return near & ~_self(image), ~near


def position_of(slice_index: Tensor, count: Tensor | int, convention: Literal["pcl", "centre"] = "pcl") -> Tensor:
    """Relative place of slices in their volumes: (i + 1) / n as PCL's code, or (i + 1/2) / n, the centre of the slice.

    Args:
        slice_index: (N,) i, counted from 0.
        count: (N,) or one number, n, the slices of the volume.
        convention: ``pcl`` or ``centre``.

    Returns:
        (N,) float64 in (0, 1].
    """
    return (slice_index.double() + (1.0 if convention == "pcl" else 0.5)) / count


def partition_of(slice_index: Tensor, count: Tensor | int, partitions: int) -> Tensor:
    """Partition of slices, floor(i S / n): S equal parts that cover all slices (Chaitanya et al. 2020).

    Args:
        slice_index: (N,) i, counted from 0.
        count: (N,) or one number, n, the slices of the volume; may be less than S.
        partitions: S.

    Returns:
        (N,) integer in 0 .. S - 1.
    """
    return slice_index * partitions // count


def pcl_partition(slice_index: Tensor, count: Tensor | int, partitions: int = 4) -> Tensor:
    """Partition of slices as in PCL's own "GCL": parts of round(n / S) slices, the last takes what is left.

    Args:
        slice_index: (N,) i, counted from 0.
        count: (N,) or one number, n, the slices of the volume.
        partitions: S.

    Returns:
        (N,) integer in 0 .. S - 1 (PCL's code counts from 1).
    """
    width = torch.as_tensor((2 * count + partitions) // (2 * partitions)).clamp_min(1)  # half a slice rounds up
    return (slice_index // width).clamp_max(partitions - 1)


def on_lattice(threshold: float, count: Tensor) -> Tensor:
    """Whether a threshold is a whole number of slices in a volume, so that rounding decides which slices are near.

    Args:
        threshold: t of `positional`.
        count: (V,) slices of the volumes.

    Returns:
        (V,) bool; worth a warning where True (t = 0.1 with 10 slices).
    """
    steps = threshold * count.double()
    return (steps - steps.round()).abs() < 1e-9


def _same(label: Tensor) -> Tensor:
    return label[:, None] == label


def _self(label: Tensor) -> Tensor:
    return torch.eye(len(label), dtype=torch.bool, device=label.device)
