"""The tables of an experiment: which axes stand in rows and columns, and what a cell says."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from glocal.errors import GlocalError
from glocal.evaluation.metrics import DISTANCES
from glocal.evaluation.significance import FEWEST_UNITS
from glocal.options import closest
from glocal.reporting.typeset import Cell, Layout

Key = tuple[str, ...]  # one value per axis of the rows, or of the columns
Record = Mapping[Hashable, Any]  # the figures of one cell: a row of the summary
Shown = Literal["sd", "interval", "subjects", "draws", "difference", "p", "better"]

ALPHA = 0.05
AVERAGED = ("split", "draw")
METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 in mm",
    "hd": "Hausdorff distance in mm",
    "assd": "ASSD in mm",
    "nsd": "Surface Dice",
}
_LEGEND = {
    "interval": "[low, high]: interval, subjects and draws resampled",
    "subjects": "subjects [low, high]: interval, only subjects resampled",
    "draws": "draws [low, high]: interval, only draws resampled",
    "difference": "Δ against {baseline}: paired difference with its interval",
    "p": "p: test of this difference, Holm-corrected",
    "better": "N of M: trainings better than those of the baseline",
}
_OF_DIFFERENCES = {"difference", "p", "better"}
_BARE = re.compile(r"[-+.\d].*|true|false|none", re.IGNORECASE | re.DOTALL)  # says nothing without the name of its axis


class TableOptions(BaseModel):
    """One table of an experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # YAML reads a budget as number

    title: str = Field("", description="else what is measured, or the difference to what baseline")
    rows: tuple[str, ...] = Field(("contender",), min_length=1, description="axes, the outermost first")
    columns: tuple[str, ...] = Field(("labels",), min_length=1, description="axes, the outermost first")
    metric: Literal["dice", "iou", "hd95", "hd", "assd", "nsd"] = "dice"
    structure: str = Field("mean", description="a class, or the mean over classes")
    checkpoint: Literal["last", "best"] = "last"
    show: tuple[Shown, ...] = Field(("sd",), description="what stands beside the mean in every cell")
    digits: int = Field(3, ge=0, le=6)
    paper: dict[str, dict[str, float]] = Field(
        {}, description="a paper's own numbers: row, then column; values of several axes are joined by ` / `"
    )
    paper_source: str = Field("", description="who reported these numbers")

    @property
    def only_differences(self) -> bool:
        """Whether it shows nothing but comparisons with the baseline: without one, only means would be left of it."""
        return bool(self.show) and _OF_DIFFERENCES.issuperset(self.show)

    @model_validator(mode="after")
    def _sourced(self) -> "TableOptions":
        if self.paper and not self.paper_source:
            raise ValueError("numbers of a paper need paper_source, the reference that reported them")
        return self


def check_layout(options: TableOptions, axes: Mapping[str, Sequence[object]]) -> None:
    """Refuse a table that its experiment cannot fill; `axes` are all axes with their values.

    Raises:
        GlocalError: an axis is unknown, named twice, or varies and is left out; or the paper has a row or column that
            the table has not.
    """
    table = f"The table {options.title!r}" if options.title else "A table"
    known = {axis: list(map(str, values)) for axis, values in axes.items() if axis not in AVERAGED}
    placed = (*options.rows, *options.columns)
    for axis in placed:
        if axis in AVERAGED:
            raise GlocalError(
                f"{table} has {axis!r} in its rows or columns, but its cells are means over it: remove it."
            )
        if axis not in known:
            raise GlocalError(f"{table} has {axis!r} in its rows or columns, no axis: {closest(axis, known)}")
        if placed.count(axis) > 1:
            raise GlocalError(f"{table} has the axis {axis!r} twice: leave it once, in rows or in columns.")
    for axis, values in known.items():
        if axis not in placed and len(set(values)) > 1:
            raise GlocalError(f"{table} would mix {', '.join(values)} in one cell: add {axis} to its rows or columns.")
    named = {"row": list(options.paper), "column": [name for numbers in options.paper.values() for name in numbers]}
    for kind, chosen in (("row", options.rows), ("column", options.columns)):
        there = [" / ".join(key) for key in product(*(known[axis] for axis in chosen))]
        for name in named[kind]:
            if name not in there:
                raise GlocalError(f"{table} has numbers of a paper for the {kind} {name!r}: {closest(name, there)}")


