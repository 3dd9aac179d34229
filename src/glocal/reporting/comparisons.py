"""Figures that compare the methods of an experiment, as bytes, in the look of `figures`.

Methods keep the order in which they come first in a frame, and with it their colours; the first, the baseline, is grey.
All raise GlocalError if there is nothing to draw or something is missing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from glocal.errors import GlocalError
from glocal.reporting import figures
from glocal.reporting.figures import INK, MARKERS, QUIET, STYLE, WIDTH, Labels

SMALL: Any = {"fontsize": 10, "linespacing": 1.1}
LINE = 0.18  # inches, of a line of small text
THIN: Any = {"color": INK, "linewidth": 1.2}


@dataclass(frozen=True)
class PictureRow:
    """One slice and what the methods made of it.

    `image`, `truth` and each of `masks` (by method) are `(H, W)`; `dice` is the mean Dice by method; `aspect` is the
    height of a pixel over its width, in mm.
    """

    name: str
    image: NDArray[np.generic]
    truth: Labels
    masks: Mapping[str, Labels]
    dice: Mapping[str, float]
    aspect: float = 1.0


def means_by_budget(frame: pd.DataFrame, ylabel: str = "Dice") -> bytes:
    """The mean of every method over the budgets as SVG, with its interval.

    Points are not joined: as they are moved aside, the line of a better method could run below that of a worse one.
    `frame` has one row per method and budget: `method`, `labels`, `mean`, `low`, `high`; an interval that is NaN is not
    drawn.
    """
    _check(frame, ["method", "labels", "mean", "low", "high"])
    budgets, methods, handles = _budgets(frame), list(frame["method"].unique()), []
    step = min(0.1, 0.6 / len(methods))  # side by side, so that no interval covers another
    with mpl.rc_context(STYLE):
        figure, axes = figures.canvas("", 3.4)
        for number, name in enumerate(methods):
            rows = frame[frame["method"] == name].set_index("labels").reindex(budgets)
            x = np.arange(len(budgets)) + (number - (len(methods) - 1) / 2) * step
            axes.vlines(x, rows["low"], rows["high"], color=_colour(number), linewidth=1.6, alpha=0.8)
            # Hollow where colours come again.
            look: Any = {"color": _colour(number), "markerfacecolor": "white" if number > 6 else _colour(number)}
            handles += axes.plot(x, rows["mean"], MARKERS[number % len(MARKERS)], markersize=6, **look)
        axes.set_xticks(range(len(budgets)), budgets)
        axes.set(xlabel="Labelled", ylabel=ylabel, xlim=(-0.5, len(budgets) - 0.5))
        axes.grid(axis="x", visible=False)
        _methods_below(figure, handles, methods)
        return figures.to_bytes(figure, "svg")


def class_boxes_by_method(frame: pd.DataFrame, metric_label: str) -> bytes:
    """A metric by class and method as SVG: box (quartiles, median) and one point per subject.

    `frame` has one row per method, class and subject: `method`, `class`, `value`; NaN is left out.
    """
    _check(frame, ["method", "class", "value"])
    methods, classes = list(frame["method"].unique()), list(frame["class"].unique())
    names = [_wrapped(name, 12) for name in classes]
    # Boxes and names must stay legible: classes that do not fit in one row go into the next.
    step = len(methods) + 1
    fitting = min(40 // step, 56 // (max(len(line) for name in names for line in name.split("\n")) + 2))
    lines = -(-len(classes) // max(1, fitting))
    columns = -(-len(classes) // lines)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3 * lines + 0.8), layout="constrained")
        panels = figure.subplots(lines, sharey=True, squeeze=False)[:, 0]
        for line, axes in enumerate(panels):
            shown = slice(line * columns, (line + 1) * columns)
            for place, name in enumerate(classes[shown]):
                _boxes(axes, place * step, frame[frame["class"] == name], methods)
            axes.set_xticks(np.arange(len(names[shown])) * step + (step - 2) / 2, names[shown])
            axes.set(xlim=(-1, columns * step - 1), ylabel=metric_label)
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="x", visible=False)
        _methods_below(figure, [Patch(**_box(number)["boxprops"]) for number in range(len(methods))], methods)
        return figures.to_bytes(figure, "svg")


def forest(frame: pd.DataFrame, xlabel: str) -> bytes:
    """Paired differences to the baseline with their intervals as SVG, by budget, against a line at zero.

    `frame` has one row per method and budget: `method`, `labels`, `difference`, `difference_low`, `difference_high`;
    rows without a difference (the baseline's own) are left out. `xlabel` should say which side is better.
    """
    _check(frame, ["method", "labels", "difference", "difference_low", "difference_high"])
    order = list(frame["method"].unique())  # with the baseline: its place counts for the colours of the others
    frame = frame.dropna(subset="difference")
    budgets, names = _budgets(frame), {name: _wrapped(name, 22) for name in frame["method"].unique()}
    height = 0.1 + LINE * max(name.count("\n") + 1 for name in names.values())
    xlabel = "\n".join(_wrapped(line, 40) for line in xlabel.split("\n"))  # the axis is narrower than the figure
    ticks: list[str] = []
    with mpl.rc_context(STYLE):
        figure, axes = figures.canvas("", 0.8 + 0.2 * xlabel.count("\n") + height * (len(frame) + len(budgets)))
        for budget in budgets:
            axes.axhspan(len(ticks) - 0.5, len(ticks) + 0.5, color="#f0f3f6", linewidth=0)
            ticks.append(f"{budget} labelled")
            for row in frame[frame["labels"] == budget].to_dict("records"):
                number = order.index(row["method"])
                y, ends, ink = len(ticks), (row["difference_low"], row["difference_high"]), _colour(number)
                axes.plot(ends, (y, y), color=ink, linewidth=2.2, solid_capstyle="butt")  # a cap would lengthen it
                axes.plot(row["difference"], y, MARKERS[number % len(MARKERS)], color=ink, markersize=6.5)
                ticks.append(names[row["method"]])
        axes.axvline(0, color=QUIET, linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(ticks)), ticks, **SMALL)
        for label in axes.get_yticklabels():
            if label.get_text() not in names.values():
                label.set(fontweight="bold", color=INK)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)  # more numbers would run into each other
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel, ylim=(len(ticks) - 0.5, -0.5))
        return figures.to_bytes(figure, "svg")


def maximal_groups(ranks: Mapping[str, float], difference: float) -> list[tuple[str, ...]]:
    """Groups of two methods or more, best first, whose ranks differ by less than `difference`; none is in another."""
    order = sorted(ranks, key=lambda name: ranks[name])
    groups, reached = [], 0
    for first, name in enumerate(order):
        end = first + sum(ranks[other] - ranks[name] < difference for other in order[first:])
        if end > max(first + 1, reached):
            groups.append(tuple(order[first:end]))
            reached = end
    return groups


def critical_difference_diagram(ranks: Mapping[str, float], difference: float) -> bytes:
    """Mean ranks (1 is best, on the right) as SVG; bars join methods that do not differ significantly.

    Demšar 2006 (JMLR 7), figure 1: they differ where their mean ranks do by the critical `difference` or more.
    """
    count, order = len(ranks), sorted(ranks, key=lambda name: -ranks[name])
    if count < 2 or not all(1 <= rank <= count for rank in ranks.values()) or not 0 < difference < np.inf:
        raise GlocalError(
            "A diagram of critical differences needs at least two methods, each with a mean rank between 1 and their "
            "number, and a critical difference above 0: compare methods that were tested on the same subjects."
        )
    names = {name: f"{_wrapped(name, 18)} ({ranks[name]:.2f})" for name in order}
    worse, better = order[: (count + 1) // 2], order[: (count + 1) // 2 - 1 : -1]  # each from its end to the middle
    left, margin = (max(_inches(names[name]) for name in side) + 0.3 for side in (worse, better))
    right = max(WIDTH - margin, left + 2.4)
    scale = (right - left) / max(count - 1, difference)  # inches per rank; the critical difference fits too
    x = {name: right - (rank - 1) * scale for name, rank in ranks.items()}
    groups = maximal_groups(ranks, difference)
    levels = max(sum(name in group for group in groups) for name in ranks)  # as many bars as lie over one another
    top, step = 0.3 + 0.14 * levels, 0.1 + LINE * max(name.count("\n") + 1 for name in names.values())
    width, height = right + margin, top + step * len(worse)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height + 1))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, -1))  # in inches
        _rank_axis(axes, right, scale, count, difference)
        for number, group in enumerate(groups):
            ends, y = (x[group[-1]] - 0.05, x[group[0]] + 0.05), 0.17 + 0.14 * (number % levels)
            axes.plot(ends, (y, y), color=INK, linewidth=4, solid_capstyle="butt", zorder=3)
        for side, end, outward, align in ((worse, left, -1, "right"), (better, right, 1, "left")):
            for place, name in enumerate(side):
                y = top + step * (place + 0.5)
                axes.plot((x[name], x[name], end + 0.1 * outward), (0, y, y), color=QUIET, linewidth=1.1)
                axes.text(end + 0.16 * outward, y, names[name], ha=align, va="center", **SMALL)
        return figures.to_bytes(figure, "svg")


def picture_grid(rows: Sequence[PictureRow], methods: Sequence[str], class_names: Mapping[str, int]) -> bytes:
    """Slices as PNG: each with the expert's labels, then with the mask of every method and its Dice.

    Shown is the part of a slice that holds all its masks, with its surroundings.
    """
    if not rows or not methods:
        raise GlocalError("There is no slice or no method to show: choose cases that were predicted.")
    count = 1 + len(methods)
    lines = -(-count // 4)  # four pictures side by side can still be seen on a phone
    columns = -(-count // lines)
    titles = [_wrapped(name, 56 // columns) for name in ("Expert", *methods)]
    words = 0.35 + LINE * max(title.count("\n") + 1 for title in titles)
    windows = [_common_window(row, methods) for row in rows]
    shapes = [figures.tallness(window, row.aspect) for row, window in zip(rows, windows, strict=True)]
    names = [_wrapped(row.name, 44) for row in rows]
    heights = [
        0.2 + 0.2 * (name.count("\n") + 1) + lines * (WIDTH / columns * shape + words)
        for name, shape in zip(names, shapes, strict=True)
    ]
    legend = 0.25 + sum(len(name) + 7 for name in class_names) / 200  # inches
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + legend), layout="constrained")
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, name, row, window in zip(parts, names, rows, windows, strict=True):
            part.suptitle(name, x=0.01, ha="left", fontsize=12, fontweight="bold")
            panels = part.subplots(lines, columns, squeeze=False).ravel()
            for axes in panels:
                axes.set_axis_off()
            masks = (row.truth, *(row.masks[method] for method in methods))
            scores = ("", *(f"Dice {row.dice[method]:.2f}" for method in methods))
            for axes, title, mask, score in zip(panels, titles, masks, scores, strict=False):
                figures.draw_slice(axes, row.image, mask, class_names, window, row.aspect)
                axes.set_title(title, loc="center", fontsize=10, fontweight="normal", pad=4)
                axes.text(0.5, -0.03, score, transform=axes.transAxes, fontsize=10, color=QUIET, ha="center", va="top")
        figures.class_legend(figure, class_names)
        return figures.to_bytes(figure, "png")


def _common_window(row: PictureRow, methods: Sequence[str]) -> figures.Window:
    masks = [row.truth, *(row.masks[name] for name in methods if name in row.masks and name in row.dice)]
    if len(masks) <= len(methods) or any(mask.shape != row.image.shape for mask in masks):
        raise GlocalError(f"{row.name} lacks a method's Dice, or a mask of the image's shape: show another case.")
    return figures.window_around(row.image.shape, *masks)


def _rank_axis(axes: Axes, right: float, scale: float, count: int, difference: float) -> None:
    """The axis of ranks at y = 0, and the critical difference above it; `right` is rank 1, `scale` inches per rank."""
    axes.set_axis_off()
    axes.plot((right, right - (count - 1) * scale), (0, 0), **THIN)
    for rank in range(1, count + 1):
        x, named = right - (rank - 1) * scale, (rank - 1) % -(-count // 10) == 0
        axes.plot((x, x), (0, -0.08 if named else -0.05), **THIN)
        if named:
            axes.text(x, -0.12, str(rank), color=QUIET, ha="center", **SMALL)
    axes.text(right + 0.07, -0.12, "= best", color=QUIET, **SMALL)
    left = right - max(count - 1, difference) * scale
    end = left + difference * scale
    axes.plot((left, left, left, end, end, end), (-0.56, -0.44, -0.5, -0.5, -0.44, -0.56), **THIN)
    axes.text(left, -0.64, f"critical difference {difference:.2f}", **SMALL)


def _check(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise GlocalError(f"The table to be drawn has no column {missing[0]!r}: it has {', '.join(map(str, frame))}.")
    if frame.dropna(subset=columns[2]).empty:
        raise GlocalError(f"There is no {columns[2]} to draw: nothing was measured, or only the baseline.")


def _budgets(frame: pd.DataFrame) -> list[str]:
    """The budgets: numbers in order, then the others as they come."""
    if frame.duplicated(["method", "labels"]).any():
        raise GlocalError("A method has several values for one budget: name apart what differs, by all its axes.")
    numbers = pd.to_numeric(frame["labels"], errors="coerce")
    return list(frame["labels"].iloc[np.argsort(numbers.to_numpy(float), kind="stable")].unique())


def _colour(number: int) -> str:
    return QUIET if number == 0 else figures.ink_colour((number - 1) % 6)


def _boxes(axes: Axes, left: float, of_class: pd.DataFrame, methods: Sequence[str]) -> None:
    for number, method in enumerate(methods):
        values = of_class.loc[of_class["method"] == method, "value"].dropna().to_numpy(float)
        axes.boxplot(values, positions=[left + number], widths=0.75, showfliers=False, **_box(number))
        x = left + number + figures.spread(len(values), 0.24)
        axes.scatter(x, values, s=9, color=_colour(number), alpha=0.65, linewidth=0, zorder=3)


def _box(number: int) -> dict[str, Any]:
    """The look of a method's box; where colours come again, it is filled."""
    style, colour = figures.box_style(_colour(number)), to_rgb(_colour(number))
    style["boxprops"]["facecolor"] = (*colour, 0.5 if number > 6 else 0.12)
    style["medianprops"]["color"] = INK
    return style


def _wrapped(name: str, letters: int) -> str:
    """A name in lines of so many letters, broken behind blanks and signs where it can be."""
    lines = re.findall(rf".{{1,{letters}}}(?:(?<=[\s_/@+,-])|$)|.{{{letters}}}", name, flags=re.DOTALL)
    return "\n".join(line.strip() for line in lines)


def _inches(text: str) -> float:
    font = FontProperties(family="DejaVu Sans")
    return max(float(TextPath((0, 0), line, size=10, prop=font).get_extents().width) for line in text.split("\n")) / 72


def _methods_below(figure: Figure, handles: Sequence[Any], methods: Sequence[str]) -> None:
    """The legend, in as many columns as fit; the figure grows by it."""
    names = [_wrapped(name, 26) for name in methods]
    widths = [_inches(name) + 0.5 for name in names]
    columns = max(n for n in range(1, len(names) + 1) if n == 1 or sum(map(max, np.array_split(widths, n))) < WIDTH)
    heights = [LINE * (name.count("\n") + 1) for name in names]
    figure.set_figheight(figure.get_figheight() + max(map(sum, np.array_split(heights, columns))) + 0.1)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.8)
