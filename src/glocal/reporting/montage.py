"""Slices of a case side by side: predicted structures above, uncertainty below."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from glocal.reporting.figures import QUIET, STYLE, Labels, class_legend, draw_slice, tallness, to_bytes, window_around


def montage(
    images: NDArray[np.generic],
    masks: Labels,
    uncertainty: NDArray[np.floating],
    class_names: Mapping[str, int],
    titles: Sequence[str],
    title: str,
    aspect: float = 1.0,
) -> bytes:
    """Slices as PNG, a column each: with their mask, and with their uncertainty from 0 (nothing) to 1 (white).

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
            draw_slice(axes, images[k], None, masks[k], class_names, window, aspect)
            axes.set_title(titles[k], loc="center", fontsize=8, fontweight="normal", color=QUIET, pad=3)
            draw_slice(below[k], images[k], None, None, class_names, window, aspect)
            below[k].imshow(uncertainty[k], cmap="inferno", vmin=0, vmax=1, alpha=0.75, aspect=aspect)
        class_legend(figure, class_names, outline=False, fill=False)
        return _in_few_colours(to_bytes(figure, "png"))


def _in_few_colours(png: bytes) -> bytes:
    """The same picture in a fourth of the bytes: a page holds many."""
    buffer, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    # The octree keeps rare colours, such as those of the legend; dithering would be noise to pack.
    few = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()
