"""The phantom is a raw dataset like any other, the same for the same seed, and has what makes the task one."""

import json

import numpy as np
import pytest

from glocal.cli.phantom import phantom as command
from glocal.data import phantom as module
from glocal.data.image import read_image, read_labels
from glocal.data.phantom import LABELS, phantom, subject
from glocal.errors import GlocalError
from glocal.files import digest, read_json

SUBJECTS, LABELLED = 8, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "phantom"
    phantom(root, SUBJECTS, LABELLED, seed=3)
    return root


@pytest.fixture(scope="module")
def drawn():
    return [subject(0, number) for number in range(30)]


def files(root):
    return {str(path.relative_to(root)): digest(path) for path in root.rglob("*") if path.is_file()}


def test_layout_is_that_of_a_raw_dataset(root):
    cases = [f"phantom{k:03d}" for k in range(SUBJECTS)]
    assert sorted(p.name for p in (root / "imagesTr").iterdir()) == [f"{case}_0000.nii.gz" for case in cases]
    description = read_json(root / "dataset.json")
    assert description["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    assert description["file_ending"] == ".nii.gz"
    assert description["numTraining"] == len(list((root / "labelsTr").iterdir()))
    rows = [line.split("\t") for line in (root / "subjects.tsv").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["case", "subject"]
    assert [row[0] for row in rows[1:]] == cases
    assert {p.name for p in root.parent.iterdir()} == {"phantom"}  # nothing unfinished is left


def test_split_parts_the_subjects(root):
    split = read_json(root / "split.json")
    assert {name: len(cases) for name, cases in split.items()} == {"pretrain": 5, "development": 1, "test": 2}
    assert sorted(case for cases in split.values() for case in cases) == [f"phantom{k:03d}" for k in range(SUBJECTS)]


def test_only_the_asked_number_of_the_training_pool_is_labelled(root):
    split = read_json(root / "split.json")
    labelled = {path.name.removesuffix(".nii.gz") for path in (root / "labelsTr").iterdir()}
    assert len(labelled & set(split["pretrain"])) == LABELLED
    assert labelled >= {*split["test"], *split["development"]}


def test_labels_and_images_lie_on_one_grid(root):
    for path in (root / "labelsTr").iterdir():
        labels = read_labels(path)
        image = read_image([root / "imagesTr" / path.name.replace(".nii", "_0000.nii")])
        assert labels.geometry == image.geometry
        assert set(np.unique(labels.array)) == set(LABELS.values())


def test_same_seed_writes_the_same_bytes(root, tmp_path):
    phantom(tmp_path / "again", SUBJECTS, LABELLED, seed=3)
    assert files(tmp_path / "again") == files(root)
    phantom(tmp_path / "other", 3, seed=4)
    first = "imagesTr/phantom000_0000.nii.gz"
    assert files(tmp_path / "other")[first] != files(root)[first]


def test_a_subject_does_not_depend_on_how_many_are_written(root, tmp_path):
    phantom(tmp_path / "few", 3, seed=3)
    for number in range(3):
        name = f"imagesTr/phantom{number:03d}_0000.nii.gz"
        assert digest(tmp_path / "few" / name) == digest(root / name)


def test_every_subject_has_every_class_and_a_heart_of_plausible_size(drawn):
    for _, labels, geometry in drawn:
        voxel = np.prod(geometry.spacing) / 1000  # millilitres
        volume = np.bincount(labels.ravel(), minlength=4) * voxel
        assert set(np.unique(labels)) == {0, 1, 2, 3}
        assert 15 < volume[1] < 300
        assert 40 < volume[2] < 350
        assert 15 < volume[3] < 250


def test_grids_are_those_of_short_axis_stacks(drawn):
    for image, labels, geometry in drawn:
        assert image.shape == labels.shape == geometry.size[::-1]
        assert image.dtype == np.int16
        assert 7 <= len(image) <= 14
        assert all(110 <= side <= 150 for side in image.shape[1:])
        assert 1.2 <= geometry.spacing[0] == geometry.spacing[1] <= 1.8
        assert 8 <= geometry.spacing[2] <= 10
    assert len({image.shape for image, _, _ in drawn}) > 10


def test_header_says_which_end_is_the_base(drawn):
    for _, labels, geometry in drawn:
        heart = (labels > 0).sum(axis=(1, 2))[:: int(geometry.direction[8])]
        slices = np.flatnonzero(heart)
        assert heart[slices[:2]].sum() > heart[slices[-2:]].sum()  # wide at the base, a tip at the apex
    assert {geometry.direction[8] for _, _, geometry in drawn} == {-1.0, 1.0}


def test_some_stacks_begin_above_the_base_and_some_miss_the_apex(drawn):
    ends = np.array([labels[:: int(g.direction[8])][[0, -1]].any(axis=(1, 2)) for _, labels, g in drawn])
    assert 0.1 < ends[:, 0].mean() < 0.9
    assert 0.1 < ends[:, 1].mean() < 0.95


def test_myocardium_parts_the_left_cavity_from_everything_else(drawn):
    for _, labels, _ in drawn:
        cavity = labels == LABELS["LV"]
        for axis in (1, 2):
            for step in (1, -1):
                assert set(np.unique(np.roll(labels, step, axis)[cavity])) <= {LABELS["LV"], LABELS["MYO"]}


def test_brightness_alone_does_not_find_the_heart(drawn):
    best = []
    for image, labels, _ in drawn[:8]:
        cavity = labels == LABELS["LV"]
        low, high = np.percentile(image[cavity], [10, 90])
        found = (image >= low) & (image <= high)
        best.append(2 * (found & cavity).sum() / (found.sum() + cavity.sum()))
    assert np.mean(best) < 0.5


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no")

    monkeypatch.setattr(module, "write_json", fails)
    with pytest.raises(OSError, match="no"):
        phantom(tmp_path / "phantom", 3)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_never_touched(root, tmp_path):
    before = files(root)
    with pytest.raises(GlocalError, match="exists"):
        phantom(root, 3)
    assert files(root) == before
    (tmp_path / "empty").mkdir()
    phantom(tmp_path / "empty", 3)
    assert (tmp_path / "empty" / "dataset.json").exists()


@pytest.mark.parametrize(("arguments", "words"), [((2,), "at least 3"), ((8, 6), "holds 5"), ((8, -1), "holds 5")])
def test_impossible_wishes_are_explained(tmp_path, arguments, words):
    with pytest.raises(GlocalError, match=words):
        phantom(tmp_path / "phantom", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_says_what_comes_next(tmp_path, capsys):
    command(tmp_path / "phantom", subjects=3, seed=1)
    assert f"glocal check {tmp_path / 'phantom'}" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "phantom" / "split.json").read_text(encoding="utf-8"))["pretrain"]) == 1
