import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from glocal.errors import GlocalError
from glocal.reporting.comparisons import (
    PictureRow,
    class_boxes_by_method,
    critical_difference_diagram,
    forest,
    maximal_groups,
    means_by_budget,
    picture_grid,
)
from glocal.reporting.figures import OPACITY, QUIET, class_colour

METHODS = ["random", "GCL", "PCL", "GLCL", "JCL"]
LONG = [f"cross-consistency training, {name} with a long name" for name in "abcdefghijkl"]


def curves(methods: list[str]) -> pd.DataFrame:
    rows = itertools.product(methods, ["all", "8", "10", "1"])
    frame = pd.DataFrame(rows, columns=["method", "labels"])
    mean = np.linspace(0.5, 0.7, len(frame))
    return frame.assign(mean=mean, low=mean - 0.1, high=mean + 0.05)


def boxes(methods: list[str], classes: list[str]) -> pd.DataFrame:
    rows = itertools.product(methods, classes, range(4))
    frame = pd.DataFrame(rows, columns=["method", "class", "subject"])
    return frame.assign(value=np.linspace(0, 1, len(frame)))


def differences(methods: list[str]) -> pd.DataFrame:
    frame = curves(methods).rename(columns={"mean": "difference", "low": "difference_low", "high": "difference_high"})
    frame.loc[frame["method"] == methods[0], ["difference", "difference_low", "difference_high"]] = np.nan
    return frame


def ranks(methods: list[str]) -> dict[str, float]:
    return {name: float(rank) for rank, name in enumerate(methods, 1)}


TRUTH = np.zeros((40, 60), np.int16)
TRUTH[10:25, 20:40] = 1
CLASSES = {"background": 0, "cavity": 1, "wall": 2}
IMAGE = np.linspace(0, 50, 40 * 60).reshape(40, 60)
ROW = PictureRow("case a", IMAGE, TRUTH, {"random": TRUTH * 0, "PCL": TRUTH * 2}, {"random": 0.0, "PCL": 0.5})
FIGURES: list[Callable[[], bytes]] = [
    lambda: means_by_budget(curves(METHODS)),
    lambda: class_boxes_by_method(boxes(METHODS, ["RV", "LV"]), "Dice"),
    lambda: forest(differences(METHODS), "Difference"),
    lambda: critical_difference_diagram(ranks(METHODS), 2.2),
    lambda: picture_grid([ROW], ["random", "PCL"], CLASSES),
]


def words(svg: bytes) -> list[str]:
    """The texts of an SVG; letters are drawn as paths (no fonts needed), the words stay as comments."""
    ET.fromstring(svg)
    return re.findall(r"<!-- (.*?) -->", svg.decode(), flags=re.DOTALL)


def text(svg: bytes) -> str:
    """All words in one line, without the breaks of long names."""
    return re.sub(r"\s+", " ", " ".join(words(svg)))


def size(svg: bytes) -> tuple[float, float]:
    width, height = ET.fromstring(svg).get("viewBox", "").split()[2:]
    return float(width), float(height)


def shape(png: bytes) -> tuple[int, ...]:
    return np.asarray(imread(io.BytesIO(png))).shape


def shown(png: bytes, colour: str) -> int:
    """How many pixels have this colour, as the legend has it."""
    pixels = np.asarray(imread(io.BytesIO(png)))[..., :3]
    return int((np.abs(pixels - np.array(mpl.colors.to_rgb(colour))).max(-1) < 0.02).sum())


@pytest.mark.parametrize("draw", FIGURES)
def test_same_input_same_bytes_and_no_global_state(draw: Callable[[], bytes]) -> None:
    before = dict(mpl.rcParams)
    assert draw() == draw()
    assert dict(mpl.rcParams) == before


def test_curves_have_numbers_in_order_then_other_budgets() -> None:
    found = words(means_by_budget(curves(METHODS), "Mean IoU"))
    assert [word for word in found if word in ("1", "8", "10", "all")] == ["1", "8", "10", "all"]
    assert [word for word in found if word in METHODS] == METHODS
    assert "Mean IoU" in found


