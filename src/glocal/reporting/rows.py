"""Rows of slices as a picture: neighbours below those that were asked, generated images below real ones."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from glocal.reporting.figures import QUIET, STYLE, class_legend, draw_slice, tallness, to_bytes

Row = tuple[str, NDArray[np.generic], NDArray[np.integer] | None]


def slice_rows(
    rows: Sequence[Row],
    headings: NDArray[np.floating] | None = None,
    class_names: Mapping[str, int] | None = None,
) -> bytes:
    """Rows of slices as PNG, as many columns as there are in the longest.

    Args:
        rows: name, images `(columns, H, W)` of any grey values, and label maps `(columns, H, W)` to lay over them.
        headings: `(rows, columns)` numbers to write above the slices.
        class_names: of the label maps, which have a legend then.
    """
    columns, classes = max(len(images) for _, images, _ in rows), class_names or {}
    window = (0, rows[0][1].shape[1]), (0, rows[0][1].shape[2])
    height, masked = 1.5 * tallness(window, 1.0) + 0.55, any(labels is not None for _, _, labels in rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * columns, len(rows) * height + 0.4 * masked), layout="constrained")
        if masked:
            class_legend(figure, classes)
        bands = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for number, (band, (name, images, labels)) in enumerate(zip(bands, rows, strict=True)):
            band.suptitle(name, x=0.01, ha="left", fontsize=12, fontweight="bold")
            for column, axes in enumerate(band.subplots(1, columns, squeeze=False)[0]):
                if column >= len(images):
                    axes.set_axis_off()
                    continue
                mask = None if labels is None else labels[column]
                draw_slice(axes, images[column], mask, classes, window, 1.0)
                if headings is not None:
                    title = f"{headings[number, column]:.2f}"
                    axes.set_title(title, loc="center", fontsize=11, fontweight="normal", color=QUIET, pad=3)
        return to_bytes(figure, "png")
