"""What `auto` derives from a dataset, by numbers worked out by hand; what is given stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from glocal.data.dataset import write_dataset_json
from glocal.errors import GlocalError
from glocal.experiments.derive import ITERATIONS, derived
from glocal.finetuning.registry import finetuning_options
from glocal.options import merged

Write = Callable[..., None]


def image_of(shape: tuple[int, int, int], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Add a case: array (z, y, x) or its shape, spacing (x, y, z), label map if there is one."""

    def add(
        case: str,
        image: NDArray[Any] | tuple[int, int, int],
        spacing: tuple[float, float, float],
        labels: NDArray[Any] | None = None,
        channel: str = "MRI",
    ) -> None:
        array = image_of(image, ord(case)) if isinstance(image, tuple) else image
        files = {tmp_path / "imagesTr" / f"{case}_0000.mha": array, tmp_path / "labelsTr" / f"{case}.mha": labels}
        for path, values in files.items():
            if values is not None:
                path.parent.mkdir(exist_ok=True)
                volume = sitk.GetImageFromArray(values)
                volume.SetSpacing(spacing)
                sitk.WriteImage(volume, str(path))
        write_dataset_json(tmp_path, "Mine", [channel], {"organ": 1}, 1, file_ending=".mha")

    return add


def preprocess(root: Path, **given: Any) -> dict[str, Any]:
    settings = {"data": str(root), "device": "cpu", "preprocess": {"auto": True, **given}}
    result: dict[str, Any] = derived(settings)["preprocess"]
    return result


def test_equal_pixels_stay_as_they_are_and_sizes_become_multiples_of_16(tmp_path: Path, write: Write) -> None:
    write("a", (6, 48, 40), (1.0, 1.0, 8.0))
    write("b", (9, 50, 42), (1.01, 1.0, 8.0))
    assert preprocess(tmp_path) == {
        "intensity": "percentile",
        "spacing": None,
        "slice_axis": "z",
        "field": [64, 48],  # medians 49 and 41
        "size": [64, 48],
    }


def test_unequal_pixels_are_resampled_to_the_median_and_sizes_count_these_pixels(tmp_path: Path, write: Write) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    write("b", (4, 24, 20), (2.0, 2.0, 8.0))  # the same 48 x 40 mm
    found = preprocess(tmp_path)
    assert found["spacing"] == [1.5, 1.5]
    assert (found["field"], found["size"]) == ([32, 32], [32, 32])  # 32 and 26.7 pixels


def test_a_large_image_is_shrunk_alike_along_both_axes(tmp_path: Path, write: Write) -> None:
    write("a", (2, 200, 300), (1.0, 1.0, 5.0))
    found = preprocess(tmp_path)
    assert found["size"] == [96, 128]  # 300 / 128 = 2.34; 200 / 2.34 = 85.3
    assert found["field"] == [225, 300]
    assert found["field"][0] / found["size"][0] == found["field"][1] / found["size"][1]


def test_slices_lie_across_the_largest_spacing_else_across_the_fewest(tmp_path: Path, write: Write) -> None:
    write("a", (40, 48, 12), (1.0, 1.0, 1.0))
    assert preprocess(tmp_path)["slice_axis"] == "x"
    assert preprocess(tmp_path)["field"] == [48, 48]  # z and y
    assert preprocess(tmp_path, slice_axis="y")["field"] == [48, 16]  # z and x
    write("a", (40, 48, 12), (1.0, 6.0, 1.0))
    assert preprocess(tmp_path)["slice_axis"] == "y"
    assert preprocess(tmp_path, spacing_known=False)["slice_axis"] == "x"


def test_placeholder_spacing_is_not_resampled_to(tmp_path: Path, write: Write) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    write("b", (4, 24, 20), (2.0, 2.0, 8.0))
    assert preprocess(tmp_path, spacing_known=False)["spacing"] is None