def test_curves_draw_intervals_where_there_are_some() -> None:
    frame = curves(["random"])
    frame.loc[0, ["low", "high"]] = np.nan
    interval = r'<path d="M [^"]*"[^>]*stroke-opacity: 0.8'
    assert len(re.findall(interval, means_by_budget(frame).decode())) == len(frame) - 1
    missing = curves(METHODS).drop(index=5)  # one method was not trained with one budget
    assert [word for word in words(means_by_budget(missing)) if word in METHODS] == METHODS


def test_points_are_not_joined_and_hollow_where_colours_come_again() -> None:
    few, many = (means_by_budget(curves(LONG[:count])).decode() for count in (7, 8))
    assert "stroke: #0072b2; stroke-width: 1.6" not in many  # a line through all budgets; intervals have an opacity
    hollow = "fill: #ffffff; stroke: #0072b2"
    assert hollow not in few
    assert many.count(hollow) == 4 + 1  # budgets, and the legend


def test_the_label_of_a_forest_is_whole() -> None:
    label = "Hausdorff distance in mm, left ventricle, difference to the baseline\n(left is better)"
    svg = forest(differences(["random", LONG[0]]), label)
    assert label.replace("\n", " ") in text(svg)
    assert max(map(len, words(svg))) <= 40
    short = size(forest(differences(["random", LONG[0]]), "x"))
    assert size(svg)[1] > short[1] + 20  # it takes nothing of the rows


def test_numbers_below_a_forest_have_room() -> None:
    frame = differences(["random", "PCL"]).assign(difference_low=-0.039, difference_high=0.15)  # as measured once
    numbers = [word for word in words(forest(frame, "Difference")) if re.fullmatch(r"[−-]?0\.\d+", word)]
    assert 3 <= len(numbers) <= 6


def test_the_baseline_is_quiet_and_nothing_else_is() -> None:
    alone = means_by_budget(curves(["random"])).decode()
    assert f"fill: {QUIET}; stroke: {QUIET}" in alone
    assert "stroke: #0072b2" not in alone
    assert "stroke: #0072b2" in means_by_budget(curves(["random", "GCL"])).decode()
    # The forest leaves the baseline out and yet gives the others the colours they have in the curves.
    drawn = forest(differences(["random", "GCL"]), "x").decode()
    assert "stroke: #0072b2; stroke-width: 2.2" in drawn
    assert f"stroke: {QUIET}; stroke-width: 2.2" not in drawn
    several = differences(["random A", "random B", "GCL"])  # a baseline for each dataset
    several.loc[several["method"] == "random B", "difference"] = np.nan
    assert "stroke: #d55e00; stroke-width: 2.2" in forest(several, "x").decode()


@pytest.mark.parametrize("methods", [METHODS[:2], METHODS, LONG])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_boxes_name_all_classes_and_methods(methods: list[str], count: int) -> None:
    classes = ["Left ventricle", "RV", "Wall", "LA", "RA", "Aorta", "Pulmonary artery", "Septum"][:count]
    svg = class_boxes_by_method(boxes(methods, classes), "Dice")
    found = text(svg)
    assert all(name in found for name in (*methods, *classes))
    assert found.count("Dice") == (3 if len(methods) == 12 and count == 8 else 2 if count == 8 else 1)  # rows
    # One median (in ink, thick) per box.
    assert svg.decode().count("stroke: #1d2733; stroke-width: 2.4") == len(methods) * count


def test_boxes_leave_out_what_was_not_measured() -> None:
    frame = boxes(METHODS, ["RV", "LV"])
    frame.loc[(frame["method"] == "GCL") & (frame["class"] == "RV"), "value"] = np.nan
    svg = class_boxes_by_method(frame, "Dice")
    assert text(svg).count("GCL") == 1
    marks = [
        class_boxes_by_method(each, "Dice").decode().count("<use") for each in (frame, boxes(METHODS, ["RV", "LV"]))
    ]
    assert marks[0] == marks[1] - 4