def lay_out(
    summary: pd.DataFrame,
    options: TableOptions,
    names: Mapping[str, str],
    caption: str,
    axes: Mapping[str, Sequence[object]] | None = None,
    baseline: str = "the baseline",
) -> Layout:
    """Lay out the summary of an experiment as a table.

    Args:
        summary: one row per combination of the axes, which are its columns of text. `validation`, if there and no axis
            of the table, says how many labelled volumes were used for validation. A row whose mean is NaN is missing.
        options: the table.
        names: how axes and their values are to be called.
        caption: what the numbers are, in words.
        axes: the axes with all values that were asked for, in their order, so that what has no result yet is seen to
            be missing; by default those in the summary, numbers in ascending order.
        baseline: what it is called.

    Raises:
        GlocalError: see `check_layout`; or there is nothing to show, or two rows of the summary for one cell.
    """
    placed = (*options.rows, *options.columns)
    asked = {axis: list(map(str, values)) for axis, values in (axes or {}).items()}
    for axis in map(str, summary.columns):
        text = all(isinstance(value, str) for value in summary[axis])
        if text and (axis != "validation" or axis in placed):
            asked[axis] = list(dict.fromkeys([*asked.get(axis, []), *_ascending(summary[axis].unique())]))
    check_layout(options, asked)
    row_keys, column_keys = (list(product(*(asked[axis] for axis in side))) for side in (options.rows, options.columns))
    figures = _figures(summary, options, row_keys, column_keys)
    records = figures.to_dict("records")
    words = _Words(names, {} if "validation" in placed else _validation(summary))
    paths = [words.of(options.columns, key, alone=True) for key in column_keys]
    header, columns = [], []
    for place, path in enumerate(paths):
        column = records[place :: len(paths)]
        header.append((*path, "ours") if options.paper else path)
        columns.append(_cells(column, options))
        reported = [record.get("paper", float("nan")) for record in column]
        if any(map(pd.notna, reported)):
            header.append((*path, "paper"))
            decimals = max(len(f"{value:g}".partition(".")[2]) for value in reported)
            columns.append([Cell("" if pd.isna(value) else f"{value:.{decimals}f}") for value in reported])
    cells, row_names = list(zip(*columns, strict=True)), [words.of(options.rows, key) for key in row_keys]
    structure = "mean over classes" if options.structure == "mean" else names.get(options.structure, options.structure)
    measured = f"{METRIC_NAMES[options.metric]}, {structure}, {options.checkpoint} checkpoint"
    notes = [f"{measured}: {_legend(options, [cell for row in cells for cell in row], baseline)}"]
    if "labels" in asked and "labels" not in placed:
        notes.append(f"Labelled volumes: {words.of(['labels'], asked['labels'])[0]}.")
    notes.append(_incomplete(records, row_names, paths))
    stub = tuple(names.get(axis, axis) for axis in options.rows)
    title = options.title or (f"Difference to {baseline}" if options.only_differences else measured)
    return Layout(title, caption, " ".join(filter(None, notes)), stub, header, row_names, cells, figures)


@dataclass(frozen=True)
class _Words:
    """What axes and values are called; `validation` has the number of validation volumes of a budget."""

    names: Mapping[str, str]
    validation: Mapping[str, str]

    def of(self, axes: Iterable[str], values: Iterable[str], alone: bool = False) -> tuple[str, ...]:
        """The names of values; alone: where the name of their axis stands nowhere near them."""
        return tuple(self._one(axis, value, alone) for axis, value in zip(axes, values, strict=True))

    def _one(self, axis: str, value: str, alone: bool) -> str:
        if axis == "labels" and value in self.validation:
            return f"{self.names.get(value, value)} + {self.validation[value]} for validation"
        if not alone or value in self.names or not _BARE.fullmatch(value):
            return self.names.get(value, value)
        return f"{value} label{'s' * (value != '1')}" if axis == "labels" else f"{self.names.get(axis, axis)} {value}"


def _ascending(values: Iterable[str]) -> list[str]:
    """Numbers by size, anything else as it comes."""
    values = list(values)
    try:
        return sorted(values, key=float)
    except ValueError:
        return values


def _validation(summary: pd.DataFrame) -> dict[str, str]:
    """How many labelled volumes are used for validation, by budget; only budgets with any."""
    if "validation" not in summary:
        return {}
    counts = pd.to_numeric(summary["validation"]).dropna().groupby(summary["labels"]).unique()
    return {str(budget): " or ".join(f"{n:g}" for n in sorted(found)) for budget, found in counts.items() if any(found)}


def _figures(summary: pd.DataFrame, options: TableOptions, rows: list[Key], columns: list[Key]) -> pd.DataFrame:
    """The summary, one row per cell of the table in reading order, and beside it the numbers of the paper."""
    if not rows or not columns:
        raise GlocalError("There is nothing to put into a table yet: no training has measured anything.")
    placed = [*options.rows, *options.columns]
    if summary.duplicated(placed).any():
        twice = ", ".join(summary.loc[summary.duplicated(placed), placed].iloc[0])
        raise GlocalError(f"A table has two results for {twice}: add the axis that parts them to its rows or columns.")
    grid = pd.DataFrame([row + column for row, column in product(rows, columns)], columns=placed, dtype=str)
    figures = grid.merge(summary, on=placed, how="left", validate="one_to_one")
    if options.paper:
        keys = product(map(" / ".join, rows), map(" / ".join, columns))
        figures["paper"] = [options.paper.get(row, {}).get(column, float("nan")) for row, column in keys]
    return figures


