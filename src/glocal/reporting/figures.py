"""Figures for reports, as bytes: curves and plots as SVG, pictures of slices as PNG.

All of them use matplotlib's objects without pyplot, so that nothing global is left behind and no screen is needed.
Type is large for the size of the figure: a report is read on a phone too, where figures shrink to a third.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

# Okabe & Ito's colours, told apart with any colour vision; first those that stand out on grey.
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, QUIET, GRID = "#1d2733", "#5b6875", "#e3e8ed"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab4be",
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.hashsalt": "glocal",  # the same figure is the same bytes
}
WIDTH = 5.6  # inches
OPACITY = 0.65  # of a mask: over dark muscle, half a colour is no longer that of the legend

Labels = NDArray[np.integer] | NDArray[np.bool_]
Window = tuple[tuple[int, int], tuple[int, int]]


def learning_curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, ylabel: str) -> bytes:
    """Curves over training as SVG: `series` maps a name to its points (iteration, value)."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(title, 3.4)
        for number, (name, points) in enumerate(series.items()):
            x, y = np.array(points, dtype=float).reshape(-1, 2).T
            mark, line = "o" if len(x) < 3 else None, "--" if number > 6 else "-"  # colours come again after seven
            axes.plot(x, y, line, color=ink_colour(number), linewidth=1.8, marker=mark, label=name)
        axes.set(xlabel="Iteration", ylabel=ylabel)
        axes.margins(x=0.01)
        if len(series) > 1:
            _legend_below(figure, axes.get_legend_handles_labels())
        return to_bytes(figure, "svg")


def overlay_row(
    image: NDArray[np.generic],
    truth: Labels | None,
    prediction: Labels | None,
    class_names: Mapping[str, int],
    title: str,
    aspect: float = 1.0,
) -> bytes:
    """The same slice side by side as PNG: image, expert (left out without `truth`) and prediction.

    Shown is the part of the slice that holds all masks, with its surroundings.

    Args:
        image: `(H, W)`, any grey values.
        truth: label map `(H, W)`, or None.
        prediction: label map `(H, W)`, or None.
        class_names: class name to label value; a value has the same colour in every picture.
        title: printed above.
        aspect: height of a pixel over its width, in mm.
    """
    panels = [("Image", None), ("Expert", truth), ("Prediction", prediction)]
    panels = [(name, mask) for name, mask in panels if name == "Image" or mask is not None]
    with mpl.rc_context(STYLE):
        window = window_around(image.shape, truth, prediction)
        size = 2.1 * len(panels), 2.1 * tallness(window, aspect) + 0.95
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for axes, (name, mask) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_slice(axes, image, mask, class_names, window, aspect)
            axes.set_title(name, loc="center", fontsize=11, fontweight="normal", color=QUIET, pad=4)
        class_legend(figure, class_names)
        return to_bytes(figure, "png")


def class_boxes(frame: pd.DataFrame, metric: str, label: str = "") -> bytes:
    """One metric of every case by class as SVG: box (quartiles, median) and one point per case.

    `frame` is what `evaluate` returns, its classes in the order of their labels; hollow points are classes that were
    missed, invented or had no prediction. `label` names the axis, else the metric's name does.
    """
    with mpl.rc_context(STYLE):
        classes = list(frame["class"].unique())
        figure, axes = canvas("", 3.4)
        for place, name in enumerate(classes):
            rows = frame[(frame["class"] == name) & frame[metric].notna()]
            values, lost = rows[metric].to_numpy(float), rows["note"].isin(["missed", "invented", "no prediction"])
            colour = class_ink(place + 1)  # that of the class in pictures
            axes.boxplot(values, positions=[place], widths=0.5, showfliers=False, **box_style(colour))
            x = place + spread(len(values), 0.17)
            axes.scatter(x[~lost], values[~lost], s=14, color=colour, alpha=0.65, linewidth=0, zorder=3)
            axes.scatter(x[lost], values[lost], s=26, facecolor="white", edgecolor=colour, linewidth=1.4, zorder=3)
        axes.set_xticks(range(len(classes)), classes)
        axes.set_ylabel(label or metric)
        axes.grid(axis="x", visible=False)
        return to_bytes(figure, "svg")


def paired_differences(table: pd.DataFrame) -> bytes:
    """Differences in Dice between paired runs against zero as SVG: a line per contender and number of labels.

    `table` has the columns contender, split, labels, draw, difference; right of zero the contender is better. Points
    are pairs (a marker per split), the bar is their mean.
    """
    with mpl.rc_context(STYLE):
        groups = list(table.groupby(["contender", "labels"], sort=False))
        figure, axes = canvas("", 1.5 + 0.42 * len(groups))
        budgets, splits = list(table["labels"].unique()), list(table["split"].unique())
        for place, ((_, budget), rows) in enumerate(groups):
            colour = ink_colour(budgets.index(budget))
            for split, pairs in rows.groupby("split", sort=False):
                y = place + spread(len(pairs), 0.13)
                marker = MARKERS[splits.index(split) % len(MARKERS)]
                axes.scatter(pairs["difference"], y, s=26, marker=marker, color=colour, alpha=0.7, linewidth=0)
            mean = rows["difference"].mean()
            axes.plot([mean, mean], [place - 0.32, place + 0.32], color=INK, linewidth=2.2, solid_capstyle="round")
        axes.axvline(0, color=QUIET, linewidth=1.2, zorder=1)
        names = [f"{contender}, {budget} label{'' if budget == 1 else 's'}" for (contender, budget), _ in groups]
        axes.set_yticks(range(len(groups)), names)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("← worse      Difference in Dice      better →")
        if len(splits) > 1:
            marks = [_mark(MARKERS[number % len(MARKERS)]) for number in range(len(splits))]
            _legend_below(figure, (marks, [f"Split {split}" for split in splits]))
        return to_bytes(figure, "svg")


