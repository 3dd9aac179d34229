"""The check finds every planted defect, names its case, finds nothing in a sound dataset, and never raises."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from glocal.cli.check import check as command
from glocal.data.check import check
from glocal.data.dataset import write_dataset_json
from glocal.data.findings import RULES, Finding
from glocal.data.image import Geometry, write_volume
from glocal.data.nifti import forms_of, write_forms

GEOMETRY = Geometry((8, 9, 4), (1.5, 1.5, 8.0), (-10.1, 20.3, 700.7))
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


def image(
    root: Path, case: str, array: np.ndarray | None = None, geometry: Geometry = GEOMETRY, channel: int = 0
) -> None:
    voxels = np.random.default_rng(sum(case.encode())).normal(size=geometry.size[::-1]) if array is None else array
    write_volume(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", voxels.astype(np.float32), geometry)


def label(root: Path, case: str, array: np.ndarray | None = None, geometry: Geometry = GEOMETRY) -> None:
    write_volume(root / "labelsTr" / f"{case}.nii.gz", labels() if array is None else array, geometry)


def labels() -> np.ndarray:
    array = np.zeros((4, 9, 8), np.uint8)
    array[1:3, 2:6, 2:4], array[1:3, 2:6, 4:6] = 1, 2
    return array


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Cases a, b, c, of which a and b are labelled; nothing is wrong with them."""
    write_dataset_json(tmp_path, "Sound", ["MRI"], {"LV": 1, "RV": 2}, 3)
    for case in "abc":
        image(tmp_path, case, geometry=replace(GEOMETRY, direction=OBLIQUE))
    for case in "ab":
        label(tmp_path, case, geometry=replace(GEOMETRY, direction=OBLIQUE))
    return tmp_path


def found(root: Path) -> dict[str, Finding]:
    report = check(root, workers=2)
    assert all(RULES[finding.code] == (finding.severity, finding.remedy) for finding in report.findings)
    assert report.ok == all(finding.severity != "error" for finding in report.findings)
    return {finding.code: finding for finding in report.findings}


def test_a_sound_dataset_has_no_findings(root: Path) -> None:
    report = check(root)
    assert report.ok
    assert report.findings == []
    assert report.summary["cases"] == 3
    assert report.summary["labelled"] == 2
    assert report.summary["subjects"] == 3
    assert report.summary["size"] == [[8, 9, 4], [8, 9, 4]]
    np.testing.assert_allclose(report.summary["spacing"], [[1.5, 1.5, 8.0]] * 2)
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def truncate(root: Path) -> None:
    path = root / "imagesTr/a_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])


def edit_description(root: Path, **changes: object) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def second_channel(root: Path) -> None:
    edit_description(root, channel_names={"0": "T1", "1": "T2"})
    for case in "abc":
        place = replace(GEOMETRY, direction=OBLIQUE, origin=(0, 0, 0) if case == "a" else GEOMETRY.origin)
        image(root, case, geometry=place, channel=1)


def two_places(path: Path) -> None:
    forms = forms_of(path)
    assert forms is not None
    write_forms(path, replace(forms, codes=(1, 2), numbers=(*forms.numbers[:9], 55.0, *forms.numbers[10:])))


def frames(root: Path) -> None:
    volume = sitk.GetImageFromArray(labels())
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(root / "imagesTr/a_0000.nii.gz"))


def sheared(root: Path) -> None:
    shutil.rmtree(root / "imagesTr")
    shutil.rmtree(root / "labelsTr")
    edit_description(root, file_ending=".mha")
    write_volume(root / "imagesTr/a_0000.mha", labels(), replace(GEOMETRY, direction=(1, 0.2, 0, 0, 1, 0, 0, 0, 1)))


def not_finite(root: Path) -> None:
    sheared(root)
    write_volume(root / "imagesTr/a_0000.mha", with_value(np.inf), GEOMETRY)


