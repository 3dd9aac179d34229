"""What a second preprocessing of the same dataset reads."""

import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from glocal.data import preprocess as module
from glocal.data.image import Geometry, write_volume
from glocal.data.preprocess import PreprocessOptions, prepare
from glocal.errors import Busy
from glocal.files import digest, write_json
from glocal.runs import held

LABELS = {"background": 0, "disc": 1, "ring": 2}


def written(path, seed, labels=False):
    array = np.random.default_rng(seed).integers(0, 3 if labels else 1000, size=(3, 8, 7)).astype(np.int16)
    write_volume(path, array, Geometry((7, 8, 3), spacing=(1.0, 1.0, 4.0)))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Two cases, uncompressed: other voxels take as many bytes; time is such that what was written just now is old."""
    monkeypatch.setattr("glocal.files._YOUNG", 0)
    root = tmp_path / "raw"
    content = {"name": "toy", "channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii"}
    write_json(root / "dataset.json", content)
    for number, case in enumerate("ab"):
        written(root / "imagesTr" / f"{case}_0000.nii", number)
        written(root / "labelsTr" / f"{case}.nii", number, labels=True)
    return root


class Started:
    """A preprocessing, what it read and what it prepared."""

    def __init__(self, raw, monkeypatch, workers=1):
        self.read, self.prepared = [], []
        monkeypatch.setattr(module, "digest", lambda path: self.read.append(path.name) or digest(path))
        monkeypatch.setattr(module, "prepare", lambda *given: self.prepared.append(1) or prepare(*given))
        self.store = module.preprocess(raw, raw.parent / "store", PreprocessOptions(size=(8, 8)), workers)
        self.images = self.store.images(torch.arange(6))


def test_of_an_unchanged_dataset_no_file_is_read_and_no_process_is_started(raw, monkeypatch):
    first = Started(raw, monkeypatch)
    assert (len(first.read), len(first.prepared)) == (4, 2)
    monkeypatch.setattr(module, "_pool", lambda workers: pytest.fail("workers were started"))
    monkeypatch.setattr("glocal.data.image.read_file", lambda path: pytest.fail(f"{path} was read"))
    again = Started(raw, monkeypatch, workers=2)
    assert again.read == again.prepared == []
    assert again.store.digest() == first.store.digest()


def test_a_touched_file_is_read_once_more_and_accepted(raw, monkeypatch):
    first = Started(raw, monkeypatch)
    (raw / "labelsTr" / "b.nii").touch()
    touched = Started(raw, monkeypatch)
    assert (touched.read, touched.prepared) == (["b_0000.nii", "b.nii"], [])
    assert touched.store.digest() == first.store.digest()
    assert Started(raw, monkeypatch).read == []


def test_a_copied_dataset_is_read_once_more_and_accepted(raw, monkeypatch):
    first = Started(raw, monkeypatch)
    shutil.copytree(raw, raw.parent / "copy")  # with the times of the originals
    shutil.rmtree(raw)
    (raw.parent / "copy").rename(raw)
    copied = Started(raw, monkeypatch)
    assert (len(copied.read), copied.prepared) == (4, [])
    assert copied.store.digest() == first.store.digest()


@pytest.mark.parametrize("replace", [False, True])
def test_other_voxels_are_noticed_though_size_and_time_are_the_same(raw, monkeypatch, replace):
    first = Started(raw, monkeypatch)
    path = raw / "imagesTr" / "a_0000.nii"
    before = path.stat()
    other = raw / "other.nii"
    written(other, seed=9)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    if replace:
        other.rename(path)
    else:
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = Started(raw, monkeypatch)
    assert changed.prepared == [1]
    assert changed.store.digest() != first.store.digest()
    assert not torch.equal(changed.images[:3], first.images[:3])
    assert torch.equal(changed.images[3:], first.images[3:])


def test_a_file_that_was_just_written_is_read_at_the_next_start_too(raw, monkeypatch):
    monkeypatch.setattr("glocal.files._YOUNG", 10**12)
    first = Started(raw, monkeypatch)
    young = Started(raw, monkeypatch)
    assert (len(young.read), young.prepared) == (4, [])
    assert young.store.digest() == first.store.digest()
    monkeypatch.setattr("glocal.files._YOUNG", 0)
    assert len(Started(raw, monkeypatch).read) == 4
    assert Started(raw, monkeypatch).read == []


@pytest.mark.parametrize(("header", "voxels"), [(".mhd", ".raw"), (".nhdr", ".raw")])
def test_changed_voxels_are_noticed_where_the_header_is_a_file_of_its_own(raw, monkeypatch, header, voxels):
    shutil.rmtree(raw / "imagesTr")
    shutil.rmtree(raw / "labelsTr")
    content = {"name": "toy", "channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 0, "file_ending": header}
    write_json(raw / "dataset.json", content)
    (raw / "imagesTr").mkdir()
    for case in "ab":
        image = sitk.GetImageFromArray(np.random.default_rng(ord(case)).integers(0, 900, (3, 8, 7)).astype(np.int16))
        sitk.WriteImage(image, raw / "imagesTr" / f"{case}_0000{header}")
    first = Started(raw, monkeypatch)
    (data,) = (path for path in (raw / "imagesTr").iterdir() if path.suffix == voxels and path.name[0] == "b")
    data.write_bytes(data.read_bytes()[::-1])
    changed = Started(raw, monkeypatch)
    assert len(changed.prepared) == 1
    assert changed.store.digest() != first.store.digest()


def test_a_store_that_another_process_makes_is_left_alone(raw):
    store = raw.parent / "store"
    module.preprocess(raw, store, PreprocessOptions(size=(8, 8)))
    half = store / "images" / ".0123abcd.a.npy"  # which it is writing
    half.write_bytes(b"half")
    with held(store), pytest.raises(Busy, match="Another process is working in"):
        module.preprocess(raw, store, PreprocessOptions(size=(8, 8)))
    assert half.exists()
    module.preprocess(raw, store, PreprocessOptions(size=(8, 8)))
    assert not half.exists()  # nobody's
