import io
import xml.etree.ElementTree as ET
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from glocal.reporting.figures import (
    OPACITY,
    class_boxes,
    class_colour,
    class_ink,
    learning_curves,
    overlay_row,
    paired_differences,
)
from glocal.reporting.rows import slice_rows

CLASSES = {"background": 0, "cavity": 1, "wall": 2}
IMAGE = np.linspace(0, 50, 40 * 60).reshape(40, 60)
SLICES = np.broadcast_to(IMAGE, (3, 40, 60))
TRUTH, PREDICTION = np.zeros((2, 40, 60), np.int16)
TRUTH[10:25, 20:40] = 1
PREDICTION[0:30, 25:45] = 2
FRAME = pd.DataFrame(
    {
        "case": ["a", "b", "a", "b"],
        "class": ["cavity", "cavity", "wall", "wall"],
        "dice": [0.9, 0.8, 0.7, 0.0],
        "hd95": [np.nan] * 4,
        "note": ["", "", "", "missed"],
    }
)
PAIRS = pd.DataFrame(
    [
        {"contender": name, "split": split, "labels": labels, "draw": draw, "difference": 0.01 * draw - 0.02}
        for name in ("PCL", "JCL")
        for split in (0, 1)
        for labels in (1, 8)
        for draw in range(3)
    ]
)
FIGURES: list[Callable[[], bytes]] = [
    lambda: learning_curves({"a": [(0, 1.0), (10, 0.1)], "b": [(0, 0.5)]}, "Loss", "value"),
    lambda: class_boxes(FRAME, "dice"),
    lambda: paired_differences(PAIRS),
    lambda: overlay_row(IMAGE, TRUTH, PREDICTION, CLASSES, "case a"),
    lambda: slice_rows([(name, SLICES, None) for name in ("asked", "found")], np.full((2, 3), 0.5)),
    lambda: slice_rows([("real", SLICES, SLICES.astype(int) // 20), ("moved", SLICES[:1], None)], None, CLASSES),
]


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png))[..., :3]


def words(svg: bytes) -> str:
    """The text of an SVG; letters are drawn as paths (no fonts needed), the words stay as comments."""
    ET.fromstring(svg)
    return svg.decode()


def near(png: bytes, colour: str, tolerance: float = 0.02) -> int:
    """How many pixels have this colour."""
    wanted = np.array(mpl.colors.to_rgb(colour))
    return int((np.abs(pixels(png) - wanted).max(-1) < tolerance).sum())


@pytest.mark.parametrize("draw", FIGURES)
def test_same_input_same_bytes_and_no_global_state(draw: Callable[[], bytes]) -> None:
    before = dict(mpl.rcParams)
    assert draw() == draw()
    assert dict(mpl.rcParams) == before


def test_curves_name_their_axes_and_series() -> None:
    text = words(learning_curves({"first": [(0, 1.0), (5, 0.0)], "second": [(0, float("nan"))]}, "T1", "Dice"))
    for word in ("T1", "Dice", "Iteration", "first", "second"):
        assert f"<!-- {word} -->" in text
    assert "<!-- lonely -->" not in words(learning_curves({"lonely": [(0, 1.0)]}, "T", "y"))
    assert words(learning_curves({}, "nothing yet", "y"))


def test_curves_are_dashed_where_colours_come_again() -> None:
    seven, eight = (words(learning_curves({str(k): [(0, 1.0)] for k in range(n)}, "", "")) for n in (7, 8))
    assert "stroke-dasharray" not in seven
    assert "stroke-dasharray" in eight


def test_boxes_show_every_class_even_without_values() -> None:
    for metric in ("dice", "hd95"):
        text = words(class_boxes(FRAME, metric, label="Value"))
        assert all(f"<!-- {word} -->" in text for word in ("cavity", "wall", "Value"))


def test_lost_classes_are_hollow_points() -> None:
    found = words(class_boxes(FRAME.assign(note=""), "dice"))
    hollow = f"fill: #ffffff; stroke: {class_ink(2)}"  # the colour that the class has in pictures, but darker
    assert hollow not in found
    assert hollow in words(class_boxes(FRAME, "dice"))


def test_differences_name_contenders_budgets_and_splits() -> None:
    text = words(paired_differences(PAIRS))
    assert all(f"<!-- {word} -->" in text for word in ("PCL, 1 label", "JCL, 8 labels", "Split 0", "Split 1"))
    assert "Difference in Dice" in text
    assert "Split" not in words(paired_differences(PAIRS[PAIRS["split"] == 0]))


def tinted(png: bytes, colour: str) -> int:
    """How many pixels of the picture, legend included, are of a mask of this colour, over whatever grey."""
    wanted, found = np.array(mpl.colors.to_rgb(colour)), pixels(png)
    wanted, found = wanted - wanted.mean(), found - found.mean(-1, keepdims=True)
    return int((np.abs(found - OPACITY * wanted).max(-1) < 0.05).sum())


def test_masks_have_the_colours_of_their_values_not_of_their_order() -> None:
    shown = overlay_row(IMAGE, TRUTH, PREDICTION, {"cavity": 1}, "")
    assert tinted(shown, class_colour(1)) > 500
    assert tinted(shown, class_colour(2)) == 0
    both = overlay_row(IMAGE, TRUTH, PREDICTION, CLASSES, "")
    assert tinted(both, class_colour(2)) > 1000
    assert len({class_colour(value) for value in range(1, 8)}) == 7


def test_pixels_keep_their_physical_shape() -> None:
    flat, tall = (pixels(overlay_row(IMAGE, None, TRUTH, CLASSES, "", aspect)) for aspect in (1.0, 2.0))
    assert flat.shape[1] == tall.shape[1]
    assert tall.shape[0] > 1.4 * flat.shape[0]


def test_masks_are_shown_close_and_whole() -> None:
    image, far = np.zeros((2, 400, 400), np.int16)
    far[300:320, 10:30] = 1
    whole = tinted(overlay_row(image, None, far, {"a": 1}, ""), class_colour(1))
    assert whole > 3000  # a 20-pixel square in 400 would be a dot
    both = np.zeros_like(far)
    both[0:5, 395:400] = 1
    assert tinted(overlay_row(image, far, both, {"a": 1}, ""), class_colour(1)) < whole  # both masks stay in sight


def test_what_is_not_shown_does_not_darken_the_rest() -> None:
    image, mask = np.tile(np.linspace(0, 1, 400), (400, 1)), np.zeros((400, 400), np.int16)
    mask[190:210, 190:210] = 1
    bright = image.copy()
    bright[:50] = 100
    assert overlay_row(image, mask, None, CLASSES, "") == overlay_row(bright, mask, None, CLASSES, "")


def test_rows_leave_out_what_is_not_there() -> None:
    three, two = (pixels(overlay_row(IMAGE, truth, PREDICTION, CLASSES, "t")).shape for truth in (TRUTH, None))
    assert three[1] == pytest.approx(1.5 * two[1], abs=2)


def test_rows_of_neighbours_grow_with_their_slices() -> None:
    one, wide, high = (
        pixels(slice_rows([("name", np.broadcast_to(IMAGE, (columns, 40, 60)), None)] * rows, np.ones((rows, columns))))
        for rows, columns in ((1, 2), (1, 4), (3, 2))
    )
    assert wide.shape[:2] == pytest.approx((one.shape[0], 2 * one.shape[1]), abs=2)
    assert high.shape[:2] == pytest.approx((3 * one.shape[0], one.shape[1]), abs=2)


def test_inputs_stay_and_flat_images_work() -> None:
    image, mask = np.full((20, 20), 7), np.ones((20, 20), np.int16)
    image.flags.writeable = mask.flags.writeable = False
    assert overlay_row(image, mask, mask, CLASSES, "t").startswith(b"\x89PNG")
