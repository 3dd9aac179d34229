"""Compare a folder of predictions with a folder of label maps: one row for every expected case and class."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from glocal.data.image import file_ending, is_volume_file, read_labels, require_same_grid, without_label_suffix
from glocal.errors import GlocalError
from glocal.evaluation.metrics import METRICS, Row, case_metrics, worst_metrics
from glocal.files import read_json, replacing
from glocal.progress import console, track

NO_PREDICTION = "no prediction"
FOREGROUND = "mean foreground"
NOTES = ("missed", "invented", NO_PREDICTION)


def evaluate(
    predictions: Path,
    labels: Path,
    out: Path | None = None,
    class_names: Mapping[str, int] | None = None,
    spacing_known: bool = True,
    cases: Sequence[str] | None = None,
    tolerance: float = 1.0,
) -> pd.DataFrame:
    """Measure every expected case; one without a prediction gets the worst values and is never left out.

    Args:
        predictions: folder of predicted label maps; matched with `labels` by name without ending and without
            `_gt`, `_seg`, `_label` or `_mask` behind it; formats may differ.
        labels: a `labelsTr` folder, or a raw dataset with `dataset.json` and `labelsTr`.
        out: where to write the table as CSV; None writes nothing.
        class_names: class name to label value; None takes them from `dataset.json`, or else from the label maps.
        spacing_known: False where the voxel size is a placeholder: distances in mm are then left empty.
        cases: which cases are expected; None means every label map.
        tolerance: of the Surface Dice, in mm.

    Returns:
        Rows sorted by case: case, class, and the columns of `case_metrics`.

    Raises:
        GlocalError: a folder is missing or no prediction fits; two files of one name; a prediction of other shape or
            place than its label map; label values that have no name, negative ones, or none at all.
    """
    folder, names = _label_folder(labels)
    expected = _volumes(folder)
    predicted = _by_case(_volumes(predictions), expected)
    chosen = sorted(expected if cases is None else set(cases))
    if unknown := [case for case in chosen if case not in expected]:
        raise GlocalError(f"{folder} has no label map for {_listed(unknown)}: correct the list of cases.")
    if not predicted.keys() & set(chosen):
        raise GlocalError(
            f"No file in {predictions} is named like a label map in {folder} (such as {_listed(chosen[:2])}): "
            "give the folder that holds the predictions."
        )
    _warn_of_extra(sorted(predicted.keys() - expected.keys()), predictions)
    classes = _foreground(class_names or names or _found_labels([expected[case] for case in chosen]))
    measure = partial(_measure, classes=classes, spacing_known=spacing_known, tolerance=tolerance)
    pairs = [(case, expected[case], predicted.get(case)) for case in chosen]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = track(pool.map(lambda pair: measure(*pair), pairs), "Evaluating", len(pairs))
        frame = pd.DataFrame([row for rows in done for row in rows])
    if out is not None:
        with replacing(out) as temporary:
            frame.to_csv(temporary, index=False)
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarise the rows of `evaluate`: class, metric, cases, mean, sd (n − 1), median, min, max.

    Metrics that were not measured are left out. The last class is 'mean foreground': the mean over the classes of each
    case first, then over cases, so that every case weighs the same.
    """
    measured = [metric for metric in METRICS if frame[metric].notna().any()]
    foreground = frame.groupby("case", as_index=False)[measured].mean().assign(**{"class": FOREGROUND})
    columns = ["case", "class", *measured]
    tidy = pd.concat([frame[columns], foreground[columns]]).melt(["case", "class"], var_name="metric")
    groups = tidy.groupby(["class", "metric"], sort=False)["value"]
    return groups.agg(cases="count", mean="mean", sd="std", median="median", min="min", max="max").reset_index()


def per_subject(frame: pd.DataFrame, metric: str, keys: Sequence[str]) -> "pd.Series[float]":
    """A metric's mean over the classes of each case, then over the cases of each subject.

    Args:
        frame: rows of `evaluate` with a column `subject`, and whatever tells evaluations apart.
        metric: its column.
        keys: the columns that tell evaluations apart.

    Returns:
        The means, indexed by keys and subject in the order in which they first appear.
    """
    per_case = frame.groupby([*keys, "subject", "case"], sort=False)[metric].mean()
    means: pd.Series[float] = per_case.groupby([*keys, "subject"], sort=False).mean()
    return means


def pooled_dice(frame: pd.DataFrame) -> "pd.Series[float]":
    """The Dice of all cases taken together as one, by class, and last the mean of the classes, 'mean foreground'.

    The number of Zeng et al. 2021 and 2023, beside which the mean over cases must not be put: it is 2 Σ |P ∩ T| over
    Σ (|P| + |T|), so that a small structure of one case hardly counts. A class that no case has scores 1.
    """
    voxels = frame["truth_voxels"] + frame["predicted_voxels"]
    sums = pd.DataFrame({"both": frame["dice"] * voxels, "all": voxels}).groupby(frame["class"], sort=False).sum()
    pooled = (sums["both"] / sums["all"]).fillna(1.0)
    pooled[FOREGROUND] = pooled.mean()
    return pooled


