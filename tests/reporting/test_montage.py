import io

import numpy as np
import pytest
from PIL import Image

from glocal.reporting.figures import class_colour
from glocal.reporting.montage import montage


@pytest.mark.parametrize(("slices", "aspect"), [(1, 1.0), (5, 1.7)])
def test_mask_and_uncertainty_are_seen_in_a_small_picture(slices: int, aspect: float) -> None:
    rng = np.random.default_rng(0)
    images, masks = rng.normal(size=(slices, 40, 50)), np.zeros((slices, 40, 50), dtype=np.uint8)
    masks[:, 10:20, 10:20] = 2
    unsure = np.zeros(masks.shape)
    titles = [f"slice {k}" for k in range(slices)]
    labels = {"background": 0, "a": 1, "b": 2}
    sure = montage(images, masks, unsure, labels, titles, "case", aspect)
    drawn = montage(images, masks, unsure + 1.0, labels, titles, "case", aspect)
    assert len(drawn) < 300_000
    before, after = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float) for png in (sure, drawn))
    assert before.shape == after.shape
    half = len(before) // 2
    changed = np.abs(after - before).max(2) > 30
    assert changed[half:].mean() > 0.15
    assert changed[: half - 20].mean() < 0.01  # the masks above are the same
    assert {tuple(p) for p in after[-60:].reshape(-1, 3)} >= {_near(after, class_colour(k)) for k in (1, 2)}


def _near(picture: np.ndarray, colour: str) -> tuple[float, ...]:
    """The colour of the picture that is nearest to a wanted one, which must be near."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)], dtype=float)
    colours = np.unique(picture.reshape(-1, 3), axis=0)
    gaps = np.abs(colours - wanted).max(1)
    assert gaps.min() < 16
    return tuple(colours[gaps.argmin()])


def test_greys_do_not_show_bands() -> None:
    """Greys of a smooth image are close to each other, beside many colours of uncertainty."""
    ramp = np.tile(np.linspace(0, 1, 120), (2, 120, 1))
    masks = np.zeros(ramp.shape, dtype=np.uint8)
    masks[:, 20:30, 20:40] = 1
    picture = montage(ramp, masks, ramp, {"background": 0, "a": 1}, ["1", "2"], "ramp")
    pixels = np.unique(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3).astype(int), axis=0)
    greys = np.unique(pixels[np.ptp(pixels, axis=1) < 4].mean(1))
    assert greys[0] < 8
    assert np.diff(greys).max() < 12


def test_a_case_without_structures_is_drawn_too() -> None:
    zeros = np.zeros((3, 20, 20))
    assert (
        montage(zeros, zeros.astype(np.uint8), zeros, {"background": 0, "a": 1}, ["1", "2", "3"], "empty")[1:4]
        == b"PNG"
    )
