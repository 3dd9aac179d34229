"""Files that are whole or absent: everything is written beside its target, flushed to disk, then renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from glocal.errors import GlocalError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
_OUT_OF_SPACE_IN_WORDS = re.compile(r"os error (28|122)\b|requested and \d+ written")  # safetensors, NumPy
_OUT_OF_MEMORY = re.compile(  # of PyTorch, on a GPU and on a CPU
    r"^OutOfMemoryError|^\w+: .*(CUDA error: out of memory|_STATUS_ALLOC_FAILED|can't allocate memory)", re.DOTALL
)
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_UMASK = os.umask(0o077)  # can only be read by setting it: once, before there are threads
os.umask(_UMASK)
_YOUNG = 10 * 10**9  # ns: more than the coarsest clock of a file system (2 s), and some for a server's that is behind


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`, on failure it is removed.

    The temporary file keeps the target's endings (`.nii.gz`), so that writers that choose a format by name work.

    Raises:
        GlocalError: the disk is full, the folder cannot be written, or a file is where a folder should be.
    """
    temporary = path.parent / f".{uuid.uuid4().hex[:8]}.{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # some writers keep their files from everybody else, colleagues on a shared drive, too
            temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    except Exception as error:
        if sentence := explained(error, path):
            raise GlocalError(sentence) from error
        raise
    finally:
        with suppress(OSError):  # absent after success; where its folder cannot be, neither can it
            temporary.unlink()


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which may be there if it is empty; on success it is renamed, else removed.

    Raises:
        GlocalError: a file or folder of the way cannot be written or read.
    """
    target = folder.resolve()
    temporary = target.parent / f".{uuid.uuid4().hex[:8]}.{target.name}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    except PermissionError as error:
        raise GlocalError(f"Cannot write {folder}, or cannot read a source: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def explained(error: Exception, path: Path | None = None) -> str | None:
    """One sentence for an error of the file system, or for a lack of memory, that the user can solve, else None.

    Args:
        path: what was being written, if that is known.
    """
    code, where = getattr(error, "errno", None), path or getattr(error, "filename", None) or "a file"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        return (
            "The memory of the GPU or of the machine is used up: end what else uses it, let fewer happen at the same "
            "time (--workers), or train in a new folder with a smaller `batch` or smaller slices (`preprocess.size`)."
        )
    if code in _OUT_OF_SPACE or _OUT_OF_SPACE_IN_WORDS.search(str(error)):
        return f"No space left on disk while writing {where}: free some space and start the same command again."
    if code in _IN_THE_WAY:
        return f"Cannot write {where}: a file is where a folder should be, or the reverse; choose another place."
    if code == errno.ENAMETOOLONG:
        return f"{where} has too long a name for this disk: shorten it."
    if code in _FORBIDDEN:
        if path is None and code != errno.EROFS:
            return f"Cannot open {where}: ask for the permission to read it, or choose another place."
        return f"Cannot write {where}: choose a place you have the permission for."
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically; folders are made as needed."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        GlocalError: the file is missing, unreadable or not JSON; the sentence names the line.
    """
    try:
        return json.loads(path.read_bytes())  # with or without a byte order mark, UTF-16, too: as Windows saves it
    except FileNotFoundError as error:
        raise GlocalError(f"{path} does not exist.") from error
    except json.JSONDecodeError as error:
        raise GlocalError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}): correct that line.") from error
    except UnicodeDecodeError as error:
        raise GlocalError(f"{path} cannot be read: save it as plain text (UTF-8).") from error
    except OSError as error:
        raise GlocalError(f"{path} cannot be read: {error}.") from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> list[int] | None:
    """What differs once a file was written, replaced or copied: size, times of change of content and entry, inode.

    The second time cannot be set back, so that a copy or a restored file never has the stamp of another. None while
    the last change is so recent that one more might get the same time: such a file must be read to know it.
    """
    found = path.stat()
    if max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - _YOUNG:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
