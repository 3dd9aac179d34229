"""Matching pixels of two views: in closed form, and in images that carry their own coordinates."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from glocal.views.correspondence import (
    cells_of,
    interpolated,
    matching_cells,
    matching_grid,
    matching_points,
    overlap_grid,
    source_points,
    values_at,
    view_points,
)
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial

SIZE = (72, 96)
AFFINE = SpatialOptions(
    rotation=40.0, scale=(0.8, 1.4), anisotropy=0.2, shift=0.15, crop=(0.6, 1.0), flip=(0.5, 0.5), probability=0.9
)
ELASTIC = AFFINE.model_copy(update={"elastic": 2.5})
both_kinds = pytest.mark.parametrize(
    ("options", "accuracy"), [(AFFINE, 0.01), (ELASTIC, 0.1)], ids=["affine", "elastic"]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(options: SpatialOptions, seed: int, batch: int = 12) -> Spatial:
    return draw_spatial(options, batch, SIZE, seeded(seed))


def scattered(batch: int = 12, count: int = 150) -> Tensor:
    return torch.rand(batch, count, 2, generator=seeded(9)) * torch.tensor([SIZE[1] - 1, SIZE[0] - 1])


def coordinates(batch: int = 12) -> Tensor:
    """Images whose first channel is x, second y and third 1: outside, where views are zero, they say so."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).float().expand(batch, -1, -1, -1)


