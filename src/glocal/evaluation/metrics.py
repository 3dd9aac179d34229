"""Overlap and surface distance of two label maps, class by class, with a defined value where a class is absent.

The surface of an object is the set of its voxels with at least one of the six face neighbours outside it; beyond the
image everything counts as outside. Distances run between the centres of surface voxels, in millimetres, and agree with
MONAI's `compute_hausdorff_distance`, `compute_average_surface_distance(symmetric=True)` and `compute_surface_dice`.
A volume of one slice is measured as the two-dimensional image it is: its slice axis has no neighbours to be outside.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from glocal.errors import GlocalError

VERSION = 1  # raised by hand when the same masks give other figures (see `runs.identity`)
OVERLAPS = ("dice", "iou")
DISTANCES = ("hd95", "hd", "assd")
METRICS = (*OVERLAPS, *DISTANCES, "nsd")
EMPTY_POLICY = (
    "A class absent from both masks scores Dice 1 and distance 0; one that was missed or invented, or whose case has "
    "no prediction, scores Dice 0 and the image diagonal as distance."
)

_UNITS_OF_ROUNDING = 1e-6  # mm: a distance that equals the tolerance is within it, whatever the last bits say

Mask = NDArray[np.bool_]
Labels = NDArray[np.integer]
Row = dict[str, str | int | float]


def dice(prediction: NDArray[np.generic], truth: NDArray[np.generic]) -> float:
    """Dice's coefficient of two masks of equal shape, `2 |P ∩ T| / (|P| + |T|)`; 1 where both are empty."""
    predicted, expected = prediction.astype(bool, copy=False), truth.astype(bool, copy=False)
    total = np.count_nonzero(predicted) + np.count_nonzero(expected)
    return 2 * np.count_nonzero(predicted & expected) / total if total else 1.0


def case_metrics(
    prediction: Labels,
    truth: Labels,
    labels: Mapping[str, int],
    spacing: tuple[float, float, float] | None,
    tolerance: float = 1.0,
) -> list[Row]:
    """Measure one case: one row per class, in the order of `labels`.

    Args:
        prediction: label map `(z, y, x)`.
        truth: label map of the same shape.
        labels: class name to label value, foreground only.
        spacing: voxel size in mm, (x, y, z); None where it is unknown, then everything in mm is NaN.
        tolerance: how far apart in mm two surfaces may be and still agree, for the Surface Dice (`nsd`; Nikolov et al.,
            arXiv:1809.04430, with surface voxels counted instead of areas, as in Seidlitz et al., arXiv:2111.05408).

    Returns:
        Rows of class, dice, iou, hd95 (larger 95th percentile of the two directions), hd, assd (mean over the surface
        voxels of both), nsd, truth_voxels, predicted_voxels, and a note: empty, 'absent from both', 'missed' or
        'invented'. Absent from both: Dice, IoU, NSD 1 and distances 0. Missed or invented: Dice, IoU, NSD 0 and
        distances the image diagonal, so that a lost organ can never improve a mean.

    Raises:
        GlocalError: the two label maps differ in shape.
    """
    if prediction.shape != truth.shape:
        raise GlocalError(
            f"The prediction has shape {prediction.shape} and the label map {truth.shape} (z, y, x): "
            "predict in the geometry of the original image."
        )
    highest = max(labels.values(), default=0)
    boxes = [find_objects(array, highest) for array in (prediction, truth)]
    rows = []
    for name, value in labels.items():
        box = _union([found[value - 1] for found in boxes])
        masks = prediction[box] == value, truth[box] == value
        rows.append({"class": name, **_class_metrics(*masks, truth.shape, spacing, tolerance)})
    return rows


