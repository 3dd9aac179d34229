"""What trainings have measured, made into values: one per training and subject."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from glocal.data.split import Draw, Split, write_split
from glocal.errors import GlocalError
from glocal.experiments.grid import Variant
from glocal.experiments.jobs import Job
from glocal.experiments.layout import TableOptions
from glocal.experiments.plan import Training
from glocal.experiments.results import collect, scores_of, values_of
from glocal.files import write_json

Row = tuple[str, str, str, str, float, float]  # checkpoint, case, subject, class, dice, hd95
AXES = {"contender": "pcl", "labels": "2"}
# Subject `a` was examined twice; its second case lacks a structure.
ROWS: list[Row] = [
    ("last", "a1", "a", "wall", 0.2, 3.0),
    ("last", "a1", "a", "blood", 0.6, 5.0),
    ("last", "a2", "a", "wall", 0.9, np.nan),
    ("last", "b1", "b", "wall", 0.5, 8.0),
    ("last", "b1", "b", "blood", 0.7, np.nan),
]

Make = Callable[..., Training]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A training that never was: `make(rows)` with its evaluation, finished unless said otherwise."""

    def training(
        rows: Sequence[Row] | None = ROWS,
        axes: Mapping[str, str] = AXES,
        split: int = 0,
        draw: int = 0,
        validation: int = 0,
        done: bool = True,
    ) -> Training:
        folder = tmp_path / "-".join([*axes.values(), str(split), str(draw)])
        part = Split(split, ("t1", "t2"), (), ("a1", "a2", "b1"))
        write_split(folder, part, Draw(draw, ("t1",), ()))
        if rows is not None:
            columns = ["checkpoint", "case", "subject", "class", "dice", "hd95"]
            pd.DataFrame(rows, columns=columns).assign(transductive=False).to_csv(
                folder / "evaluation-test.csv", index=False
            )
        if done:
            write_json(folder / "manifest.json", {"evaluated": {"test": []}})
        job = Job(print, {"settings": {"validation": validation}}, folder, 1, measured="test")
        return Training(Variant(axes, {}), part, draw, job, None)

    return training


def by_subject(trainings: Sequence[Training], axes: Sequence[str] = ("contender", "labels"), **table: Any) -> Any:
    values = values_of(collect(trainings), axes, TableOptions(**table))
    return values.set_index("subject")["value"].to_dict()


def test_a_value_is_the_mean_over_structures_then_over_the_cases_of_a_subject(make: Make) -> None:
    assert by_subject([make()]) == pytest.approx({"a": ((0.2 + 0.6) / 2 + 0.9) / 2, "b": (0.5 + 0.7) / 2})
    # Not the mean of all rows of the subject:
    assert by_subject([make()])["a"] != pytest.approx((0.2 + 0.6 + 0.9) / 3)


def test_a_distance_that_is_not_defined_is_left_out(make: Make) -> None:
    assert by_subject([make()], metric="hd95") == pytest.approx({"a": (3 + 5) / 2, "b": 8})


def test_one_structure(make: Make) -> None:
    assert by_subject([make()], structure="wall") == pytest.approx({"a": (0.2 + 0.9) / 2, "b": 0.5})
    assert by_subject([make()], structure="blood") == pytest.approx({"a": 0.6, "b": 0.7})


def test_one_checkpoint(make: Make) -> None:
    best = [("best", *row[1:4], row[4] / 2, row[5]) for row in ROWS]
    training = make([*ROWS, *best], validation=2)
    assert by_subject([training]) == pytest.approx({"a": 0.65, "b": 0.6})
    assert by_subject([training], checkpoint="best") == pytest.approx({"a": 0.325, "b": 0.3})
    assert set(values_of(collect([training]), list(AXES), TableOptions())["validation"]) == {2}


def test_a_missing_prediction_has_the_worst_value_and_counts(make: Make) -> None:
    missing = [*ROWS, ("last", "b2", "b", "wall", 0.0, np.nan), ("last", "b2", "b", "blood", 0.0, np.nan)]
    assert by_subject([make(missing)])["b"] == pytest.approx(0.3)


def test_every_training_has_rows_of_its_own(make: Make) -> None:
    other = {"contender": "random", "labels": "2"}
    trainings = [make(), make(draw=1), make(split=1), make([ROWS[3]], axes=other)]
    values = values_of(collect(trainings), list(AXES), TableOptions())
    places = ["contender", "labels", "split", "draw", "subject"]
    assert [tuple(row) for row in values[places].itertuples(index=False)] == [
        ("pcl", "2", 0, 0, "a"),
        ("pcl", "2", 0, 0, "b"),
        ("pcl", "2", 0, 1, "a"),
        ("pcl", "2", 0, 1, "b"),
        ("pcl", "2", 1, 0, "a"),
        ("pcl", "2", 1, 0, "b"),
        ("random", "2", 0, 0, "b"),
    ]
    assert list(values.columns) == [*AXES, "split", "draw", "validation", "subject", "value"]


def test_only_what_is_finished_and_measured_is_collected(make: Make) -> None:
    finished = make()
    results = collect([finished, make(draw=1, done=False), make(None, draw=2)])
    assert set(results["draw"]) == {0}
    assert set(results["run"]) == {str(finished.job.folder)}
    assert len(results) == len(ROWS)
    assert collect([make(None, draw=2)]).empty
    assert collect([]).empty


def test_names_that_look_like_something_else_stay_names(make: Make) -> None:
    rows = [("last", "001", "007", "1", 0.5, 1.0), ("last", "NA", "NA", "1", 0.25, 1.0)]
    axes = {"finetune.batch": "4", "contender": "true", "labels": "1"}
    training = make(rows, axes=axes)
    assert by_subject([training], axes=list(axes)) == {"007": 0.5, "NA": 0.25}
    results = collect([training])
    assert (set(results["finetune.batch"]), set(results["contender"])) == ({"4"}, {"true"})


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"structure": "valve"}, "A table names the structure 'valve': choose mean or wall, blood"),
        ({"checkpoint": "best"}, "dice of the best checkpoint, which no training has measured: the best checkpoint"),
        ({"metric": "hd95"}, "hd95 of the last checkpoint, which no training has measured"),
    ],
)
def test_what_was_not_measured_is_refused(make: Make, table: dict[str, str], sentence: str) -> None:
    training = make([(*row[:5], np.nan) for row in ROWS])
    with pytest.raises(GlocalError, match=sentence):
        by_subject([training], **table)


def test_every_training_of_the_plan_has_a_score_or_none(make: Make) -> None:
    trainings = [make(), make(draw=1, done=False)]
    scores = scores_of(trainings, collect(trainings))
    assert scores["dice"].iloc[0] == pytest.approx((0.65 + 0.6) / 2)
    assert np.isnan(scores["dice"].iloc[1])
    assert list(scores["done"]) == [True, False]
    assert scores_of(trainings[1:], pd.DataFrame())["dice"].isna().all()
