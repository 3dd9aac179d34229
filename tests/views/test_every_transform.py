"""What every option must keep, alone and all together."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import View, ViewOptions, draw_view

SPATIAL: dict[str, Any] = {
    "rotation": 40.0,
    "scale": (0.7, 1.4),
    "anisotropy": 0.3,
    "shift": 0.2,
    "crop": (0.5, 0.9),
    "flip": (0.5, 0.5),
    "elastic": 2.0,
}
INTENSITY: dict[str, Any] = {
    "brightness": 0.3,
    "contrast": 0.5,
    "gamma": (0.6, 1.6),
    "noise": 0.2,
    "blur": 1.5,
    "clip": (0.3, 0.6),
}
ALONE = [ViewOptions(spatial=SpatialOptions(**{name: value})) for name, value in SPATIAL.items()] + [
    ViewOptions(intensity=IntensityOptions(**{name: value})) for name, value in INTENSITY.items()
]
TOGETHER = ViewOptions(spatial=SpatialOptions(**SPATIAL), intensity=IntensityOptions(**INTENSITY))
every_option = pytest.mark.parametrize("options", [*ALONE, TOGETHER], ids=[*SPATIAL, *INTENSITY, "all"])
every_move = pytest.mark.parametrize(
    "options", [*ALONE[: len(SPATIAL)], ViewOptions(spatial=TOGETHER.spatial)], ids=[*SPATIAL, "all"]
)
SIZE = (33, 48)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(options: ViewOptions, batch: int = 6, size: tuple[int, int] = SIZE, seed: int = 0) -> View:
    return draw_view(options, batch, size, seeded(seed))


def smooth(batch: int = 6, size: tuple[int, int] = SIZE, channels: int = 2) -> Tensor:
    coarse = torch.rand(batch, channels, 5, 6, generator=seeded(1))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)


@every_option
def test_changes_images_and_keeps_shape_dtype_and_input(options: ViewOptions) -> None:
    x = smooth()
    before = x.clone()
    viewed = drawn(options).image(x)
    assert viewed.shape == x.shape
    assert viewed.dtype == x.dtype
    assert viewed.isfinite().all()
    assert not torch.allclose(viewed, x, atol=1e-3)
    assert torch.equal(x, before)


@every_option
def test_same_seed_same_view_other_seed_other_view(options: ViewOptions) -> None:
    x = smooth()
    first = drawn(options)
    assert torch.equal(first.image(x), drawn(options).image(x))
    assert torch.equal(first.image(x), first.image(x))
    if options.intensity.clip is None:
        assert not torch.allclose(first.image(x), drawn(options, seed=1).image(x), atol=1e-3)


@every_option
def test_images_of_a_batch_are_changed_differently_and_on_their_own(options: ViewOptions) -> None:
    x = smooth(1).expand(6, -1, -1, -1)
    view = drawn(options)
    viewed = view.image(x)
    if options.intensity.clip is None or options is TOGETHER:
        assert not torch.allclose(viewed[0], viewed[1], atol=1e-3)
    others = torch.cat([x[:2], torch.randn(4, *x.shape[1:], generator=seeded())])
    assert torch.equal(view.image(others)[:2], viewed[:2])


@every_option
def test_a_share_of_a_draw_is_that_share_of_the_view(options: ViewOptions) -> None:
    x = smooth()
    view = drawn(options)
    labels = (x[:, 0] * 4).long()
    assert len(view[2:5]) == 3
    torch.testing.assert_close(view[2:5].image(x[2:5]), view.image(x)[2:5])
    assert torch.equal(view[2:5].labels(labels[2:5]), view.labels(labels)[2:5])


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_only_rounded(options: ViewOptions, dtype: torch.dtype) -> None:
    x = smooth().to(dtype)
    view = drawn(options)
    viewed = view.image(x)
    assert viewed.dtype == dtype
    torch.testing.assert_close(viewed.float(), view.image(x.float()), atol=1e-2, rtol=1e-2)


@every_option
def test_autocast_changes_nothing(options: ViewOptions) -> None:
    x = smooth()
    view = drawn(options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = view.image(x)
    assert torch.equal(under, view.image(x))


@every_option
@pytest.mark.parametrize("size", [(1, 1), (7, 31), (20, 20)])
def test_batch_of_one_and_any_size(options: ViewOptions, size: tuple[int, int]) -> None:
    view = drawn(options, 1, size)
    assert view.image(smooth(1, size)).isfinite().all()
    assert view.labels(torch.ones(1, *size, dtype=torch.uint8)).shape == (1, *size)


@every_option
def test_probability_zero_is_identity(options: ViewOptions) -> None:
    never = ViewOptions(
        spatial=options.spatial.model_copy(update={"probability": 0.0, "flip": (0.0, 0.0)}),  # which has its own
        intensity=options.intensity.model_copy(update={"probability": 0.0, "clip": None}),
    )
    x = smooth() - 0.3
    torch.testing.assert_close(drawn(never).image(x), x, atol=1e-5, rtol=0)


# Flips have a probability of their own, and clip is not drawn.
CHOSEN = {n: o for n, o in zip([*SPATIAL, *INTENSITY], ALONE, strict=True) if n not in ("flip", "clip")}


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN.keys())
def test_probability_chooses_images(options: ViewOptions) -> None:
    half = ViewOptions(
        spatial=options.spatial.model_copy(update={"probability": 0.5}),
        intensity=options.intensity.model_copy(update={"probability": 0.5}),
    )
    x = smooth(100)
    changed = ((drawn(half, 100).image(x) - x).abs() > 1e-4).flatten(1).any(1).float().mean()
    assert 0.35 < changed < 0.65


def test_no_options_return_the_tensors_themselves() -> None:
    x, labels = smooth(), torch.ones(6, *SIZE, dtype=torch.long)
    for view in (drawn(ViewOptions()), View.identity(6)):
        assert view.image(x) is x
        assert view.labels(labels) is labels


def test_a_view_moves_first_and_changes_values_then() -> None:
    x, view = smooth(), drawn(TOGETHER)
    assert torch.equal(view.image(x), view.intensity.image(view.spatial.image(x)))


@every_move
def test_images_and_labels_move_together(options: ViewOptions) -> None:
    size = (64, 80)
    view = drawn(options, size=size)
    labels = (smooth(size=size)[:, 0] * 3.999).long()
    onehot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    moved = view.labels(labels)
    sure = view.image(onehot).max(1)
    inner = sure.values > 0.9  # away from borders between labels
    assert inner.float().mean() > 0.2
    assert torch.equal(moved[inner], sure.indices[inner])
    blurred = sure.values > 0.5
    assert (moved[blurred] == sure.indices[blurred]).float().mean() > 0.98


@every_move
def test_labels_of_any_layout_and_integer_type(options: ViewOptions) -> None:
    view = drawn(options)
    labels = (smooth()[:, 0] * 5).long()
    moved = view.labels(labels)
    assert moved.dtype == torch.long
    assert torch.equal(view.labels(labels[:, None])[:, 0], moved)
    assert torch.equal(view.labels(labels.to(torch.uint8)).long(), moved)
    assert set(moved.unique().tolist()) <= {0, *labels.unique().tolist()}


@pytest.mark.parametrize("name", SPATIAL)
def test_an_option_leaves_the_draws_of_the_others(name: str) -> None:
    # elastic displacements are drawn last, so even they stay when an affine option is switched off
    fewer = SpatialOptions(**{key: value for key, value in SPATIAL.items() if key != name})
    ours, all_of_them = drawn(ViewOptions(spatial=fewer)).spatial, drawn(TOGETHER).spatial
    if name == "elastic":
        assert torch.equal(ours.matrix, all_of_them.matrix)
    else:
        assert ours.displacement is not None
        assert all_of_them.displacement is not None
        assert torch.equal(ours.displacement, all_of_them.displacement)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    rotation=st.floats(0, 180),
    zoom=st.floats(0.1, 10),
    knots=st.integers(2, 9),
)
def test_any_draw_is_finite(
    height: int, width: int, batch: int, seed: int, rotation: float, zoom: float, knots: int
) -> None:
    spatial = SpatialOptions(
        rotation=rotation, scale=(zoom, 2 * zoom), crop=(0.1, 1), elastic=5, elastic_grid=(knots, 2), shift=1
    )
    view = drawn(ViewOptions(spatial=spatial, intensity=TOGETHER.intensity), batch, (height, width), seed)
    x = torch.randn(batch, 1, height, width, generator=seeded(seed))
    assert view.image(x).isfinite().all()
    assert view.spatial.grid((height, width)).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (SpatialOptions, {"scale": (1.2, 0.8)}),
        (SpatialOptions, {"scale": (0.0, 1.0)}),
        (SpatialOptions, {"crop": (0.5, 1.5)}),
        (SpatialOptions, {"flip": (0.5, 1.5)}),
        (SpatialOptions, {"elastic_grid": 1}),
        (SpatialOptions, {"anisotropy": 1.0}),
        (SpatialOptions, {"rotations": 3.0}),
        (IntensityOptions, {"gamma": (0.0, 1.0)}),
        (IntensityOptions, {"clip": (1.0, 0.0)}),
        (IntensityOptions, {"noise": -0.1}),
        (IntensityOptions, {"brightness": float("nan")}),
    ],
)
def test_senseless_options_are_refused(model: type[SpatialOptions | IntensityOptions], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**wrong)