def test_forest_groups_by_budget_without_the_baseline() -> None:
    found = words(forest(differences(METHODS), "← worse   Δ   better →"))
    heads = ["1 labelled", "8 labelled", "10 labelled", "all labelled"]
    assert [word for word in found if word in (*heads, *METHODS)] == [
        word for head in heads for word in (head, *METHODS[1:])
    ]
    assert "← worse   Δ   better →" in found
    alone = differences(METHODS)
    alone.loc[alone["labels"] == "8", "difference"] = np.nan  # nothing to compare there
    assert "8 labelled" not in words(forest(alone, "x"))


def slow_groups(values: dict[str, float], difference: float) -> set[frozenset[str]]:
    """All sets of methods that agree pairwise and are part of no larger one, by trying them all."""
    sets = [
        frozenset(chosen)
        for count in range(2, len(values) + 1)
        for chosen in itertools.combinations(values, count)
        if all(abs(values[a] - values[b]) < difference for a, b in itertools.combinations(chosen, 2))
    ]
    return {one for one in sets if not any(one < other for other in sets)}


@given(st.lists(st.integers(4, 24), min_size=2, max_size=6), st.integers(1, 24))
def test_groups_are_the_maximal_ones(quarters: list[int], difference: int) -> None:
    values = {f"m{place}": quarter / 4 for place, quarter in enumerate(quarters)}
    groups = maximal_groups(values, difference / 4)
    assert {frozenset(group) for group in groups} == slow_groups(values, difference / 4)
    assert len(groups) == len({frozenset(group) for group in groups})
    assert all([values[name] for name in group] == sorted(values[name] for name in group) for group in groups)


def test_groups_by_hand() -> None:
    values = {"d": 4.0, "a": 1.0, "c": 2.5, "b": 1.5}
    assert maximal_groups(values, 1.6) == [("a", "b", "c"), ("c", "d")]
    assert maximal_groups(values, 1.5) == [("a", "b"), ("b", "c")]  # as far apart as the difference: they differ
    assert maximal_groups(values, 0.5) == []
    assert maximal_groups(values, 9) == [("a", "b", "c", "d")]


def test_diagram_names_all_methods_and_joins_groups() -> None:
    for count in (2, 5, 12, 20):
        methods = [f"{LONG[number % 12]} {number}" for number in range(count)]
        for difference in (0.5, 1.5, 30.0):
            svg = critical_difference_diagram(ranks(methods), difference)
            # A name stands beside its rank, whatever lines it is broken into.
            assert all(f"{name} ({rank:.2f})" in text(svg) for name, rank in ranks(methods).items())
            bars = svg.decode().count("stroke-width: 4")
            assert bars == {0.5: 0, 1.5: count - 1, 30.0: 1}[difference]
            assert f"critical difference {difference:.2f}" in words(svg)


def test_diagram_has_the_best_on_the_right_and_cuts_no_name() -> None:
    narrow, wide = (critical_difference_diagram({name: 1.0, "b": 2.0}, 1.0) for name in ("a", "W" * 18))
    assert size(narrow)[0] == pytest.approx(5.6 * 72)
    assert size(critical_difference_diagram({"W" * 18: 1.0, "M" * 18: 2.0}, 1.0))[0] > 5.6 * 72
    for svg in (narrow, wide):
        at = {
            word: float(x)
            for word, x in re.findall(r"<!-- (.*?) -->.*?translate\((\S+) ", svg.decode(), flags=re.DOTALL)
        }
        assert at["b (2.00)"] < at["2"] < at["1"] < max(at.values())
        assert min(at.values()) > 0
        stems = re.findall(r'd="M (\S+) [^"]*"[^>]*stroke-width: 1.1', svg.decode())
        assert float(stems[0]) < float(stems[1])  # the worse one is drawn first, and on the left


