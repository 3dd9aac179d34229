"""Each spatial transform against what it should do, in pixels."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from glocal.views.correspondence import source_points, view_points
from glocal.views.spatial import Spatial, SpatialOptions, bicubic, draw_spatial

SIZE = (40, 64)
MIDDLE = torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2])


def draw(batch: int = 200, seed: int = 0, **options: object) -> Spatial:
    return draw_spatial(SpatialOptions.model_validate(options), batch, SIZE, torch.Generator().manual_seed(seed))


def linear(spatial: Spatial) -> tuple[Tensor, Tensor]:
    """Matrices (B, 2, 2) from source to view offsets in pixels, and the images (B, 2) of the source's middle."""
    points = torch.stack([MIDDLE, MIDDLE + torch.tensor([1.0, 0.0]), MIDDLE + torch.tensor([0.0, 1.0])])
    moved = view_points(spatial, points.expand(len(spatial), -1, -1), SIZE)
    return torch.stack([moved[:, 1] - moved[:, 0], moved[:, 2] - moved[:, 0]], 2), moved[:, 0]


def test_rotation_is_rigid_about_the_middle_and_in_range() -> None:
    matrices, middle = linear(draw(rotation=30.0))
    assert torch.allclose(matrices.mT @ matrices, torch.eye(2).expand_as(matrices), atol=1e-4)
    torch.testing.assert_close(middle, MIDDLE.expand_as(middle), atol=1e-4, rtol=0)
    degrees = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -30 <= degrees.min() < -25
    assert 25 < degrees.max() <= 30


def test_scale_enlarges_evenly_and_log_uniformly() -> None:
    matrices, _ = linear(draw(2000, scale=(0.5, 2.0)))
    zoom = matrices[:, 0, 0]
    assert torch.allclose(matrices, zoom[:, None, None] * torch.eye(2), atol=1e-4)
    assert 0.5 <= zoom.min() < 0.52
    assert 1.9 < zoom.max() <= 2.0001
    assert abs((zoom > 1).float().mean() - 0.5) < 0.05


def test_anisotropy_stretches_one_axis_and_keeps_the_area() -> None:
    matrices, _ = linear(draw(anisotropy=0.2))
    ratio = matrices[:, 0, 0] / matrices[:, 1, 1]
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(200), atol=1e-4)
    assert 0.8 - 1e-4 <= ratio.min() < 0.82
    assert 1.18 < ratio.max() <= 1.2 + 1e-4


def test_shift_moves_by_a_fraction_of_each_side() -> None:
    matrices, middle = linear(draw(shift=0.25))
    moved = (middle - MIDDLE) / torch.tensor([SIZE[1], SIZE[0]])
    assert torch.allclose(matrices, torch.eye(2), atol=1e-4)
    assert moved.abs().max() <= 0.2501
    assert (moved.amin(0) < -0.22).all()
    assert (moved.amax(0) > 0.22).all()


def test_crop_is_a_window_inside_the_image_resized_to_full_size() -> None:
    spatial = draw(crop=(0.4, 0.8))
    width, height = SIZE[1], SIZE[0]
    edges = torch.tensor([[-0.5, -0.5], [width - 0.5, height - 0.5]]).expand(len(spatial), -1, -1)
    first, last = source_points(spatial, edges, SIZE).unbind(1)
    sides = (last - first) / torch.tensor([width, height])
    torch.testing.assert_close(sides[:, 0], sides[:, 1], atol=1e-4, rtol=0)
    assert 0.4 - 1e-4 <= sides.min() < 0.45
    assert 0.75 < sides.max() <= 0.8 + 1e-4
    assert (first >= -0.5 - 1e-3).all()
    assert (last <= torch.tensor([width, height]) - 0.5 + 1e-3).all()
    assert (first.amin(0) < 2).all()