def canvas(title: str, height: float) -> tuple[Figure, Axes]:
    """A figure of the usual width with one plot; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    if title:
        axes.set_title(title)
    return figure, axes


def draw_slice(
    axes: Axes,
    image: NDArray[np.generic],
    mask: Labels | None,
    class_names: Mapping[str, int],
    window: Window,
    aspect: float,
) -> None:
    """The shown part of a slice `(H, W)` with its mask, translucent."""
    (top, bottom), (left, right) = window
    # Of the shown part alone, and with its brightest spots cut: fat would darken all else.
    low, high = np.percentile(image[top:bottom, left:right].astype(np.float32), (0.5, 98))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="bilinear")
    if mask is not None:
        layer = np.zeros((*mask.shape, 4))
        for value in (value for value in class_names.values() if value != 0):
            layer[mask == value] = (*to_rgb(class_colour(value)), OPACITY)
        axes.imshow(layer, aspect=aspect, interpolation="nearest")
    axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    axes.set_axis_off()


def class_colour(value: int) -> str:
    """The colour of a label value (1 or more), the same in every picture; they repeat after seven."""
    return COLOURS[(value - 1) % len(COLOURS)]


def class_ink(value: int) -> str:
    """The colour of a label value, darker: for lines on white."""
    red, green, blue = to_rgb(class_colour(value))
    return to_hex((0.8 * red, 0.8 * green, 0.8 * blue))


def ink_colour(number: int) -> str:
    """Colours for lines on white: the same set, begun with the dark ones."""
    return ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b6875")[number % 7]


def class_legend(figure: Figure, class_names: Mapping[str, int]) -> None:
    """The colours of the classes below a figure."""
    handles = [Patch(facecolor=class_colour(value), label=name) for name, value in class_names.items() if value != 0]
    _legend_below(figure, (handles, [str(handle.get_label()) for handle in handles]))


def _legend_below(figure: Figure, entries: tuple[Sequence[Any], Sequence[str]]) -> None:
    handles, names = entries
    room = figure.get_figwidth() * 11.5  # in letters; an entry needs five besides its name
    columns = int(np.clip(room // (np.mean([len(name) for name in names]) + 5), 1, len(names))) if names else 1
    figure.legend(handles, names, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=1.2)


def _mark(marker: str) -> Line2D:
    return Line2D([], [], color=QUIET, marker=marker, linestyle="", markersize=5)


def box_style(colour: str) -> dict[str, Any]:
    """The look of a box in one colour, as keywords of matplotlib's `boxplot`."""
    line = {"color": colour, "linewidth": 1.2}
    return {
        "patch_artist": True,
        "boxprops": {"facecolor": (*to_rgb(colour), 0.12), "edgecolor": colour, "linewidth": 1.2},
        "medianprops": {"color": colour, "linewidth": 2.4},
        "whiskerprops": line,
        "capprops": line,
    }


def spread(count: int, width: float) -> NDArray[np.float64]:
    """Offsets that keep points apart, the same each time: the golden ratio's even but patternless sequence."""
    return np.asarray(((np.arange(count) * 0.6180339887 + 0.5) % 1 - 0.5) * 2 * width, dtype=np.float64)


def window_around(shape: tuple[int, ...], *masks: Labels | None) -> Window:
    """What of the slice is shown, rows and columns: all masks and as much again around them; without any, all of it."""
    marked = [np.argwhere(mask) for mask in masks if mask is not None and mask.any()]
    if not marked:
        return (0, shape[0]), (0, shape[1])
    found = np.concatenate(marked)
    first, last = found.min(0), found.max(0) + 1
    margin = int((last - first).max() // 2) + 8
    low, high = np.maximum(first - margin, 0), np.minimum(last + margin, shape)
    return (int(low[0]), int(high[0])), (int(low[1]), int(high[1]))


def tallness(window: Window, aspect: float) -> float:
    """Height of the picture over its width; extreme shapes are held to what fits a page."""
    (top, bottom), (left, right) = window
    return float(np.clip((bottom - top) * aspect / (right - left), 0.3, 2.5))


def to_bytes(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The figure as the bytes of a file, which are the same each time."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=170, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def in_few_colours(png: bytes) -> bytes:
    """The same picture in half the bytes: a page holds many."""
    buffer, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    # An octree would be smaller still, but leaves too few greys: MR would show bands. Dithering would be noise to pack.
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()
