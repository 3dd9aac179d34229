import gc
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from glocal.data.image import Geometry, read_labels, write_volume
from glocal.data.preprocess import PreprocessOptions, preprocess
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import write_json

SLICES = {"a": 3, "b": 5, "c": 2, "d": 4}  # d is unlabelled; a and b are one subject
OPTIONS = PreprocessOptions(intensity="window", window=(0.0, 100.0), field=(12, 10), size=(6, 5), slice_axis="z")


def write_case(root: Path, case: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    geometry = Geometry((9, 12, SLICES[case]), spacing=(1.0, 1.0, 4.0))
    image = generator.uniform(0, 100, size=geometry.size[::-1]).astype(np.float32)
    write_volume(root / "imagesTr" / f"{case}_0000.nii.gz", image, geometry)
    if case != "d":
        labels = np.zeros_like(image, dtype=np.uint8)
        labels[:, 3:9, 2:7] = 1 + generator.integers(0, 2)
        write_volume(root / "labelsTr" / f"{case}.nii.gz", labels, geometry)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    write_json(
        root / "dataset.json",
        {"name": "toy", "channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1, "two": 2}}
        | {"numTraining": 4, "file_ending": ".nii.gz"},
    )
    (root / "subjects.tsv").write_text("case\tsubject\na\ts1\nb\ts1\nc\ts2\nd\ts3\n")
    for number, case in enumerate(SLICES):
        write_case(root, case, number)
    return root


def prepared(raw: Path, name: str = "store", options: PreprocessOptions = OPTIONS) -> Store:
    return preprocess(raw, raw.parent / name, options, workers=1)


def test_slices_are_numbered_through_all_volumes(raw: Path) -> None:
    store = prepared(raw)
    assert [(v.case, v.subject, v.slices, v.labelled) for v in store.volumes] == [
        ("a", "s1", 3, True),
        ("b", "s1", 5, True),
        ("c", "s2", 2, True),
        ("d", "s3", 4, False),
    ]
    assert store.first.tolist() == [0, 3, 8, 10]
    assert store.volume_of.tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [3] * 4
    assert store.slice_of.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
    assert store.count_of.tolist() == [3] * 3 + [5] * 5 + [2] * 2 + [4] * 4
    assert (store.name, store.dataset, store.split) == ("toy", raw, None)
    assert store.labels == {"background": 0, "one": 1, "two": 2}
    assert store.volumes[0].spacing == (1.0, 1.0, 4.0)
    assert [store.index_of(case) for case in SLICES] == [0, 1, 2, 3]
    assert store.warnings == ()


def test_memory_and_disk_give_the_same(raw: Path) -> None:
    prepared(raw)
    memory, disk = Store.open(raw.parent / "store"), Store.open(raw.parent / "store", memory_limit=0)
    assert (memory.in_memory, disk.in_memory) == (True, False)
    indices = torch.tensor([9, 0, 4, 4, 13, 2])
    files = [np.load(raw.parent / "store" / "images" / f"{case}.npy") for case in SLICES]
    expected = torch.from_numpy(np.concatenate(files)).float()[indices]
    for store in (memory, disk):
        assert store.images(indices).dtype == torch.float32
        assert torch.equal(store.images(indices), expected)
        assert torch.equal(store.volume("b"), torch.from_numpy(files[1]).float())
    labels = disk.labels_of(torch.tensor([9, 0, 4]))
    assert labels.dtype == torch.int64
    assert labels.shape == (3, 6, 5)
    assert labels.sum() > 0
    assert torch.equal(labels, memory.labels_of(torch.tensor([9, 0, 4])))


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_labels_of_an_unlabelled_volume_are_refused(raw: Path, memory_limit: int) -> None:
    prepared(raw)
    with pytest.raises(GlocalError, match="Case d has no label map"):
        Store.open(raw.parent / "store", memory_limit).labels_of(torch.tensor([0, 11]))


def test_no_volume_is_opened_before_it_is_needed(raw: Path) -> None:
    prepared(raw)
    shutil.rmtree(raw.parent / "store" / "images")
    store = Store.open(raw.parent / "store", memory_limit=0)
    with pytest.raises(GlocalError, match=r"b\.npy is missing or damaged"):
        store.volume("b")
    with pytest.raises(GlocalError, match="no case nobody"):
        store.volume("nobody")


def resaved(path: Path, dtype: str) -> None:
    np.save(path, np.load(path).astype(dtype))


@pytest.mark.parametrize("memory_limit", [0, 2**30])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "b.npy is missing or damaged: delete the store"),
        (lambda path: os.truncate(path, 70), "b.npy is missing or damaged"),
        (lambda path: os.truncate(path, 0), "b.npy is missing or damaged"),
        (lambda path: shutil.copy(path.parent / "a.npy", path), "b.npy does not fit the store's index"),
        (lambda path: resaved(path, "float32"), "b.npy does not fit the store's index"),
    ],
)
def test_a_damaged_volume_is_one_sentence(
    raw: Path, memory_limit: int, spoil: Callable[[Path], None], sentence: str
) -> None:
    prepared(raw)
    spoil(raw.parent / "store" / "images" / "b.npy")
    with pytest.raises(GlocalError, match=sentence):
        Store.open(raw.parent / "store", memory_limit).images(torch.tensor([4]))


