import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from glocal.errors import GlocalError
from glocal.evaluation.metrics import DISTANCES, METRICS, OVERLAPS, Row, case_metrics, dice, worst_metrics

SPACING = (1.25, 0.7, 3.0)
volumes = hnp.arrays(np.int16, (4, 6, 5), elements=st.integers(0, 1))
spacings = st.tuples(*[st.floats(0.2, 8.0)] * 3)
few = settings(max_examples=40, deadline=None)


def one(prediction: NDArray[np.integer], truth: NDArray[np.integer], spacing=SPACING, tolerance: float = 1.0) -> Row:
    (row,) = case_metrics(prediction, truth, {"organ": 1}, spacing, tolerance)
    return row


def blobs(shape: tuple[int, ...], seed: int, density: float = 0.3) -> NDArray[np.int16]:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return (noise > np.quantile(noise, 1 - density)).astype(np.int16)


@pytest.mark.parametrize("shape", [(9, 17, 21), (2, 11, 12), (5, 1, 9)])
@pytest.mark.parametrize("tolerance", [0.7, 1.25, 3.0])
def test_equals_monai(shape: tuple[int, int, int], tolerance: float) -> None:
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    prediction, truth = blobs(shape, 1), blobs(shape, 2)
    keep = [axis for axis, length in enumerate(shape) if length > 1]
    spacing = [SPACING[::-1][axis] for axis in keep]
    a, b = (torch.from_numpy(array.squeeze())[None, None] for array in (prediction, truth))
    options = {"include_background": True, "spacing": spacing}
    expected = {
        "dice": monai.compute_dice(a, b, include_background=True),
        "iou": monai.compute_iou(a, b, include_background=True),
        "hd": monai.compute_hausdorff_distance(a, b, **options),
        "hd95": monai.compute_hausdorff_distance(a, b, percentile=95, **options),
        "assd": monai.compute_average_surface_distance(a, b, symmetric=True, **options),
        "nsd": monai.compute_surface_dice(a, b, [tolerance], **options),
    }
    row = one(prediction, truth, tolerance=tolerance)
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(float(value), rel=1e-6, abs=1e-6), metric


def test_values_by_hand() -> None:
    truth, prediction = np.zeros((2, 1, 5, 9), np.int16)
    truth[0, 1:4, 1:4] = 1  # nine pixels, eight of them surface
    prediction[0, 1:4, 3:6] = 1  # the same square two pixels to the right
    row = one(prediction, truth, spacing=(2.0, 1.0, 1.0), tolerance=1.5)
    assert row["dice"] == pytest.approx(6 / 18)
    assert row["iou"] == pytest.approx(3 / 15)
    assert row["hd"] == pytest.approx(4.0)
    # Distances of each surface: the shared column 0, and by symmetry the rest of the two squares.
    # Columns of the truth 1: 3 pixels 4 mm away; 2: its two surface pixels 2 mm; 3: three shared pixels.
    assert row["assd"] == pytest.approx((3 * 4 + 2 * 2 + 3 * 0) / 8)
    assert row["nsd"] == pytest.approx(3 / 8)


def test_one_slice_is_measured_in_its_plane() -> None:
    truth = np.zeros((1, 20, 20), np.int16)
    truth[0, 2:18, 2:18] = 1
    prediction = truth.copy()
    prediction[0, 8:12, 8:12] = 0  # a hole: were all pixels surface, most distances would be 0 and the mean tiny
    assert one(prediction, truth, spacing=(1, 1, 9))["assd"] > 0.5
    twice = one(np.repeat(prediction, 2, 0), np.repeat(truth, 2, 0), spacing=(1, 1, 9))
    assert twice["assd"] < 0.5  # two slices are a volume, and each of their voxels has a neighbour outside


def test_a_class_absent_from_both_is_perfect() -> None:
    row = one(np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.uint8))
    assert [row[metric] for metric in METRICS] == [1, 1, 0, 0, 0, 1]
    assert row["note"] == "absent from both"


@pytest.mark.parametrize(("swap", "note", "voxels"), [(False, "missed", (1, 0)), (True, "invented", (0, 1))])
def test_a_class_in_one_mask_only_is_worst(swap: bool, note: str, voxels: tuple[int, int]) -> None:
    empty, full = np.zeros((2, 3, 4, 5), np.int16)
    full[1, 2, 3] = 1
    row = one(full, empty) if swap else one(empty, full)
    assert [row[metric] for metric in (*OVERLAPS, "nsd")] == [0, 0, 0]
    assert [row[metric] for metric in DISTANCES] == pytest.approx([math.hypot(5 * 1.25, 4 * 0.7, 3 * 3.0)] * 3)
    assert (row["note"], (row["truth_voxels"], row["predicted_voxels"])) == (note, voxels)


