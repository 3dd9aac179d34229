"""The cases in a folder of images: which files belong together, and what their masks are called."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from glocal.data.dataset import some
from glocal.data.dicom import dicom_series
from glocal.data.image import FILE_ENDINGS, file_ending, files_of, is_volume_file
from glocal.errors import GlocalError
from glocal.files import digest
from glocal.progress import console

# A mask is one file: these headers have their voxels in a second one, their formats have an ending that has not.
_IN_ONE_FILE = {".mhd": ".mha", ".nhdr": ".nrrd"}


@dataclass(frozen=True)
class Input:
    """A case to predict: its channel files (or one DICOM folder) and the mask's file name."""

    name: str
    files: tuple[Path, ...]
    target: str

    @property
    def uncertainty(self) -> str:
        """The file name of its uncertainty map, of the mask's format."""
        return f"{self.name}_uncertainty{self.target.removeprefix(self.name)}"

    def digest(self) -> str:
        """SHA-256 of all bytes of its files, which tells it from another image of the same name."""
        found = hashlib.sha256()
        for path in self.files:
            for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else files_of(path):
                found.update(bytes.fromhex(digest(part)))
        return found.hexdigest()


def list_inputs(images: Path, channels: int) -> list[Input]:
    """The cases in a folder: image files (`CASE_0000...` per channel, or any name with one channel), DICOM folders.

    Folders without a DICOM series are passed over, for example one that holds the masks, and named on the screen.

    Raises:
        GlocalError: nothing to read, a missing channel, or two cases of one name.
    """
    if not images.exists():
        raise GlocalError(f"{images} does not exist: give a folder of images, or one image file.")
    files = [images] if images.is_file() else sorted(p for p in images.iterdir() if not p.name.startswith("."))
    cases: dict[str, dict[int, Path]] = {}
    passed = [path for path in files if path.is_dir() and not dicom_series(path)]
    for path in files:
        if path not in passed and (path.is_dir() or is_volume_file(path)):
            stem = path.name if path.is_dir() else path.name.removesuffix(file_ending(path))
            match = re.fullmatch(r"(.+)_(\d{4})", stem)
            name, channel = (match[1], int(match[2])) if match else (stem, 0)
            if channel in cases.setdefault(name, {}):
                raise GlocalError(f"{path} and {cases[name][channel].name} would write one mask: rename one of them.")
            cases[name][channel] = path
    if not cases and images.is_dir() and dicom_series(images):
        cases = {images.resolve().name: {0: images}}  # the folder may be one DICOM series itself
    if not cases:
        raise GlocalError(
            f"{images} holds no image (files ending in {', '.join(FILE_ENDINGS)}, or folders of one DICOM series each; "
            "folders within these are not searched)."
        )
    if passed:
        console.print(f"Not searched for images: {some([path.name for path in passed])}.", markup=False)
    if channels == 1:  # scan_0001 and scan_0002 are two scans then, unless there is a scan_0000
        for name in [name for name, found in cases.items() if 0 not in found]:
            for number, path in cases.pop(name).items():
                other = cases.setdefault(f"{name}_{number:04d}", {0: path})[0]
                if other != path:
                    raise GlocalError(f"{path} and {other.name} would write one mask: rename one of them.")
    return [_input(name, found, channels) for name, found in sorted(cases.items())]


def _input(name: str, found: dict[int, Path], channels: int) -> Input:
    if sorted(found) != list(range(channels)):
        wanted = ", ".join(f"{name}_{channel:04d}" for channel in range(channels))
        raise GlocalError(f"The model needs {channels} channel(s) of {name} ({wanted}), found {len(found)}.")
    return input_of(name, tuple(found[channel] for channel in range(channels)))


def input_of(name: str, files: tuple[Path, ...]) -> Input:
    """A case of these channel files, or of one DICOM folder, which gets a NIfTI mask."""
    return Input(name, files, mask_name(name, ".nii.gz" if files[0].is_dir() else file_ending(files[0]).lower()))


def mask_name(name: str, ending: str) -> str:
    """The file name of a case's mask, where its images end in `ending`."""
    return name + _IN_ONE_FILE.get(ending, ending)