def test_a_volume_that_is_cut_short_after_it_was_read_is_one_sentence(raw: Path) -> None:
    prepared(raw)
    store = Store.open(raw.parent / "store", memory_limit=0)
    store.volume("b")
    os.truncate(raw.parent / "store" / "images" / "b.npy", 200)
    with pytest.raises(GlocalError, match=r"b\.npy is missing or damaged"):
        store.volume("b")


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks where Linux lists what a process holds")
def test_reading_leaves_neither_handles_nor_maps(raw: Path) -> None:
    prepared(raw)
    store = Store.open(raw.parent / "store", memory_limit=0)
    before = len(os.listdir("/proc/self/fd"))
    store.images(torch.arange(14))
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(store.path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("memory_limit", [0, 2**30])
@pytest.mark.parametrize("used_before", [False, True])
def test_slices_come_out_on_the_device_of_the_store(raw: Path, memory_limit: int, used_before: bool) -> None:
    prepared(raw)
    store = Store.open(raw.parent / "store", memory_limit)
    if used_before:
        store.images(torch.tensor([0]))
    assert store.to("meta") is store
    images, labels = store.images(torch.tensor([9, 0, 4])), store.labels_of(torch.tensor([9, 0]))
    assert (images.device.type, images.shape, images.dtype) == ("meta", (3, 1, 6, 5), torch.float32)
    assert (labels.device.type, labels.shape, labels.dtype) == ("meta", (2, 6, 5), torch.int64)
    assert store.volume("b").device.type == "meta"
    assert store.volume_of.device.type == "cpu"


def test_garbage_is_collected_again_after_a_store_was_opened_or_refused(raw: Path) -> None:
    prepared(raw)
    Store.open(raw.parent / "store")
    assert gc.isenabled()
    write_json(raw.parent / "store" / "index.json", {})
    with pytest.raises(GlocalError, match="this version"):
        Store.open(raw.parent / "store")
    assert gc.isenabled()


def test_what_is_no_finished_store_is_refused(raw: Path) -> None:
    with pytest.raises(GlocalError, match="not a store"):
        Store.open(raw)
    prepared(raw)
    index = raw.parent / "store" / "index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    del content["manifest"]["plan"]
    write_json(index, content)
    with pytest.raises(GlocalError, match="this version"):
        Store.open(raw.parent / "store")
    index.unlink()
    with pytest.raises(GlocalError, match="unfinished"):
        Store.open(raw.parent / "store")


def modified(store: Path) -> dict[str, int]:
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.glob("*/*.npy")}


def test_a_broken_case_is_named_and_the_rest_is_kept(raw: Path) -> None:
    good = (raw / "imagesTr" / "c_0000.nii.gz").read_bytes()
    image = np.zeros((2, 12, 9), dtype=np.float32)
    write_volume(raw / "imagesTr" / "c_0000.nii.gz", image, Geometry((9, 12, 2), spacing=(1.0, 1.0, 4.0)))
    with pytest.raises(GlocalError, match=r"Case c: .*same value everywhere.*glocal check"):
        prepared(raw)
    with pytest.raises(GlocalError, match="unfinished"):
        Store.open(raw.parent / "store")
    before = modified(raw.parent / "store")
    assert set(before) == {"images/a.npy", "labels/a.npy", "images/b.npy", "labels/b.npy"}
    leftover = raw.parent / "store" / "images" / ".0a1b2c3d.c.npy"
    leftover.touch()
    (raw / "imagesTr" / "c_0000.nii.gz").write_bytes(good)
    continued = prepared(raw)
    after = modified(raw.parent / "store")
    assert {path: after[path] for path in before} == before
    assert not leftover.exists()
    assert continued.digest() == prepared(raw, "fresh").digest()


def test_only_changed_cases_are_done_again(raw: Path) -> None:
    first = prepared(raw)
    images = first.volume("b")
    before = modified(raw.parent / "store")
    assert prepared(raw).digest() == first.digest()
    assert modified(raw.parent / "store") == before
    write_case(raw, "b", seed=99)
    second = prepared(raw)
    after = modified(raw.parent / "store")
    assert {path for path in after if after[path] != before[path]} == {"images/b.npy", "labels/b.npy"}
    assert second.digest() != first.digest()
    assert not torch.equal(second.volume("b"), images)
    (raw / "labelsTr" / "a.nii.gz").unlink()
    assert not prepared(raw).volumes[0].labelled