def test_the_field_holds_every_labelled_structure(tmp_path: Path, write: Write) -> None:
    write("a", (3, 32, 32), (1.0, 1.0, 8.0))
    write("b", (3, 32, 32), (1.0, 1.0, 8.0))
    labels = np.zeros((3, 80, 80), np.uint8)
    labels[1, 5:9, 40] = 1  # 34.5 pixels off the centre at 39.5
    write("c", (3, 80, 80), (1.0, 1.0, 8.0), labels)
    field = preprocess(tmp_path)["field"]
    assert field == [80, 32]  # rows: 1.1 * 70 = 77; columns: the median
    assert preprocess(tmp_path, spacing=[2.0, 2.0])["field"] == [48, 16]  # 38.5; the median 16


def test_ct_gets_the_window_of_its_labelled_structures(tmp_path: Path, write: Write) -> None:
    image = np.full((4, 40, 40), -1000.0, np.float32)
    image[:, 8:32, 8:32] = np.linspace(-20.4, 180.7, 4 * 24 * 24).reshape(4, 24, 24)
    labels = (image > -900).astype(np.uint8)
    write("a", image, (1.0, 1.0, 5.0), labels, channel="CT")
    found = preprocess(tmp_path)
    low, high = np.percentile(image[labels > 0], (0.5, 99.5))
    assert found["intensity"] == "window"
    assert found["window"] == [np.floor(low), np.ceil(high)] == [-20, 180]
    assert preprocess(tmp_path, intensity="zscore")["intensity"] == "zscore"
    assert "window" not in preprocess(tmp_path, intensity="zscore")
    assert preprocess(tmp_path, window=[-100, 300])["window"] == [-100, 300]


def test_a_window_is_for_ct_alone(tmp_path: Path, write: Write) -> None:
    write("a", (4, 32, 32), (1.0, 1.0, 8.0))
    write_dataset_json(tmp_path, "Mine", ["PET", "CT"], {"organ": 1}, 1, file_ending=".mha")
    (tmp_path / "imagesTr" / "a_0001.mha").write_bytes((tmp_path / "imagesTr" / "a_0000.mha").read_bytes())
    found = preprocess(tmp_path)
    assert found["intensity"] == "percentile"
    assert "window" not in found


def test_volumes_stored_in_another_order_of_axes_are_taken_along_the_same(tmp_path: Path, write: Write) -> None:
    labels = np.zeros((6, 64, 96), np.uint8)
    labels[2, :, 4:92] = 1
    for case in "abcd":
        write(case, (6, 64, 96), (1.0, 1.0, 8.0), labels)
    expected = preprocess(tmp_path)
    assert expected["field"] == [80, 112]  # the structure and a margin
    for path in (tmp_path / "imagesTr" / "a_0000.mha", tmp_path / "labelsTr" / "a.mha"):
        sitk.WriteImage(sitk.PermuteAxes(sitk.ReadImage(str(path)), [2, 0, 1]), str(path))
    assert preprocess(tmp_path) == {**expected, "slice_axis": "x"}


def test_ct_without_labels_gets_the_window_of_the_body(tmp_path: Path, write: Write) -> None:
    image = np.full((4, 40, 40), -1000.0, np.float32)
    image[:, 8:32, 8:32] = 40.0
    image[:, 8:32, 8:20] = 60.0
    image[0, 8, 8] = np.nan
    write("a", image, (1.0, 1.0, 5.0), channel=" ct")
    assert preprocess(tmp_path)["window"] == [40, 60]


def test_given_keys_stay_and_the_others_follow_them(tmp_path: Path, write: Write) -> None:
    write("a", (4, 100, 80), (1.0, 1.0, 8.0))
    assert preprocess(tmp_path, spacing=[2.0, 2.0])["field"] == [64, 48]  # 50 x 40 pixels
    assert preprocess(tmp_path, size=[50, 50])["field"] == [100, 100]  # both axes are halved
    assert preprocess(tmp_path, size=[128, 96])["field"] == [128, 96]  # padded rather than enlarged
    assert preprocess(tmp_path, field=[32, 64])["size"] == [32, 64]
    assert preprocess(tmp_path, percentiles=[0, 100], clip=False)["percentiles"] == [0, 100]
    assert preprocess(tmp_path, window=[0, 100]) | {"window": None} == preprocess(tmp_path) | {
        "intensity": "window",
        "window": None,
    }


