"""What all pictures are drawn with: a white page on which slices, frames, boxes, arrows and words are placed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from glocal.reporting.figures import GRID, INK, QUIET

WIDTH = 900
DOTS = 1.25  # pixels of the file per unit of the page
LEVELS = 20  # of each colour channel: half the size of the file, and no difference to the eye
BLUE, VERMILION, GREEN, SKY, PALE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#eef2f5"

# Colour, line and letter each tell who is who; what takes no part is faded and has none of them.
LOOKS: dict[str, tuple[str, Any, float, str]] = {
    "anchor": (INK, "-", 4.0, "A"),
    "positive": (BLUE, "-", 2.6, "+"),
    "negative": (VERMILION, (0, (2.2, 1.3)), 1.6, "−"),
}
WORDS = {"anchor": "anchor", "positive": "attracts it", "negative": "repels it"}


def role_of(number: int, anchor: int, positive: Tensor, negative: Tensor) -> str:
    """What candidate `number` is to an anchor, whose rows of the masks are given: a key of `LOOKS`, or ''."""
    if number == anchor:
        return "anchor"
    return "positive" if positive[number] else "negative" if negative[number] else ""


class Sheet:
    """A page of 900 by `height` units; x to the right, y down."""

    def __init__(self, height: float) -> None:
        self.height = height
        with mpl.rc_context({"font.family": "DejaVu Sans"}):
            self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100 * DOTS, facecolor="white")
            self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def image(self, pixels: Tensor, x: float, y: float, side: float, role: str | None = None, **look: Any) -> None:
        """A slice or map `(H, W)` at (x, y), `side` wide; framed by its role, faded if that is ''."""
        height = side * pixels.shape[0] / pixels.shape[1]
        look = _or(look, cmap="gray", vmin=0.0, vmax=1.0, interpolation="bilinear", zorder=1)
        look |= {"alpha": 0.3} if role == "" else {}
        self.axes.imshow(pixels.detach().numpy(), extent=(x, x + side, y + height, y), **look)
        if role:
            self.frame(role, x, y, side, height)

    def map(self, values: Tensor, x: float, y: float, side: float) -> None:
        """A map `(H, W)` of any values, from dark (the lowest) to bright."""
        self.image(values, x, y, side, None, cmap="cividis", vmin=None, vmax=None, interpolation="nearest")

    def frame(self, role: str, x: float, y: float, width: float, height: float) -> None:
        """The frame of a role, with its letter in the corner; a thin dotted one for no role."""
        if not role:
            return self.rectangle(x, y, width, height, edgecolor=GRID, linewidth=0.8, linestyle=":")
        colour, style, line, letter = LOOKS[role]
        halo = [withStroke(linewidth=line + 2, foreground="white")] if role == "anchor" else []  # it is dark
        self.rectangle(
            x, y, width, height, edgecolor=colour, linestyle=style, linewidth=line, zorder=4, path_effects=halo
        )
        self.rectangle(x, y, 14, 14, facecolor=colour, edgecolor="white", linewidth=0.8, zorder=5)
        self.text(letter, x + 7, y + 7, size=9, weight="bold", color="white")

    def rectangle(self, x: float, y: float, width: float, height: float, **look: Any) -> None:
        """A rectangle, of which nothing is seen but what is asked for."""
        self.axes.add_patch(Rectangle((x, y), width, height, **_or(look, facecolor="none", linewidth=0)))

    def line(self, points: Sequence[Sequence[float]], color: str, **look: Any) -> None:
        """A line through points (x, y)."""
        self.axes.plot(*zip(*points, strict=True), color=color, solid_capstyle="round", **look)

    def box(self, text: str, x: float, y: float, width: float, height: float, **look: Any) -> None:
        """A step of the computation."""
        look = _or(look, facecolor=PALE, edgecolor="#aab4be", linewidth=1.0)
        style = "round,pad=0,rounding_size=7"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, zorder=2, **look))
        self.text(text, x + width / 2, y + height / 2)

    def text(self, text: str, x: float, y: float, size: float = 9.5, align: str = "center", **look: Any) -> None:
        """Words, their middle at height y."""
        look = _or(look, color=INK, zorder=7, linespacing=1.35)
        self.axes.text(x, y, text, ha=align, va="center", fontsize=size, **look)

    def arrow(self, start: Sequence[float], end: Sequence[float], color: str = QUIET, **look: Any) -> None:
        """From (x, y) to (x, y)."""
        look = _or(look, arrowstyle="-|>", linewidth=1.3, mutation_scale=11, shrinkA=0, shrinkB=0)
        self.axes.add_patch(FancyArrowPatch((start[0], start[1]), (end[0], end[1]), color=color, zorder=6, **look))

    def pull(self, start: Sequence[float], end: Sequence[float], **look: Any) -> None:
        """What is moved towards what."""
        self.arrow(start, end, BLUE, **_or(look, linewidth=2.0, mutation_scale=14))

    def outline(self, corners: Sequence[Sequence[float]], color: str, **look: Any) -> None:
        """A closed line through corners (x, y)."""
        self.axes.add_patch(Polygon(np.array(corners), closed=True, fill=False, edgecolor=color, zorder=5, **look))

    def bars(self, values: Tensor, top: float, x: float, y: float, size: tuple[float, float], color: str) -> None:
        """Probabilities as bars that stand at the bottom of a box of (width, height), which one of `top` fills."""
        step = size[0] / len(values)
        self.rectangle(x, y, *size, facecolor=PALE)
        for place, value in enumerate((values / top * size[1]).tolist()):
            self.rectangle(x + (place + 0.12) * step, y + size[1] - value, 0.76 * step, value, facecolor=color)

    def legend(self, y: float, neither: str = "takes no part", **words: str) -> None:
        """What frames and letters mean; `words` replace the usual ones."""
        x = 30.0
        for role, word in (WORDS | words).items():
            self.frame(role, x, y - 11, 30, 22)
            self.text(word, x + 40, y, align="left")
            x += 66 + 7 * len(word)
        if neither:
            self.rectangle(x, y - 11, 30, 22, facecolor=GRID)
            self.text(f"faded: {neither}", x + 40, y, align="left")

    def save(self, path: Path) -> None:
        """Write a PNG of few colours, the same bytes each time."""
        self.axes.set(xlim=(0, WIDTH), ylim=(self.height, 0), aspect="auto")
        canvas: Any = FigureCanvasAgg(self.figure)
        canvas.draw()
        rounded = np.rint(np.asarray(canvas.buffer_rgba())[..., :3] / 255 * LEVELS) * 255 / LEVELS
        picture = Image.fromarray(rounded.round().astype(np.uint8))
        picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


def _or(look: dict[str, Any], **usual: Any) -> dict[str, Any]:
    """The usual look where nothing else is said."""
    return usual | look