def test_a_store_begun_otherwise_is_refused(raw: Path) -> None:
    prepared(raw)
    with pytest.raises(GlocalError, match=r"begun with clip: true, now it is false"):
        prepared(raw, options=OPTIONS.model_copy(update={"clip": False}))
    description = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    write_json(raw / "dataset.json", description | {"labels": {"background": 0, "two": 1, "one": 2}})
    with pytest.raises(GlocalError, match="begun with labels"):
        prepared(raw)
    with pytest.raises(GlocalError, match="not empty and is no store"):
        preprocess(raw, raw, OPTIONS, workers=1)


def test_a_store_keeps_its_frame_when_a_new_case_comes_first(raw: Path) -> None:
    for kind, name in (("imagesTr", "a_0000"), ("labelsTr", "a")):
        (raw / kind / f"{name}.nii.gz").rename(raw.parent / f"{name}.nii.gz")
    (raw / "subjects.tsv").unlink()
    axes = prepared(raw).plan.axes
    sideways = Geometry((9, 12, 3), spacing=(1.0, 1.0, 4.0), direction=(0, 1, 0, 1, 0, 0, 0, 0, 1))
    image = np.random.default_rng(0).uniform(0, 100, size=(3, 12, 9)).astype(np.float32)
    write_volume(raw / "imagesTr" / "a_0000.nii.gz", image, sideways)
    store = prepared(raw)
    assert store.plan.axes == axes
    assert store.volumes[0].undo.order == (0, 2, 1)


def test_a_field_that_cuts_structures_off_is_warned_about(raw: Path) -> None:
    store = prepared(raw, options=OPTIONS.model_copy(update={"field": (4, 10)}))
    assert len(store.warnings) == 3
    assert store.warnings[0].startswith("a: The field cuts off 33.3%")


def test_several_workers_give_the_same_store_and_leave_the_threads_alone(raw: Path) -> None:
    expected, threads = prepared(raw), (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads())
    found = preprocess(raw, raw.parent / "parallel", OPTIONS, workers=2)
    assert found.digest() == expected.digest()
    assert torch.equal(found.images(torch.arange(14)), expected.images(torch.arange(14)))
    assert threads == (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads())


def test_a_given_executor_is_used_and_left_open(raw: Path) -> None:
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(2) as executor:
            store = preprocess(raw, raw.parent / "store", OPTIONS, executor=executor)
            assert executor.submit(int, "1").result() == 1
    finally:
        torch.set_num_threads(threads)
    assert [volume.case for volume in store.volumes] == list(SLICES)


class _Interrupted(Executor):
    def __init__(self) -> None:
        self.futures: list[Future] = []

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        if not self.futures:
            future.set_exception(KeyboardInterrupt())
        self.futures.append(future)
        return future


def test_an_interrupt_cancels_what_waits(raw: Path) -> None:
    executor = _Interrupted()
    with pytest.raises(KeyboardInterrupt):
        preprocess(raw, raw.parent / "store", OPTIONS, executor=executor)
    assert [future.cancelled() for future in executor.futures] == [False, True, True, True]


def test_check_is_not_said_to_find_what_only_the_options_make_a_problem(raw: Path) -> None:
    sparse = np.zeros((2, 12, 9), dtype=np.float32)
    sparse[0, 0, 0] = 1
    write_volume(raw / "imagesTr" / "c_0000.nii.gz", sparse, Geometry((9, 12, 2), spacing=(1.0, 1.0, 4.0)))
    with pytest.raises(GlocalError, match=r"Case c: .*percentiles.*`glocal check .*` lists what else is wrong\.$"):
        preprocess(raw, raw.parent / "store", PreprocessOptions(size=(6, 5), slice_axis="z"))


def test_subjects_that_share_an_image_count_as_one(raw: Path) -> None:
    shutil.copy(raw / "imagesTr" / "a_0000.nii.gz", raw / "imagesTr" / "d_0000.nii.gz")
    store = prepared(raw)
    assert [volume.subject for volume in store.volumes] == ["s1", "s1", "s2", "s1"]
    assert any("s3 has an image of s1 too" in warning for warning in store.warnings)


@pytest.mark.parametrize("what", ["mirrored", "shifted"])
def test_a_label_map_that_lies_elsewhere_than_its_image_is_refused(raw: Path, what: str) -> None:
    path = raw / "labelsTr" / "a.nii.gz"
    labels = read_labels(path)
    origin, direction = (5.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    moved = {"direction": direction} if what == "mirrored" else {"origin": origin}
    write_volume(path, labels.array[0], replace(labels.geometry, **moved))
    with pytest.raises(GlocalError, match=r"Case a: .*labelsTr/a.nii.gz lies up to .* mm away from"):
        prepared(raw)
