"""DICOM: the series of a folder, and a series as one volume."""

import locale
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from glocal.errors import GlocalError

_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]+)", re.DOTALL)  # of what a file's header says it holds
# The classes of images; 4.2, MR spectroscopy, is none.
_IMAGE = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(?!4\.2$)([1-7]|1[234]|20|30|66\.4|77|128|130|481\.[12])(\.|$)")
_PIXELS = b"\xe0\x7f\x10\x00"  # the tag before them


def readable_name(path: str | Path) -> str:
    """A path as SimpleITK takes it: any other ends the whole process.

    Raises:
        GlocalError: the name is not UTF-8, as in old archives of another system.
    """
    name = os.fspath(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise GlocalError(f"The name of {shown} holds characters that are not UTF-8: rename it.") from error
    return name


@contextmanager
def same_locale() -> Iterator[None]:
    """GDCM sets the C locale and leaves it so: whatever opens a text file afterwards would read it as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@same_locale()
def dicom_series(folder: Path) -> tuple[str, ...]:
    """The identifiers of the DICOM series in a folder (subfolders are not looked at)."""
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(readable_name(folder)))


@same_locale()
def dicom_files(folder: Path, series: str) -> tuple[str, ...]:
    """The files of one DICOM series, in the order of their slices."""
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(readable_name(folder), series)
    if files:
        # GDCM sorts some storage classes by name until ITK has read one image, and by place from then on: a mask would
        # be written in another order than its image was read in.
        reader = sitk.ImageFileReader()
        reader.SetFileName(readable_name(files[0]))
        with suppress(RuntimeError):  # reading the series says what is wrong with it
            reader.ReadImageInformation()
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(readable_name(folder), series)
    return tuple(readable_name(file) for file in files)


@same_locale()
def read_dicom(folder: Path, series: str) -> sitk.Image:
    """Read one DICOM series of a folder as a volume.

    Raises:
        GlocalError: unreadable files, or slices that are not parallel and at even distances (missing, several time
            frames, or a localizer).
    """
    files = dicom_files(folder, series)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        if "Zero-valued spacing" in str(error):  # the frames of one file, all at one place
            raise _no_volume(folder, files) from error
        raise GlocalError(f"The DICOM series in {folder} cannot be read: export it again.") from error
    # ITK would quietly squeeze any slices into an even grid, and every distance along z would be wrong or invented.
    axes, places = _numbers(reader, files, "0020|0037"), _numbers(reader, files, "0020|0032")
    if not _one_stack(reader, axes, places):
        raise _no_volume(folder, files)
    if axes is not None and places is not None and _shifted(axes[0], places):
        raise GlocalError(
            f"The slices of the DICOM series of {Path(files[0]).name} in {folder} are shifted against each other (CT "
            "with a tilted gantry): resample it to a straight grid first, as dcm2niix does."
        )
    if len(files) > 1 and (axes is None or places is None):
        for key in ("qform_code", "sform_code"):  # as a NIfTI says that it does not know
            image.SetMetaData(key, "0")
    return image[:, :, :, 0] if image.GetSize()[3:] == (1,) else image  # one file with all slices as its frames


class Patient(NamedTuple):
    """Who a DICOM file says it is of, as far as it says; to group and to hide, never to be written."""

    identifier: str = ""
    name: str = ""
    birth: str = ""

    @property
    def known_by(self) -> str:
        """What tells one patient from another."""
        return self.identifier or self.name


_PATIENT = ("0010|0020", "0010|0010", "0010|0030")
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


@same_locale()
def patient_of(file: str) -> Patient | None:
    """The patient of a DICOM image; None for a segmentation, which is no image though it has voxels.

    Raises:
        GlocalError: an unreadable file.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(readable_name(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise GlocalError(f"{file} cannot be read as DICOM: export its series again.") from error
    kind, *patient = (
        reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else "" for tag in ("0008|0016", *_PATIENT)
    )
    return None if kind == _SEGMENTATION else Patient(*map(_text, patient))


def _text(value: str) -> str:
    """What a file that does not say its encoding most often means: UTF-8, else Latin-1."""
    content = value.encode("utf-8", "surrogateescape")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def holds_no_image(path: Path) -> bool:
    """Whether a DICOM file is of a kind without pixels (a report, structure set, plan, ...), and no cut-off image."""
    content = path.read_bytes()
    kind = _CLASS.search(content, 132, 1024) if content[128:132] == b"DICM" else None
    return kind is not None and not _IMAGE.match(kind[1]) and _PIXELS not in content


def _no_volume(folder: Path, files: tuple[str, ...]) -> GlocalError:
    return GlocalError(
        f"The DICOM series of {Path(files[0]).name} in {folder} is no volume of parallel slices at even distances "
        "(slices are missing, or it holds several time frames or views): leave it out, or export it again, one "
        "complete volume per series."
    )


def _one_stack(
    reader: sitk.ImageSeriesReader, axes: NDArray[np.float64] | None, places: NDArray[np.float64] | None
) -> bool:
    """Whether the slices are parallel and at even distances, as far as they say where they lie."""
    if axes is not None and np.ptp(axes, axis=0).max() > 0.01:
        return False
    if places is None or len(places) == 1:
        frames = reader.GetMetaData(0, "0028|0009") if reader.HasMetaDataKey(0, "0028|0009") else ""
        return "0018,106" not in frames  # the frames of one file follow each other in time
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    usual = np.median(steps)
    return bool(usual > 0.01 and np.all(np.abs(steps - usual) <= 0.05 * usual))


def _shifted(axes: NDArray[np.float64], places: NDArray[np.float64]) -> bool:
    """Whether the way from slice to slice is not at right angles to them: such a grid no volume here can have."""
    normal = np.cross(axes[:3], axes[3:])
    steps = np.diff(places, axis=0)
    sideways = steps - np.outer(steps @ normal, normal)
    return bool(np.any(np.linalg.norm(sideways, axis=1) > 0.05 * np.linalg.norm(steps, axis=1)))


def _numbers(reader: sitk.ImageSeriesReader, files: tuple[str, ...], tag: str) -> NDArray[np.float64] | None:
    """What every file says under a tag of several numbers, `(files, numbers)`; None where one does not say."""
    if not all(reader.HasMetaDataKey(k, tag) for k in range(len(files))):
        return None
    try:
        return np.array([[float(value) for value in reader.GetMetaData(k, tag).split("\\")] for k in range(len(files))])
    except ValueError:  # empty or malformed
        return None