def test_crop_is_torch_interpolation_of_the_window() -> None:
    # Half the side, first corner: the coordinates of a window that starts and ends between pixels.
    spatial = Spatial(torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, -0.5]]]))
    x = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    resized = interpolate(x[..., : SIZE[0] // 2, : SIZE[1] // 2], SIZE, mode="bilinear")
    torch.testing.assert_close(spatial.image(x)[..., 1:-1, 1:-1], resized[..., 1:-1, 1:-1], atol=1e-4, rtol=0)


def test_flips_are_exact_mirrors_of_the_named_axis() -> None:
    x = torch.rand(4, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw(4, flip=(1.0, 0.0)).image(x), x.flip(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(4, flip=(0.0, 1.0)).image(x), x.flip(3), atol=1e-5, rtol=0)
    mirrored = draw(400, flip=(0.25, 0.75)).matrix[:, :, :2] < -0.5
    assert abs(mirrored[:, 1, 1].float().mean() - 0.25) < 0.08
    assert abs(mirrored[:, 0, 0].float().mean() - 0.75) < 0.08


def test_images_that_are_not_moved_are_mirrored_as_often() -> None:
    spatial = draw(400, flip=(0.25, 0.75), rotation=10.0, probability=0.4)
    still = spatial.matrix[:, 0, 1] == 0
    assert abs(still.float().mean() - 0.6) < 0.08
    for chosen in (still, ~still):
        mirrored = spatial.matrix[chosen, :, :2] < -0.5
        assert abs(mirrored[:, 1, 1].float().mean() - 0.25) < 0.1
        assert abs(mirrored[:, 0, 0].float().mean() - 0.75) < 0.1


def test_quarter_turn_takes_right_to_below() -> None:
    x = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    quarter = Spatial(torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]]))
    torch.testing.assert_close(quarter.image(x), x.rot90(-1, (2, 3)), atol=1e-5, rtol=0)


def test_elastic_displacements_have_the_stated_size_at_the_control_points() -> None:
    spatial = draw(300, elastic=3.0, elastic_grid=(4, 5))
    assert spatial.displacement is not None
    assert spatial.displacement.shape == (300, 2, 4, 5)
    rows, columns = torch.linspace(-0.5, SIZE[0] - 0.5, 4), torch.linspace(-0.5, SIZE[1] - 0.5, 5)
    knots = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(1, -1, 2).expand(300, -1, -1)
    moved = source_points(spatial, knots, SIZE) - knots
    assert torch.allclose(moved.std((0, 1)), torch.tensor([3.0, 3.0]), rtol=0.05)
    assert moved.mean().abs() < 0.1


def test_bicubic_is_exact_for_lines_and_close_to_smooth_curves() -> None:
    places = torch.linspace(-1, 1, 101)
    knots = torch.linspace(-1, 1, 9)
    weights = bicubic(places, 9)
    assert torch.allclose(weights.sum(1), torch.ones(101), atol=1e-6)
    inner = places.abs() <= 0.75
    assert torch.allclose((weights @ knots)[inner], places[inner], atol=1e-6)
    assert (weights @ torch.sin(2 * knots) - torch.sin(2 * places))[inner].abs().max() < 3e-3
    assert torch.allclose(bicubic(knots, 9), torch.eye(9), atol=1e-6)


def test_grid_agrees_with_points_and_is_the_one_used() -> None:
    spatial = draw(3, rotation=20.0, scale=(0.8, 1.2), elastic=2.0, shift=0.1)
    rows, columns = torch.arange(SIZE[0]), torch.arange(SIZE[1])
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(1, -1, 2).expand(3, -1, -1)
    grid = spatial.grid(SIZE)
    from_grid = ((grid + 1) * torch.tensor([SIZE[1], SIZE[0]]) - 1) / 2
    torch.testing.assert_close(from_grid.reshape(3, -1, 2), source_points(spatial, pixels, SIZE), atol=1e-3, rtol=0)
    x = torch.rand(3, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spatial.image(x), grid_sample(x, grid, align_corners=False))


def test_a_draw_holds_for_maps_of_another_resolution() -> None:
    spatial = draw(4, rotation=20.0, elastic=2.0, shift=0.1, flip=(0.5, 0.5))
    coarse = torch.rand(4, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    fine = interpolate(coarse, SIZE, mode="bilinear")
    small = interpolate(fine, (20, 32), mode="area")
    views = interpolate(spatial.image(fine), (20, 32), mode="area")
    assert (spatial.image(small) - views)[..., 3:-3, 3:-3].abs().median() < 0.01


def test_grid_under_autocast_stays_precise() -> None:
    spatial = draw(3, rotation=20.0, elastic=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spatial.grid(SIZE), spatial.grid(SIZE).float())
        under = spatial.grid(SIZE)
    assert torch.equal(under, spatial.grid(SIZE))


def test_gradients_flow_through_a_view() -> None:
    x = torch.ones(2, 1, *SIZE, requires_grad=True)
    draw(2, rotation=10.0, elastic=1.0).image(x).sum().backward()
    assert x.grad is not None
    assert math.isclose(float(x.grad[..., 15:25, 25:40].mean()), 1.0, abs_tol=0.1)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_views_follow_the_images_device(device: str) -> None:
    spatial = draw(2, rotation=20.0, elastic=2.0)
    x = torch.rand(2, 1, *SIZE)
    viewed = spatial.image(x.to(device))
    assert viewed.device.type == device
    torch.testing.assert_close(viewed.cpu(), spatial.image(x), atol=1e-3, rtol=0)
