"""DICOM: the series of a folder, and a series as one volume."""

import locale
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from glocal.errors import GlocalError


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
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


@same_locale()
def dicom_files(folder: Path, series: str) -> tuple[str, ...]:
    """The files of one DICOM series, in the order of their slices."""
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
    if files:
        # GDCM sorts some storage classes by name until ITK has read one image, and by place from then on: a mask would
        # be written in another order than its image was read in.
        reader = sitk.ImageFileReader()
        reader.SetFileName(files[0])
        with suppress(RuntimeError):  # reading the series says what is wrong with it
            reader.ReadImageInformation()
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
    return tuple(files)


@same_locale()
def read_dicom(folder: Path, series: str) -> sitk.Image:
    """Read one DICOM series of a folder as a volume.

    Raises:
        GlocalError: unreadable files, or slices that are not at even distances (missing, or several time frames).
    """
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(dicom_files(folder, series))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise GlocalError(f"The DICOM series in {folder} cannot be read: export it again.") from error
    # ITK would quietly squeeze the remaining slices into an even grid, and every distance along z would be wrong.
    if image.HasMetaDataKey("ITK_non_uniform_sampling_deviation") and _uneven(reader, image.GetSize()[2]):
        raise GlocalError(
            f"The slices of the DICOM series in {folder} are not at even distances (slices are missing, or it holds "
            "several time frames): export it again, one complete volume per series."
        )
    return image


@same_locale()
def patient_of(file: str) -> tuple[str, str]:
    """The patient's identifier and name in a DICOM file; empty where there is none.

    Raises:
        GlocalError: an unreadable file.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise GlocalError(f"{file} cannot be read as DICOM: export its series again.") from error
    tags = [reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else "" for tag in ("0010|0020", "0010|0010")]
    return tags[0], tags[1]


def _uneven(reader: sitk.ImageSeriesReader, slices: int) -> bool:
    places = [reader.GetMetaData(k, "0020|0032") for k in range(slices)]
    points = np.array([[float(value) for value in place.split("\\")] for place in places])
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return bool(np.any(np.abs(steps - np.median(steps)) > 0.05 * np.median(steps)))