def test_a_case_without_prediction_is_worst_even_where_the_class_is_absent() -> None:
    rows = worst_metrics(np.ones((3, 4, 5), np.int16), {"organ": 1, "other": 2}, SPACING, "no prediction")
    assert [row["dice"] for row in rows] == [0, 0]
    assert all(row["hd95"] > 10 and row["note"] == "no prediction" for row in rows)
    assert [row["truth_voxels"] for row in rows] == [60, 0]
    assert list(rows[0]) == list(one(np.ones((3, 4, 5), np.int16), np.ones((3, 4, 5), np.int16)))


def test_unknown_spacing_leaves_out_millimetres() -> None:
    for prediction in (blobs((4, 9, 9), 1), np.zeros((4, 9, 9), np.int16)):
        row = one(prediction, blobs((4, 9, 9), 2), spacing=None)
        assert all(math.isnan(row[metric]) for metric in (*DISTANCES, "nsd"))
        assert 0 <= row["dice"] < 1


def test_classes_are_kept_apart_and_inputs_untouched() -> None:
    prediction, truth = np.random.default_rng(0).integers(0, 4, (2, 5, 8, 8)).astype(np.int16)
    prediction.flags.writeable = truth.flags.writeable = False
    rows = case_metrics(prediction, truth, {"b": 3, "a": 1}, SPACING)
    assert [row["class"] for row in rows] == ["b", "a"]
    for row, value in zip(rows, (3, 1), strict=True):
        alone = one((prediction == value).astype(np.int16), (truth == value).astype(np.int16))
        assert row | {"class": ""} == alone | {"class": ""}
        assert row["dice"] == dice(prediction == value, truth == value)


def test_shapes_must_agree() -> None:
    with pytest.raises(GlocalError, match="shape"):
        one(np.zeros((2, 3, 4), np.int16), np.zeros((2, 3, 5), np.int16))


@few
@given(volumes, volumes, spacings)
def test_symmetric_and_in_range(
    a: NDArray[np.int16], b: NDArray[np.int16], spacing: tuple[float, float, float]
) -> None:
    row, back = one(a, b, spacing), one(b, a, spacing)
    diagonal = float(np.linalg.norm(np.array(spacing) * a.shape[::-1]))
    for metric in METRICS:
        assert row[metric] == pytest.approx(back[metric])
    assert all(0 <= row[metric] <= 1 for metric in (*OVERLAPS, "nsd"))
    assert 0 <= row["hd95"] <= row["hd"] <= diagonal + 1e-9
    assert 0 <= row["assd"] <= row["hd"] * (1 + 1e-12)  # a mean of equal distances is rounded
    assert row["iou"] <= row["dice"]


@few
@given(volumes, spacings)
def test_identical_masks_are_perfect(a: NDArray[np.int16], spacing: tuple[float, float, float]) -> None:
    row = one(a, a, spacing, tolerance=0.0)
    assert [row[metric] for metric in METRICS] == [1, 1, 0, 0, 0, 1]


@few
@given(volumes, volumes, st.tuples(*[st.integers(0, 4)] * 3))
def test_translation_changes_nothing(a: NDArray[np.int16], b: NDArray[np.int16], shift: tuple[int, int, int]) -> None:
    a[0, 0, 0] = b[1, 1, 1] = 1
    moved = [np.pad(array, [(s, 4 - s) for s in shift]) for array in (a, b)]
    row, other = one(a, b), one(*moved)
    for metric in METRICS:
        assert row[metric] == pytest.approx(other[metric])


@few
@given(volumes, volumes, st.floats(0.1, 10))
def test_distances_scale_with_spacing(a: NDArray[np.int16], b: NDArray[np.int16], factor: float) -> None:
    row = one(a, b, SPACING, tolerance=1.0)
    scaled = one(a, b, tuple(factor * step for step in SPACING), tolerance=factor)
    for metric in DISTANCES:
        assert scaled[metric] == pytest.approx(factor * row[metric])
    assert [scaled[metric] for metric in OVERLAPS] == [row[metric] for metric in OVERLAPS]


@few
@given(volumes, volumes)
def test_equals_brute_force(a: NDArray[np.int16], b: NDArray[np.int16]) -> None:
    a[0, 0, 0] = b[1, 1, 1] = 1

    def surface(mask: NDArray[np.int16]) -> NDArray[np.float64]:
        steps = [step * sign for step in np.eye(3, dtype=int) for sign in (1, -1)]
        padded = np.pad(mask, 1)
        points = [p for p in np.argwhere(padded) if any(not padded[tuple(p + step)] for step in steps)]
        return np.array(points) * SPACING[::-1]

    gaps = np.linalg.norm(surface(a)[:, None] - surface(b)[None], axis=-1)
    ways = gaps.min(1), gaps.min(0)
    row = one(a, b)
    assert row["hd"] == pytest.approx(max(way.max() for way in ways))
    assert row["hd95"] == pytest.approx(max(np.percentile(way, 95) for way in ways))
    assert row["assd"] == pytest.approx(np.concatenate(ways).mean())
