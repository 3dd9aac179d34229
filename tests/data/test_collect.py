"""Any folder becomes a dataset: names, channels, labels, subjects; sources stay untouched, failures leave no trace."""

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import typer
from typer.testing import CliRunner

from glocal.cli.collect import collect as command
from glocal.data.check import check
from glocal.data.collect import collect
from glocal.data.dataset import read_dataset
from glocal.data.dicom import same_locale
from glocal.data.image import Geometry, read_image, read_labels, write_volume
from glocal.errors import GlocalError

GEOMETRY = Geometry((8, 7, 4), (1.5, 1.5, 8.0), (1.0, 2.0, 3.0), (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def volume(path: Path) -> np.ndarray:
    array = np.random.default_rng(sum(str(path).encode())).normal(size=(4, 7, 8)).astype(np.float32)
    write_volume(path, array, GEOMETRY)
    return array


def label(path: Path, *values: int) -> np.ndarray:
    array = np.zeros((4, 7, 8), np.int16)
    for slice_, value in enumerate(values):
        array[slice_ % 4, slice_ // 4, :] = value
    write_volume(path, array, GEOMETRY)
    return array


@same_locale()
def dicom(
    folder: Path, uid: str, patient: str, name: str, slices: int = 4, birth: str = "", kind: str | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(slices):
        image = sitk.GetImageFromArray(np.full((1, 6, 7), 10 * number, np.int16))
        tags = {
            "0008|0018": f"{uid}.9.{number}",
            "0010|0010": name,
            "0010|0020": patient,
            "0010|0030": birth,
            "0020|000d": f"{uid}.1",
            "0020|000e": uid,
            "0020|0032": f"0\\0\\{5 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        } | ({"0008|0016": kind} if kind else {})
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{number}.dcm"))
        writer.Execute(image)


def report(path: Path, kind: str = "1.2.840.10008.5.1.4.1.1.88.11") -> None:
    """A DICOM file without pixels; the kind says of what: a report, ..."""
    identifier = kind.encode() + b"\0" * (len(kind) % 2)
    header = b"\x02\x00\x02\x00UI" + len(identifier).to_bytes(2, "little") + identifier
    path.write_bytes(bytes(128) + b"DICM" + header + b"\x08\x00\x60\x00CS\x02\x00SR")


def traces(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_format_becomes_one_layout(tmp_path: Path, images: Path) -> None:
    arrays = {name: volume(images / name) for name in ("a.nii.gz", "b.nii", "c.mha", "deep/er/d.nrrd")}
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    made = collect(images, tmp_path / "out" / "Dataset", name="Any")
    dataset = read_dataset(tmp_path / "out" / "Dataset")
    assert (made.cases, made.labelled, made.subjects, made.channels, made.labels) == (4, 0, 4, 1, {})
    assert (dataset.name, [case.name for case in dataset.cases]) == ("Any", ["a", "b", "c", "d"])
    for case, array in zip(dataset.cases, arrays.values(), strict=True):
        found = read_image(case.images)
        np.testing.assert_array_equal(found.array[0], array)
        np.testing.assert_allclose(found.geometry.direction, GEOMETRY.direction, atol=1e-5)
        np.testing.assert_allclose(found.geometry.origin, GEOMETRY.origin, atol=1e-5)
    assert gzip.decompress(dataset.cases[0].images[0].read_bytes()) == gzip.decompress(before[images / "a.nii.gz"])
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before
    assert traces(tmp_path / "out") == ["Dataset"]
    assert [finding.code for finding in check(tmp_path / "out" / "Dataset").findings] == ["no-labels"]


def test_channels_belong_to_one_case(tmp_path: Path, images: Path) -> None:
    for name in ("p_0000", "p_0001", "q_0000", "q_0001"):
        volume(images / f"{name}.mha")
    assert collect(images, tmp_path / "out").channels == 2
    assert [len(case.images) for case in read_dataset(tmp_path / "out").cases] == [2, 2]
    (images / "q_0001.mha").unlink()
    with pytest.raises(GlocalError, match="channel"):
        collect(images, tmp_path / "out2")
    for name in ("p", "q"):
        volume(images / f"{name}_0002.mha")
        (images / f"{name}_0001.mha").unlink(missing_ok=True)
    with pytest.raises(GlocalError, match=r"p_0002\.mha is not the next channel"):
        collect(images, tmp_path / "out2")


def test_a_number_without_a_channel_0_is_part_of_the_name(tmp_path: Path, images: Path) -> None:
    for name in ("IMG_0001", "IMG_0002"):
        volume(images / f"{name}.mha")
    collect(images, tmp_path / "out")
    assert [case.name for case in read_dataset(tmp_path / "out").cases] == ["IMG_0001", "IMG_0002"]


def test_names_are_plain_and_unique(tmp_path: Path, images: Path) -> None:
    for name in ("s1/T1.mha", "s2/T1.mha", "s2/t1.mha", "s 3/Müller (2).mha"):
        volume(images / name)
    collect(images, tmp_path / "out")
    assert [case.name for case in read_dataset(tmp_path / "out").cases] == ["s1_T1", "s2_T1", "s2_t1_2", "s_3_M_ller_2"]


@pytest.mark.parametrize("suffix", ["", "_gt", "_seg", "_label", "-mask"])
@pytest.mark.parametrize("mirrored", [True, False])
def test_label_maps_find_their_image(tmp_path: Path, images: Path, suffix: str, mirrored: bool) -> None:
    wanted = {}
    for number, case in enumerate(("a", "b", "c")):
        volume(images / case / f"scan_{case}.mha")
        if case != "c":
            folder = tmp_path / "labels" / (case if mirrored else ".")
            wanted[f"scan_{case}"] = label(folder / f"scan_{case}{suffix}.nii.gz", 1, number + 1)
    made = collect(images, tmp_path / "out", tmp_path / "labels")
    dataset = read_dataset(tmp_path / "out")
    assert (made.labelled, made.mapping, dataset.foreground) == (2, None, {"label_1": 1, "label_2": 2})
    assert [case.name for case in dataset.labelled] == ["scan_a", "scan_b"]
    for case in dataset.labelled:
        assert case.label is not None
        np.testing.assert_array_equal(read_labels(case.label).array[0], wanted[case.name])
    assert check(tmp_path / "out").ok


def test_label_maps_among_the_images(tmp_path: Path, images: Path) -> None:
    for case in ("a", "b"):
        volume(images / f"{case}.nii.gz")
        label(images / f"{case}_gt.nii.gz", 1)
    with pytest.raises(GlocalError, match="--labels"):
        collect(images, tmp_path / "out")
    made = collect(images, tmp_path / "out", images)
    assert (made.cases, made.labelled) == (2, 2)


def test_label_maps_that_fit_no_image_or_the_same(tmp_path: Path, images: Path) -> None:
    volume(images / "one/a.mha")
    label(tmp_path / "labels/zz.mha", 1)
    with pytest.raises(GlocalError, match=r"zz\.mha"):
        collect(images, tmp_path / "out", tmp_path / "labels")
    shutil.rmtree(tmp_path / "labels")
    label(tmp_path / "labels/two/a.mha", 1)  # another patient's folder: the name alone is not enough
    with pytest.raises(GlocalError, match=r"two/a\.mha"):
        collect(images, tmp_path / "out", tmp_path / "labels")
    shutil.rmtree(tmp_path / "labels")
    label(tmp_path / "labels/a.mha", 1)
    label(tmp_path / "labels/a_gt.mha", 1)
    with pytest.raises(GlocalError, match="both fit"):
        collect(images, tmp_path / "out", tmp_path / "labels")
    assert traces(tmp_path) == ["in", "labels"]


def test_label_values_with_gaps_are_renumbered_and_it_is_said(tmp_path: Path, images: Path) -> None:
    volume(images / "a.mha")
    volume(images / "b.mha")
    label(tmp_path / "labels/a.mha", 255)
    original = label(tmp_path / "labels/b.mha", 85, 0, 255)
    made = collect(images, tmp_path / "out", tmp_path / "labels")
    assert made.mapping == {85: 1, 255: 2}
    assert any("255 became 2" in note for note in made.notes)
    description = json.loads((tmp_path / "out/dataset.json").read_text(encoding="utf-8"))
    assert description["collected"] == {"renumbered": {"85": 1, "255": 2}}
    assert description["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    found = read_labels(tmp_path / "out/labelsTr/b.nii.gz")
    np.testing.assert_array_equal(found.array[0], np.select([original == 85, original == 255], [1, 2]))
    assert check(tmp_path / "out").ok


@pytest.mark.parametrize(("value", "words"), [(0.5, "whole numbers"), (-1, "negative")])
def test_label_values_that_are_none(tmp_path: Path, images: Path, value: float, words: str) -> None:
    volume(images / "a.mha")
    write_volume(tmp_path / "labels/a.mha", np.full((4, 7, 8), value, np.float32), GEOMETRY)
    with pytest.raises(GlocalError, match=words):
        collect(images, tmp_path / "out", tmp_path / "labels")


def test_dicom_series_become_cases_and_nobody_is_named(tmp_path: Path, images: Path) -> None:
    dicom(images / "DOE_John" / "T1", "1.2.3", "4711007", "DOE^JOHN")
    dicom(images / "second", "1.2.4", "4711007", "DOE^JOHN")
    dicom(images / "second", "1.2.5", "4711007", "DOE^JOHN")
    dicom(images / "4711008 scan", "1.2.6", "4711008", "ROE^JANE")
    dicom(images / "nobody", "1.2.7", "", "")
    label(tmp_path / "labels/DOE_John/T1.mha", 1)
    made = collect(images, tmp_path / "out", tmp_path / "labels")
    assert (made.cases, made.subjects, made.labelled) == (5, 3, 1)
    dataset = read_dataset(tmp_path / "out")
    assert {case.name: case.subject for case in dataset.cases} == {
        "S002_scan": "S002",
        "T1": "S001",
        "nobody": "nobody",
        "second_1": "S001",
        "second_2": "S001",
    }
    assert [case.name for case in dataset.labelled] == ["T1"]
    np.testing.assert_array_equal(read_image(dataset.cases[0].images).array[0, :, 0, 0], [0, 10, 20, 30])
    for path in (tmp_path / "out").rglob("*"):
        packed = path.name.endswith(".gz")
        content = gzip.decompress(path.read_bytes()) if packed else b""
        text = (
            str(path.relative_to(tmp_path)).encode() + content + (b"" if packed or path.is_dir() else path.read_bytes())
        )
        assert not any(secret in text.lower() for secret in (b"4711", b"doe", b"john", b"roe", b"jane"))


def test_free_text_of_a_nifti_stays_behind(tmp_path: Path, images: Path) -> None:
    array = volume(images / "a.nii")
    content = bytearray((images / "a.nii").read_bytes())
    for place, length in ((14, 18), (148, 80), (228, 24), (328, 16)):  # db_name, descrip, aux_file, intent_name
        content[place : place + length] = b"Doe^John".ljust(length, b"\0")
    struct.pack_into("<f", content, 108, 352 + 32)  # an extension, of comments
    content[348:352] = b"\1\0\0\0"
    content[352:352] = struct.pack("<2i", 32, 6) + b"Doe^John was here".ljust(24, b"\0")
    (images / "a.nii").write_bytes(content)
    with open(images / "b.nii.gz", "wb") as file, gzip.GzipFile("doe_john.nii", "wb", fileobj=file) as packed:
        packed.write(content)
    assert b"doe_john" in (images / "b.nii.gz").read_bytes()
    collect(images, tmp_path / "out")
    for case in read_dataset(tmp_path / "out").cases:
        np.testing.assert_array_equal(read_image(case.images).array[0], array)
        assert read_image(case.images).geometry == read_image([images / "a.nii"]).geometry
        written = case.images[0].read_bytes()
        assert b"doe" not in (written + gzip.decompress(written)).lower()


def test_names_of_another_alphabet_and_dates_of_birth_stay_behind(tmp_path: Path, images: Path) -> None:
    dicom(images / "Müller_Li_19600102", "1.2.3", "4711", "Mxller^Li", birth="19600102")
    dicom(images / "MU\u0308LLER Liver 02.01.1960", "1.2.4", "4711", "Mxller^Li", birth="19600102")
    for path in images.rglob("*.dcm"):
        path.write_bytes(path.read_bytes().replace(b"Mxller", b"M\xfcller"))  # as most scanners write it: Latin-1
    dicom(images / "Smith_Jones 02131960", "1.2.5", "", "Smith-Jones", birth="19600213")  # a name, but no ID
    dicom(images / "Jones 2", "1.2.6", "", "Smith-Jones", birth="19600213")
    collect(images, tmp_path / "out", subject="^([A-Za-z]+)")
    dataset = read_dataset(tmp_path / "out")
    assert {case.name: case.subject for case in dataset.cases} == {
        "S001_Liver_S001": "S001",
        "S001_S001_S001": "S001",
        "S002_S002_S002": "S002",
        "S002_2": "S002",
    }


def test_subjects_are_found_in_paths(tmp_path: Path, images: Path) -> None:
    for name in ("patient01/frame01.mha", "patient01/frame12.mha", "patient02/frame01.mha"):
        volume(images / name)
    dicom(images / "series", "1.2.3", "4711", "A")
    (images / "series").rename(images / "patient02" / "series")
    made = collect(images, tmp_path / "out", subject="patient[0-9]+")
    assert made.subjects == 3
    assert {case.name: case.subject for case in read_dataset(tmp_path / "out").cases} == {
        "patient01_frame01": "patient01",
        "patient01_frame12": "patient01",
        "patient02_frame01": "patient02",
        "patient02_series": "S001",  # its patient's ID says more than a path
    }
    assert not any("guess" in note for note in made.notes)
    assert collect(images, tmp_path / "groups", subject="^patient([0-9]+)/").subjects == 3
    assert {case.subject for case in read_dataset(tmp_path / "groups").cases} == {"01", "02", "S001"}
    with pytest.raises(GlocalError, match=r"finds no subject in patient01/frame01, patient02/frame01: correct --subj"):
        collect(images, tmp_path / "no", subject="frame12|series")
    with pytest.raises(GlocalError, match=r"'\(' is no regular expression"):
        collect(images, tmp_path / "no", subject="(")
    assert not (tmp_path / "no").exists()


def test_files_that_are_no_volume_are_named_all_at_once_or_excluded(tmp_path: Path, images: Path) -> None:
    for case in ("p1/a", "p2/b"):
        volume(images / f"{case}.nii.gz")
        still = sitk.ReadImage(str(images / f"{case}.nii.gz"))
        sitk.WriteImage(sitk.JoinSeries([still, still]), str(images / f"{case}_4d.nii.gz"))
    dicom(images / "p2" / "scout", "1.2.3", "7", "A")
    label(images / "p2" / "b_gt.nii.gz", 1)
    with pytest.raises(GlocalError, match=r"Not three-dimensional: .*a_4d\.nii\.gz, .*b_4d\.nii\.gz\. Split"):
        collect(images, tmp_path / "out", images)
    assert traces(tmp_path) == ["in"]
    assert collect(images, tmp_path / "out", images, exclude=["*_4d*"]).cases == 3
    made = collect(images, tmp_path / "fewer", images, exclude=["*_4d*", "*/scout"])
    assert (made.cases, made.labelled) == (2, 1)
    assert collect(images, tmp_path / "unlabelled", exclude=["*_4d*", "p2"]).cases == 1  # with its label map
    with pytest.raises(GlocalError, match="holds no NIfTI"):
        collect(images, tmp_path / "none", exclude=["p?"])


def test_a_dicom_segmentation_is_no_image(tmp_path: Path, images: Path) -> None:
    dicom(images / "both", "1.2.3", "7", "A")
    dicom(images / "both", "1.2.4", "7", "A", slices=1, kind="1.2.840.10008.5.1.4.1.1.66.4")
    made = collect(images, tmp_path / "out")
    assert made.cases == 1
    assert "segmentations, ...) were left out" in made.notes[-1]
    assert "1.2.4_0.dcm" in made.notes[-1]


def test_what_a_slicer_saves_is_matched(tmp_path: Path, images: Path) -> None:
    volume(images / "a.nii.gz")
    label(images / "a.seg.nrrd", 1)
    assert collect(images, tmp_path / "out", images).labelled == 1


def test_a_bad_source_is_named_and_leaves_nothing(tmp_path: Path, images: Path) -> None:
    for case in "abcdef":
        volume(images / f"{case}.nii.gz")
    content = (images / "d.nii.gz").read_bytes()
    (images / "d.nii.gz").write_bytes(content[:-50])
    with pytest.raises(GlocalError, match=r"d\.nii\.gz cannot be read"):
        collect(images, tmp_path / "out")
    (images / "d.nii.gz").unlink()
    dicom(images / "series", "1.2.3", "7", "A")
    path = images / "series" / "1.2.3_3.dcm"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(GlocalError, match=r"1\.2\.3_3\.dcm cannot be read"):
        collect(images, tmp_path / "out")
    assert traces(tmp_path) == ["in"]


def test_dicom_files_without_an_image_are_left_out_and_it_is_said(tmp_path: Path, images: Path) -> None:
    dicom(images / "series", "1.2.3", "7", "A")
    report(images / "series" / "report.dcm")
    report(images / "private.IMA", "1.3.12.2.1107.5.9.1")
    made = collect(images, tmp_path / "out")
    assert made.cases == 1
    assert f"left out: {images / 'private.IMA'}, {images / 'series' / 'report.dcm'}." in made.notes[-1]
    path = images / "series" / "1.2.3_3.dcm"
    path.write_bytes(path.read_bytes().partition(b"\xe0\x7f\x10\x00")[0])  # an image, cut off before its pixels
    with pytest.raises(GlocalError, match=r"1\.2\.3_3\.dcm cannot be read"):
        collect(images, tmp_path / "out2")


def test_a_link_to_nothing_is_not_overlooked(tmp_path: Path, images: Path) -> None:
    volume(images / "a.mha")
    (images / "b.mha").symlink_to("annex/b.mha")
    with pytest.raises(GlocalError, match=r"b\.mha is a link to a file that is not here: fetch it"):
        collect(images, tmp_path / "out")
    assert traces(tmp_path) == ["in"]


def test_folders_it_refuses(tmp_path: Path, images: Path) -> None:
    with pytest.raises(GlocalError, match="holds no NIfTI"):
        collect(images, tmp_path / "out")
    with pytest.raises(GlocalError, match="not a folder"):
        collect(tmp_path / "nowhere", tmp_path / "out")
    volume(images / "a.mha")
    for inside in (images, images / "new", tmp_path / "in" / ".." / "in" / "new"):
        with pytest.raises(GlocalError, match="lies within"):
            collect(images, inside)
    with pytest.raises(GlocalError, match="not empty"):
        collect(images, tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(GlocalError, match="no label maps"):
        collect(images, tmp_path / "out", tmp_path / "labels")
    volume(images / "a.nrrd")
    with pytest.raises(GlocalError, match="two formats"):
        collect(images, tmp_path / "out")
    (images / "a.nrrd").unlink()
    (tmp_path / "out").mkdir()
    assert collect(images, tmp_path / "out").cases == 1  # an empty folder is fine


def test_the_command(tmp_path: Path, images: Path) -> None:
    volume(images / "a.mha")
    label(tmp_path / "labels/a.mha", 1, 3)
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(images), str(tmp_path / "out"), "--labels", str(tmp_path / "labels")])
    assert result.exit_code == 0
    assert "1 cases (1 labelled)" in result.stdout
    assert "3 became 2" in result.stdout
    assert f"glocal check {tmp_path / 'out'}" in result.stdout
