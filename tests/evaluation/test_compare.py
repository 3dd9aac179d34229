from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from scipy.stats import wilcoxon
from typer.testing import CliRunner

from glocal.cli.evaluate import evaluate as command
from glocal.data.dataset import write_dataset_json
from glocal.data.image import Geometry, write_volume
from glocal.errors import GlocalError
from glocal.evaluation.compare import compare
from glocal.evaluation.metrics import METRICS
from glocal.files import write_text

CASES = [f"case{number}" for number in range(9)]


def rows(seed: int, shift: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame([{"case": case, "class": name} for case in CASES for name in ("cavity", "wall")])
    for metric in METRICS:
        frame[metric] = np.nan if metric == "assd" else rng.uniform(0.4, 0.9, len(frame)) + shift
    return frame


def test_differences_are_paired_by_subject() -> None:
    first, second = rows(0), rows(1)
    subjects = dict(zip(CASES, "aabbccdef", strict=True))
    found = compare(first, second, subjects).set_index(["metric", "class"])
    for name in ("cavity", "wall", "mean foreground"):
        means = []
        for frame in (first, second):
            of_case = (
                (frame if name == "mean foreground" else frame[frame["class"] == name]).groupby("case")["dice"].mean()
            )
            means.append(of_case.groupby(subjects).mean())
        row, difference = found.loc[("dice", name)], means[0] - means[1]
        assert row["first"] == pytest.approx(means[0].mean())
        assert row["second"] == pytest.approx(means[1].mean())
        assert row["difference"] == pytest.approx(difference.mean())
        assert (row["subjects"], row["better"], row["worse"]) == (6, (difference > 0).sum(), (difference < 0).sum())
        assert row["p"] == pytest.approx(wilcoxon(difference).pvalue)
        assert row["low"] < row["difference"] < row["high"]
    p = found.loc["dice", "p"].sort_values()
    assert found.loc["dice", "p_holm"][p.index[0]] == pytest.approx(min(1, 3 * p.iloc[0]))
    assert "assd" not in found.index.get_level_values("metric")


def test_the_smaller_distance_is_the_better_one() -> None:
    near, far = rows(0), rows(0, shift=0.05)
    found = compare(near, far).set_index(["metric", "class"])
    assert found.loc[("hd95", "wall"), "difference"] == pytest.approx(-0.05)
    assert found.loc[("hd95", "wall"), ["better", "worse"]].tolist() == [9, 0]
    assert found.loc[("dice", "wall"), ["better", "worse"]].tolist() == [0, 9]
    assert found.loc[("dice", "wall"), "p"] < 0.01


def test_equal_masks_differ_in_nothing() -> None:
    found = compare(rows(0), rows(0))
    assert (found[["difference", "low", "high", "better", "worse"]] == 0).all(axis=None)
    assert (found["p"] == 1).all()


def test_the_command_shows_which_masks_are_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subjects are those of the dataset: two cases of one person are one unit."""
    monkeypatch.setenv("COLUMNS", "120")
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[1, 2:6, 2:6] = 1
    worse = truth.copy()
    worse[1, 2] = 0
    geometry = Geometry((8, 8, 3), (1.5, 1.5, 8.0))
    write_dataset_json(tmp_path / "data", "Toy", ["MRI"], {"cavity": 1}, len(CASES))
    for case in CASES:
        write_volume(tmp_path / "data" / "imagesTr" / f"{case}_0000.nii.gz", truth.astype(np.float32), geometry)
        write_volume(tmp_path / "data" / "labelsTr" / f"{case}.nii.gz", truth, geometry)
        write_volume(tmp_path / "good" / f"{case}.nii.gz", truth, geometry)
        write_volume(tmp_path / "bad" / f"{case}.nii.gz", worse, geometry)
    lines = [f"{case}\t{subject}\n" for case, subject in zip(CASES, "aabbccdef", strict=True)]
    write_text(tmp_path / "data" / "subjects.tsv", "case\tsubject\n" + "".join(lines))
    app = typer.Typer()
    app.command()(command)
    words = [str(tmp_path / "good"), str(tmp_path / "data"), "--against", str(tmp_path / "bad")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "paired by subject (6)" in done.output
    assert "6 : 0" in done.output
    found = pd.read_csv(tmp_path / "good" / "evaluation-against.csv").set_index(["metric", "class"])
    assert found.loc[("dice", "cavity"), "difference"] == pytest.approx(1 - 24 / 28)
    assert set(found.index.get_level_values("class")) == {"cavity"}  # the mean of one class is no second test
    assert found.loc[("dice", "cavity"), "p_holm"] == pytest.approx(2 / 2**6)
    (tmp_path / "bad" / "case3.nii.gz").unlink()
    assert "bad has no mask of 1 of 9 cases, which count as wholly wrong." in CliRunner().invoke(app, words).output


def test_cases_beside_the_dataset_s_are_subjects_of_their_own() -> None:
    found = compare(rows(0), rows(1), {"case0": "a", "case1": "a"}).set_index(["metric", "class"])
    assert found.loc[("dice", "wall"), "subjects"] == 8


def test_other_cases_are_refused() -> None:
    with pytest.raises(GlocalError, match="different cases or classes"):
        compare(rows(0), rows(1)[2:])
