"""Read and write volumes in any format SimpleITK knows, with their geometry; DICOM series too."""

import errno
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from glocal.data.dicom import dicom_series, read_dicom
from glocal.data.dicom import readable_name as readable_name
from glocal.data.nifti import Forms, forms_of, is_complete, is_nifti, write_forms
from glocal.errors import GlocalError
from glocal.files import replacing

_SHIFT_IN_VOXELS = 0.1  # how far two grids may lie apart: above the rounding of headers, below what a result can feel
FILE_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
_LABEL_SUFFIX = re.compile(r"[._-](gt|seg|segmentation|label|labels|mask)$", re.IGNORECASE)
_CODES = ("qform_code", "sform_code")

sitk.ProcessObject.SetGlobalWarningDisplay(False)


@dataclass(frozen=True)
class Geometry:
    """Where a volume lies in the patient. Orders are (x, y, z); millimetres; DICOM (LPS) axes.

    `direction` holds the nine cosines row by row: column k is the direction of axis k.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    direction_known: bool = True

    @property
    def axes(self) -> NDArray[np.float64]:
        """Direction cosines as a (3, 3) matrix whose column k is the direction of axis k."""
        return np.asarray(self.direction, dtype=np.float64).reshape(3, 3)


@dataclass(frozen=True)
class Volume:
    """Voxels `(C, z, y, x)` and where they lie."""

    array: NDArray[np.generic]
    geometry: Geometry


def require_target(path: Path) -> None:
    """Refuse a link whose file is missing, as archives and DataLad leave them: it would be overlooked in silence.

    Raises:
        GlocalError: it is one.
    """
    if path.is_symlink() and not path.exists():
        raise GlocalError(f"{path} is a link to a file that is not here: fetch it (`datalad get`), or remove the link.")


def is_volume_file(path: Path) -> bool:
    """Whether the name ends like a volume glocal reads; hidden files (`._a.nii` of macOS) are none."""
    return path.name.lower().endswith(FILE_ENDINGS) and not path.name.startswith(".")


def file_ending(path: Path) -> str:
    """The ending of a volume's file name (`.nii.gz`, `.mha`, ...).

    Raises:
        GlocalError: the name has none of the known endings.
    """
    for ending in FILE_ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[len(path.name) - len(ending) :]
    raise GlocalError(f"{path} has none of the endings {', '.join(FILE_ENDINGS)}: convert it with `glocal collect`.")


def without_label_suffix(name: str) -> str:
    """The name of a label map without `_gt`, `_seg`, `_label` or `_mask` behind it: that of its image."""
    return _LABEL_SUFFIX.sub("", name)


def files_of(path: Path) -> list[Path]:
    """The files that hold a volume: itself, and the voxels' own file where a `.mhd` or `.nhdr` header names one."""
    if path.suffix.lower() not in (".mhd", ".nhdr") or not path.is_file():
        return [path]
    header = path.read_bytes()[:65536].decode("latin-1")
    named = re.search(r"(?im)^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$", header)
    voxels = path.parent / named[1] if named else path
    return [path, voxels] if voxels != path and voxels.is_file() else [path]


def read_file(path: Path) -> sitk.Image:
    """Read one file, or one DICOM series (a folder), as SimpleITK has it.

    Raises:
        GlocalError: missing, forbidden, truncated, corrupt or unknown file; sheared axes; a folder without exactly one
            readable DICOM series; a name that is not UTF-8.
    """
    if path.is_dir():
        series = dicom_series(path)
        if len(series) != 1:
            raise GlocalError(
                f"{path} holds {len(series) or 'no'} DICOM series where one is expected: give each its own folder."
            )
        return read_dicom(path, series[0])
    name = readable_name(path)
    if not path.is_file():
        raise GlocalError(f"{path} does not exist.")
    try:
        path.open("rb").close()  # ITK does not tell a forbidden file from a corrupt one
    except PermissionError as error:
        raise GlocalError(f"You lack the permission to read {path}: ask its owner for it.") from error
    nifti = is_nifti(path)
    try:
        # Without a name for the format, ITK opens the file once for each that it knows.
        image = sitk.ReadImage(name, imageIO="NiftiImageIO" if nifti else "")
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise GlocalError(
                f"The axes of {path} are not at right angles (a sheared header): resample it to a straight grid, or "
                "correct its orientation."
            ) from error
        raise _unreadable(path) from error
    if image.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise GlocalError(f"{path} holds complex numbers: give their magnitude, as an image of its own.")
    if nifti:
        dims = [int(image.GetMetaData(f"dim[{k}]")) for k in range(1, int(image.GetMetaData("dim[0]")) + 1)]
        if not is_complete(path, dims, int(float(image.GetMetaData("vox_offset"))), int(image.GetMetaData("bitpix"))):
            raise _unreadable(path)
    return image


