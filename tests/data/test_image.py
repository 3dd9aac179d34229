"""Reading and writing volumes: nothing is lost on the way, and nothing half is taken for whole."""

import gzip
import locale
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from glocal.data.dicom import dicom_series, same_locale
from glocal.data.image import (
    Geometry,
    file_ending,
    geometry_of,
    is_volume_file,
    read_file,
    read_image,
    read_labels,
    readable_name,
    write_image,
    write_like,
    write_volume,
)
from glocal.data.nifti import forms_of
from glocal.errors import GlocalError

GENERATOR = np.random.default_rng(0)
ARRAY = GENERATOR.integers(-500, 500, (5, 12, 14)).astype(np.int16)
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
GEOMETRY = Geometry((14, 12, 5), (1.25, 0.75, 8.0), (-103.5, 12.25, 700.125), OBLIQUE)
ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")


def patched(source: Path, target: Path, *edits: tuple[int, str, tuple[float, ...]]) -> Path:
    """A copy of a .nii.gz with bytes of its header overwritten: offset, struct format, values."""
    content = bytearray(gzip.decompress(source.read_bytes()))
    for offset, kind, values in edits:
        struct.pack_into(kind, content, offset, *values)
    target.write_bytes(gzip.compress(bytes(content)))
    return target


def codes(path: Path) -> tuple[int, ...]:
    return struct.unpack_from("<2h", gzip.decompress(path.read_bytes()), 252)


@same_locale()
def write_dicom(
    folder: Path,
    uid: str = "1.2.3",
    places: tuple[float, ...] = (0, 5, 10, 15),
    patient: str = "P7",
    modality: str = "MR",
    axes: tuple[str, ...] = ("1\\0\\0\\0\\1\\0",),
    shift: float = 0.0,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, place in enumerate(places):
        image = sitk.GetImageFromArray(np.full((1, 6, 7), 10 * number, np.int16))
        image.SetSpacing((1.5, 1.5, 5.0))
        tags = {
            "0008|0018": f"{uid}.9.{number}",
            "0008|0060": modality,
            "0010|0010": "DOE^JOHN",
            "0010|0020": patient,
            "0020|000d": f"{uid}.1",
            "0020|000e": uid,
            "0020|0013": str(number),
            "0020|0032": f"1\\{2 + number * shift}\\{place}",
            "0020|0037": axes[number % len(axes)],
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{number}.dcm"))
        writer.Execute(image)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_round_trip_keeps_voxels_and_geometry(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"väl ume{ending}"
    write_volume(path, ARRAY, GEOMETRY)
    volume = read_image([path])
    np.testing.assert_array_equal(volume.array[0], ARRAY)
    assert volume.array.shape == (1, 5, 12, 14)
    assert volume.geometry.size == GEOMETRY.size
    for name in ("spacing", "origin", "direction"):
        np.testing.assert_allclose(getattr(volume.geometry, name), getattr(GEOMETRY, name), atol=1e-4)
    assert volume.geometry.direction_known
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@settings(max_examples=25, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.1, 20)] * 3),
    origin=st.tuples(*[st.floats(-1000, 1000)] * 3),
    quaternion=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(v * v for v in q) > 0.1),
    ending=st.sampled_from(ENDINGS),
)
def test_any_rotation_survives(
    tmp_path_factory: pytest.TempPathFactory,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    quaternion: tuple[float, ...],
    ending: str,
) -> None:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    wanted = Geometry((3, 2, 2), spacing, origin, tuple(float(v) for v in np.ravel(rows)))
    path = tmp_path_factory.mktemp("rotation") / f"a{ending}"
    write_volume(path, np.zeros((2, 2, 3), np.uint8), wanted)
    found = geometry_of(read_file(path))
    np.testing.assert_allclose(found.spacing, spacing, rtol=1e-4)
    np.testing.assert_allclose(found.origin, origin, atol=1e-3)
    np.testing.assert_allclose(found.direction, wanted.direction, atol=1e-3)


