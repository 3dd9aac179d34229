"""Matching pixels of two views: in closed form, and in images that carry their own coordinates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glocal.views.correspondence import matching_grid, matching_points, source_points, values_at, view_points
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
