import pytest
import torch
from torch import Tensor

from glocal.views.moves import moves
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial

TRAINED = SpatialOptions(rotation=30, scale=(0.8, 1.3), shift=0.15)


def bumps(height: int, width: int) -> Tensor:
    """A smooth image that looks like none of its mirror images, `(1, 1, H, W)`."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (torch.sin(3 * x + 1) + torch.cos(2 * y - 0.5 * x) + x * y)[None, None]


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
@pytest.mark.parametrize("flip", [(0.0, 0.0), (0.5, 0.5)])
def test_there_and_back_is_where_it_was(size: tuple[int, int], flip: tuple[float, float]) -> None:
    image = bumps(*size)
    views = moves(TRAINED.model_copy(update={"flip": flip}), size)
    assert len(views) == (8 if any(flip) else 5)
    for move in views[1:]:
        there = move.there.image(image)
        assert float((there - image).abs().mean()) > 0.05
        both = move.back.image(torch.cat([there, torch.ones_like(there)], dim=1))
        seen = both[:, 1:] > 0.999
        assert seen.float().mean() > 0.75
        assert float((both[:, :1] - image)[seen & inner(size)].abs().max()) < 0.01


def inner(size: tuple[int, int]) -> Tensor:
    inside = torch.zeros(1, 1, *size, dtype=torch.bool)
    inside[..., 8:-8, 8:-8] = True
    return inside


def test_views_go_a_third_as_far_as_training() -> None:
    """Rotation, zoom and shift mean the same as in `draw_spatial`."""
    size = (40, 64)
    views = moves(SpatialOptions(rotation=21, scale=(1.0, 1.05**3), shift=0.06), size)
    assert len(views) == 5
    drawn = [
        draw_spatial(SpatialOptions(rotation=7, scale=(1.0, 1.05), shift=0.02), 200, size, generator(k)).matrix
        for k in range(3)
    ]
    drawn_all = torch.cat(drawn)
    low, high = drawn_all.amin(0) - 3e-3, drawn_all.amax(0) + 3e-3
    for move in views:
        linear, offset = move.there.matrix[0, :, :2], move.there.matrix[0, :, 2]
        assert ((linear >= low[:, :2]) & (linear <= high[:, :2])).all()
        assert (offset.abs() <= 2 * 0.02 * linear.abs().sum(1) + 1e-6).all()
    assert sum(move.there.matrix[0, 0, 1].abs() > 0.06 for move in views) == 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"rotation": 5.0}, 3),
        ({"scale": (0.9, 1.0)}, 2),
        ({"flip": (0.0, 0.5)}, 2),
        ({"flip": (0.5, 0.0)}, 2),
        ({"shift": 0.1}, 5),
        ({"rotation": 5.0, "shift": 0.1, "scale": (0.9, 1.2), "flip": (0.0, 0.5), "probability": 0.0}, 2),
    ],
)
def test_what_training_did_not_do_is_not_done(options: dict[str, object], count: int) -> None:
    views = moves(SpatialOptions.model_validate(options), (32, 32))
    assert len(views) == count
    assert views[0].there.still
    assert not any(move.there.still for move in views[1:])
    image = bumps(32, 32)
    if "flip" in options:
        axis = 3 if options["flip"] == (0.0, 0.5) else 2  # vertical first
        assert torch.allclose(views[1].there.image(image), image.flip(axis), atol=1e-5)


def test_a_move_of_several_images() -> None:
    move = moves(TRAINED, (24, 24))[2]
    images = torch.cat([bumps(24, 24), 2 * bumps(24, 24)])
    both = move.of(2).there
    assert isinstance(both, Spatial)
    assert torch.equal(both.image(images)[1:], move.there.image(images[1:]))