def note_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """How often each class was missed, invented or had no prediction: one row per class, one column per note."""
    counts = pd.crosstab(frame["class"], frame["note"])
    return counts.reindex(index=frame["class"].unique(), columns=list(NOTES), fill_value=0)


def _measure(
    case: str,
    truth_file: Path,
    prediction_file: Path | None,
    classes: Mapping[str, int],
    spacing_known: bool,
    tolerance: float,
) -> list[Row]:
    truth = read_labels(truth_file)
    _require_named(truth.array, classes, truth_file)
    spacing = truth.geometry.spacing if spacing_known else None
    if prediction_file is None:
        rows = worst_metrics(truth.array[0], classes, spacing, NO_PREDICTION)
    else:
        prediction = read_labels(prediction_file)
        require_same_grid(prediction.geometry, truth.geometry, prediction_file, truth_file)
        _require_named(prediction.array, classes, prediction_file)
        rows = case_metrics(prediction.array[0], truth.array[0], classes, spacing, tolerance)
    return [{"case": case, **row} for row in rows]


def _require_named(array: NDArray[np.generic], classes: Mapping[str, int], path: Path) -> None:
    if unnamed := sorted({int(value) for value in np.unique(array)} - {0, *classes.values()}):
        raise GlocalError(
            f"{path} holds the label values {_listed(unnamed)}, which have no name among {_listed(classes)}: "
            "correct this file or the labels in dataset.json."
        )


def _label_folder(labels: Path) -> tuple[Path, Mapping[str, int] | None]:
    """The folder of label maps, and the classes its dataset.json names if there is one (beside it or above it)."""
    root = labels if (labels / "dataset.json").is_file() else labels.parent
    folder = labels / "labelsTr" if (labels / "labelsTr").is_dir() else labels
    if not (root / "dataset.json").is_file():
        return folder, None
    content = read_json(root / "dataset.json")
    names = content.get("labels", {}) if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(value, int) and value >= 0 for value in names.values()):
        raise GlocalError(
            f"{root / 'dataset.json'} must give each of its `labels` one whole number, 0 or more: {names}."
        )
    return folder, names


def _volumes(folder: Path) -> dict[str, Path]:
    """The volumes of a folder by name without ending; hidden files are not meant."""
    if not folder.is_dir():
        raise GlocalError(f"{folder} is not a folder: give the folder that holds the label maps.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_volume_file(path):
            continue
        case = path.name.removesuffix(file_ending(path))
        if case in found:
            raise GlocalError(f"{folder} holds both {found[case].name} and {path.name}: keep one file per case.")
        found[case] = path
    if not found:
        raise GlocalError(f"{folder} holds no volumes: give the folder that holds the label maps.")
    return found


def _by_case(predicted: Mapping[str, Path], expected: Mapping[str, Path]) -> dict[str, Path]:
    """The predictions by the case they are of; one that is of no case keeps its name."""
    shared = Counter(map(without_label_suffix, expected))
    alike = {bare: case for case in expected if shared[bare := without_label_suffix(case)] == 1}
    found: dict[str, Path] = {}
    for name, path in predicted.items():
        case = alike.get(without_label_suffix(name), name)
        if name in expected or case in predicted:
            case = name
        if case in found:
            raise GlocalError(f"{path} and {found[case].name} are both named like the label map of {case}: keep one.")
        found[case] = path
    return found


def _foreground(names: Mapping[str, int]) -> dict[str, int]:
    """In the order of their values, as pictures colour them."""
    return {name: value for name, value in sorted(names.items(), key=lambda pair: pair[1]) if value != 0}


def _found_labels(files: Sequence[Path]) -> dict[str, int]:
    """Classes named after the values in the label maps, where nobody named them."""
    values: set[int] = set()
    for path in files:
        found = {int(value) for value in np.unique(read_labels(path).array)}
        if min(found) < 0:
            raise GlocalError(f"{path} holds the negative label value {min(found)}: give structures 1, 2, and so on.")
        values |= found
    if values <= {0}:
        raise GlocalError(
            "No label map holds a structure, and no dataset.json says which there should be: check that these are the "
            "label maps, or name the structures in a dataset.json beside them."
        )
    return {f"label {value}": value for value in sorted(values)}


def _warn_of_extra(extra: Sequence[str], folder: Path) -> None:
    if extra:
        text = f"Warning: no label map for {len(extra)} file(s) in {folder}, left out: {_listed(extra)}."
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _listed(names: Sequence[object] | Mapping[str, int]) -> str:
    """The first ten as text."""
    names = list(names)
    return ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
