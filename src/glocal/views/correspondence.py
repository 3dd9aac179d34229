"""Which pixel of one view is which pixel of another: from the two draws, with no table.

Points are (x, y) in pixels, (0, 0) the centre of the first pixel, on an image or map of `size` (H, W). A draw holds for
every resolution: for matches between feature maps of 14 x 14 cells give `size` (14, 14) and points in cells.
"""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from glocal.views.ranges import moved
from glocal.views.spatial import Spatial

STEPS = 6  # of Newton's method: five bring all points of an unfolded view within 0.01 pixel
TOLERANCE = 0.05  # pixels


def source_points(draw: Spatial, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Where points (B, P, 2) of the views lie in the source images: (B, P, 2) float32, maybe outside."""
    return _pixels(draw.source(_places(points, size)), size)


def view_points(draw: Spatial, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Where points (B, P, 2) of the source images lie in the views: (B, P, 2) float32, maybe outside.

    Exact without elastic displacement; with it, Newton's method. Where the displacement folds the image over, a point
    may lie at several places of the view (one is given) or at none (the answer is wrong then; `matching_points` tells).
    """
    with torch.autocast(points.device.type, enabled=False):
        draw = draw.to(points.device)
        inverse = torch.linalg.inv_ex(draw.matrix[:, :, :2]).inverse  # waits for no device, unlike inv
        goal = (_places(points, size) - draw.matrix[:, None, :, 2]) @ inverse.mT
        return _pixels(goal if draw.displacement is None else _unbend(draw, goal), size)


def matching_points(first: Spatial, second: Spatial, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where points (B, P, 2) of the first views are found in the second views of the same images.

    Returns the points (B, P, 2) float32 and whether they are matches, (B, P) bool: the source point and the point in
    the second view lie within the image (between the centres of its outermost pixels), and the elastic displacement
    could be undone there.
    """
    source = source_points(first, points, size)
    matched = view_points(second, source, size)
    found = (source_points(second, matched, size) - source).norm(dim=-1) < TOLERANCE
    return matched, found & _within(source, size) & _within(matched, size)


def matching_grid(first: Spatial, second: Spatial, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`matching_points` for every cell of a map of `size` (h, w), on the draws' device: (B, h, w, 2) and (B, h, w)."""
    rows, columns = (torch.arange(side, device=first.matrix.device) for side in size)
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(1, -1, 2)
    matched, inside = matching_points(first, second, points.expand(len(first), -1, -1), size)
    return matched.view(-1, *size, 2), inside.view(-1, *size)


def values_at(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps (B, C, H, W) bilinearly at points (B, P, 2) in pixels: (B, C, P); zero outside."""
    places = _places(points, (maps.shape[2], maps.shape[3])).to(maps.dtype)
    return grid_sample(maps, places[:, :, None], align_corners=False)[..., 0]


def _unbend(draw: Spatial, goal: Tensor) -> Tensor:
    """Solve v + d(v) = goal for v, all (B, P, 2), by Newton's method with slopes over `near`, about a pixel."""
    near = 0.01
    right, down = _pair(near, 0.0, goal.device), _pair(0.0, near, goal.device)
    place = goal
    for _ in range(STEPS):
        here, beside, below = draw.bend(torch.cat([place, place + right, place + down], 1)).chunk(3, 1)
        miss = goal - place - here
        (xx, yx), (xy, yy) = ((right + beside - here) / near).unbind(-1), ((down + below - here) / near).unbind(-1)
        # Where the image is folded over the determinant is not positive: small steps there, instead of infinite ones.
        area = (xx * yy - xy * yx).clamp_min(0.1)
        step = torch.stack([yy * miss[..., 0] - xy * miss[..., 1], xx * miss[..., 1] - yx * miss[..., 0]], -1)
        place = place + (step / area[..., None]).clamp(-0.5, 0.5)
    return place


def _places(points: Tensor, size: tuple[int, int]) -> Tensor:
    return (2 * points.float() + 1) / _pair(size[1], size[0], points.device) - 1


def _pixels(places: Tensor, size: tuple[int, int]) -> Tensor:
    return ((places + 1) * _pair(size[1], size[0], places.device) - 1) / 2


def _within(points: Tensor, size: tuple[int, int]) -> Tensor:
    last = _pair(size[1] - 1, size[0] - 1, points.device)
    return ((points >= -TOLERANCE) & (points <= last + TOLERANCE)).all(-1)


def _pair(x: float, y: float, device: torch.device) -> Tensor:
    return moved(torch.tensor([x, y], dtype=torch.float32), device)
