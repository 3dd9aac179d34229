"""Cases that nobody has outlined: how large their structures are, and which of them a person should look at first."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, find_objects, label

ORDER = (
    "Cases that need a human's eye come first: those with the most flags, and among equals the more uncertain ones. "
    "A case is flagged as unsure if its uncertainty is more than half of the largest possible, else as more uncertain "
    "than the others if it lies above their median by more than three (robust) standard deviations; a structure as "
    "much smaller or larger than usual if its volume differs from the median of the cases by a factor of five. "
    "What is odd about an image is a flag, too."
)
UNSURE = "unsure almost everywhere"
_HALF = 0.5  # of the largest possible uncertainty, near the structures: hardly a border is drawn with conviction
_FACTOR = 5  # between the volume of a structure and the usual one; hearts and organs of adults vary by two or three
_ENOUGH = 5  # cases: with fewer it means nothing to be unlike the others
_TOUCHING = np.ones((3, 3, 3), dtype=bool)
_AROUND = np.ones((1, 3, 3), dtype=bool)


class Measures(TypedDict):
    """What is measured of one case; by structure where there are several."""

    volume: dict[str, float | None]  # ml; None where the voxel size is not known
    pieces: dict[str, int]
    uncertainty: float | None
    warnings: NotRequired[Sequence[str]]  # what was odd about the image


def case_measures(
    mask: NDArray[np.integer],
    uncertainty: NDArray[np.floating] | None,
    labels: Mapping[str, int],
    spacing: tuple[float, float, float] | None,
) -> Measures:
    """Volumes, connected pieces (voxels that touch, if only at a corner) and mean uncertainty of one case.

    Args:
        mask: label map `(n, rows, columns)`.
        uncertainty: of the same shape; its mean is taken over the foreground and one pixel around it in each slice,
            or over everything where there is no foreground.
        labels: structure to label value, background (0) included.
        spacing: voxel size in mm, in any order; None where it is unknown.
    """
    structures = {name: value for name, value in labels.items() if value}
    boxes = find_objects(mask, max(structures.values(), default=0))
    pieces, volume = {}, {}
    for name, value in structures.items():
        inside = np.zeros((0, 0, 0), bool) if boxes[value - 1] is None else mask[boxes[value - 1]] == value
        pieces[name] = int(label(inside, _TOUCHING)[1]) if inside.size else 0
        volume[name] = None if spacing is None else float(np.count_nonzero(inside) * np.prod(spacing) / 1000)
    mean = None
    if uncertainty is not None:
        near = binary_dilation(mask != 0, _AROUND)
        mean = float(uncertainty[near].mean() if near.any() else uncertainty.mean())
    return {"volume": volume, "pieces": pieces, "uncertainty": mean}


def cases_table(cases: Mapping[str, Measures]) -> pd.DataFrame:
    """One row per case, those that need a human's eye first, see `ORDER`.

    Returns:
        Columns case, flags (sentences, parted by semicolons), uncertainty (NaN where it was not asked for), and
        `STRUCTURE ml` and `STRUCTURE pieces` for each structure.
    """
    unsure = pd.Series({name: measures["uncertainty"] for name, measures in cases.items()}, dtype=float)
    limit = _limit(np.asarray(unsure.dropna(), dtype=np.float64))
    usual = pd.DataFrame({name: measures["pieces"] for name, measures in cases.items()}).median(axis=1)
    volumes = pd.DataFrame({name: measures["volume"] for name, measures in cases.items()}, dtype=float)
    typical = volumes[volumes > 0].median(axis=1)  # of where there is any
    rows: list[tuple[tuple[float, ...], dict[str, Any]]] = []
    for name, measures in cases.items():
        flags = [text.rstrip(".") for text in measures.get("warnings", ())]
        flags += [f"{structure} is empty" for structure, count in measures["pieces"].items() if not count]
        flags += [
            f"{structure} is in {count} pieces"
            for structure, count in measures["pieces"].items()
            if count > (max(1, usual[structure]) if len(cases) >= _ENOUGH else 1)
        ]
        flags += _sizes(measures["volume"], typical) if len(cases) >= _ENOUGH else []
        if unsure[name] > _HALF:
            flags.append(UNSURE)
        elif unsure[name] > limit:
            flags.append("more uncertain than the others")
        sizes = {f"{structure} ml": size for structure, size in measures["volume"].items()}
        counts = {f"{structure} pieces": count for structure, count in measures["pieces"].items()}
        row = {"case": name, "flags": "; ".join(flags), "uncertainty": unsure[name], **sizes, **counts}
        rows.append(((-len(flags), -float(measures["uncertainty"] or 0)), row))
    return pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: pair[0])])  # stable: equals as they came


def doubt(table: pd.DataFrame) -> str | None:
    """What to say of all cases of `cases_table` together: that the model does not seem to know such images, or None."""
    if not (table["uncertainty"] > _HALF).mean() > 0.5:
        return None
    return (
        f"Most cases are {UNSURE}: the model may not know images of this kind (another scanner, sequence or part of "
        "the body than it was trained on), or has learnt too little. Do not use these masks without correcting them."
    )


def _sizes(volumes: Mapping[str, float | None], typical: pd.Series) -> list[str]:
    """Flags for structures that are there, but far from as large as in most cases."""
    flags = []
    for structure, volume in volumes.items():
        if volume and not 1 / _FACTOR <= volume / typical[structure] <= _FACTOR:
            much = "smaller" if volume < typical[structure] else "larger"
            flags.append(f"{structure} is much {much} than usual ({volume:.1f} ml; median {typical[structure]:.1f})")
    return flags


def _limit(values: NDArray[np.float64]) -> float:
    """Median and three standard deviations, these from the median absolute deviation, or 5 % where cases are alike."""
    if len(values) < _ENOUGH:
        return np.inf
    median = float(np.median(values))
    return median + 3 * max(1.4826 * float(np.median(np.abs(values - median))), 0.05 * median)