def worst_metrics(
    truth: Labels, labels: Mapping[str, int], spacing: tuple[float, float, float] | None, note: str
) -> list[Row]:
    """The rows of a case without a prediction: every class scores 0, every distance is the image diagonal."""
    scores = _constant(0.0, _diagonal(truth.shape, spacing))
    return [
        {"class": name, **scores, "truth_voxels": int((truth == value).sum()), "predicted_voxels": 0, "note": note}
        for name, value in labels.items()
    ]


def _class_metrics(
    predicted: Mask,
    expected: Mask,
    shape: tuple[int, ...],
    spacing: tuple[float, float, float] | None,
    tolerance: float,
) -> Row:
    """Measure two masks that were cropped to the box around both; `shape` is that of the whole image."""
    voxels = int(np.count_nonzero(expected)), int(np.count_nonzero(predicted))
    counts: Row = {"truth_voxels": voxels[0], "predicted_voxels": voxels[1]}
    if not any(voxels):
        return {**_constant(1.0, float("nan") if spacing is None else 0.0), **counts, "note": "absent from both"}
    if not all(voxels):
        note = "missed" if voxels[0] else "invented"
        return {**_constant(0.0, _diagonal(shape, spacing)), **counts, "note": note}
    overlap = dice(predicted, expected)
    distances: Row = dict.fromkeys((*DISTANCES, "nsd"), float("nan"))
    if spacing is not None:
        flat = tuple(axis for axis, length in enumerate(shape) if length == 1)[:2]
        step = np.delete(np.array(spacing[::-1], dtype=np.float64), flat)
        distances = _distances(predicted.squeeze(flat), expected.squeeze(flat), step, tolerance)
    return {"dice": overlap, "iou": overlap / (2 - overlap), **distances, **counts, "note": ""}


def _distances(predicted: Mask, expected: Mask, spacing: NDArray[np.float64], tolerance: float) -> Row:
    surfaces = _surface(predicted), _surface(expected)
    ways = _nearest(surfaces[0], surfaces[1], spacing), _nearest(surfaces[1], surfaces[0], spacing)
    both = np.concatenate(ways)
    return {
        "hd95": max(float(np.percentile(way, 95)) for way in ways),
        "hd": float(both.max()),
        "assd": float(both.mean()),
        "nsd": float((both <= tolerance + _UNITS_OF_ROUNDING).mean()),
    }


def _surface(mask: Mask) -> Mask:
    """The voxels of `mask` with a face neighbour outside it, or on the border of the array."""
    padded, inside = np.pad(mask, 1), mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            window = [slice(1, -1)] * mask.ndim
            window[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(window)]
    return mask & ~inside


def _nearest(start: Mask, target: Mask, spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from every voxel of the surface `start` to the closest of `target`, in the unit of `spacing`.

    A tree over surface voxels, because its cost and memory follow the surfaces and not the box around them: one stray
    voxel in a corner makes a distance transform of the whole volume. Voxels the surfaces share need no search.
    """
    apart = ~target[start]
    distances = np.zeros(apart.size)
    if apart.any():
        # Voxel centres lie on a grid: without balancing the tree is built faster and searched no slower.
        tree = KDTree(np.argwhere(target) * spacing, balanced_tree=False, compact_nodes=False)
        distances[apart] = tree.query(np.argwhere(start)[apart] * spacing)[0]
    return distances


def _constant(overlap: float, distance: float) -> Row:
    """Fixed values for a class without two masks to compare; the Surface Dice needs mm, as the distances do."""
    nsd = overlap if np.isfinite(distance) else float("nan")
    return {**dict.fromkeys(OVERLAPS, overlap), **dict.fromkeys(DISTANCES, distance), "nsd": nsd}


def _diagonal(shape: tuple[int, ...], spacing: tuple[float, float, float] | None) -> float:
    """Length of the image's diagonal in mm."""
    return float("nan") if spacing is None else float(np.linalg.norm(np.array(shape[::-1]) * spacing))


def _union(boxes: list[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """The smallest box around all of them; an empty one where there is none."""
    found = [box for box in boxes if box is not None]
    if not found:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*found, strict=True))
