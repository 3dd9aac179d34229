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
    points = _lattice(size, first.matrix.device).expand(len(first), -1, -1)
    matched, inside = matching_points(first, second, points, size)
    return matched.view(-1, *size, 2), inside.view(-1, *size)


def values_at(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps (B, C, H, W) bilinearly at points (B, P, 2) in pixels: (B, C, P); zero outside."""
    places = _places(points, (maps.shape[2], maps.shape[3])).to(maps.dtype)
    return grid_sample(maps, places[:, :, None], align_corners=False)[..., 0]


def matching_cells(first: Spatial, second: Spatial, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Which cell of the second views' maps holds what lies at the centre of each cell of the first views' maps.

    Args:
        first: B views of the images.
        second: as many other views of them.
        size: (H, W) of the views in pixels.
        stride: pixels per cell and axis. The maps cover the views; the last cells may reach beyond them.

    Returns:
        (B, P) int64, the cells of the second maps counted row after row, and (B, P) bool, whether they are matches: the
        centre lies in both views and in the source, see `matching_points`; the cell is 0 where it does not.
    """
    columns = cells_of(size, stride)[1]
    centres = _lattice(cells_of(size, stride), first.matrix.device) * stride + (stride - 1) / 2
    matched, found = matching_points(first, second, centres.expand(len(first), -1, -1), size)
    found = found & _within(centres, size)
    column, row = torch.where(found[..., None], (matched + 0.5) / stride, 0).long().unbind(-1)
    return row * columns + column, found


def overlap_grid(first: Spatial, second: Spatial, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """One grid of points over what both views show of each source: where to read either map for the same places.

    The grid stands upright in the source, where the boxes around the two views overlap, and has as many points as a map
    has cells. With rotations some of them lie outside one of the views.

    Args:
        first: B views of the images.
        second: as many other views of them.
        size: (H, W) of the views in pixels.
        stride: pixels per cell and axis. The maps cover the views; the last cells may reach beyond them.

    Returns:
        (B, P, 2) points in cells of the first maps and of the second, and (B, P) bool, whether both views show the
        place: False for all of an image whose overlap is less than a cell of either map (elastic displacement apart).
    """
    rows, columns = cells_of(size, stride)
    count, sides = (_pair(x, y, first.matrix.device) for x, y in ((columns, rows), (size[1], size[0])))
    corners = _lattice((rows + 1, columns + 1), count.device) * sides / count - 0.5  # also of the views' edges
    edges = [source_points(draw, corners.expand(len(first), -1, -1), size) for draw in (first, second)]
    low = torch.stack([edge.amin(1) for edge in edges]).amax(0).clamp_min(-0.5)  # (B, 2)
    high = torch.stack([edge.amax(1) for edge in edges]).amin(0).minimum(sides - 0.5)
    extent = (high - low).clamp_min(0)
    source = low[:, None] + extent[:, None] * (_lattice((rows, columns), count.device) + 0.5) / count
    seen = [view_points(draw, source, size) for draw in (first, second)]
    inside, cells = torch.ones_like(source[..., 0], dtype=torch.bool), []
    for draw, points in zip((first, second), seen, strict=True):
        undone = (source_points(draw, points, size) - source).norm(dim=-1) < TOLERANCE
        inside = inside & undone & _within(points, size, border=0.5)
        cells.append(torch.linalg.det(draw.matrix[:, :, :2]).abs() * stride**2)  # area of a cell in the source
    area = extent.prod(-1) * inside.float().mean(1)
    enough = area > (1 - 1e-3) * torch.stack(cells).amax(0)  # rounding aside
    return (seen[0] + 0.5) / stride - 0.5, (seen[1] + 0.5) / stride - 0.5, inside & enough[:, None]


def cells_of(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the map of an image of `size` (H, W); the last cells may reach beyond it."""
    return -(-size[0] // stride), -(-size[1] // stride)


def interpolated(maps: Tensor, points: Tensor) -> Tensor:
    """Read coarse maps (B, C, h, w) bilinearly at points (B, P, 2) in cells: (B, C, P), in float32 or finer.

    Beyond the centres of the outermost cells lies what these hold. A product with the weights of all cells, hence the
    same gradient each time on a GPU too, unlike `values_at`; it takes memory for B P h w weights.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        down, right = (
            (1 - (place.clamp(0, side - 1)[..., None] - torch.arange(side, device=maps.device)).abs()).clamp_min(0)
            for place, side in zip(points.flip(-1).unbind(-1), maps.shape[2:], strict=True)
        )
        weights = (down[..., :, None] * right[..., None, :]).flatten(2).to(maps.dtype)  # (B, P, h w)
        return maps.flatten(2) @ weights.mT


def _lattice(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(x, y) of the places of a map of `shape` (h, w), row after row: (h w, 2) float32."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in shape)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 2)


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


def _within(points: Tensor, size: tuple[int, int], border: float = 0.0) -> Tensor:
    """Whether points lie between the centres of the outermost pixels, or up to `border` beyond; (..., 2) -> (...)."""
    last = _pair(size[1] - 1, size[0] - 1, points.device)
    return ((points >= -TOLERANCE - border) & (points <= last + TOLERANCE + border)).all(-1)


def _pair(x: float, y: float, device: torch.device) -> Tensor:
    return moved(torch.tensor([x, y], dtype=torch.float32), device)
