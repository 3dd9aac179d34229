"""Files that are whole or absent: everything is written beside its target, flushed to disk, then renamed."""

import csv
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glocal.errors import GlocalError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`, on failure it is removed.

    The temporary file keeps the target's endings (`.nii.gz`), so that writers that choose a format by name work.

    Raises:
        GlocalError: the disk is full, or the folder cannot be written.
    """
    temporary = path.parent / f".{uuid.uuid4().hex[:8]}.{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if sentence := explained(error, path):
            raise GlocalError(sentence) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def explained(error: OSError, path: Path | None = None) -> str | None:
    """One sentence for an error of the file system that the user can solve, else None."""
    where = path or error.filename or "a file"
    if error.errno in _OUT_OF_SPACE:
        return f"No space left on disk while writing {where}: free some space and start the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"Cannot write {where}: choose a folder you may write to."
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        GlocalError: the file is missing, unreadable or not JSON; the sentence names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GlocalError(f"{path} does not exist.") from error
    except json.JSONDecodeError as error:
        raise GlocalError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}): correct that line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise GlocalError(f"{path} cannot be read: {error}.") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as a CSV file, atomically; the keys of the first row are the header."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