@pytest.mark.parametrize("pair", [(0, 0), (0, 2), (3, 1)])
def test_a_mask_written_like_a_nifti_lies_as_it_does(tmp_path: Path, pair: tuple[int, int]) -> None:
    write_volume(tmp_path / "plain.nii.gz", ARRAY, GEOMETRY)
    edits = ((252, "<2h", pair), (112, "<2f", (0.5, 3.0)), (148, "80s", (b"a scanner",)))
    source = patched(tmp_path / "plain.nii.gz", tmp_path / "source.nii.gz", *edits)  # type: ignore[arg-type]
    write_like(tmp_path / "mask.nii.gz", ARRAY > 0, source)
    mask, image = read_file(tmp_path / "mask.nii.gz"), read_file(source)
    assert codes(tmp_path / "mask.nii.gz") == pair
    assert not mask.GetMetaData("descrip")  # which may name the patient
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), ARRAY > 0)  # not scaled by the source's slope
    assert geometry_of(mask) == geometry_of(image)
    assert geometry_of(mask).direction_known == (pair != (0, 0))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("pair", [(1, 2), (2, 1), (0, 3)])
def test_a_mask_lies_where_its_image_does_for_whoever_goes_by_the_other_form(
    tmp_path: Path, pair: tuple[int, int], ending: str
) -> None:
    write_volume(tmp_path / "plain.nii.gz", ARRAY, GEOMETRY)
    turned = (0, -2, 0, 50, 1.25, 0, 0, -7, 0, 0, 8, 3)
    edits = ((252, "<2h", pair), (280, "<12f", turned))
    source = patched(tmp_path / "plain.nii.gz", tmp_path / "source.nii.gz", *edits)  # type: ignore[arg-type]
    write_like(tmp_path / f"mask{ending}", ARRAY > 0, source)
    assert forms_of(tmp_path / f"mask{ending}") == forms_of(source)
    found = forms_of(source)
    assert found is not None
    np.testing.assert_array_equal(found.sform.ravel(), turned)
    # NIfTI's axes point to the right and to the front, SimpleITK's to the left and to the back.
    image = sitk.ReadImage(str(tmp_path / "plain.nii.gz"))
    for voxel in ((0, 0, 0), (13, 2, 4)):
        x, y, z = image.TransformIndexToPhysicalPoint(voxel)
        np.testing.assert_allclose(found.qform @ (*voxel, 1), (-x, -y, z), atol=1e-3)
    assert (found.apart(GEOMETRY.size) > 50) == (0 not in pair)


