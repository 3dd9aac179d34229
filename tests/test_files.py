"""Files are whole or absent, whatever happens while they are written, and what the user can solve is one sentence."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from glocal.errors import GlocalError
from glocal.files import digest, explained, read_json, replacing, write_json, write_text


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_while_writing(path: Path, failure: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise failure


def test_the_file_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "scan.nii.gz"
    with replacing(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.endswith("scan.nii.gz")
        temporary.write_bytes(b"voxels")
        assert not target.exists()
    assert target.read_bytes() == b"voxels"
    assert list(target.parent.iterdir()) == [target]


def test_colleagues_may_read_what_a_writer_keeps_for_itself(tmp_path: Path) -> None:
    with replacing(tmp_path / "model") as temporary:
        temporary.touch(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_it_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_text(tmp_path / "a.txt", "a")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(failure)) as raised:
        fail_while_writing(target, failure)
    assert raised.value is failure
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_is_said_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    monkeypatch.setattr(os, place, full)
    with pytest.raises(GlocalError, match=r"No space left on disk while writing .*a\.txt: free some space"):
        write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        OSError("1000000 requested and 25584 written"),  # NumPy
    ],
)
def test_a_full_disk_is_understood_in_whatever_way_the_writer_says_it(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(GlocalError, match=r"No space left on disk while writing .*a\.npy"):
        fail_while_writing(tmp_path / "a.npy", failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/a.txt", "file/deeper/a.txt", "folder"])
def test_what_is_in_the_way_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GlocalError, match=rf"Cannot write .*{name}: a file is where a folder should be"):
        write_text(tmp_path / name, "text")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forbidden_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "replace", forbidden)
    with pytest.raises(GlocalError, match=r"Cannot write .*a\.txt: choose a place you have the permission for"):
        write_text(tmp_path / "a.txt", "text")


def test_errors_are_explained_by_the_file_they_name() -> None:
    assert "open /data/scan" in str(explained(PermissionError(errno.EACCES, "denied", "/data/scan")))
    assert "a file" in str(explained(OSError(errno.ENOSPC, "full")))
    assert explained(FileNotFoundError(errno.ENOENT, "missing", "/data/scan")) is None
    assert explained(ValueError("28")) is None
    for ask in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):  # more than any machine has
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert "memory of the GPU or of the machine is used up" in str(explained(caught.value))
    assert "used up" in str(explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")))
    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert "used up" in str(explained(RuntimeError(text)))
    assert explained(RuntimeError("the memory of a matrix")) is None
    assert "shorten it" in str(explained(OSError(errno.ENAMETOOLONG, "long", "/data/scan")))
    assert "Cannot write /cdrom" in str(explained(OSError(errno.EROFS, "read-only", "/cdrom")))


def test_json_comes_back_and_is_readable(tmp_path: Path) -> None:
    content = {"Größe": [1, 2.5, None], "ok": True}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_as_windows_saves_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text('{"Größe": 1}', encoding=encoding)
    assert read_json(tmp_path / "a.json") == {"Größe": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b'{\n "a": 1,\n oops\n}', "line 3"), (b"\xff\xfe\x00", "save it as plain text"), (None, "does not exist")],
)
def test_json_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GlocalError, match=sentence) as raised:
        read_json(path)
    assert "a.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_json_file(tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="cannot be read"):
        read_json(tmp_path)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
