"""Masks of two kinds for the same cases, such as those of another tool: which are better, and how sure is that?"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from glocal.data.dataset import read_dataset
from glocal.errors import GlocalError
from glocal.evaluation.evaluate import FOREGROUND, per_subject
from glocal.evaluation.metrics import DISTANCES, METRICS
from glocal.evaluation.significance import StatisticsOptions, summarise

_FIRST, _SECOND = "first", "second"


def compare(first: pd.DataFrame, second: pd.DataFrame, subjects: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Paired differences of two evaluations, by metric and class, and of the mean over several classes.

    Args:
        first: rows of `evaluate`.
        second: rows of `evaluate`, of the same cases.
        subjects: whose each case is; one that is not among them is a subject of its own.

    Returns:
        Columns metric, class, first, second (means over subjects), difference (first minus second), low, high (its 95 %
        bootstrap interval over subjects), subjects, better, worse (how many the first is better and worse for), p
        (Wilcoxon's over subjects; NaN for fewer than six) and p_holm (adjusted for all classes of the metric).

    Raises:
        GlocalError: the two have not the same cases and classes.
    """
    if set(zip(first["case"], first["class"], strict=True)) != set(zip(second["case"], second["class"], strict=True)):
        raise GlocalError(
            "The two evaluations have different cases or classes: evaluate both with the same label maps."
        )
    tables = []
    for metric in METRICS:
        if first[metric].notna().any() and second[metric].notna().any():
            values = pd.concat([_values(first, metric, _FIRST, subjects), _values(second, metric, _SECOND, subjects)])
            tables.append(_table(values, metric))
    return pd.concat(tables, ignore_index=True)


def subjects_beside(labels: Path) -> dict[str, str] | None:
    """Whose each case is, where label maps are those of a raw dataset; None where nothing says so."""
    root = labels if (labels / "dataset.json").is_file() else labels.parent
    if not (root / "subjects.tsv").is_file():
        return None
    return {case.name: case.subject for case in read_dataset(root).cases}


def _values(frame: pd.DataFrame, metric: str, masks: str, subjects: Mapping[str, str] | None) -> pd.DataFrame:
    """One value for each subject and class, and for the mean over classes, as `significance` has them."""
    both = frame.assign(subject=frame["case"].map(subjects or {}).fillna(frame["case"]))
    if both["class"].nunique() > 1:  # of one class the mean would be the same test a second time
        both = pd.concat([both, both.assign(**{"class": FOREGROUND})])
    values = per_subject(both, metric, ["class"]).rename("value").reset_index()
    return values.assign(masks=masks, split=0, draw=0)


def _table(values: pd.DataFrame, metric: str) -> pd.DataFrame:
    sign = -1 if metric in DISTANCES else 1
    summary = summarise(values, ["masks", "class"], {"masks": _SECOND}, StatisticsOptions(), sign > 0)
    mine, other = (summary[summary["masks"] == masks].set_index("class") for masks in (_FIRST, _SECOND))
    wide = values.pivot(index="subject", columns=["masks", "class"], values="value")
    gain = sign * (wide[_FIRST] - wide[_SECOND])[mine.index].round(12)
    return pd.DataFrame(
        {
            "metric": metric,
            "class": mine.index,
            "first": mine["mean"].to_numpy(),
            "second": other["mean"].reindex(mine.index).to_numpy(),
            "difference": mine["difference"].to_numpy(),
            "low": mine["difference_low"].to_numpy(),
            "high": mine["difference_high"].to_numpy(),
            "subjects": mine["subjects"].to_numpy(),
            "better": (gain > 0).to_numpy().sum(0),
            "worse": (gain < 0).to_numpy().sum(0),
            "p": mine["p"].to_numpy(),
            "p_holm": mine["p_holm"].to_numpy(),
        }
    )