@settings(max_examples=25, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    zoom=st.floats(0.5, 2),
    mirror=st.booleans(),
    shift=st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3)),
    width=st.integers(16, 200),
    height=st.integers(16, 200),
)
def test_affine_points_in_closed_form(
    degrees: float, zoom: float, mirror: bool, shift: tuple[float, float], width: int, height: int
) -> None:
    """A similarity about the middle in float64 pixels, written as the stored matrix, against the point functions."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom
    turn = np.diag([-1.0 if mirror else 1.0, 1.0]) @ turn  # source to view
    half, middle = np.array([width / 2, height / 2]), np.array([(width - 1) / 2, (height - 1) / 2])
    move = np.array(shift) * 2 * half
    back = np.linalg.inv(turn)
    matrix = np.diag(1 / half) @ np.c_[back @ np.diag(half), -back @ move]
    spatial = Spatial(torch.tensor(matrix, dtype=torch.float32)[None])
    source = np.random.default_rng(0).uniform(0, 1, (20, 2)) * (2 * half - 1)
    view = (source - middle) @ turn.T + move + middle
    found = view_points(spatial, torch.tensor(source)[None], (height, width))[0].numpy()
    np.testing.assert_allclose(found, view, atol=0.005)
    again = source_points(spatial, torch.tensor(view)[None], (height, width))[0].numpy()
    np.testing.assert_allclose(again, source, atol=0.005)


@both_kinds
def test_view_points_undo_source_points(options: SpatialOptions, accuracy: float) -> None:
    spatial, points = draw(options, 0), scattered()
    again = view_points(spatial, source_points(spatial, points, SIZE), SIZE)
    assert (again - points).norm(dim=-1).max() < accuracy / 2


@both_kinds
def test_images_carry_the_points_where_they_are_said_to_lie(options: SpatialOptions, accuracy: float) -> None:
    """The view of a coordinate image holds, at any point, the source coordinates of that point."""
    spatial, points = draw(options, 0), scattered()
    values = values_at(spatial.image(coordinates()), points)
    inner = values_at((spatial.image(coordinates())[:, 2:] > 0.999).float(), points)[:, 0] > 0.999
    miss = (values[:, :2].mT - source_points(spatial, points, SIZE)).norm(dim=-1)
    assert inner.float().mean() > 0.5
    assert miss[inner].max() < accuracy


@both_kinds
def test_two_views_hold_the_same_source_at_matched_points(options: SpatialOptions, accuracy: float) -> None:
    first, second, points = draw(options, 0), draw(options, 1), scattered()
    matched, inside = matching_points(first, second, points, SIZE)
    here, there = (
        values_at(spatial.image(coordinates()), places) for spatial, places in ((first, points), (second, matched))
    )
    whole = (here[:, 2] > 0.9999) & (there[:, 2] > 0.9999)  # at the very edge a view fades to zero
    assert 0.3 < inside.float().mean() < 0.95
    assert (whole & inside).sum() > 0.8 * inside.sum()
    miss = (here - there)[:, :2].norm(dim=1)
    assert miss[whole & inside].max() < 2 * accuracy


@both_kinds
def test_inside_is_true_only_within_the_source_and_the_second_view(options: SpatialOptions, accuracy: float) -> None:
    first, second, points = draw(options, 0), draw(options, 1), scattered()
    matched, inside = matching_points(first, second, points, SIZE)
    middle = torch.tensor([SIZE[1] - 1, SIZE[0] - 1]) / 2
    source = source_points(first, points, SIZE)
    beyond = torch.cat([(places - middle).abs() - middle for places in (source, matched)], -1).amax(-1)
    # an elastic displacement that folds the image over hides a few points
    assert inside[beyond < -0.1].float().mean() >= (1.0 if options is AFFINE else 0.995)
    assert not inside[beyond > 0.1].any()
    assert ((matched - middle).abs() < middle).all(-1)[~inside].any()  # seen in the second view, yet not in the source
    assert (source_points(second, matched, SIZE) - source)[inside].norm(dim=-1).max() < accuracy


def test_matching_a_view_with_itself_or_two_identities_is_trivial() -> None:
    points = torch.tensor([[0.0, 0.0], [SIZE[1] - 1, SIZE[0] - 1], [10.5, 3.25]]).expand(12, -1, -1)
    matched, inside = matching_points(Spatial.identity(12), Spatial.identity(12), points, SIZE)
    assert inside.all()
    torch.testing.assert_close(matched, points, atol=1e-4, rtol=0)
    spatial = draw(AFFINE, 0)
    torch.testing.assert_close(matching_points(spatial, spatial, points, SIZE)[0], points, atol=1e-2, rtol=0)


def test_matching_is_symmetric() -> None:
    first, second, points = draw(ELASTIC, 0), draw(ELASTIC, 1), scattered()
    matched, inside = matching_points(first, second, points, SIZE)
    again, _ = matching_points(second, first, matched, SIZE)
    assert (again - points)[inside].norm(dim=-1).max() < 0.1


def test_matching_grid_is_matching_points_in_cells() -> None:
    first, second, cells = draw(AFFINE, 0), draw(AFFINE, 1), (9, 12)
    matched, inside = matching_grid(first, second, cells)
    assert matched.shape == (12, 9, 12, 2)
    assert inside.shape == (12, 9, 12)
    # cell (row 4, column 7) of stride 8 has its centre at pixel (59.5, 35.5)
    pixels, _ = matching_points(first, second, torch.tensor([[[59.5, 35.5]]]).expand(12, -1, -1), SIZE)
    torch.testing.assert_close(matched[:, 4, 7] * 8 + 3.5, pixels[:, 0], atol=1e-2, rtol=0)


def test_folded_displacements_give_no_false_matches() -> None:
    wild = SpatialOptions(elastic=15.0)
    first, second, points = Spatial.identity(12), draw(wild, 1), scattered()
    matched, inside = matching_points(first, second, points, SIZE)
    assert matched.isfinite().all()
    assert (~inside).any()
    assert (source_points(second, matched, SIZE) - points)[inside].norm(dim=-1).max() < 0.1


def test_points_stay_precise_under_autocast_and_in_any_number_type() -> None:
    first, second, points = draw(ELASTIC, 0), draw(ELASTIC, 1), scattered().round()
    expected, _ = matching_points(first, second, points, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matching_points(first, second, points, SIZE)[0], expected)
    for dtype in (torch.long, torch.float64):
        assert torch.equal(matching_points(first, second, points.to(dtype), SIZE)[0], expected)


def test_values_at_reads_pixels() -> None:
    maps = torch.rand(2, 3, 5, 7, generator=seeded(0))
    points = torch.tensor([[0.0, 0.0], [6.0, 4.0], [2.0, 3.0], [2.5, 3.0], [-5.0, 0.0]]).expand(2, -1, -1)
    values = values_at(maps, points)
    expected = [maps[:, :, 0, 0], maps[:, :, 4, 6], maps[:, :, 3, 2], maps[:, :, 3, 2:4].mean(-1), torch.zeros(2, 3)]
    torch.testing.assert_close(values, torch.stack(expected, -1), atol=1e-5, rtol=0)


# Cells of maps: against loops over pixels


def whole_pixels(name: str, size: tuple[int, int], stride: int) -> NDArray[Any]:
    """A transformation that moves whole pixels: (3, 3) from view to source, (x, y, 1) in pixels."""
    height, width = size
    return np.array(
        {
            "identity": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            "shift": [[1, 0, stride], [0, 1, -2 * stride], [0, 0, 1]],
            "far shift": [[1, 0, width - stride], [0, 1, height - stride], [0, 0, 1]],
            "flip x": [[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]],
            "flip y": [[1, 0, 0], [0, -1, height - 1], [0, 0, 1]],
            "turn": [[0, -1, width - 1], [1, 0, 0], [0, 0, 1]],  # of a square, by 90 degrees
            "turn, flip and shift": [[0, 1, stride], [1, 0, 0], [0, 0, 1]],
        }[name],
        dtype=float,
    )


def as_draw(affine: NDArray[Any], size: tuple[int, int]) -> Spatial:
    """The draw of one (3, 3) matrix in pixels."""
    height, width = size
    to_pixels = np.array([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
    matrix = np.linalg.inv(to_pixels) @ affine @ to_pixels
    return Spatial(torch.tensor(matrix[None, :2], dtype=torch.float32))


def in_pixels(spatial: Spatial, row: int, size: tuple[int, int]) -> NDArray[Any]:
    """The (3, 3) matrix in pixels of one of the draws."""
    height, width = size
    to_pixels = np.array([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
    return to_pixels @ np.vstack([spatial.matrix[row].double().numpy(), [0, 0, 1]]) @ np.linalg.inv(to_pixels)


def shown_pixels(affine: NDArray[Any], size: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """For each pixel (x, y) of the view the pixel of the source that it shows."""
    found = {}
    for y, x in product(range(size[0]), range(size[1])):
        u, v, _ = affine @ (x, y, 1)
        if 0 <= u < size[1] and 0 <= v < size[0]:
            found[x, y] = (round(u), round(v))
    return found


NAMES = ["identity", "shift", "far shift", "flip x", "flip y"]
SQUARE = [*NAMES, "turn", "turn, flip and shift"]
LAYOUTS = [
    ((15, 20), 5, NAMES),
    ((16, 24), 4, NAMES),
    ((13, 18), 5, NAMES),
    ((12, 16), 5, NAMES),  # the middle of the last cells lies beyond the image
    ((15, 15), 5, SQUARE),
    ((16, 16), 4, SQUARE),
]
LAYOUT_IDS = [f"{height} x {width} by {stride}" for (height, width), stride, _ in LAYOUTS]
known_views = pytest.mark.parametrize(("size", "stride", "names"), LAYOUTS, ids=LAYOUT_IDS)


@known_views
def test_matching_cells_hold_the_same_pixels(size: tuple[int, int], stride: int, names: list[str]) -> None:
    """Known transformations: what the middle of a cell shows, looked for among all pixels of the other view."""
    rows, columns = cells_of(size, stride)
    for pair in product(names, names):
        first, second = (whole_pixels(name, size, stride) for name in pair)
        here = shown_pixels(first, size)
        there = {source: pixel for pixel, source in shown_pixels(second, size).items()}
        match, found = matching_cells(as_draw(first, size), as_draw(second, size), size, stride)
        assert match.shape == found.shape == (1, rows * columns)
        for row, column in product(range(rows), range(columns)):
            low, high = (stride - 1) // 2, stride // 2  # the pixel in the middle, or the two about it
            middle = product((column * stride + low, column * stride + high), (row * stride + low, row * stride + high))
            mates = [there.get(here[pixel]) if pixel in here else None for pixel in middle]
            expected = {y // stride * columns + x // stride for x, y in (mate for mate in mates if mate)}
            cell = row * columns + column
            assert bool(found[0, cell]) == (None not in mates), (pair, row, column)
            assert {int(match[0, cell])} == (expected if None not in mates else {0}), (pair, row, column)


def test_matching_cells_in_closed_form() -> None:
    size, stride = (12, 20), 4  # 3 x 5 cells
    cells = torch.arange(15).view(3, 5)
    same, moved, mirrored = (
        as_draw(whole_pixels(name, size, stride), size) for name in ("identity", "shift", "flip x")
    )
    match, found = matching_cells(same, same, size, stride)
    assert found.all()
    assert match[0].equal(cells.flatten())
    match, found = matching_cells(same, mirrored, size, stride)
    assert found.all()
    assert match[0].equal(cells.flip(1).flatten())
    match, found = matching_cells(moved, same, size, stride)  # the view shows what is one cell right and two up
    assert found.view(3, 5).equal(torch.tensor([[False] * 5, [False] * 5, [True] * 4 + [False]]))
    assert match.view(3, 5)[2, :4].equal(cells[0, 1:])


@both_kinds
def test_matching_cells_of_random_views(options: SpatialOptions, accuracy: float) -> None:
    """For the pixel in the middle of each cell, the nearest of all pixels of the other view."""
    size, stride, batch = (45, 60), 15, 6
    first, second = (draw_spatial(options, batch, size, seeded(seed)) for seed in (0, 1))
    match, found = matching_cells(first, second, size, stride)
    half = np.array([size[1] / 2, size[0] / 2])
    grids = [(draw.grid(size).double().numpy() + 1) * half - 0.5 for draw in (first, second)]  # sources, in pixels
    clear = outside = 0
    for image, row, column in product(range(batch), range(3), range(4)):
        source, cell = grids[0][image, row * 15 + 7, column * 15 + 7], row * 4 + column
        distance = np.linalg.norm(grids[1][image] - source, axis=-1)
        beyond = bool((np.abs(source - half + 0.5) > half - 0.4).any())
        if beyond or distance.min() > 2:
            assert not found[image, cell]
            outside += 1
            continue
        y, x = np.unravel_index(distance.argmin(), size)
        near = {(int(v) // 15) * 4 + int(u) // 15 for v, u in np.argwhere(distance < distance.min() + 0.7)}
        if found[image, cell]:
            assert int(match[image, cell]) in near
            clear += len(near) == 1
        else:  # at the very edge only
            assert min(x, y, size[1] - 1 - x, size[0] - 1 - y) == 0 or (np.abs(source - half + 0.5) > half - 1.1).any()
    assert clear > 0.3 * batch * 12
    assert outside > 2


def slow_overlap(
    first: NDArray[Any], second: NDArray[Any], size: tuple[int, int], stride: int
) -> tuple[list[list[list[float]]], list[float], float]:
    """Point by point: places in cells of both maps, how far inside both views (in pixels), and the overlap in cells."""
    height, width = size
    rows, columns = -(-height // stride), -(-width // stride)
    low, high = [-0.5, -0.5], [width - 0.5, height - 0.5]
    for affine in (first, second):
        corners = [affine @ (x, y, 1) for x in (-0.5, width - 0.5) for y in (-0.5, height - 0.5)]
        for axis in range(2):
            low[axis] = max(low[axis], min(corner[axis] for corner in corners))
            high[axis] = min(high[axis], max(corner[axis] for corner in corners))
    extent = [max(0.0, high[axis] - low[axis]) for axis in range(2)]
    places, margins = [], []
    for row, column in product(range(rows), range(columns)):
        source = (low[0] + extent[0] * (column + 0.5) / columns, low[1] + extent[1] * (row + 0.5) / rows, 1)
        pixels = [np.linalg.inv(affine) @ source for affine in (first, second)]
        places.append([[(pixel[axis] + 0.5) / stride - 0.5 for axis in range(2)] for pixel in pixels])
        margins.append(min(min(p[0] + 0.5, p[1] + 0.5, width - 0.5 - p[0], height - 0.5 - p[1]) for p in pixels))
    area = extent[0] * extent[1] * sum(margin >= 0 for margin in margins) / len(margins)
    cell = max(abs(np.linalg.det(affine[:2, :2])) for affine in (first, second)) * stride**2
    return places, margins, area / cell


def assert_overlap(
    found: tuple[Tensor, Tensor, Tensor], image: int, first: NDArray[Any], second: NDArray[Any], *layout: Any
) -> float:
    places, margins, area = slow_overlap(first, second, *layout)
    for view in range(2):
        expected = torch.tensor([place[view] for place in places], dtype=torch.float32)
        torch.testing.assert_close(found[view][image], expected, atol=2e-3, rtol=1e-4)
    for cell, margin in enumerate(margins):
        if abs(margin) > 0.06 or area < 0.9:
            assert bool(found[2][image, cell]) == (margin > 0 and area > 0.999), (cell, margin, area)
    return area


@known_views
def test_overlap_of_known_views(size: tuple[int, int], stride: int, names: list[str]) -> None:
    for pair in product(names, names):
        first, second = (whole_pixels(name, size, stride) for name in pair)
        found = overlap_grid(as_draw(first, size), as_draw(second, size), size, stride)
        area = assert_overlap(found, 0, first, second, size, stride)
        # As many pixels of the source as both views show, counted one by one.
        both = set(shown_pixels(first, size).values()) & set(shown_pixels(second, size).values())
        assert area == pytest.approx(len(both) / stride**2)
        # A point of the grid is one place of the source, whichever view it is read from, and lies in such a pixel.
        points = [some[0].double().numpy() for some in found[:2]]
        for here, there in zip(*(some[found[2][0].numpy()] for some in points), strict=True):
            one, other = (
                affine @ (*((place + 0.5) * stride - 0.5), 1) for affine, place in ((first, here), (second, there))
            )
            np.testing.assert_allclose(one, other, atol=0.02)
            assert any(np.abs(one[:2] - pixel).max() < 0.52 for pixel in both), pair


def test_overlap_of_random_views() -> None:
    size, stride = (48, 64), 8
    turned = AFFINE.model_copy(update={"rotation": 180.0, "crop": (0.3, 0.8)})
    first, second = (draw_spatial(turned, 20, size, seeded(seed)) for seed in (0, 1))
    found = overlap_grid(first, second, size, stride)
    areas = []
    for image in range(20):
        one, other = (in_pixels(draw, image, size) for draw in (first, second))
        areas.append(assert_overlap(found, image, one, other, size, stride))
    assert min(areas) < 5 < max(areas)
    assert 0.2 < found[2].float().mean() < 0.9


@both_kinds
def test_both_views_show_the_same_source_on_the_grid(options: SpatialOptions, accuracy: float) -> None:
    """The views of coordinate images, read where the grid says."""
    first, second = draw(options, 0), draw(options, 1)
    *points, shown = overlap_grid(first, second, SIZE, 4)
    points = [places * 4 + 1.5 for places in points]  # in pixels
    here, there = (
        interpolated(spatial.image(coordinates()), places)
        for spatial, places in zip((first, second), points, strict=True)
    )
    whole = shown & (here[:, 2] > 0.9999) & (there[:, 2] > 0.9999)  # at the very edge a view fades to zero
    assert shown.float().mean() > 0.4
    assert whole.sum() > 0.9 * shown.sum()
    miss = (here - there)[:, :2].norm(dim=1)
    # beyond the centres of the outermost cells the edge is repeated: half a pixel of the view
    inner = [((p > 0) & (p < torch.tensor([SIZE[1] - 1, SIZE[0] - 1]))).all(-1) for p in points]
    assert miss[whole & inner[0] & inner[1]].max() < 2 * accuracy
    assert miss[whole].max() < 1.5


def test_the_grid_covers_the_overlap_evenly_and_undoes_a_flip() -> None:
    size, stride = (16, 16), 4
    same, moved, mirrored = (
        as_draw(whole_pixels(name, size, stride), size) for name in ("identity", "shift", "flip x")
    )
    here, there, shown = overlap_grid(same, same, size, stride)
    cells = torch.tensor([[x, y] for y in range(4) for x in range(4)]).float()
    assert shown.all()
    for points in (here, there):
        torch.testing.assert_close(points[0], cells, atol=1e-4, rtol=0)
    here, there, shown = overlap_grid(same, mirrored, size, stride)
    assert shown.all()
    torch.testing.assert_close(there[0], cells * torch.tensor([-1, 1]) + torch.tensor([3, 0]), atol=1e-4, rtol=0)
    here, there, shown = overlap_grid(same, moved, size, stride)  # 3 x 2 cells are shared: columns 1 - 3, rows 0 - 1
    assert shown.all()
    torch.testing.assert_close(here[0].amin(0), torch.tensor([0.5 + 0.375, -0.5 + 0.25]), atol=1e-4, rtol=0)
    torch.testing.assert_close(here[0].amax(0), torch.tensor([3.5 - 0.375, 1.5 - 0.25]), atol=1e-4, rtol=0)
    torch.testing.assert_close(there - here, torch.tensor([-1.0, 2.0]).expand_as(here), atol=1e-4, rtol=0)


def test_less_than_a_cell_of_overlap_is_none() -> None:
    size, stride = (16, 16), 4

    def shifted(x: float, y: float, window: float = 1.0) -> Spatial:
        return as_draw(np.array([[window, 0, x], [0, window, y], [0, 0, 1]]), size)

    for x, y, enough in ((12, 12, True), (12.2, 12, False), (8, 14.1, False), (8, 13.9, True), (16.1, 0, False)):
        *points, shown = overlap_grid(shifted(0, 0), shifted(x, y), size, stride)
        assert shown.all() if enough else not shown.any(), (x, y)
        assert all(place.isfinite().all() for place in points)
    # A window of a quarter has cells of a sixteenth: the overlap counts in the larger ones of the other view.
    for window, enough in ((0.3, True), (0.24, False)):
        for pair in ((shifted(0, 0), shifted(2, 2, window)), (shifted(2, 2, window), shifted(0, 0))):
            assert bool(overlap_grid(*pair, size, stride)[2].any()) == enough


def test_the_grid_is_the_same_whichever_view_is_first() -> None:
    first, second = draw(ELASTIC, 0), draw(ELASTIC, 1)
    one, other, shown = overlap_grid(first, second, SIZE, 8)
    again = overlap_grid(second, first, SIZE, 8)
    assert again[0].equal(other)
    assert again[1].equal(one)
    assert again[2].equal(shown)


def test_interpolated_against_a_loop() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 9, 2, generator=seeded(1)) * 7 - 1  # some beyond the edges
    expected = []
    for image, point in product(range(2), range(9)):
        x, y = (min(max(float(v), 0.0), last) for v, last in zip(points[image, point], (4, 3), strict=True))
        left, top = min(int(x), 3), min(int(y), 2)
        value = torch.zeros(3, dtype=torch.float64)
        for dy, dx in product(range(2), range(2)):
            weight = (1 - abs(x - left - dx)) * (1 - abs(y - top - dy))
            value = value + weight * maps[image, :, top + dy, left + dx]
        expected.append(value)
    slow = torch.stack(expected).view(2, 9, 3).mT
    values = interpolated(maps, points)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, slow, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(some.sin().sum(), maps)[0] for some in (values, slow)), atol=1e-6, rtol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert interpolated(maps, points).equal(values)
        narrow = interpolated(maps.bfloat16(), points)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), values, atol=0.02, rtol=0)