def test_network_and_iterations_follow_size_and_machine(tmp_path: Path, write: Write) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    write("b", (4, 48, 40), (1.0, 1.0, 8.0))
    settings = {
        "data": tmp_path,
        "device": "cpu",
        "preprocess": {"auto": True},
        "network": {"auto": True, "name": "unet"},
        "pretrain": {"auto": True, "gcl": {"method": "gcl"}, "pcl": {"method": "pcl", "max_iterations": 3}},
        "finetune": {"auto": True, "labels": 2},
        "protocol": {"draws": 2},
    }
    result = derived(settings)
    pretraining, finetuning = ITERATIONS["cpu"]
    assert result["network"] == {"name": "unet", "widths": [16, 32, 64, 128]}  # 48 -> 6 at the bottleneck
    assert result["pretrain"] == {
        "gcl": {"method": "gcl", "volumes": 2, "max_iterations": pretraining},  # there are only two volumes
        "pcl": {"method": "pcl", "max_iterations": 3},
    }
    assert result["finetune"] == {
        "labels": 2,
        "max_iterations": finetuning,
        "strategy": "self-training",
        "tta": True,
    }
    assert result["protocol"] == {"draws": 2}
    assert settings["preprocess"] == {"auto": True}
    assert derived(result) == result


def test_without_spacing_labelled_slices_are_seen_at_more_scales(tmp_path: Path, write: Write) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))

    def finetune(given: dict[str, Any], **preprocess: Any) -> dict[str, Any]:
        part = {"auto": True, "max_iterations": 5, "strategy": "supervised", **given}
        found = derived({"data": tmp_path, "preprocess": {"auto": True, **preprocess}, "finetune": part})["finetune"]
        assert finetuning_options(found).max_iterations == 5
        return {key: value for key, value in found.items() if key not in ("max_iterations", "strategy")}

    wide = {"augmentation": {"spatial": {"scale": [0.5, 2]}}}
    assert finetune({}) == finetune({}, spacing_known=True) == {}
    assert finetune({}, spacing_known=False) == wide
    own: dict[str, Any] = {"augmentation": {"spatial": {"rotation": 9}, "intensity": "none"}}
    assert finetune(own, spacing_known=False) == merged(wide, own)
    for given in ({"augmentation": "none"}, {"augmentation": {"spatial": {"scale": [1, 1]}}}):
        assert finetune(given, spacing_known=False) == given


def test_what_has_no_labels_is_learnt_from_too(raw: Path, write_dataset: Any, tmp_path: Path) -> None:
    """One of the six cases of `raw` has no label map."""

    def strategy(data: Path, **given: Any) -> tuple[str, bool | None]:
        settings = {"data": data, "preprocess": {"size": [32, 32]}, "finetune": {"auto": True, **given}}
        found = derived(settings)["finetune"]
        assert finetuning_options(found).strategy == found["strategy"]
        return found["strategy"], found.get("tta")

    assert strategy(raw, labels="all") == strategy(raw) == strategy(raw, labels=[1, "all"]) == ("self-training", True)
    assert strategy(raw, tta=False) == ("self-training", False)
    for still in ("none", {"spatial": "none"}):
        assert strategy(raw, augmentation=still) == ("self-training", None)
    assert strategy(raw, strategy="mixup") == ("mixup", None)
    labelled = write_dataset(tmp_path / "labelled", {"a": 5, "b": 6, "c": 5}, ["a", "b", "c"])
    assert strategy(labelled, labels="all") == strategy(labelled, labels=["all"]) == ("supervised", None)
    assert strategy(labelled, labels=2) == ("self-training", True)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("pcl-unet", {"widths": [32, 64, 128, 256]}),
        ("nnunet-residual", {"widths": [32, 64, 128, 256]}),
        ("resnet50-unet", {}),  # its levels are fixed
    ],
)
def test_other_networks_keep_as_many_of_their_levels_as_fit(
    tmp_path: Path, write: Write, name: str, widths: dict[str, Any]
) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    settings = {
        "data": tmp_path,
        "device": "cpu",
        "preprocess": {"auto": True},
        "network": {"auto": True, "name": name},
    }
    assert derived(settings)["network"] == {"name": name, **widths}
    settings["network"] = {"auto": True, "name": "vnet"}
    with pytest.raises(GlocalError, match="There is no network 'vnet'"):
        derived(settings)


