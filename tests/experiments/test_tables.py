"""The tables of a run, on numbers small enough to be worked out by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from glocal.errors import GlocalError
from glocal.experiments.tables import (
    caption,
    collect_results,
    paired,
    read_table,
    scores,
    summarise,
    write_tables,
)
from glocal.files import write_json

Dice = Mapping[str, Sequence[float]]


def write_run(out: Path, **protocol: Any) -> Path:
    out.mkdir(exist_ok=True)
    whole = {"splits": 1, "draws": 2, "evaluate": "test", "budget": "volumes", "transductive": False} | protocol
    (out / "recipe.yaml").write_text(yaml.safe_dump({"kind": "run", "compare": ["pcl", "gcl"], "protocol": whole}))
    return out


def write_training(
    out: Path, contender: str, draw: int, dice: Dice, split: int = 0, labels: int | str = 2, best: Dice | None = None
) -> None:
    """A finished fine-tuning with the Dice of every case, class by class; the subject is the case's first letter."""
    folder = out / "finetune" / f"split-{split}" / contender / f"labels-{labels}-draw-{draw}"
    folder.mkdir(parents=True)
    settings = {"kind": "finetune", "split": split, "labels": labels, "validation": 1 if best else 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    write_json(folder / "split.json", {"draw": {"index": draw}})
    rows = [
        {"checkpoint": checkpoint, "case": case, "subject": case[0], "class": f"class {k}", "dice": value, "hd95": 1.0}
        for checkpoint, table in (("last", dice), ("best", best or {}))
        for case, values in table.items()
        for k, value in enumerate(values)
    ]
    pd.DataFrame(rows).to_csv(folder / "evaluation-test.csv", index=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two draws of random, PCL and G^D at two labels: PCL gains 0.1 and 0.2, G^D loses 0.1 and gains 0.1."""
    out = write_run(tmp_path / "run")
    for contender, first, second in (("gcl", 0.4, 0.8), ("pcl", 0.6, 0.9), ("random", 0.5, 0.7)):
        write_training(out, contender, 0, {"a": [first], "b": [first]})
        write_training(out, contender, 1, {"a": [second - 0.05, second + 0.05]})
    return out


def test_a_score_is_the_mean_over_classes_of_each_case_and_then_over_cases(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    # Case b has one class: the mean over all rows would be 2 / 3.
    write_training(out, "random", 0, {"a": [1.0, 0.0], "b": [1.0]})
    table = scores(collect_results(out))
    assert table.drop(columns="dice").to_dict("records") == [
        {"split": 0, "contender": "random", "labels": 2, "draw": 0, "checkpoint": "last", "validation": 0}
    ]
    assert table["dice"].tolist() == [0.75]


def test_every_subject_counts_the_same_whatever_its_number_of_cases(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    write_training(out, "random", 0, {"a1": [0.0], "a2": [0.2], "b": [0.7]})
    assert scores(collect_results(out))["dice"].tolist() == pytest.approx([0.4])  # the mean over cases is 0.3


def test_every_row_is_kept_with_where_it_comes_from(run: Path) -> None:
    results = collect_results(run)
    assert len(results) == 3 * (2 + 2)
    found = results[(results["contender"] == "pcl") & (results["draw"] == 1)]
    assert found["class"].tolist() == ["class 0", "class 1"]
    assert found["dice"].tolist() == pytest.approx([0.85, 0.95])
    assert set(found["labels"]) == {2}
    assert "hd95" in results


def test_differences_are_paired_with_the_same_split_budget_draw_and_checkpoint() -> None:
    keys = ["split", "contender", "labels", "draw", "checkpoint", "dice"]
    rows = [
        (0, "random", 1, 0, "last", 0.50),
        (0, "random", 1, 1, "last", 0.10),
        (0, "random", 2, 0, "last", 0.60),
        (1, "random", 1, 0, "last", 0.40),
        (0, "random", 1, 0, "best", 0.55),
        (0, "pcl", 1, 0, "last", 0.70),
        (0, "pcl", 1, 1, "last", 0.05),
        (0, "pcl", 2, 0, "last", 0.63),
        (1, "pcl", 1, 0, "last", 0.41),
        (0, "pcl", 1, 0, "best", 0.58),
        (1, "pcl", 2, 0, "last", 0.99),  # has no partner
    ]
    shuffled = pd.DataFrame(rows, columns=keys).sample(frac=1, random_state=0)
    found = paired(shuffled).sort_values(["split", "labels", "draw", "checkpoint"])
    assert found["contender"].tolist() == ["pcl"] * 5
    assert found["difference"].tolist() == pytest.approx([0.03, 0.20, -0.05, 0.03, 0.01])
    assert found["dice"].tolist() == pytest.approx([0.58, 0.70, 0.05, 0.63, 0.41])


def test_the_summary_has_means_deviations_and_paired_differences(run: Path) -> None:
    rows = summarise(scores(collect_results(run)))
    common = {"labels": "2", "trainings": 2, "best_dice": ""}
    # Deviations of two numbers are their distance / sqrt(2).
    assert rows == [
        {**common, "contender": "random", "dice": "0.600 ± 0.141", "difference": "", "positive": ""},
        # Contenders as the recipe has them, not by name.
        {**common, "contender": "pcl", "dice": "0.750 ± 0.212", "difference": "+0.150 ± 0.071", "positive": "2 of 2"},
        {**common, "contender": "gcl", "dice": "0.600 ± 0.283", "difference": "+0.000 ± 0.141", "positive": "1 of 2"},
    ]


def test_a_single_training_has_no_deviation(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    write_training(out, "random", 0, {"a": [0.5]})
    write_training(out, "pcl", 0, {"a": [0.25]})
    assert [(row["dice"], row["difference"]) for row in summarise(scores(collect_results(out)))] == [
        ("0.500", ""),
        ("0.250", "-0.250"),
    ]


def test_validation_volumes_are_labels_too_and_best_stands_beside_last(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    write_training(out, "random", 0, {"a": [0.5]}, labels=1, best={"a": [0.6]})
    write_training(out, "pcl", 0, {"a": [0.7]}, labels=1, best={"a": [0.4]})
    rows = write_tables(out)
    assert [row["labels"] for row in rows] == ["1 + 1 for validation"] * 2
    assert [(row["dice"], row["best_dice"]) for row in rows] == [("0.500", "0.600"), ("0.700", "0.400")]
    assert [row["difference"] for row in rows] == ["", "+0.200"]  # of the last weights
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "| 1 + 1 for validation | pcl | 1 | 0.700 | 0.400 | +0.200 | 1 of 1 |" in text.splitlines()


def test_budgets_are_apart_and_in_order(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    for labels, value in (("all", 0.95), (10, 0.9), (2, 0.5)):
        write_training(out, "random", 0, {"a": [value]}, labels=labels)
        write_training(out, "random", 0, {"a": [value + 0.02]}, labels=labels, split=1)
    assert [(row["labels"], row["dice"]) for row in write_tables(out)] == [
        ("2", "0.510 ± 0.014"),
        ("10", "0.910 ± 0.014"),
        ("all", "0.960 ± 0.014"),
    ]
    assert [row["labels"] for row in read_table(out)] == ["2", "10", "all"]  # from the file, where all are words


def test_the_tables_are_written_and_read_back(run: Path) -> None:
    rows = write_tables(run)
    assert read_table(run) == rows
    assert len(pd.read_csv(run / "results.csv")) == 12
    assert pd.read_csv(run / "scores.csv")["dice"].tolist() == pytest.approx([0.5, 0.7, 0.6, 0.9, 0.4, 0.8])
    lines = (run / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        "| Labelled volumes | Pre-training | Trainings | Dice | Difference to random | Better than random |"
    )
    assert lines[3] == "| 2 | pcl | 2 | 0.750 ± 0.212 | +0.150 ± 0.071 | 2 of 2 |"
    assert lines[-1] == caption(run)


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    assert write_tables(out) == []
    assert [path.name for path in out.iterdir()] == ["recipe.yaml"]
    with pytest.raises(GlocalError, match="has measured nothing: no labelled volume was kept for testing"):
        read_table(out)


def test_the_caption_says_what_the_numbers_are(tmp_path: Path) -> None:
    words = caption(write_run(tmp_path / "a"))
    assert "mean over foreground classes, then over test subjects; last checkpoint" in words
    assert "trainings, 2 draws of the labelled volumes" in words
    assert "trainings, 1 draw of the labelled volumes" in caption(write_run(tmp_path / "d", draws=1))
    assert "ransductive" not in words
    assert "development subjects (for choosing settings)" in caption(write_run(tmp_path / "b", evaluate="development"))
    assert "Transductive: the images of test subjects were part of" in caption(
        write_run(tmp_path / "c", transductive=True)
    )