def dimensions(path: Path) -> int | None:
    """How many axes a file says it has, of which only the header is read; None where it cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(readable_name(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return int(reader.GetDimension())


def _unreadable(path: Path) -> GlocalError:
    return GlocalError(f"{path} cannot be read (truncated, corrupt or of unknown format): copy or export it again.")


def geometry_of(image: sitk.Image) -> Geometry:
    """The geometry of a three-dimensional SimpleITK image."""
    codes = [image.GetMetaData(key) for key in _CODES if image.HasMetaDataKey(key)]
    return Geometry(
        size=image.GetSize(),
        spacing=image.GetSpacing(),
        origin=image.GetOrigin(),
        direction=image.GetDirection(),
        # A NIfTI whose two codes are 0 states no orientation at all; the other formats always do.
        direction_known=not codes or any(code.strip() != "0" for code in codes),
    )


def read_image(paths: Sequence[Path]) -> Volume:
    """Read a case's image, one file per channel, as a `Volume` of float32 `(C, z, y, x)`.

    Raises:
        GlocalError: unreadable file, not three-dimensional, or channels that do not lie voxel on voxel.
    """
    if not paths:
        raise GlocalError("A case needs at least one image file.")
    image = _read_scalar(paths[0])
    geometry = geometry_of(image)
    array = np.empty((len(paths), *geometry.size[::-1]), dtype=np.float32)
    array[0] = sitk.GetArrayViewFromImage(image)
    for channel, path in zip(array[1:], paths[1:], strict=True):
        image = _read_scalar(path)
        require_same_grid(geometry_of(image), geometry, path, paths[0])
        channel[:] = sitk.GetArrayViewFromImage(image)
    return Volume(array, geometry)


def same_grid(found: Geometry, wanted: Geometry) -> bool:
    """Whether two volumes lie voxel on voxel, within a tenth of a voxel."""
    return found.size == wanted.size and _apart(found, wanted) <= _SHIFT_IN_VOXELS * min(wanted.spacing)


def require_same_grid(found: Geometry, wanted: Geometry, path: Path, reference: Path) -> None:
    """Refuse a volume that does not lie voxel on voxel with its reference, within a tenth of a voxel.

    Raises:
        GlocalError: another size, or another place in the patient.
    """
    if found.size != wanted.size:
        raise GlocalError(
            f"{path} has size {found.size} (x, y, z) and {reference} {wanted.size}: they must lie voxel on voxel, so "
            "write one in the geometry of the other."
        )
    if not same_grid(found, wanted):
        apart = _apart(found, wanted)
        raise GlocalError(
            f"{path} lies up to {apart:.3g} mm away from {reference} (other spacing, origin or direction in the "
            "header): write one with the header of the other."
        )


def _apart(found: Geometry, wanted: Geometry) -> float:
    """How many mm the voxels of two grids of one size lie apart at most."""
    return float(np.linalg.norm(_corners(found) - _corners(wanted), axis=1).max())


def _corners(geometry: Geometry) -> NDArray[np.float64]:
    """Where the centres of the eight corner voxels lie in the patient, `(8, 3)` in mm."""
    index = np.array(list(product(*((0, length - 1) for length in geometry.size))))
    steps = geometry.axes * geometry.spacing
    return np.asarray(index @ steps.T + geometry.origin, dtype=np.float64)


def read_labels(path: Path) -> Volume:
    """Read a label map as a `Volume` of integers `(1, z, y, x)`.

    Raises:
        GlocalError: unreadable file, not three-dimensional, or values that are not whole numbers.
    """
    image = _read_scalar(path)
    array = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):  # NaN and values beyond 32 bits differ after the cast, and are refused below
        labels = array.astype(np.int32)
    if not np.can_cast(array.dtype, np.int32) and not np.array_equal(labels, array):
        raise GlocalError(f"{path} holds values that are not whole numbers: it is no label map.")
    return Volume(labels[None], geometry_of(image))


def _read_scalar(path: Path) -> sitk.Image:
    image = read_file(path)
    dimension, values = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if dimension != 3 or values != 1:
        raise GlocalError(
            f"{path} is not one three-dimensional volume ({dimension}-D, {values} values per voxel): split it into one "
            "file per channel or frame."
        )
    return image


def write_like(path: Path, array: NDArray[np.generic], reference: Path) -> None:
    """Write `array` `(z, y, x)` with the geometry of the file `reference`, atomically.

    Nothing else is taken over: what a header says besides may name the patient.

    Raises:
        GlocalError: the array has another size than the reference, the format of `path` cannot be written, or there
            is no space.
    """
    source = read_file(reference)
    image = _image_of(array)
    if image.GetSize() != source.GetSize():
        raise GlocalError(f"{path} would have size {image.GetSize()}, but {reference} has {source.GetSize()}.")
    image.CopyInformation(source)
    for key in _CODES:
        if source.HasMetaDataKey(key):
            image.SetMetaData(key, source.GetMetaData(key))
    write_image(path, image, forms_of(reference) if reference.is_file() and is_nifti(reference) else None)


def write_volume(path: Path, array: NDArray[np.generic], geometry: Geometry) -> None:
    """Write `array` `(z, y, x)` with a geometry, atomically.

    Raises:
        GlocalError: the format of `path` cannot be written, or there is no space.
    """
    image = _image_of(array)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    if not geometry.direction_known:
        for key in _CODES:
            image.SetMetaData(key, "0")
    write_image(path, image)


def _image_of(array: NDArray[np.generic]) -> sitk.Image:
    """SimpleITK has neither booleans nor half precision."""
    wider: dict[str, type[np.generic]] = {"bool": np.uint8, "float16": np.float32}
    return sitk.GetImageFromArray(array.astype(wider.get(array.dtype.name, array.dtype.type), copy=False))


def write_image(path: Path, image: sitk.Image, forms: Forms | None = None) -> None:
    """Write a SimpleITK image atomically and compressed; as NIfTI with the `forms` of another, if they are given.

    Raises:
        GlocalError: the format of `path` cannot be written or cannot hold the geometry, or there is no space.
    """
    readable_name(path)
    axes = np.reshape(image.GetDirection(), (image.GetDimension(), -1))
    if ".nii" in file_ending(path).lower() and not np.allclose(axes.T @ axes, np.eye(len(axes)), atol=1e-3):
        raise GlocalError(f"{path} cannot hold axes that are not at right angles: resample the volume first.")
    if file_ending(path).lower() in (".mhd", ".nhdr"):
        raise GlocalError(f"{path} would become two files, header and voxels: write .nii.gz, .mha or .nrrd instead.")
    with replacing(path) as temporary:
        # On a full disk ITK writes what fits and reports success.
        if shutil.disk_usage(path.parent).free < image.GetNumberOfPixels() * image.GetSizeOfPixelComponent():
            raise OSError(errno.ENOSPC, "No space left on device")
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise GlocalError(f"Cannot write {path}: check the free space and the file's ending.") from error
        if is_nifti(path) and all(image.HasMetaDataKey(key) for key in _CODES):
            codes = int(image.GetMetaData(_CODES[0])), int(image.GetMetaData(_CODES[1]))
            forms = forms or forms_of(temporary)
            assert forms is not None  # of a file just written
            write_forms(temporary, replace(forms, codes=codes))