def with_value(value: float) -> np.ndarray:
    array = labels().astype(np.float32)
    array[0, 0, 0] = value
    return array


def same(root: Path, *lines: str) -> None:
    shutil.copy(root / "imagesTr/a_0000.nii.gz", root / "imagesTr/b_0000.nii.gz")
    if lines:
        (root / "subjects.tsv").write_text("case\tsubject\n" + "\n".join(lines) + "\n")


# code, case it is found in, how it comes about
DEFECTS: list[tuple[str, str | None, Callable[[Path], object]]] = [
    ("unreadable", "a", truncate),
    ("unreadable", "a", lambda root: (root / "labelsTr/a.nii.gz").write_bytes(b"nothing")),
    ("label-geometry", "a", lambda root: label(root, "a", labels()[:-1], replace(GEOMETRY, size=(8, 9, 3)))),
    (
        "label-geometry",
        "a",
        lambda root: label(root, "a", geometry=replace(GEOMETRY, direction=OBLIQUE, spacing=(1.5, 1.5, 8.1))),
    ),
    (
        "label-geometry",
        "a",
        lambda root: label(root, "a", geometry=replace(GEOMETRY, direction=OBLIQUE, origin=(-10.1, 20.5, 700.7))),
    ),
    ("label-geometry", "a", lambda root: label(root, "a", geometry=GEOMETRY)),
    ("channel-geometry", "a", second_channel),
    ("channels", "b", lambda root: (second_channel(root), (root / "imagesTr/b_0001.nii.gz").unlink())),
    ("label-unknown", "a", lambda root: label(root, "a", with_value(3))),
    ("label-not-whole", "a", lambda root: label(root, "a", with_value(0.5))),
    ("not-finite-read-as-0", "a", lambda root: image(root, "a", with_value(np.nan))),
    ("not-finite-read-as-0", "a", lambda root: image(root, "a", with_value(-np.inf))),
    ("not-finite", "a", not_finite),
    ("constant", "a", lambda root: image(root, "a", np.full((4, 9, 8), 7.0))),
    ("dimensions", "a", frames),
    ("single-slice", "a", lambda root: image(root, "a", geometry=replace(GEOMETRY, size=(8, 9, 1)))),
    ("label-empty", "a", lambda root: label(root, "a", 0 * labels())),
    ("label-tiny", "a", lambda root: label(root, "a", with_value(1) * (np.arange(4) == 0)[:, None, None])),
    ("label-missing", None, lambda root: [label(root, case, labels() // 2 * 0 + (labels() == 1)) for case in "ab"]),
    ("duplicate", "a", same),
    ("duplicate-in-subject", "a", lambda root: same(root, "a\tp", "b\tp", "c\tq")),
    (
        "split",
        None,
        lambda root: (
            same(root, "a\tp", "b\tp", "c\tq"),
            (root / "split.json").write_text('{"pretrain": ["a"], "test": ["b"]}'),
        ),
    ),
    ("subjects", None, lambda root: (root / "subjects.tsv").write_text("case\tsubject\na\tp\n")),
    ("label-without-image", "z", lambda root: label(root, "z")),
    ("image-name", None, lambda root: shutil.copy(root / "imagesTr/a_0000.nii.gz", root / "imagesTr/a.nii.gz")),
    ("image-name", None, lambda root: (root / "imagesTr/a_0000.nii.gz").rename(root / "imagesTr/a_0000.nii")),
    ("image-name", None, lambda root: (root / "labelsTr/a.nii.gz").rename(root / "labelsTr/a.mha")),
    ("description", None, lambda root: (root / "dataset.json").unlink()),
    ("description", None, lambda root: (root / "dataset.json").write_text("{")),
    ("no-images", None, lambda root: shutil.rmtree(root / "imagesTr")),
    ("named-alike", None, lambda root: [image(root, f"p{k}_{time}") for k in (1, 2) for time in ("ED", "ES")]),
    ("count", None, lambda root: edit_description(root, numTraining=7)),
    ("no-labels", None, lambda root: shutil.rmtree(root / "labelsTr")),
    (
        "orientation",
        None,
        lambda root: image(root, "c", geometry=replace(GEOMETRY, direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1))),
    ),
    ("slice-axis-mixed", None, lambda root: image(root, "c", geometry=replace(GEOMETRY, spacing=(8.0, 1.5, 1.5)))),
    ("slice-axis-guessed", None, lambda root: image(root, "c", geometry=replace(GEOMETRY, spacing=(8.0, 1.5, 8.0)))),
    ("two-places", "c", lambda root: two_places(root / "imagesTr/c_0000.nii.gz")),
    ("direction-unknown", "c", lambda root: image(root, "c", geometry=replace(GEOMETRY, direction_known=False))),
    ("direction", "a", sheared),
]


@pytest.mark.parametrize(
    ("code", "case", "spoil"), DEFECTS, ids=[f"{code}-{k}" for k, (code, *_) in enumerate(DEFECTS)]
)
def test_a_planted_defect_is_found(root: Path, code: str, case: str | None, spoil: Callable[[Path], object]) -> None:
    spoil(root)
    findings = found(root)
    assert code in findings
    assert findings[code].case == case


def test_every_rule_is_planted() -> None:
    assert {code for code, *_ in DEFECTS} | {"placeholder-spacing"} == set(RULES)


def test_names_alike_are_no_matter_where_subjects_say_so_or_where_many_are(root: Path) -> None:
    for k in (1, 2):
        for time in ("ED", "ES"):
            image(root, f"p{k}_{time}")
    assert "p1_ED and p1_ES, p2_ED and p2_ES have names alike" in found(root)["named-alike"].message
    lines = [f"{case}\t{case.partition('_')[0]}\n" for case in ("a", "b", "c", "p1_ED", "p1_ES", "p2_ED", "p2_ES")]
    (root / "subjects.tsv").write_text("case\tsubject\n" + "".join(lines))
    assert "named-alike" not in found(root)
    (root / "subjects.tsv").unlink()
    for number in range(6):  # two studies, not two people
        image(root, f"p1_{number}")
    assert "named-alike" not in found(root)


def test_a_placeholder_spacing_is_suspected_in_flat_volumes_only(tmp_path: Path) -> None:
    for name, size, suspected in (("flat", (24, 24, 6), True), ("cubic", (12, 10, 9), False)):
        write_dataset_json(tmp_path / name, name, ["MRI"], {}, 1)
        image(tmp_path / name, "a", geometry=Geometry(size))
        assert ("placeholder-spacing" in found(tmp_path / name)) == suspected


def test_single_precision_is_no_difference(root: Path) -> None:
    origin = tuple(float(np.float32(value)) * (1 + 1e-7) for value in GEOMETRY.origin)
    label(root, "a", geometry=replace(GEOMETRY, direction=OBLIQUE, origin=origin))  # type: ignore[arg-type]
    assert found(root) == {}


def test_it_is_as_strict_with_geometries_as_preprocessing(root: Path) -> None:
    label(root, "a", geometry=replace(GEOMETRY, direction=OBLIQUE, origin=(-10.1, 20.4, 700.7)))  # 1/15 voxel
    assert found(root) == {}
    long = replace(GEOMETRY, size=(8, 9, 200))
    image(root, "b", geometry=long)
    label(root, "b", np.ones((200, 9, 8), np.uint8), replace(long, spacing=(1.5, 1.5, 8.001)))  # 0.2 mm at the end
    assert "spacing (1.5, 1.5, 8 against 1.5, 1.5, 8.001)." in found(root)["label-geometry"].message


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_found(root: Path) -> None:
    for name in (b"imagesTr/M\xfcller_0000.nii.gz", b"labelsTr/M\xfcller.nii.gz"):
        (root / os.fsdecode(name)).touch()
        text = found(root)["image-name"].message
        assert "xfcller" in text
        assert text.isprintable()


def test_the_message_says_which_values_differ(root: Path) -> None:
    label(root, "a", geometry=replace(GEOMETRY, direction=OBLIQUE, spacing=(1.5, 1.5, 5.0)))
    message = found(root)["label-geometry"].message
    assert "spacing (1.5, 1.5, 8 against 1.5, 1.5, 5)" in message
    assert "origin" not in message


def test_every_value_of_a_label_map_is_seen_wherever_it_lies(root: Path) -> None:
    place = replace(GEOMETRY, direction=OBLIQUE)
    scattered = np.random.default_rng(0).integers(0, 7, (4, 9, 8))
    label(root, "a", scattered.astype(np.int16), place)
    assert "does not name: 3, 4, 5 and 1 more" in found(root)["label-unknown"].message
    for corner in (0, -1):
        single = np.zeros((4, 9, 8), np.float32)
        single.flat[corner] = 2
        label(root, "a", single, place)
        assert "only 1 voxel(s)" in found(root)["label-tiny"].message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_label_value_that_is_no_number_is_not_whole(root: Path, value: float) -> None:
    sheared(root)
    (root / "labelsTr").mkdir()
    write_volume(root / "labelsTr/a.mha", with_value(value), GEOMETRY)
    assert f"not whole numbers: {value}." in found(root)["label-not-whole"].message


def test_the_same_image_is_found_in_another_voxel_type_and_not_where_a_voxel_differs(root: Path) -> None:
    place = replace(GEOMETRY, direction=OBLIQUE)
    voxels = np.arange(288).reshape(4, 9, 8)
    write_volume(root / "imagesTr/a_0000.nii.gz", voxels.astype(np.int16), place)
    write_volume(root / "imagesTr/b_0000.nii.gz", voxels.astype(np.float64), place)
    voxels[-1, -1, -1] += 1
    write_volume(root / "imagesTr/c_0000.nii.gz", voxels.astype(np.uint16), place)
    assert found(root)["duplicate"].message == "The same image is in a, b."


def test_it_names_the_same_in_threads_as_alone(root: Path) -> None:
    truncate(root)
    label(root, "b", with_value(9))
    assert check(root, workers=3).as_dict() == check(root, workers=1).as_dict()


def test_several_defects_are_told_at_once_errors_first(root: Path) -> None:
    truncate(root)
    image(root, "b", np.zeros((4, 9, 8)), replace(GEOMETRY, direction=OBLIQUE))
    edit_description(root, numTraining=9)
    (root / "split.json").write_text("[")
    assert [finding.code for finding in check(root).findings] == ["split", "unreadable", "constant", "count"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from(["background", ".mha", "a", "0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "background", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    description=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("channel_names", "labels", "file_ending", "numTraining"), JSON)
    ),
    split=JSON,
    subjects=st.text('casesubject\t\n"a', max_size=40),
    junk=st.binary(max_size=60),
)
def test_it_never_raises(
    tmp_path: Path, description: dict[str, object], split: object, subjects: str, junk: bytes
) -> None:
    (tmp_path / "imagesTr").mkdir(exist_ok=True)
    (tmp_path / "imagesTr/a_0000.mha").write_bytes(junk)
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "subjects.tsv").write_text(subjects)
    assert not check(tmp_path, workers=1).ok


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_the_command(root: Path) -> None:
    code, text = run(str(root))
    assert (code, "No errors" in text) == (0, True)
    truncate(root)
    code, text = run(str(root))
    assert (code, "1 error" in text, f"glocal check {root}" in text) == (2, True, True)
    code, text = run(str(root), "--json")
    assert code == 2
    assert [finding["code"] for finding in json.loads(text)["findings"]] == ["unreadable"]
