"""Two windows of a slice and the places that both show; pgl, which lays a grid over these."""

import torch
from torch import Tensor

from figures.sheet import BLUE, VERMILION, Sheet
from figures.step import SIDE, pool_of, stage_of, watched
from glocal.data.store import Store
from glocal.reporting.figures import INK, QUIET
from glocal.views.correspondence import source_points
from glocal.views.spatial import Spatial

LEFT, TOP, SLICE, VIEW = 40, 62, 224, 280  # where the slice is and how wide; how wide its views


def pgl(store: Store) -> Sheet:
    """The grid over what both views of a slice show, as the step lays it."""
    stage, number = stage_of(pool_of(store), "pgl", batch=8), 3
    seen = watched(stage, "overlap_grid")
    (*draws, _, stride), (*points, shown) = seen.calls["overlap_grid"][0]
    picture = stage.pool.images(stage.pool.epoch(8, stage.options.seed, 0))[number, 0]
    sheet, pixels = Sheet(366), [(some[number] + 0.5) * stride for some in points]
    own = [draw[number : number + 1] for draw in draws]
    two_windows(sheet, picture, own, pixels, shown[number], ("view 1", "view 2"))
    for view in range(2):
        sheet.image(seen.inputs[0][0][view * 8 + number, 0], view_at(view), 34, VIEW)
    what = "A grid over what both windows share: at each number the features of one view predict those of the other."
    sheet.text(f"{what}\nFaded numbers lie outside one of the windows and take no part.", 450, 344, color=QUIET)
    return sheet


def view_at(view: int) -> float:
    """Where the left edge of a view is."""
    return 310 + view * 298


def two_windows(
    sheet: Sheet, picture: Tensor, draws: list[Spatial], points: list[Tensor], shown: Tensor, names: tuple[str, str]
) -> None:
    """A slice with the windows of two views, and numbered points in all three; the views are drawn by the caller.

    Args:
        sheet: where to.
        picture: the slice `(H, W)`.
        draws: of each view, for this slice alone.
        points: of each view, `(P, 2)` in pixels from its corner.
        shown: `(P,)` bool, whether both views show the place.
        names: of the views.
    """
    scale, corner = SLICE / SIDE, torch.tensor([LEFT, TOP])
    sheet.image(picture, LEFT, TOP, SLICE)  # windows may reach beyond it
    sheet.text("slice, both windows", LEFT + SLICE / 2, 18, weight="bold")
    numbered(sheet, _in_slice(draws[0], points[0]), shown, LEFT, TOP, scale)
    corners = torch.tensor([[0.0, 0.0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]])
    for view, (colour, style) in enumerate(((BLUE, "-"), (VERMILION, "--"))):
        x = view_at(view)
        outline = _in_slice(draws[view], corners) * scale + corner
        sheet.outline(outline.tolist(), colour, linestyle=style, linewidth=2.2)
        sheet.rectangle(x, 34, VIEW, VIEW, edgecolor=colour, linestyle=style, linewidth=2.6, zorder=3)
        numbered(sheet, points[view], shown, x, 34, VIEW / SIDE)
        sheet.text(names[view], x + VIEW / 2, 18, weight="bold")


def numbered(sheet: Sheet, points: Tensor, shown: Tensor, x: float, y: float, scale: float) -> None:
    """Points (P, 2) in pixels from the corner of a picture at (x, y), the same number in every picture."""
    disc = {"boxstyle": "circle,pad=0.18", "facecolor": INK, "edgecolor": "white", "linewidth": 0.7}
    for number, ((right, down), there) in enumerate(zip(points.tolist(), shown.tolist(), strict=True)):
        look = {"bbox": disc, "weight": "bold"} if there else {"alpha": 0.6}
        if 0 <= right <= SIDE and 0 <= down <= SIDE:
            sheet.text(str(number + 1), x + right * scale, y + down * scale, 7, color="white", **look)


def _in_slice(draw: Spatial, points: Tensor) -> Tensor:
    """Where points (P, 2) of a view lie in the slice, in pixels from its corner."""
    return source_points(draw, points[None] - 0.5, (SIDE, SIDE))[0] + 0.5
