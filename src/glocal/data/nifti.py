"""What SimpleITK does not tell of a NIfTI-1 file, or does not keep: its two forms, its free text, its proper length."""

import gzip
import math
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

_HEADER = 348  # bytes, as its own first number says
_MAGIC = (b"n+1\0", b"ni1\0")
_PIXDIM, _OFFSET, _UNITS, _CODES, _FORMS, _MAGIC_AT = 76, 108, 123, 252, 256, 344
_TEXT = ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16))  # begin and length of what people may write into
_PACKED = b"\x1f\x8b"
_COMPRESSION = 4  # level: half the time of the usual one, for files hardly larger


@dataclass(frozen=True)
class Forms:
    """Where a header says that the voxels lie, twice: by a quaternion (qform) and by a matrix (sform).

    `codes` (of qform and sform; 0: not stated), `pixdim` (a sign and three sizes) and `numbers` (18) as in the file, in
    `millimetres` or in another unit.
    """

    codes: tuple[int, int]
    pixdim: tuple[float, ...]
    numbers: tuple[float, ...]
    millimetres: bool

    @property
    def qform(self) -> NDArray[np.float64]:
        """Voxel indices to places, `(3, 4)`."""
        b, c, d, *offset = self.numbers[:6]
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        sign, *sizes = self.pixdim
        return np.column_stack([rotation * sizes * (1, 1, -1 if sign < 0 else 1), offset])

    @property
    def sform(self) -> NDArray[np.float64]:
        """Voxel indices to places, `(3, 4)`."""
        return np.array(self.numbers[6:]).reshape(3, 4)

    def apart(self, size: tuple[int, int, int]) -> float:
        """By how many mm (or units) the two forms place a voxel differently at most; 0 where but one is stated."""
        if 0 in self.codes:
            return 0.0
        corners = np.array([[x, y, z, 1] for x in (0, size[0] - 1) for y in (0, size[1] - 1) for z in (0, size[2] - 1)])
        return float(np.linalg.norm(corners @ (self.qform - self.sform).T, axis=1).max())


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.name.lower().endswith((".nii.gz", ".nii"))


def forms_of(path: Path) -> Forms | None:
    """What the header of a file says of the place of its voxels; None if it is no sound header of NIfTI-1."""
    with _opened(path) as file:
        header = file.read(_HEADER)
    order = _order(header)
    if order is None:
        return None
    return Forms(
        codes=struct.unpack_from(f"{order}2h", header, _CODES),
        pixdim=struct.unpack_from(f"{order}4f", header, _PIXDIM),
        numbers=struct.unpack_from(f"{order}18f", header, _FORMS),
        millimetres=header[_UNITS] & 7 in (0, 2),
    )


def write_forms(path: Path, forms: Forms) -> None:
    """Give a file that SimpleITK wrote (little-endian) the forms of another of the same size.

    SimpleITK reads one form, writes it twice, and sets both codes to 1: a program that goes by the other form would
    show the file elsewhere. Of forms in other units than mm only the codes are taken over.
    """
    with _opened(path) as file:
        content = bytearray(file.read())
    before = bytes(content[:_HEADER])
    struct.pack_into("<2h", content, _CODES, *forms.codes)
    if forms.millimetres:
        struct.pack_into("<4f", content, _PIXDIM, *forms.pixdim)
        struct.pack_into("<18f", content, _FORMS, *forms.numbers)
    if content[:_HEADER] != before:
        with open(path, "wb") as file, _packed(file, path) as target:
            target.write(content)


def is_complete(path: Path, dims: list[int], offset: int, bits: int) -> bool:
    """Whether a file holds all voxels its header announces: ITK fills what is missing with zeros and says nothing.

    Args:
        path: of the file.
        dims: its size along each axis.
        offset: bytes before the first voxel.
        bits: of a voxel.
    """
    expected = offset + math.prod(max(1, size) for size in dims) * bits // 8
    with open(path, "rb") as file:
        if file.read(2) != _PACKED:
            return path.stat().st_size >= expected
        file.seek(-4, 2)
        if struct.unpack("<I", file.read(4))[0] == expected % 2**32:  # gzip's own note of its content's length
            return True
    try:  # several gzip members, or bytes behind the voxels: the long way
        with gzip.open(path) as unpacked:
            return sum(len(block) for block in iter(lambda: unpacked.read(1 << 20), b"")) >= expected
    except (OSError, EOFError, zlib.error):
        return False


def copy_without_text(source: Path, target: Path) -> None:
    """Copy a file that has `forms_of` to a `.nii.gz`, without free text, extensions, and gzip's own file name.

    These may name a patient. Everything else is copied bit for bit.
    """
    with _opened(source) as file:
        header = bytearray(file.read(_HEADER))
        order = _order(header)
        for place, length in _TEXT:
            header[place : place + length] = bytes(length)
        (offset,) = struct.unpack_from(f"{order}f", header, _OFFSET)
        if offset > _HEADER:  # what lies between are extensions
            header += bytes(4)
            struct.pack_into(f"{order}f", header, _OFFSET, len(header))
        with open(target, "wb") as raw, _packed(raw, target) as out:
            out.write(header)
            file.seek(max(_HEADER, int(offset)))
            shutil.copyfileobj(file, out, 1 << 20)


def _order(header: bytes | bytearray) -> str | None:
    """The order of the bytes of a header; None if it is none, or does not say where the voxels begin."""
    for order in "<>":
        if len(header) == _HEADER and struct.unpack_from(f"{order}i", header)[0] == _HEADER:
            begins = math.isfinite(struct.unpack_from(f"{order}f", header, _OFFSET)[0])
            return order if begins and bytes(header[_MAGIC_AT:]) in _MAGIC else None
    return None


def _opened(path: Path) -> BinaryIO:
    """A file to read, unpacked, whatever its name says."""
    with open(path, "rb") as file:
        packed = file.read(2) == _PACKED
    return cast(BinaryIO, gzip.open(path)) if packed else open(path, "rb")


def _packed(file: BinaryIO, path: Path) -> BinaryIO:
    """A file to write, packed if it is called so, without name and time: the same voxels are the same bytes."""
    if not path.name.lower().endswith(".gz"):
        return file
    return cast(BinaryIO, gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0))
