"""The raw layout: what is read, and every way a dataset can contradict it."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from glocal.data.dataset import read_dataset, write_dataset_json
from glocal.errors import GlocalError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Cases a (subject p, labelled), b (p), c (q, labelled), of two channels; the files are empty: none is opened."""
    write_dataset_json(tmp_path, "Hearts", ["T1", "T2"], {"LV": 1, "RV": 2}, 3)
    for folder, names in {"imagesTr": [f"{c}_000{k}" for c in "cab" for k in (1, 0)], "labelsTr": ["a", "c"]}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.nii.gz").touch()
    (tmp_path / "subjects.tsv").write_text("case\tsubject\na\tp\nb\tp\nc\tq\n")
    (tmp_path / "split.json").write_text('{"pretrain": ["a", "b"], "test": ["c"]}')
    return tmp_path


def describe(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_dataset_is_read(root: Path) -> None:
    dataset = read_dataset(root)
    assert (dataset.name, dataset.channels, dataset.file_ending) == ("Hearts", ("T1", "T2"), ".nii.gz")
    assert dataset.labels == {"background": 0, "LV": 1, "RV": 2}
    assert dataset.foreground == {"LV": 1, "RV": 2}
    assert [(case.name, case.subject) for case in dataset.cases] == [("a", "p"), ("b", "p"), ("c", "q")]
    assert dataset.cases[1].images == (root / "imagesTr/b_0000.nii.gz", root / "imagesTr/b_0001.nii.gz")
    assert [case.label for case in dataset.cases] == [root / "labelsTr/a.nii.gz", None, root / "labelsTr/c.nii.gz"]
    assert [case.name for case in dataset.labelled] == ["a", "c"]
    assert dataset.split == {"pretrain": ["a", "b"], "test": ["c"]}


def test_what_is_optional_may_be_absent(root: Path) -> None:
    (root / "subjects.tsv").unlink()
    (root / "split.json").unlink()
    (root / "imagesTr" / "._a_0000.nii.gz").touch()
    (root / "imagesTr" / "notes.txt").touch()
    describe(root, name=None, numTraining=None)
    dataset = read_dataset(root)
    assert [case.subject for case in dataset.cases] == ["a", "b", "c"]
    assert dataset.split is None
    assert dataset.name == root.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "'labels'"),
        ({"channel_names": None}, "'channel_names'"),
        ({"file_ending": None}, "'file_ending'"),
        ({"file_ending": ".png"}, r"file_ending is '\.png'"),
        ({"channel_names": ["T1", "T2"]}, "channel_names"),
        ({"channel_names": {"1": "T1", "2": "T2"}}, "channel_names"),
        ({"labels": {"LV": 1}}, "background"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "'whole' is a region"),
        ({"labels": {"background": 0, "LV": 1, "ignore": 2}}, "'ignore' is not supported"),
        ({"labels": {"background": 0, "LV": "1"}}, "'LV' is '1'"),
        ({"labels": {"background": 0, "LV": True}}, "'LV' is True"),
        ({"labels": {"background": 0, "LV": 1, "RV": 3}}, "without gaps"),
        ({"labels": {"background": 0, "LV": 1, "RV": 1}}, "repetitions"),
        ({"channel_names": {"0": "T1"}}, "_0001"),
        ({"channel_names": {"0": "T1", "1": "T2", "2": "T3"}}, "lacks the channel file _0002"),
        ({"file_ending": ".mha"}, r"a_0000\.nii\.gz does not end in \.mha"),
    ],
)
def test_a_wrong_description_is_named(root: Path, changes: dict[str, Any], words: str) -> None:
    describe(root, **changes)
    with pytest.raises(GlocalError, match=words):
        read_dataset(root)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dataset.json", "{", "line 1"),
        ("dataset.json", "[]", "object"),
        ("subjects.tsv", "case\tsubject\na\tp\nb\tp\n", "leaves out cases: c"),
        ("subjects.tsv", "case\tsubject\na\tp\nb\tp\nc\tq\nd\tq\n", "no image: d"),
        ("subjects.tsv", "case\tsubject\na\tp\na\tq\nb\tp\nc\tq\n", "line 3.*twice"),
        ("subjects.tsv", "case,subject\na,p\n", "line 2"),
        ("subjects.tsv", "case\tsubject\na\n", "line 2"),
        ("split.json", '{"pretrain": ["a", "x"]}', "no image: x"),
        ("split.json", '{"pretrain": ["a"], "test": ["b"]}', "subject p .*both pretrain and test"),
        ("split.json", '{"pretrain": ["a", "a"]}', "twice"),
        ("split.json", '{"train": ["a"]}', "'train'"),
        ("split.json", '{"pretrain": "a"}', "lists"),
        ("split.json", '{"pretrain": [["a"]]}', "lists"),
    ],
)
def test_a_wrong_file_beside_it_is_named(root: Path, name: str, content: str, words: str) -> None:
    (root / name).write_text(content)
    with pytest.raises(GlocalError, match=words) as error:
        read_dataset(root)
    assert name in str(error.value)