def test_parts_that_are_not_auto_are_left_alone(tmp_path: Path) -> None:
    settings = {"name": "x", "preprocess": {"size": [8, 8]}, "finetune": {"auto": False, "labels": 1}}
    assert derived(settings) == {"name": "x", "preprocess": {"size": [8, 8]}, "finetune": {"labels": 1}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 64}, "preprocess.size=64 does not fit: it must be a list in brackets"),
        ({"sise": [64, 64]}, r"preprocess\.sise is not a setting: did you mean 'size'\?"),
        ({"slice_axis": "q"}, r"preprocess\.slice_axis=q does not fit: it must be 'auto', 'x', 'y' or 'z'"),
        ({"spacing": [1, 1], "spacing_known": False}, "spacing cannot be set when spacing_known is false"),
    ],
)
def test_a_given_key_that_does_not_fit_is_said_before_it_is_used(
    tmp_path: Path, write: Write, given: dict[str, Any], words: str
) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    with pytest.raises(GlocalError, match=words):
        preprocess(tmp_path, **given)


def test_what_is_missing_is_said(tmp_path: Path, write: Write) -> None:
    with pytest.raises(GlocalError, match="data=DATASET"):
        derived({"preprocess": {"auto": True}})
    with pytest.raises(GlocalError, match=r"dataset\.json"):
        preprocess(tmp_path)
    write("a", (4, 48, 40), (1.0, 1.0, 8.0))
    with pytest.raises(GlocalError, match=r"preprocess\.size is missing"):
        derived({"data": str(tmp_path), "network": {"auto": True}})
    with pytest.raises(GlocalError, match="preprocess=3 does not fit: it must be settings of its own"):
        derived({"data": str(tmp_path), "preprocess": 3, "finetune": {"auto": True}})
    (tmp_path / "imagesTr" / "a_0000.mha").write_text("no image")
    with pytest.raises(GlocalError, match=r"a_0000\.mha cannot be read: run `glocal check`"):
        preprocess(tmp_path)


def test_a_label_map_of_another_size_is_said(tmp_path: Path, write: Write) -> None:
    write("a", (4, 48, 40), (1.0, 1.0, 8.0), np.ones((4, 48, 39), np.uint8), channel="CT")
    with pytest.raises(GlocalError, match="differ in size: run `glocal check`"):
        preprocess(tmp_path)


def test_nothing_is_fitted_to_the_labels_of_test_cases(tmp_path: Path, write: Write) -> None:
    labels = np.zeros((3, 80, 80), np.uint8)
    labels[1, 5:9, 40] = 1
    for case in "ab":
        write(case, (3, 32, 32), (1.0, 1.0, 8.0))
    write("c", (3, 80, 80), (1.0, 1.0, 8.0), labels)
    assert preprocess(tmp_path)["field"] == [80, 32]
    (tmp_path / "split.json").write_text('{"pretrain": ["a", "b"], "test": ["c"]}')
    assert preprocess(tmp_path)["field"] == [32, 32]


@pytest.mark.parametrize("vary", [{"seed": [0, 1]}, {"half": {"first": {"protocol.splits": 2}}}])
def test_nothing_is_fitted_to_labels_where_the_split_varies(tmp_path: Path, write: Write, vary: dict[str, Any]) -> None:
    labels = np.zeros((3, 80, 80), np.uint8)
    labels[1, 5:9, 40] = 1
    for case in "abcdef":
        write(case, (3, 32, 32), (1.0, 1.0, 8.0), labels[:, :32, :32])
    write("g", (3, 80, 80), (1.0, 1.0, 8.0), labels)
    (tmp_path / "split.json").write_text('{"pretrain": ["a", "b", "c", "g"], "test": ["d", "e", "f"]}')
    settings = {"data": str(tmp_path), "device": "cpu", "preprocess": {"auto": True}}
    assert derived(settings)["preprocess"]["field"] == [80, 32]
    assert derived(settings, {"labels": [1, 2]})["preprocess"]["field"] == [80, 32]
    assert derived(settings, vary)["preprocess"]["field"] == [32, 32]