def test_forms_of_either_order_of_bytes(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", ARRAY, GEOMETRY)
    little = forms_of(tmp_path / "a.nii")
    assert little is not None
    content = bytearray((tmp_path / "a.nii").read_bytes())
    for place, kind in ((0, "i"), (76, "4f"), (108, "f"), (252, "2h"), (256, "18f")):
        struct.pack_into(f">{kind}", content, place, *struct.unpack_from(f"<{kind}", content, place))
    (tmp_path / "b.nii").write_bytes(content)
    assert forms_of(tmp_path / "b.nii") == little


@pytest.mark.parametrize(
    "edit", [(344, "4s", (b"\0\0\0\0",)), (108, "<f", (float("nan"),)), (0, "<i", (540,))]
)  # ANALYZE; no beginning; NIfTI-2
def test_odd_headers_have_no_forms(tmp_path: Path, edit: tuple[int, str, tuple[float, ...]]) -> None:
    write_volume(tmp_path / "plain.nii.gz", ARRAY, GEOMETRY)
    assert forms_of(patched(tmp_path / "plain.nii.gz", tmp_path / "a.nii.gz", edit)) is None
    (tmp_path / "b.nii").write_bytes(b"nothing")
    assert forms_of(tmp_path / "b.nii") is None


def test_forms_in_other_units_are_not_taken_over(tmp_path: Path) -> None:
    write_volume(tmp_path / "plain.nii.gz", ARRAY, GEOMETRY)
    source = patched(tmp_path / "plain.nii.gz", tmp_path / "source.nii.gz", (123, "B", (3,)), (252, "<2h", (4, 0)))
    write_like(tmp_path / "mask.nii.gz", ARRAY > 0, source)  # in micrometres, which SimpleITK makes millimetres of
    assert codes(tmp_path / "mask.nii.gz") == (4, 0)
    assert geometry_of(read_file(tmp_path / "mask.nii.gz")).spacing == pytest.approx((0.00125, 0.00075, 0.008))


def test_an_unknown_direction_stays_unknown(tmp_path: Path) -> None:
    unknown = Geometry((14, 12, 5), GEOMETRY.spacing, direction_known=False)
    write_volume(tmp_path / "a.nii.gz", ARRAY, unknown)
    assert geometry_of(read_file(tmp_path / "a.nii.gz")) == unknown


def test_write_like_refuses_another_size(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.mha", ARRAY, GEOMETRY)
    with pytest.raises(GlocalError, match="size"):
        write_like(tmp_path / "b.mha", ARRAY[:-1], tmp_path / "a.mha")
    assert not (tmp_path / "b.mha").exists()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kept", [0.2, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"a{ending}"
    write_volume(path, ARRAY, GEOMETRY)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(GlocalError, match=r"a\..*cannot be read"):
        read_file(path)


def test_a_forbidden_file_is_not_called_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volume(tmp_path / "a.nii.gz", ARRAY, GEOMETRY)

    def forbid(path: Path, mode: str) -> None:
        raise PermissionError(f"{path}, {mode}")

    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(GlocalError, match=r"permission to read .*a\.nii\.gz"):
        read_file(tmp_path / "a.nii.gz")


def test_a_name_that_is_not_utf8_is_refused_before_it_ends_the_process(tmp_path: Path) -> None:
    assert readable_name(tmp_path / "Müller.mha") == str(tmp_path / "Müller.mha")
    path = tmp_path / os.fsdecode(b"M\xfcller.mha")
    for use in (read_file, dicom_series, lambda path: write_volume(path, ARRAY, GEOMETRY)):
        with pytest.raises(GlocalError, match=r"M\\xfcller\.mha holds characters that are not UTF-8: rename it"):
            use(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", bytes(400)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_nonsense_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(GlocalError, match="cannot be read"):
        read_file(path)


def test_whole_files_packed_unusually_are_read(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", ARRAY, GEOMETRY)
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(content[:900]) + gzip.compress(content[900:]))
    (tmp_path / "longer.nii.gz").write_bytes(gzip.compress(content + b"behind the voxels"))
    (tmp_path / "unpacked.nii.gz").write_bytes(content)
    for name in ("members", "longer", "unpacked"):
        np.testing.assert_array_equal(read_image([tmp_path / f"{name}.nii.gz"]).array[0], ARRAY)


def test_sheared_axes_are_named(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", ARRAY, GEOMETRY)
    rows = (1.5, 0.8, 0, 0, 0, 1.5, 0, 0, 0, 0, 8, 0)
    path = patched(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", (252, "<2h", (0, 1)), (280, "<12f", rows))
    with pytest.raises(GlocalError, match="right angles"):
        read_file(path)
    image = sitk.GetImageFromArray(ARRAY)
    image.SetDirection((1, 0.3, 0, 0, 1, 0, 0, 0, 1))
    with pytest.raises(GlocalError, match="right angles"):  # ITK would bend them silently
        write_image(tmp_path / "c.nii.gz", image)


def test_label_maps_are_whole_numbers(tmp_path: Path) -> None:
    values = np.array([0, 1, 255, 40_000], np.float32).repeat(6).reshape(2, 3, 4)
    write_volume(tmp_path / "a.nii.gz", values, Geometry((4, 3, 2)))
    labels = read_labels(tmp_path / "a.nii.gz")
    assert labels.array.dtype.kind == "i"
    np.testing.assert_array_equal(labels.array, values[None])
    for bad in (0.5, np.nan, np.inf, 3e9):
        values[0, 0, 0] = bad
        write_volume(tmp_path / "b.mha", values, Geometry((4, 3, 2)))
        with pytest.raises(GlocalError, match="whole numbers"):
            read_labels(tmp_path / "b.mha")


def test_volumes_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(ARRAY)
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(tmp_path / "frames.nii.gz"))
    sitk.WriteImage(sitk.Compose(image, image), str(tmp_path / "vector.mha"))
    for name in ("frames.nii.gz", "vector.mha"):
        with pytest.raises(GlocalError, match="not one three-dimensional volume"):
            read_image([tmp_path / name])


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    """Their imaginary part would be lost in silence."""
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY * (1 + 1j)), str(tmp_path / "complex.nii.gz"))
    with pytest.raises(GlocalError, match="complex numbers: give their magnitude"):
        read_image([tmp_path / "complex.nii.gz"])


def test_channels_must_have_one_size(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.mha", ARRAY, GEOMETRY)
    write_volume(tmp_path / "b.mha", ARRAY[1:], GEOMETRY)
    assert read_image([tmp_path / "a.mha"] * 2).array.shape == (2, 5, 12, 14)
    with pytest.raises(GlocalError, match=r"b\.mha has size"):
        read_image([tmp_path / "a.mha", tmp_path / "b.mha"])


@pytest.mark.parametrize("dtype", [bool, np.float16, np.uint8, np.int64, np.float64])
def test_every_usual_type_is_written(tmp_path: Path, dtype: type) -> None:
    array = (ARRAY[:, :4] % 2).astype(dtype)
    write_volume(tmp_path / "a.nii.gz", array, Geometry((14, 4, 5)))
    np.testing.assert_array_equal(read_image([tmp_path / "a.nii.gz"]).array[0], array)


def test_formats_of_two_files_are_not_written(tmp_path: Path) -> None:
    for ending in (".mhd", ".nhdr"):
        with pytest.raises(GlocalError, match="two files"):
            write_volume(tmp_path / f"a{ending}", ARRAY, GEOMETRY)
    assert not list(tmp_path.iterdir())


def test_file_endings() -> None:
    assert file_ending(Path("a.b/c.d.NII.gz")) == ".NII.gz"
    assert is_volume_file(Path("a.nrrd"))
    assert not is_volume_file(Path("a.png"))
    assert not is_volume_file(Path("._a.nii.gz"))  # what macOS leaves on shared disks
    with pytest.raises(GlocalError, match="endings"):
        file_ending(Path("a.png"))


def test_a_dicom_series_is_one_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path)
    volume = read_image([tmp_path])
    np.testing.assert_array_equal(volume.array[0, :, 0, 0], [0, 10, 20, 30])
    assert volume.geometry == Geometry((7, 6, 4), (1.5, 1.5, 5.0), (1.0, 2.0, 0.0))
    write_like(tmp_path / "mask.nii.gz", np.ones((4, 6, 7), np.uint8), tmp_path)
    assert geometry_of(read_file(tmp_path / "mask.nii.gz")).spacing == (1.5, 1.5, 5.0)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "straight", shift=0.05)  # rounding, or a table that is a little askew
    assert read_image([tmp_path / "straight"]).array.shape == (1, 4, 6, 7)
    write_dicom(tmp_path / "tilted", shift=1.34)  # by 15 degrees
    with pytest.raises(GlocalError, match=r"tilted gantry\): resample it to a straight grid"):
        read_file(tmp_path / "tilted")


def test_dicom_that_does_not_say_how_it_lies(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():  # the writer adds both by itself
        content = path.read_bytes()
        for tag in (b"\x20\x00\x32\x00", b"\x20\x00\x37\x00"):
            before, _, rest = content.partition(tag)
            content = before + rest[4 + int.from_bytes(rest[:4], "little") :]
        path.write_bytes(content)
    image = read_file(tmp_path / "in")
    assert not geometry_of(image).direction_known
    write_image(tmp_path / "a.nii.gz", image)
    write_like(tmp_path / "mask.nii.gz", np.ones((4, 6, 7), np.uint8), tmp_path / "in")
    for name in ("a", "mask"):
        assert codes(tmp_path / f"{name}.nii.gz") == (0, 0)


def test_the_slices_of_a_series_have_one_order_from_the_first_reading_on(tmp_path: Path) -> None:
    """In a process of its own: GDCM sorts by file name until ITK has read an image."""
    write_dicom(tmp_path, places=(15, 10, 5, 0), modality="OT")  # secondary capture, named against their places
    code = (
        "import sys; from pathlib import Path; from glocal.data.image import read_image\n"
        "for _ in range(2): print(*read_image([Path(sys.argv[1])]).array[0, :, 0, 0])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == second == "30.0 20.0 10.0 0.0"


def test_reading_dicom_leaves_the_locale_alone(tmp_path: Path) -> None:
    write_dicom(tmp_path)
    before = locale.setlocale(locale.LC_ALL)
    if before == "C":
        pytest.skip("the locale is C already")
    read_image([tmp_path])
    assert locale.setlocale(locale.LC_ALL) == before


AXES = ("1\\0\\0\\0\\1\\0", "1\\0\\0\\0\\0\\-1", "0\\1\\0\\0\\0\\-1")  # three views


def test_the_slices_of_one_file_are_a_volume_unless_they_are_frames(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(ARRAY.astype(np.uint16))
    image.SetSpacing((1.25, 0.75, 8.0))
    for name in ("slices", "in time", "in one place"):
        (tmp_path / name).mkdir()
        with same_locale():
            sitk.WriteImage(image, str(tmp_path / name / "a.dcm"))
    volume = read_image([tmp_path / "slices"])
    np.testing.assert_array_equal(volume.array[0], ARRAY.astype(np.uint16))
    assert volume.geometry == Geometry((14, 12, 5), (1.25, 0.75, 8.0))
    frames = tmp_path / "in time" / "a.dcm"
    pointer = b"\x28\x00\x09\x00\x04\x00\x00\x00"  # to what changes from frame to frame: here the time
    content = frames.read_bytes()
    place = content.index(pointer) + len(pointer)
    frames.write_bytes(content[:place] + b"\x18\x00\x63\x10" + content[place + 4 :])
    frames = tmp_path / "in one place" / "a.dcm"
    frames.write_bytes(
        re.sub(
            rb"(\x20\x00\x32\x00.{4}0\\0\\)[0-9]+",
            lambda m: m[1].ljust(len(m[0]), b"0"),
            frames.read_bytes(),
            flags=re.DOTALL,
        )
    )
    for name in ("in time", "in one place"):
        with pytest.raises(GlocalError, match="several time frames"):
            read_file(tmp_path / name)


def test_dicom_folders_that_are_no_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path / "gap", places=(0, 5, 15, 20))
    write_dicom(tmp_path / "frames", places=(0, 0, 5, 5))
    write_dicom(tmp_path / "cine", places=(0, 0, 0, 0, 0, 0))
    write_dicom(tmp_path / "localizer", places=(0, 5, 10), axes=AXES)
    write_dicom(tmp_path / "localizer in one place", places=(0, 0, 0), axes=AXES)
    for name in ("gap", "frames", "cine", "localizer", "localizer in one place"):
        with pytest.raises(GlocalError, match="even distances"):
            read_file(tmp_path / name)
    write_dicom(tmp_path / "two", uid="1.2.3")
    write_dicom(tmp_path / "two", uid="1.2.4")
    assert len(dicom_series(tmp_path / "two")) == 2
    (tmp_path / "none").mkdir()
    for name, count in (("two", "2"), ("none", "no")):
        with pytest.raises(GlocalError, match=f"holds {count} DICOM series"):
            read_file(tmp_path / name)