def test_text_of_another_encoding_is_named(root: Path) -> None:
    (root / "subjects.tsv").write_bytes("case\tsubject\na\tMüller\n".encode("latin-1"))
    with pytest.raises(GlocalError, match=r"subjects\.tsv cannot be read: save it as plain text"):
        read_dataset(root)


def test_a_link_to_nothing_is_not_overlooked(root: Path) -> None:
    (root / "imagesTr" / "d_0000.nii.gz").symlink_to("../.git/annex/d.nii.gz")
    with pytest.raises(GlocalError, match=r"d_0000\.nii\.gz is a link to a file that is not here: fetch it"):
        read_dataset(root)


def test_files_that_are_missing_or_misnamed(root: Path) -> None:
    (root / "imagesTr/d.nii.gz").touch()
    with pytest.raises(GlocalError, match=r"name it d_0000\.nii\.gz"):
        read_dataset(root)
    (root / "imagesTr/d.nii.gz").unlink()
    for other in ("imagesTr/d_0000.nii", "imagesTr/d_0000.NII.GZ", "labelsTr/b.mha"):
        (root / other).touch()
        with pytest.raises(GlocalError, match=rf"{other} does not end in \.nii\.gz and would be left out: convert"):
            read_dataset(root)
        (root / other).unlink()
    (root / "labelsTr/d.nii.gz").touch()
    with pytest.raises(GlocalError, match=r"labelsTr holds label maps of cases that have no image: d\. Add the images"):
        read_dataset(root)
    (root / "labelsTr/d.nii.gz").unlink()
    (root / "imagesTr/b_0001.nii.gz").unlink()
    with pytest.raises(GlocalError, match=r"Case b .*lacks the channel file _0001"):
        read_dataset(root)
    shutil.rmtree(root / "imagesTr")
    with pytest.raises(GlocalError, match=r"holds no images with the ending \.nii\.gz"):
        read_dataset(root)
    (root / "dataset.json").unlink()
    with pytest.raises(GlocalError, match="glocal collect"):
        read_dataset(root)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_name_that_is_not_utf8(root: Path, folder: str) -> None:
    (root / folder / os.fsdecode(b"M\xfcller_0000.nii.gz")).touch()
    with pytest.raises(GlocalError, match=r"M\\xfcller_0000\.nii\.gz .* rename it"):
        read_dataset(root)


def test_case_names_may_end_in_four_digits(tmp_path: Path) -> None:
    write_dataset_json(tmp_path, "x", ["MRI"], {}, 1, file_ending=".mha", licence="CC0")
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr/IMG_0007_0000.mha").touch()
    assert [case.name for case in read_dataset(tmp_path).cases] == ["IMG_0007"]
    assert json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))["licence"] == "CC0"