def _cells(column: Sequence[Record], options: TableOptions) -> list[Cell]:
    """The cells of one column; best and second best differ by what is shown, not by hidden digits."""
    sign = 1 if options.metric in DISTANCES else -1
    costs = [sign * round(float(record["mean"]), options.digits) for record in column]
    measured = [cost for cost in costs if pd.notna(cost)]
    ranked = sorted(set(measured)) if len(measured) > 1 else []
    return [
        Cell("–")
        if pd.isna(cost)
        else Cell(
            _mean(record, options),
            tuple(_beside(record, kind, options.digits) for kind in options.show if kind != "sd"),
            best=cost in ranked[:1],
            second=cost in ranked[1:2],
            significant=_significant(record),
            worse=_significant(record) and sign * record["difference"] > 0,
        )
        for record, cost in zip(column, costs, strict=True)
    ]


def _significant(record: Record) -> bool:
    """A p over subjects knows nothing of other draws: there must be some, and their interval must exclude 0 as well."""
    low, high = record["difference_low"], record["difference_high"]
    varied = record["draws"] > 1 or record["splits"] >= FEWEST_UNITS
    return bool(varied and record["p_holm"] < ALPHA and (low > 0 or high < 0))


def _mean(record: Record, options: TableOptions) -> str:
    sd = f" ± {record['sd']:.{options.digits}f}" if "sd" in options.show and pd.notna(record["sd"]) else ""
    return f"{record['mean']:.{options.digits}f}{sd}"


def _beside(record: Record, kind: str, digits: int) -> str:
    """What stands below a mean; empty where there is nothing to say, as on the baseline itself."""
    if kind == "p":
        return "" if pd.isna(record["p_holm"]) else p_value(record["p_holm"])
    if kind == "better":
        return "" if pd.isna(record["pairs"]) else f"{record['better']:.0f} of {record['pairs']:.0f}"
    prefix = {"interval": "", "difference": "difference_"}.get(kind, f"{kind}_")
    form = f"{'+' * (kind == 'difference')}.{digits}f"
    low, high = record[f"{prefix}low"], record[f"{prefix}high"]
    interval: str = "" if pd.isna(low) else f"[{_signed(low, form)}, {_signed(high, form)}]"
    if kind == "difference":
        return "" if pd.isna(record[kind]) else f"Δ {_signed(record[kind], form)} {interval}".strip()
    return f"{kind} {interval}" if interval and prefix else interval


def p_value(p: float) -> str:
    """A p as papers print it."""
    return f"p = {p:.3f}".replace("= 0.000", "< 0.001")


def _signed(value: float, form: str) -> str:
    return re.sub(r"^[-+](?=[0.]*$)", "", f"{value:{form}}").replace("-", "−")


def _legend(options: TableOptions, cells: Sequence[Cell], baseline: str) -> str:
    """How to read a cell: what some cell has."""
    mean = "mean ± standard deviation over trainings" if "sd" in options.show else "mean over trainings"
    kinds = [kind for kind in options.show if kind != "sd"]
    there = {kind for cell in cells for kind, text in zip(kinds, cell.beside, strict=False) if text}
    parts = ["; ".join([mean, *(_LEGEND[kind].format(baseline=baseline) for kind in kinds if kind in there)])]
    if any(cell.best for cell in cells):
        lowest = ", lower is better" if options.metric in DISTANCES else ""
        parts.append(f"Bold: best of its column, underlined: second best{lowest}")
    if any(cell.significant for cell in cells):
        several = f"more than one draw (or at least {FEWEST_UNITS} splits)"
        both = f"Holm-corrected p < {ALPHA}, 0 outside the interval of the difference, and {several}"
        parts.append(f"* better, † worse than the baseline: {both}")
    if options.paper:
        parts.append(f"Paper: as reported by {options.paper_source.rstrip('.')}")
    return ". ".join(parts) + "."


def _incomplete(records: Sequence[Record], rows: Sequence[Key], paths: Sequence[Key]) -> str:
    """Which cells have no result, or rest on fewer trainings than others of their column; empty if none."""
    most = [
        max((r["trainings"] for r in records[i :: len(paths)] if pd.notna(r["mean"])), default=0)
        for i in range(len(paths))
    ]
    gaps: dict[str, list[str]] = {}
    for (row, (path, full)), record in zip(product(rows, zip(paths, most, strict=True)), records, strict=True):
        if pd.isna(record["mean"]):
            gaps.setdefault(", ".join(row), []).append(", ".join(path))
        elif record["trainings"] < full:
            few = f"{record['trainings']:.0f} of {full:.0f} trainings"
            gaps.setdefault(", ".join(row), []).append(f"{', '.join(path)} ({few})")
    if not gaps:
        return ""
    listed = "; ".join(f"{row} at {' and '.join(places)}" for row, places in gaps.items())
    return f"Not complete, because a training failed, is not finished or cannot be measured: {listed}."
