"""Slices of a case side by side: predicted structures above, uncertainty below."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from glocal.reporting.figures import (
    QUIET,
    STYLE,
    Labels,
    class_legend,
    draw_slice,
    in_few_colours,
    tallness,
    to_bytes,
    window_around,
)


def montage(
    images: NDArray[np.generic],
    masks: Labels,
    uncertainty: NDArray[np.floating],
    class_names: Mapping[str, int],
    titles: Sequence[str],
    title: str,
    aspect: float = 1.0,
) -> bytes:
    """Slices as PNG, a column each: with their mask, and their uncertainty from 0 (black) to 1 (pale yellow).

    Args:
        images: `(n, H, W)`, any grey values.
        masks: label maps `(n, H, W)`.
        uncertainty: `(n, H, W)`, from 0 to 1.
        class_names: class name to label value.
        titles: of the slices.
        title: printed above.
        aspect: height of a pixel over its width, in mm.
    """
    with mpl.rc_context(STYLE):
        window = window_around(images.shape[1:], (masks != 0).any(0))
        size = 1.25 * max(3, len(images)), 2.35 * tallness(window, aspect) + 0.9
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        above, below = figure.subplots(2, len(images), squeeze=False)
        for k, axes in enumerate(above):
            draw_slice(axes, images[k], masks[k], class_names, window, aspect)
            axes.set_title(titles[k], loc="center", fontsize=8, fontweight="normal", color=QUIET, pad=3)
            # The map alone: over the image its colours would be those of the image as much as of the doubt.
            draw_slice(below[k], images[k], None, class_names, window, aspect)
            shades = below[k].imshow(uncertainty[k], cmap="inferno", vmin=0, vmax=1, aspect=aspect)
            _outline(below[k], masks[k])
        bar = figure.colorbar(shades, ax=list(below), fraction=0.03, pad=0.01, ticks=[0, 0.5, 1])
        bar.ax.tick_params(labelsize=7, length=2, colors=QUIET)
        bar.outline.set_visible(False)
        class_legend(figure, class_names)
        return in_few_colours(to_bytes(figure, "png"))


def _outline(axes: Axes, mask: Labels) -> None:
    """Thin white lines around all structures together."""
    if (mask != 0).any():
        axes.contour((mask != 0).astype(float), levels=[0.5], colors="w", linewidths=0.6, alpha=0.7)
