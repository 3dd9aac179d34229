import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from glocal.cli.evaluate import evaluate as command
from glocal.data.image import Geometry, write_volume
from glocal.errors import GlocalError
from glocal.evaluation.evaluate import FOREGROUND, NO_PREDICTION, evaluate, note_counts, pooled_dice, summary
from glocal.evaluation.metrics import dice
from glocal.files import write_json

GEOMETRY = Geometry(size=(8, 7, 4), spacing=(1.5, 1.5, 5.0), origin=(-20.0, 31.7, 12.5))
CLASSES = {"background": 0, "cavity": 1, "wall": 2}


def mask(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, GEOMETRY.size[::-1]).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of three cases, and predictions for two of them, in another format; `b` is perfect."""
    root = tmp_path / "Dataset"
    for seed, case in enumerate("abc"):
        write_volume(root / "labelsTr" / f"{case}.nii.gz", mask(seed), GEOMETRY)
    write_json(root / "dataset.json", {"labels": CLASSES})
    write_volume(tmp_path / "predictions" / "a.mha", mask(9), GEOMETRY)
    write_volume(tmp_path / "predictions" / "b.mha", mask(1), GEOMETRY)
    return root


@pytest.fixture
def predictions(dataset: Path) -> Path:
    return dataset.parent / "predictions"


@pytest.mark.parametrize("inside", [".", "labelsTr"])
def test_every_expected_case_and_class_has_a_row(dataset: Path, predictions: Path, inside: str) -> None:
    frame = evaluate(predictions, dataset / inside)
    assert list(zip(frame["case"], frame["class"], strict=True)) == [(c, k) for c in "abc" for k in ("cavity", "wall")]
    scores = frame.set_index(["case", "class"])
    assert (scores.loc["b", "dice"] == 1).all()
    assert (scores.loc["b", "hd95"] == 0).all()
    assert (scores.loc["a", "dice"] < 0.6).all()
    assert (scores.loc["c", "dice"] == 0).all()
    assert (scores.loc["c", "note"] == NO_PREDICTION).all()
    assert scores.loc["c", "assd"].tolist() == pytest.approx([math.hypot(8 * 1.5, 7 * 1.5, 4 * 5)] * 2)


def test_the_file_is_the_table(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    frame = evaluate(predictions, dataset, tmp_path / "new" / "table.csv", spacing_known=False)
    with open(tmp_path / "new" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == frame["dice"].tolist()
    assert {row[metric] for row in rows for metric in ("hd95", "hd", "assd", "nsd")} == {""}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_only_the_chosen_cases(dataset: Path, predictions: Path) -> None:
    assert evaluate(predictions, dataset, cases=["b"])["case"].unique().tolist() == ["b"]
    with pytest.raises(GlocalError, match="no label map for z"):
        evaluate(predictions, dataset, cases=["b", "z"])


def test_class_names_given_or_found(dataset: Path, predictions: Path) -> None:
    assert (
        evaluate(predictions, dataset, class_names={"x": 2, "y": 1})["class"].tolist() == ["y", "x"] * 3
    )  # in the order of their values
    (dataset / "dataset.json").unlink()
    assert evaluate(predictions, dataset)["class"].tolist() == ["label 1", "label 2"] * 3


def test_extra_predictions_are_named(dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(predictions / "case[7].nii.gz", mask(3), GEOMETRY)
    assert "case[7]" not in evaluate(predictions, dataset)["case"].tolist()
    assert "case[7]" in capsys.readouterr().err


def test_label_maps_may_have_a_suffix(dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = evaluate(predictions, dataset)
    for case in "abc":
        (dataset / f"labelsTr/{case}.nii.gz").rename(dataset / f"labelsTr/{case}_gt.nii.gz")
    (predictions / "b.mha").rename(predictions / "b-seg.mha")
    suffixed = evaluate(predictions, dataset)
    assert suffixed["case"].unique().tolist() == ["a_gt", "b_gt", "c_gt"]
    assert suffixed["dice"].tolist() == frame["dice"].tolist()
    write_volume(predictions / "b.mha", mask(3), GEOMETRY)
    with pytest.raises(GlocalError, match=r"b\.mha and b-seg\.mha are both named like the label map of b_gt: keep one"):
        evaluate(predictions, dataset)
    (dataset / "labelsTr/b_gt.nii.gz").rename(dataset / "labelsTr/b.nii.gz")
    capsys.readouterr()
    assert not evaluate(predictions, dataset, cases=["b"])["dice"].eq(1).any()  # the very name comes first
    assert "b-seg" in capsys.readouterr().err
    (dataset / "labelsTr/c_gt.nii.gz").rename(dataset / "labelsTr/b_gt.nii.gz")
    (predictions / "b.mha").unlink()
    found = evaluate(predictions, dataset)  # of b or of b_gt? nobody can say
    assert found[found["note"] == "no prediction"]["case"].unique().tolist() == ["b", "b_gt"]


def test_other_size(dataset: Path, predictions: Path) -> None:
    write_volume(predictions / "a.mha", mask(9)[:-1], GEOMETRY)
    with pytest.raises(GlocalError, match=r"a\.mha has size \(8, 7, 3\)"):
        evaluate(predictions, dataset)


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": (1.5, 1.5, 1.0)},
        {"origin": (-20.0, 31.7, 13.5)},
        {"direction": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)},
    ],
)
def test_other_place(dataset: Path, predictions: Path, change: dict[str, tuple[float, ...]]) -> None:
    write_volume(predictions / "a.mha", mask(9), replace(GEOMETRY, **change))
    with pytest.raises(GlocalError, match="mm away"):
        evaluate(predictions, dataset)


def test_rounding_of_headers_is_no_other_place(dataset: Path, predictions: Path) -> None:
    near = replace(GEOMETRY, origin=(-20.00001, 31.7, 12.5), spacing=(1.500001, 1.5, 5.0))
    write_volume(predictions / "a.mha", mask(9), near)
    assert len(evaluate(predictions, dataset)) == 6


def test_labels_without_a_name(dataset: Path, predictions: Path) -> None:
    write_volume(predictions / "a.mha", mask(9) + np.uint8(5), GEOMETRY)
    with pytest.raises(GlocalError, match="5, 6, 7"):
        evaluate(predictions, dataset)


def test_labels_of_the_truth_without_a_name(dataset: Path, predictions: Path) -> None:
    write_volume(dataset / "labelsTr" / "a.nii.gz", mask(0) + np.uint8(5), GEOMETRY)
    with pytest.raises(GlocalError, match=r"labelsTr.a.nii.gz holds the label values 5, 6, 7"):
        evaluate(predictions, dataset)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [((0, 0), "No label map holds a structure"), ((0, -1), r"b.nii.gz holds the negative label value -1")],
)
def test_label_maps_that_say_nothing(dataset: Path, predictions: Path, values: tuple[int, int], sentence: str) -> None:
    (dataset / "dataset.json").unlink()
    for case in "abc":
        labels = np.where(mask(0) == 1, *values[::-1]).astype(np.int16) if case == "b" else mask(0) * 0
        write_volume(dataset / "labelsTr" / f"{case}.nii.gz", labels, GEOMETRY)
    with pytest.raises(GlocalError, match=sentence):
        evaluate(predictions, dataset)


@pytest.mark.parametrize("content", [[], {"labels": ["wall"]}, {"labels": {"wall": -1}}])
def test_a_dataset_json_of_another_kind(dataset: Path, predictions: Path, content: object) -> None:
    write_json(dataset / "dataset.json", content)
    with pytest.raises(GlocalError, match="one whole number, 0 or more"):
        evaluate(predictions, dataset)


def test_folders_that_cannot_be_meant(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="is not a folder"):
        evaluate(tmp_path / "nowhere", dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GlocalError, match="no volumes"):
        evaluate(tmp_path / "empty", dataset)
    write_volume(tmp_path / "other" / "q.mha", mask(0), GEOMETRY)
    with pytest.raises(GlocalError, match="No file in"):
        evaluate(tmp_path / "other", dataset)
    write_volume(predictions / "a.nrrd", mask(0), GEOMETRY)
    with pytest.raises(GlocalError, match=r"both a\.mha and a\.nrrd"):
        evaluate(predictions, dataset)


def test_label_regions_are_refused(dataset: Path, predictions: Path) -> None:
    write_json(dataset / "dataset.json", {"labels": {"background": 0, "whole": [1, 2]}})
    with pytest.raises(GlocalError, match="one whole number"):
        evaluate(predictions, dataset)


def frame_of(dice: dict[str, tuple[float, ...]]) -> pd.DataFrame:
    rows = [
        {"case": str(case), "class": name, "dice": value, "iou": value, "note": "" if value else "missed"}
        for name, values in dice.items()
        for case, value in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(hd95=float("nan"), hd=float("nan"), assd=float("nan"), nsd=float("nan"))


def test_summary_by_hand() -> None:
    table = summary(frame_of({"a": (0.8, 0.6), "b": (0.2, 0.0)})).set_index(["class", "metric"])
    assert table.index.get_level_values("metric").unique().tolist() == ["dice", "iou"]
    a, foreground = table.loc["a", "dice"], table.loc[FOREGROUND, "dice"]
    assert a[["mean", "median", "min", "max"]].tolist() == pytest.approx([0.7, 0.7, 0.6, 0.8])
    assert a["sd"] == pytest.approx(math.sqrt(0.02))
    assert foreground["mean"] == pytest.approx(0.4)
    assert foreground["sd"] == pytest.approx(np.std([0.5, 0.3], ddof=1))
    assert foreground["cases"] == 2


def test_pooled_dice_is_that_of_all_cases_laid_beside_each_other(dataset: Path, predictions: Path) -> None:
    pooled = pooled_dice(evaluate(predictions, dataset))
    truth = np.concatenate([mask(seed) for seed in range(3)])
    predicted = np.concatenate([mask(9), mask(1), np.zeros_like(mask(0))])  # c has no prediction
    expected = [dice(predicted == value, truth == value) for value in (1, 2)]
    assert pooled.to_list() == pytest.approx([*expected, np.mean(expected)])
    assert pooled.index.to_list() == ["cavity", "wall", FOREGROUND]
    nowhere = pd.DataFrame([{"class": "a", "dice": 1.0, "truth_voxels": 0, "predicted_voxels": 0}])
    assert pooled_dice(nowhere).to_list() == [1, 1]


def test_notes_are_counted() -> None:
    counts = note_counts(frame_of({"z": (0.8, 0.6), "b": (0.2, 0.0)}))
    assert counts.index.tolist() == ["z", "b"]
    assert counts["missed"].tolist() == [0, 1]
    assert counts["invented"].tolist() == [0, 0]


def test_command(dataset: Path, predictions: Path) -> None:
    write_json(dataset / "dataset.json", {"labels": {"background": 0, "cavity [left]": 1, "wall": 2}})
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(predictions), str(dataset)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in ("cavity [left]", "wall", FOREGROUND, "HD95", NO_PREDICTION, str(predictions / "evaluation.csv")):
        assert text in result.output
    assert len(pd.read_csv(predictions / "evaluation.csv")) == 6
    result = CliRunner().invoke(app, [str(predictions), str(dataset)], env={"COLUMNS": "80"})
    assert "wall" in result.output
    assert "foreground" in result.output
    result = CliRunner().invoke(app, [str(predictions), str(dataset), "--spacing-unknown"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert " mm" not in result.output.replace(str(predictions), "")


def test_command_is_imported_fast() -> None:
    code = "import sys, glocal.cli.evaluate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "glocal.cli.evaluate" in loaded
    assert not {"torch", "pandas", "SimpleITK", "scipy", "monai", "numpy"} & set(loaded)