def test_pictures_show_every_method_and_wrap() -> None:
    three = picture_grid([ROW], ["random", "PCL"], CLASSES)
    two = picture_grid([ROW, replace(ROW, name="case b")], ["random", "PCL"], CLASSES)
    assert shape(two)[1] == shape(three)[1]
    assert shape(two)[0] > 1.7 * shape(three)[0]
    masks, dice = dict.fromkeys(LONG, TRUTH), dict.fromkeys(LONG, 0.5)
    many = picture_grid([replace(ROW, masks=masks, dice=dice)], LONG, CLASSES)
    assert shape(many)[1] == shape(three)[1]  # as wide as ever, and so as large on a phone
    assert shape(many)[0] > 3 * shape(three)[0]


def test_pictures_use_masks_and_aspect_of_their_row() -> None:
    methods = ["random", "PCL"]
    tall = picture_grid([replace(ROW, aspect=2.0)], methods, CLASSES)
    assert shape(tall)[0] > 1.3 * shape(picture_grid([ROW], methods, CLASSES))[0]
    black = replace(ROW, image=np.zeros_like(IMAGE))
    dark = {value: tuple(OPACITY * part for part in mpl.colors.to_rgb(class_colour(value))) for value in (1, 2)}
    png = picture_grid([black], methods, CLASSES)
    expert, predicted = (shown(png, mpl.colors.to_hex(dark[value])) for value in (1, 2))
    assert expert > 5000
    assert predicted == pytest.approx(expert, rel=0.05)  # the same region, once as each class


def test_inputs_stay_and_odd_names_work() -> None:
    frames = curves(["_hidden", "a--b & <c>"]), differences(["x", "_hidden"]), boxes(["_hidden", "b"], ["_class"])
    copies = [frame.copy() for frame in frames]
    assert "_hidden" in words(means_by_budget(frames[0]))
    assert "_hidden" in words(forest(frames[1], "x"))
    assert {"_hidden", "_class"} <= set(words(class_boxes_by_method(frames[2], "x")))
    for frame, copy in zip(frames, copies, strict=True):
        pd.testing.assert_frame_equal(frame, copy)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: means_by_budget(curves(METHODS).drop(columns="low")), "no column 'low'"),
        (lambda: means_by_budget(curves(METHODS).iloc[:0]), "no mean"),
        (lambda: means_by_budget(pd.concat([curves(METHODS)] * 2)), "several values for one budget"),
        (lambda: forest(differences(["random"]), "x"), "only the baseline"),
        (lambda: forest(pd.concat([differences(METHODS)] * 2), "x"), "several values for one budget"),
        (lambda: class_boxes_by_method(boxes(METHODS, ["RV"]).assign(value=np.nan), "x"), "no value"),
        (lambda: critical_difference_diagram({"a": 1.0}, 1.0), "at least two methods"),
        (lambda: critical_difference_diagram({"a": 1.0, "b": float("nan")}, 1.0), "between 1 and their number"),
        (lambda: critical_difference_diagram({"a": 1.0, "b": 3.0}, 1.0), "between 1 and their number"),
        (lambda: critical_difference_diagram({"a": 1.0, "b": 2.0}, float("nan")), "above 0"),
        (lambda: picture_grid([], ["random"], CLASSES), "no slice"),
        (lambda: picture_grid([ROW], [], CLASSES), "no method"),
        (lambda: picture_grid([ROW], ["JCL"], CLASSES), "case a lacks"),
        (lambda: picture_grid([replace(ROW, dice={})], ["PCL"], CLASSES), "case a lacks"),
        (lambda: picture_grid([replace(ROW, masks={"PCL": TRUTH.T})], ["PCL"], CLASSES), "image's shape"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Callable[[], bytes], says: str) -> None:
    with pytest.raises(GlocalError, match=says):
        draw()
