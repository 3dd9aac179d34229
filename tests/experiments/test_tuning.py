"""Tuning within an experiment: as long for every method, and judged on development subjects only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from glocal.data.split import Draw, write_split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments import estimate as measuring
from glocal.experiments import plan as planning
from glocal.experiments.design import Experiment, read_experiment
from glocal.experiments.experiment import experiment
from glocal.experiments.grid import TuneOptions, Variant, experiment_options, variants
from glocal.experiments.plan import Training, plan, store_folder
from glocal.experiments.tuning import Trial, judged, trials_of, tuned, tuning_trainings
from glocal.files import write_json, write_text
from glocal.finetuning.registry import finetuning_options
from glocal.runs import manifest_of

RECIPE: dict[str, Any] = {
    "name": "tuned",
    "preprocess": {"size": [32, 32]},
    "network": {"widths": [4, 8, 8]},
    "device": "cpu",
    "precision": "float32",
    "max_iterations": 2,
    "pretrain": {
        "pcl": {"method": "pcl", "batch": 6, "outputs": 8, "log": []},
        "gcl": {"method": "gcl", "volumes": 2, "outputs": 8, "log": []},
    },
    "finetune": {"batch": 2, "log": []},
}
KEYS = {"finetune.learning_rate": [0.1, 0.2, 0.3], "pretrain.temperature": [0.5, 0.7], "pretrain.pcl.threshold": [0.2]}


def varied(**vary: Any) -> list[Variant]:
    settings = {**RECIPE, "data": "data", "out": "out"}
    return variants(settings, experiment_options({"vary": {"labels": [1, 2], **vary}}))


def options(trials: int = 4, **other: Any) -> TuneOptions:
    return TuneOptions.model_validate({"keys": KEYS, "trials": trials, "labels": 1, **other})


def tries(trials: Sequence[Trial], method: str) -> list[dict[str, Any]]:
    return [trial.settings for trial in trials if trial.method == (method,)]


def test_every_method_has_equally_many_trials_beginning_with_its_own() -> None:
    trials = trials_of(varied(), options())
    assert [t.number for t in trials] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [t.method for t in trials[:3]] == [("random",), ("pcl",), ("gcl",)]
    for method in ("random", "pcl", "gcl"):
        tried = tries(trials, method)
        assert tried[0] == {}
        assert len({tuple(settings.items()) for settings in tried}) == 4


def test_random_weights_have_no_pretraining_to_tune() -> None:
    trials = trials_of(varied(), options())
    assert sorted(s["finetune.learning_rate"] for s in tries(trials, "random")[1:]) == [0.1, 0.2, 0.3]
    assert {key for settings in tries(trials, "random") for key in settings} == {"finetune.learning_rate"}
    with pytest.raises(GlocalError, match=r"trials=5, but random has only 3 settings to try beside its own: lower"):
        trials_of(varied(), options(trials=5))


def test_keys_of_pretraining_go_to_each_contender_s_own() -> None:
    trials = trials_of(varied(contender=["pcl", "gcl"]), options(trials=7))
    fine = "finetune.learning_rate"
    assert {tuple(settings) for settings in tries(trials, "pcl")[1:]} == {
        (fine, "pretrain.pcl.temperature", "pretrain.pcl.threshold")
    }
    assert {tuple(settings) for settings in tries(trials, "gcl")[1:]} == {(fine, "pretrain.gcl.temperature")}
    for trial in trials:
        recipe = trial.variant.recipe
        for key, value in trial.settings.items():
            where: Any = recipe.model_dump()
            for level in key.split("."):
                where = where[level]
            assert where == value
        if trial.method == ("pcl",):
            assert "temperature" not in recipe.pretrain["gcl"]


def test_settings_that_change_nothing_are_not_tried() -> None:
    """The learning rate is the default, said once more as text: as long a search for those whose default is listed."""
    default = finetuning_options({"labels": 1}).learning_rate
    keys = {"finetune.learning_rate": [default, str(default), 0.5, "0.5", 0.25]}
    trials = trials_of(varied(contender=["random"]), options(trials=3, keys=keys))
    assert sorted(float(s["finetune.learning_rate"]) for s in tries(trials, "random")[1:]) == [0.25, 0.5]
    with pytest.raises(GlocalError, match="random has only 2 settings to try beside its own"):
        trials_of(varied(contender=["random"]), options(keys=keys))


def test_trials_are_of_one_budget_on_development_subjects() -> None:
    for trial in trials_of(varied(), options(labels=3, draws=2)):
        recipe = trial.variant.recipe
        assert (recipe.finetune["labels"], recipe.protocol.draws, recipe.protocol.evaluate) == (3, 2, "development")
        assert trial.variant.axes == {"contender": trial.method[0], "labels": "3", "trial": str(trial.number)}


def test_trials_depend_on_the_seed_alone() -> None:
    keys = {"finetune.learning_rate": [k / 100 for k in range(1, 40)]}
    first, again = (trials_of(varied(seed=[5]), options(keys=keys)) for _ in range(2))
    assert [t.settings for t in first] == [t.settings for t in again]
    other = trials_of(varied(seed=[6]), options(keys=keys))
    assert [t.settings for t in first] != [t.settings for t in other]
    assert tries(first, "pcl") == []  # two axes: methods are named by both
    assert {t.method for t in first} == {("5", "random"), ("5", "pcl"), ("5", "gcl")}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"finetune.learning_rat": [1, 2, 3]},
            r"finetune\.learning_rat is not a setting: did you mean 'learning_rate'",
        ),
        ({"pretrain.tempratur": [1, 2, 3]}, r"pretrain\.pcl\.tempratur is not a setting: did you mean 'temperature'"),
        ({"finetune.learning_rate": [-1, 0.2, 0.3]}, r"finetune\.learning_rate=-1 does not fit"),
        ({"finetune.batch": [3, 4, 5]}, r"experiment\.tune\.keys names finetune\.batch, which experiment\.vary varies"),
        ({"finetune.loss": ["dice", "dice+ce"]}, r"names finetune\.loss, which experiment\.vary varies"),
        ({"pretrain.threshold": [0.1, 0.2]}, r"names pretrain\.threshold, which experiment\.vary varies"),
        ({"seed": [1, 2, 3]}, r"names seed, which must be the same for all methods"),
        ({"finetune.seed": [1, 2, 3]}, r"names finetune\.seed, which must be the same for all methods"),
        ({"finetune.validation": [1, 2, 3]}, r"names finetune\.validation, which must be the same"),
        ({"protocol.transductive": [True]}, r"names protocol\.transductive, which must be the same"),
    ],
)
def test_keys_and_values_that_do_not_fit_are_refused(keys: dict[str, Any], sentence: str) -> None:
    """Also what only some options of an axis set: chosen settings would take the place of these."""
    labels = {1: {}, "all": {"finetune.loss": "dice", "pretrain.pcl.threshold": 0.3}}
    found = varied(contender=["pcl"], labels=labels, **{"finetune.batch": [2, 4]})
    with pytest.raises(GlocalError, match=sentence):
        trials_of(found, options(trials=2, keys=keys))


@pytest.fixture
def trials() -> list[Trial]:
    return trials_of(varied(contender=["random", "pcl"]), options(trials=3, draws=2))


@pytest.fixture
def trainings(trials: list[Trial], store: Store, tmp_path: Path) -> list[Training]:
    stores = {store_folder(tmp_path, trial.variant.recipe): store for trial in trials}
    return tuning_trainings(trials, stores, tmp_path)


def measured(trainings: Sequence[Training], dice: dict[tuple[str, int], list[float | None]]) -> None:
    """Trainings that never were, with the Dice of each draw; None for one that failed."""
    for training in trainings:
        axes, folder = training.variant.axes, training.job.folder
        value = dice[axes["contender"], int(axes["trial"])][training.draw]
        write_split(folder, training.split, Draw(training.draw, ("case0",), ()))
        if value is not None:
            row = {"checkpoint": "last", "case": "case4", "subject": "case4", "class": "wall", "dice": value}
            pd.DataFrame([row]).to_csv(folder / "evaluation-development.csv", index=False)
            write_json(folder / "manifest.json", {"evaluated": {"development": ["case4"]}})


def test_the_best_mean_over_draws_is_chosen_and_the_earlier_of_equals(
    trials: list[Trial], trainings: list[Training]
) -> None:
    dice: dict[tuple[str, int], list[float | None]] = {
        ("random", 0): [0.2, 0.3],
        ("random", 1): [0.1, 0.8],
        ("random", 2): [0.4, 0.4],
        ("pcl", 0): [0.3, 0.3],
        ("pcl", 1): [0.5, 0.5],
        ("pcl", 2): [0.5, 0.5],
    }
    measured(trainings, dice)
    judgement = judged(trials, trainings)
    assert list(judgement["dice"]) == pytest.approx([np.mean(dice[t.method[0], t.number]) for t in trials])
    chosen = {(row["method"], row["trial"]) for row in judgement[judgement["chosen"]].to_dict("records")}
    assert chosen == {("random", 1), ("pcl", 1)}
    assert judgement["settings"].iloc[0] == "as in the recipe"
    assert judgement["settings"].iloc[2] == f"finetune.learning_rate={trials[2].settings['finetune.learning_rate']}"


def test_chosen_settings_reach_all_variants_of_the_method_and_only_these(
    trials: list[Trial], trainings: list[Training]
) -> None:
    measured(
        trainings, {(m, n): [n / 10, n / 10] if m == "pcl" else [0.5, 0.5] for m in ("random", "pcl") for n in range(3)}
    )
    judgement = judged(trials, trainings)
    before = varied(contender=["random", "pcl"])
    after = tuned(before, trials, judgement)
    assert [v.axes for v in after] == [v.axes for v in before]
    (best,) = (t.settings for t in trials if (t.method, t.number) == (("pcl",), 2))
    for old, new in zip(before, after, strict=True):
        if new.contender == "random":
            assert new.recipe == old.recipe
            continue
        assert new.recipe.finetune["learning_rate"] == best["finetune.learning_rate"]
        assert new.recipe.pretrain["pcl"]["temperature"] == best["pretrain.pcl.temperature"]
        assert new.recipe.pretrain["gcl"] == old.recipe.pretrain["gcl"]
        assert new.recipe.finetune["labels"] == old.recipe.finetune["labels"]
        assert new.recipe.protocol == old.recipe.protocol  # measured on test subjects again


def test_a_trial_that_failed_is_not_chosen(trials: list[Trial], trainings: list[Training]) -> None:
    dice: dict[tuple[str, int], list[float | None]] = {(m, n): [0.5, 0.5] for m in ("random", "pcl") for n in range(3)}
    measured(trainings, dice | {("pcl", 0): [None, None], ("pcl", 1): [0.9, None]})  # half of one is no comparison
    judgement = judged(trials, trainings)
    chosen = {(row["method"], row["trial"]) for row in judgement[judgement["chosen"]].to_dict("records")}
    assert chosen == {("random", 0), ("pcl", 2)}
    assert judgement["dice"].isna().sum() == 2


def test_a_method_whose_trials_all_failed_is_left_out(trials: list[Trial], trainings: list[Training]) -> None:
    dice: dict[tuple[str, int], list[float | None]] = {(m, n): [0.5, 0.5] for m in ("random", "pcl") for n in range(3)}
    measured(trainings, dice | {("pcl", n): [None, 0.5] for n in range(3)})
    judgement = judged(trials, trainings)
    assert list(judgement[judgement["chosen"]]["method"]) == ["random"]
    before = varied(contender=["random", "pcl"])
    assert {variant.contender for variant in tuned(before, trials, judgement)} == {"random"}
    with pytest.raises(GlocalError, match="Every tuning trial has failed"):
        tuned(before, trials, judgement.assign(chosen=False))


def design(raw: Path, tmp_path: Path, *words: str, **tune: Any) -> Experiment:
    part = {"keys": {"finetune.learning_rate": [0.1, 0.2]}, "trials": 2, "labels": 1, **tune}
    recipe = tmp_path / "tuned.yaml"
    vary = {"contender": ["random", "pcl"], "labels": [1, 2]}
    recipe.write_text(yaml.safe_dump(RECIPE | {"experiment": {"vary": vary, "tune": part}}))
    return read_experiment(str(recipe), [f"data={raw}", f"out={tmp_path / 'out'}", *words])


def test_it_is_refused_without_development_subjects(raw: Path, write_dataset: Any, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    split = {"pretrain": ["a", "b"], "development": ["d"], "test": ["c"]}
    closed = write_dataset(tmp_path / "closed", dict.fromkeys(names, 5), ["a", "b", "c"], split)
    none = write_dataset(tmp_path / "none", dict.fromkeys(names, 5), names, split | {"development": []})
    for data in (closed, none):  # `d` has no labels; there is nobody
        with pytest.raises(GlocalError, match="there are none: list some labelled cases as `development`"):
            design(data, tmp_path)
    with pytest.raises(GlocalError, match="there are none"):
        design(raw, tmp_path, "protocol.leave_one_out=true")
    with pytest.raises(GlocalError, match="only 3 may be trained on"):
        design(raw, tmp_path, labels=9)
    with pytest.raises(GlocalError, match="would label the same volumes"):
        design(raw, tmp_path, labels=3, draws=2)
    assert not (tmp_path / "out").exists()


def test_only_split_0_is_tuned_on(raw: Path, store: Store, tmp_path: Path) -> None:
    found = design(raw, tmp_path, "protocol.splits=2")
    stores = {store_folder(found.out, found.variants[0].recipe): store}
    searching = tuning_trainings(found.trials, stores, found.out)
    assert len(searching) == 4
    assert {t.split.index for t in searching} == {0}
    assert {t.split.index for t in plan(found.variants, stores, found.out)} == {0, 1}


def test_a_tuned_experiment(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways of preprocessing that are tried have stores of their own. Trials are measured on development subjects, and
    then the chosen ones alone, without training again, on test subjects."""
    monkeypatch.setattr(planning, "report", lambda run: write_text(run / "report.html", "a report"))
    monkeypatch.setattr(measuring, "ITERATIONS", 2)
    vary = {"contender": ["random", "pcl"], "labels": [2]}
    tune = {"keys": {"preprocess.size": [[16, 16]], "finetune.learning_rate": [0.01]}, "trials": 2, "labels": 2}
    recipe = tmp_path / "tuned.yaml"
    part = {"vary": vary, "tune": tune, "statistics": {"resamples": 20}}
    recipe.write_text(yaml.safe_dump(RECIPE | {"experiment": part}))
    page = experiment(str(recipe), [f"data={raw}", f"out={tmp_path / 'out'}"], workers=1)
    assert page is not None
    out, trials = tmp_path / "out", pd.read_csv(page.parent / "tuning.csv")
    assert len([path for path in (out / "stores").iterdir() if path.name[0] != "."]) == 2
    assert list(zip(trials["method"], trials["trial"], strict=True)) == [
        ("random", 0),
        ("pcl", 0),
        ("random", 1),
        ("pcl", 1),
    ]
    finetunings = {path.parent: manifest_of(path.parent) for path in out.glob("finetune/*/manifest.json")}
    chosen_on, shown_on = {"development": ["case4"]}, {"test": ["case5"]}
    evaluated = sorted((facts["evaluated"] for facts in finetunings.values()), key=len)
    assert evaluated == [chosen_on] * 2 + [chosen_on | shown_on] * 2
    # A trial's Dice, and its method's best, by hand.
    dice: dict[bool, list[float]] = {True: [], False: []}
    for folder in finetunings:
        found = pd.read_csv(folder / "evaluation-development.csv")["dice"].mean()
        dice[(folder / "transfer.json").exists()].append(found)
    for method, is_pretrained in (("random", False), ("pcl", True)):
        rows = trials[trials["method"] == method]
        assert sorted(rows["dice"]) == pytest.approx(sorted(dice[is_pretrained]), abs=1e-5)
        (chosen,) = rows[rows["chosen"]].to_dict("records")
        assert chosen["dice"] == rows["dice"].max()
        results = pd.read_csv(page.parent / "results.csv")
        (run,) = results[results["contender"] == method]["run"].unique()
        settings = yaml.safe_load((out / run / "recipe.yaml").read_text(encoding="utf-8"))
        assert (settings["learning_rate"] == 0.01) == (chosen["trial"] == 1)
        store = Store.open(Path(manifest_of(out / run)["store"]))
        assert store.plan.options.size == ((16, 16) if chosen["trial"] == 1 else (32, 32))
    text = page.read_text(encoding="utf-8")
    assert "judged on development subjects" in text
    assert not (out / "machine.json").exists()  # the precision was said, so nothing was decided
