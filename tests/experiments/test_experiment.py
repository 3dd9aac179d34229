"""A whole experiment on a tiny dataset: everything once, in good order, and honest about what is missing."""

import html
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import torch
import yaml

from glocal import runs
from glocal.cli import main
from glocal.data.store import Store
from glocal.errors import Busy, GlocalError
from glocal.experiments import estimate as measuring
from glocal.experiments import experiment as whole_experiment
from glocal.experiments import plan as planning
from glocal.experiments import trainings as jobs_of_recipes
from glocal.experiments.design import Experiment, read_experiment
from glocal.experiments.estimate import estimate
from glocal.experiments.executors import Here
from glocal.experiments.experiment import duration, experiment
from glocal.experiments.findings import boxes_of, figures_of, findings, pictures_of
from glocal.experiments.jobs import Job
from glocal.experiments.layout import TableOptions
from glocal.experiments.page import _key_figures, write_results
from glocal.experiments.plan import Training, jobs_of, plan, store_folder
from glocal.experiments.results import collect
from glocal.files import read_json, write_json, write_text
from glocal.reporting import comparisons

RECIPE: dict[str, Any] = {
    "name": "first",
    "summary": "A tiny experiment.",
    "preprocess": {"size": [32, 32]},
    "network": {"widths": [4, 8, 8]},
    "device": "cpu",
    "precision": "float32",
    "max_iterations": 2,
    "pretrain": {"pcl": {"method": "pcl", "batch": 6, "outputs": 8, "log": []}},
    "finetune": {"batch": 2, "log": []},
    "protocol": {"draws": 2},
    "experiment": {"vary": {"contender": ["random", "pcl"], "labels": [1, 2]}, "statistics": {"resamples": 20}},
}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Reports of single trainings have their own tests, and a step need not be measured well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "report", lambda run: write_text(run / "report.html", "a report"))
        patch.setattr(measuring, "ITERATIONS", 2)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


def written(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(RECIPE | settings, sort_keys=False))
    return str(path)


def planned(recipe: str, words: list[str]) -> tuple[Experiment, list[Training], dict[Path, Store]]:
    design = read_experiment(recipe, words)
    stores = whole_experiment._stores(design)
    return design, plan(design.variants, stores, design.out), stores


@pytest.fixture(scope="module")
def out(recipe: str, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared folder with a finished experiment, `first`: 2 contenders, 2 budgets, 2 draws."""
    folder = tmp_path_factory.mktemp("experiments") / "out"
    assert experiment(recipe, [f"data={raw}", f"out={folder}"], workers=1) == folder / "first" / "index.html"
    return folder


def trained(out: Path) -> set[str]:
    """The folders of finished trainings."""
    return {str(path.parent.relative_to(out)) for path in out.glob("*/*/manifest.json")}


def times(out: Path) -> dict[Path, int]:
    """When the files of all trainings were written last."""
    folders = (out / "finetune", out / "pretrain")
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def links(page: Path) -> list[str]:
    found = re.findall(r'href="([^"#]*(?:#[^"]+)?)"', page.read_text(encoding="utf-8"))
    return [unquote(html.unescape(link)) for link in found if link]


def refuse_training(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing is to be trained")


def test_everything_is_there(out: Path) -> None:
    names = {str(path.relative_to(out / "first")) for path in (out / "first").rglob("*") if path.is_file()}
    files = {"index.html", "runs.html", "results.csv", "recipe.yaml", "table-dice.md", "table-dice.csv"}
    assert files | {"table-dice.tex"} <= names
    assert {name.split("-")[0] for name in names if name.startswith("figures/")} == {
        "figures/dice",
        "figures/structures",
        "figures/pictures",
    }
    assert len(list((out / "finetune").iterdir())) == 8
    assert len(list((out / "pretrain").iterdir())) == 1
    assert len([path for path in (out / "stores").iterdir() if path.name[0] != "."]) == 1
    assert not list(out.glob(".measuring-*"))
    page = (out / "first" / "index.html").read_text(encoding="utf-8")
    for text in (
        "A tiny experiment.",
        "8 of 8 fine-tunings done",
        "contender (2)",
        "inductive",
        "Papers to cite",
        "Settings",
    ):
        assert text in page, text
    assert "nan" not in re.sub(r'data:[^"]+"', "", page).lower().split()


def test_results_hold_a_row_for_every_case_and_structure(out: Path) -> None:
    results = pd.read_csv(out / "first" / "results.csv", dtype=str)
    keys = ["contender", "labels", "split", "draw", "case", "class"]
    assert {tuple(row) for row in results[keys].itertuples(index=False)} == {
        (contender, labels, "0", draw, "case5", structure)
        for contender in ("random", "pcl")
        for labels in ("1", "2")
        for draw in ("0", "1")
        for structure in ("wall", "blood")
    }
    assert len(results) == 16
    # The table's mean, by hand.
    ours = results[(results["contender"] == "pcl") & (results["labels"] == "2")]
    table = pd.read_csv(out / "first" / "table-dice.csv", dtype={"contender": str, "labels": str})
    cell = table[(table["contender"] == "pcl") & (table["labels"] == "2")].iloc[0]
    assert cell["mean"] == pytest.approx(ours["dice"].astype(float).mean(), abs=1e-5)
    assert (cell["trainings"], cell["splits"], cell["draws"], cell["subjects"]) == (2, 1, 2, 1)


def test_draws_are_paired(out: Path) -> None:
    results = pd.read_csv(out / "first" / "results.csv", dtype=str)
    drawn: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for row in results.to_dict("records"):
        cases = read_json(out / row["run"] / "split.json")["draw"]["train"]
        drawn.setdefault((row["labels"], row["draw"]), set()).add(tuple(cases))
    assert {key: len(cases) for key, cases in drawn.items()} == dict.fromkeys(drawn, 1)
    assert len(drawn) == 4


def test_every_link_leads_somewhere(out: Path) -> None:
    folder = out / "first"
    ids = set(re.findall(r'id="([^"]+)"', (folder / "runs.html").read_text(encoding="utf-8")))
    anchors = {link.partition("#")[2] for link in links(folder / "index.html") if link.startswith("runs.html#")}
    assert anchors == {"random|1", "random|2", "pcl|1", "pcl|2"}
    assert anchors <= {html.unescape(name) for name in ids}
    leading = [link for link in links(folder / "runs.html") if not link.startswith("#")]
    assert len(leading) == 8 + 4 + 1  # a pre-training is behind each of four; and back to the experiment
    files = {link for link in links(folder / "index.html") if link.startswith("table-")}
    assert files == {"table-dice.md", "table-dice.csv", "table-dice.tex"}
    for link in (*leading, *files):
        assert (folder / link).is_file(), link


def test_the_trainings_say_on_whom_they_were_measured(out: Path) -> None:
    page = (out / "first" / "runs.html").read_text(encoding="utf-8")
    assert "Dice, test subjects" in page
    assert "not a medical device" in page


def test_pictures_are_named_by_their_place(out: Path, recipe: str, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[comparisons.PictureRow] = []
    monkeypatch.setattr(comparisons, "picture_grid", lambda rows, *_: drawn.extend(rows) or b"")
    design, trainings, stores = planned(recipe, [f"data={raw}", f"out={out}"])
    results = collect(trainings)
    assert len(list(pictures_of(design, trainings, results, stores))) == 2
    assert [row.name.partition(",")[0] for row in drawn] == ["Worst and median and best: case5"] * 2
    of_first = results[(results["labels"] == "1") & (results["draw"] == 0)]
    dice = of_first.groupby("contender")["dice"].mean().to_dict()
    assert drawn[0].dice == pytest.approx(dice)


def test_the_baseline_is_drawn_first_wherever_it_stands_in_the_recipe(
    out: Path, recipe: str, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []

    def draw(frame: pd.DataFrame, *_: str) -> bytes:
        drawn.append(list(frame["method"].unique()))
        return b""

    for figure in ("means_by_budget", "forest", "class_boxes_by_method"):
        monkeypatch.setattr(comparisons, figure, draw)
    words = [
        f"data={raw}",
        f"out={out}",
        "experiment.vary.contender=[pcl, random]",
        "experiment.baseline.contender=random",
    ]
    design, trainings, _ = planned(recipe, words)
    results = collect(trainings)
    found, _ = findings(design, results)
    pictures = [*(picture for finding in found for picture in figures_of(design, finding)), *boxes_of(design, results)]
    assert list(found[0].summary["method"].unique()) == ["pcl", "random"]  # a table keeps the recipe's order
    assert drawn == [["random", "pcl"]] * len(pictures)
    assert len(pictures) >= 3


def test_the_best_method_stands_beside_what_it_is_compared_with(raw: Path, tmp_path: Path) -> None:
    """A baseline that leaves an axis open has a row for each of its options."""
    vary = {"contender": ["random", "pcl"], "strategy": ["supervised", "mixup"], "labels": [1]}
    recipe = written(tmp_path / "open.yaml", experiment={"vary": vary, "baseline": {"contender": "random"}})
    design = read_experiment(recipe, [f"data={raw}", f"out={tmp_path / 'out'}"])
    rows = [
        ("random + supervised", 0.6, True, math.nan),
        ("random + mixup", 0.8, True, math.nan),
        ("pcl + supervised", 0.7, False, 0.1),
        ("pcl + mixup", 0.85, False, 0.05),
    ]
    summary = pd.DataFrame(rows, columns=["method", "mean", "baseline", "difference"]).assign(group="1 labelled")
    finding: Any = SimpleNamespace(summary=summary, label="Dice", higher_is_better=True)
    assert _key_figures(design, finding) == [
        ("Dice, random + mixup, 1 labelled", "0.800"),
        ("Dice, pcl + mixup, 1 labelled", "0.850"),
        ("pcl + mixup against random + mixup, 1 labelled", "+0.050"),
    ]
    finding.summary = summary.iloc[:2]  # nothing to compare
    assert _key_figures(design, finding) == [("Dice, random + mixup, 1 labelled", "0.800")]


def test_a_table_of_differences_needs_some(out: Path, recipe: str, raw: Path) -> None:
    design, trainings, _ = planned(recipe, [f"data={raw}", f"out={out}"])
    gain = TableOptions(title="Gain", show=("difference", "better", "p"))
    design = replace(design, tables={**design.tables, "gain": gain})
    results = collect(trainings)
    both, nothing = findings(design, results)
    assert ([finding.name for finding in both], nothing) == (["dice", "gain"], [])
    assert "Δ against random: paired" in both[1].layout.note
    alone = results[results["contender"] == "random"]
    found, missing = findings(design, alone)
    assert [finding.name for finding in found] == ["dice"]
    assert missing == [
        "There is no table gain. It shows differences to random, and there is nothing to compare with it."
    ]
    only, _ = findings(replace(design, tables={"gain": gain}), alone)  # its means stand nowhere else
    assert [finding.name for finding in only] == ["gain"]
    assert "Δ" not in only[0].layout.note


def test_the_recipe_that_is_kept_is_the_experiment(out: Path) -> None:
    kept = read_experiment(str(out / "first" / "recipe.yaml"))
    assert [dict(v.axes) for v in kept.variants] == [
        {"contender": contender, "labels": labels} for contender in ("random", "pcl") for labels in ("1", "2")
    ]
    assert (kept.name, kept.folder) == ("first", out / "first")


def test_words_choose_options_of_the_recipe_with_their_settings(raw: Path, tmp_path: Path) -> None:
    vary = {"contender": ["random", "pcl"], "labels": {1: {}, "all": {"finetune.max_iterations": 7}}}
    recipe = written(tmp_path / "long.yaml", experiment={"vary": vary})
    words = [f"data={raw}", f"out={tmp_path / 'out'}", "experiment.vary.labels=[all]"]
    found = read_experiment(recipe, words).variants
    assert [(v.contender, v.axes["labels"], v.recipe.finetune["max_iterations"]) for v in found] == [
        ("random", "all", 7),
        ("pcl", "all", 7),
    ]


def test_the_numbers_of_a_paper_for_what_words_leave_out_are_left_out_too(raw: Path, tmp_path: Path) -> None:
    table = {"paper_source": "They 2020", "paper": {"random": {1: 0.5, 2: 0.6}, "pcl": {1: 0.7}}}
    part = {"vary": {"contender": ["random", "pcl"], "labels": [1, 2]}, "tables": {"dice": table}}
    recipe, data = written(tmp_path / "paper.yaml", experiment=part), [f"data={raw}", f"out={tmp_path / 'out'}"]
    assert read_experiment(recipe, data).tables["dice"].paper == {"random": {"1": 0.5, "2": 0.6}, "pcl": {"1": 0.7}}
    for words, left in (
        ("experiment.vary.labels=[2]", {"random": {"2": 0.6}}),
        ("experiment.vary.contender=[pcl]", {"pcl": {"1": 0.7}}),
    ):
        assert read_experiment(recipe, [*data, words]).tables["dice"].paper == left
    table["paper"] = {"randon": {2: 0.5}}
    written(tmp_path / "paper.yaml", experiment=part)
    with pytest.raises(GlocalError, match="for the row 'randon': did you mean 'random'"):
        read_experiment(recipe, [*data, "experiment.vary.labels=[2]"])


def test_started_again_nothing_is_trained(
    out: Path, recipe: str, raw: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("finetune", "pretrain"):
        monkeypatch.setattr(jobs_of_recipes, name, refuse_training)
    before, csv = times(out), (out / "first" / "results.csv").read_text(encoding="utf-8")
    experiment(recipe, [f"data={raw}", f"out={out}"], workers=1)
    assert times(out) == before
    assert (out / "first" / "results.csv").read_text(encoding="utf-8") == csv
    assert "Every training is done." in capfd.readouterr().err


def test_a_removed_pretraining_is_not_done_again_for_nothing(out: Path, recipe: str, raw: Path) -> None:
    before = trained(out)
    shutil.move(out / "pretrain", out / "away")
    try:
        experiment(recipe, [f"data={raw}", f"out={out}"], workers=1)
        assert {f for f in before if "pretrain" not in f} == {f for f in trained(out) if "away" not in f}
        assert not (out / "pretrain").exists()
        assert "(not done)" in (out / "first" / "runs.html").read_text(encoding="utf-8")
    finally:
        shutil.rmtree(out / "pretrain", ignore_errors=True)
        shutil.move(out / "away", out / "pretrain")
    experiment(recipe, [f"data={raw}", f"out={out}"], workers=1)


def test_development_is_said_of_every_table_and_test_subjects_are_measured_without_training(
    recipe: str, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tables = "experiment.tables={one: {}, two: {metric: iou}}"
    words = [f"data={raw}", f"out={out}", "protocol.draws=1", "experiment.vary.labels=[1]", tables]
    page = experiment(recipe, [*words, "protocol.evaluate=development"], workers=1)
    assert page is not None
    said = page.read_text(encoding="utf-8")
    assert said.count("Measured on development subjects: for choosing") == 2  # of the page, and of the second table
    assert said.count("Means over development subjects") == 1  # with all else about the first
    behind = (page.parent / "runs.html").read_text(encoding="utf-8")
    assert "Measured on development subjects: for choosing" in behind
    assert "Dice, development subjects" in behind

    weights = {path: path.stat().st_mtime_ns for path in out.glob("finetune/*/*.safetensors")}
    shutil.rmtree(out / "pretrain")  # nobody needs it any more
    capfd.readouterr()
    experiment(recipe, [*words, "name=chosen"], workers=1)
    assert "Every training is done. 2 finished ones only to be measured." in capfd.readouterr().err
    assert not (out / "pretrain").exists()
    assert {path: path.stat().st_mtime_ns for path in out.glob("finetune/*/*.safetensors")} == weights
    assert len(list(out.glob("finetune/*/report.html"))) == 2
    for name, case in (("first", "case4"), ("chosen", "case5")):
        assert set(pd.read_csv(out / name / "results.csv")["case"]) == {case}
    assert "Means over test subjects" in (out / "chosen" / "index.html").read_text(encoding="utf-8")

    experiment(recipe, [*words, "name=moved", "protocol.tta=true"], workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.glob("finetune/*/*.safetensors")} == weights
    plain, moved = (pd.read_csv(out / name / "results.csv") for name in ("chosen", "moved"))
    assert (plain["case"] == moved["case"]).all()
    assert (plain["dice"] != moved["dice"]).any()
    assert "masks being means over moved views" in (out / "moved" / "index.html").read_text(encoding="utf-8")


def test_a_dry_run_prints_the_plan_and_trains_nothing(
    out: Path, recipe: str, raw: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = times(out)
    left, busy = out / ".measuring-killed", out / ".measuring-busy"  # by a process that was killed; by one at work
    for folder in (left, busy):
        write_text(folder / ".lock", "")
    words = ["name=dry", "experiment.vary.labels=[1,2,all]", "experiment.vary.contender=[random]"]
    with runs.held(busy):
        assert experiment(recipe, [f"data={raw}", f"out={out}", *words], workers=1, dry_run=True) is None
    assert list(out.glob(".measuring-*")) == [busy]
    shutil.rmtree(busy)
    said = capfd.readouterr().err
    assert "dry: contender (1) x labels (3) x split (1) x draw (2); compared with contender=random." in said
    assert re.search(r"fine-tuning, supervised +6 +2 ", said)
    assert "2 of 6 trainings to do: about" in said
    assert times(out) == before
    assert not (out / "dry").exists()


def test_another_experiment_trains_only_what_is_new(
    out: Path, recipe: str, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One axis changed by a word, another name, the same folder: trainings and the store are shared."""
    before, stores = times(out), list((out / "stores").iterdir())
    words = ["name=second", "experiment.vary.labels=[2,all]", "experiment.vary.contender=[random]"]
    page = experiment(recipe, [f"data={raw}", f"out={out}", *words], workers=1)
    assert page == out / "second" / "index.html"
    pages = [(out / name / "index.html").read_text(encoding="utf-8") for name in ("first", "second")]
    assert ["Differences are paired with random" in text for text in pages] == [True, False]  # here nothing differs
    after = times(out)
    assert {path: after[path] for path in before} == before
    new = {path.parent for path in after.keys() - before.keys() if path.name == "manifest.json"}
    assert len(new) == 2  # two draws of `all`
    assert {read_json(folder / "split.json")["draw"]["train"][0] for folder in new} <= {"case0", "case1", "case2"}
    results = pd.read_csv(out / "second" / "results.csv", dtype=str)
    assert set(zip(results["contender"], results["labels"], strict=True)) == {("random", "2"), ("random", "all")}
    assert list((out / "stores").iterdir()) == stores


def test_an_interrupted_experiment_continues(
    out: Path, recipe: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    finetune = jobs_of_recipes.finetune

    def stopping(**arguments: Any) -> Path:
        calls.append(arguments["run"])
        if len(calls) == 1 + 2:  # the measurement is one training
            raise KeyboardInterrupt
        return finetune(**arguments)

    words = [f"data={raw}", f"out={tmp_path / 'out'}", "experiment.vary.contender=[random]"]
    words.append("experiment.vary.labels=[1]")
    with monkeypatch.context() as patch:
        patch.setattr(jobs_of_recipes, "finetune", stopping)
        with pytest.raises(KeyboardInterrupt):
            experiment(recipe, words, workers=1)
    (done,) = trained(tmp_path / "out") - {f"stores/{path.name}" for path in (tmp_path / "out" / "stores").iterdir()}

    def of_done() -> dict[Path, int]:
        written = times(tmp_path / "out").items()
        return {path: when for path, when in written if (tmp_path / "out" / done) in path.parents}

    before = of_done()
    assert tmp_path / "out" / done / "model.safetensors" in before
    experiment(recipe, words, workers=1)
    assert of_done() == before
    continued, whole = (pd.read_csv(folder / "first" / "results.csv", dtype=str) for folder in (tmp_path / "out", out))
    whole = whole[(whole["contender"] == "random") & (whole["labels"] == "1")].reset_index(drop=True)
    pd.testing.assert_frame_equal(continued, whole)  # the same trainings, in folders of the same name
    assert len(continued) == 4


def test_an_experiment_that_runs_is_not_started_twice(out: Path, recipe: str, raw: Path) -> None:
    with runs.held(out / "first"), pytest.raises(Busy, match="Another process is working in"):
        experiment(recipe, [f"data={raw}", f"out={out}"], workers=1)


def test_two_experiments_at_the_same_time_share_trainings(recipe: str, raw: Path, tmp_path: Path) -> None:
    """Two processes, each with the whole command; a diary says what was trained where."""
    code = (
        "import sys\n"
        "from glocal.cli import main\n"
        "from glocal.experiments import estimate, jobs, plan\n"
        "from glocal.files import write_text\n"
        "from glocal.finetuning import finetune\n"
        "from glocal.pretraining import pretrain\n"
        "estimate.ITERATIONS, jobs.REST_SECONDS, jobs.LOOK_SECONDS = 2, 0.1, 0.1\n"
        "plan.report = lambda run: write_text(run / 'report.html', 'a report')\n"
        "def noted(work, place):\n"
        "    def wrapper(*arguments):\n"
        "        open(sys.argv[0], 'a').write(f'{arguments[place]}\\n')\n"
        "        return work(*arguments)\n"
        "    return wrapper\n"
        "finetune._train = noted(finetune._train, 1)\n"
        "pretrain._train_stages = noted(pretrain._train_stages, 3)\n"
        "sys.argv = [sys.argv[1], *sys.argv[2:]]\n"
        "main()\n"
    )
    diary = tmp_path / "diary"
    words = ["experiment", recipe, f"data={raw}", f"out={tmp_path / 'out'}", "experiment.vary.labels=[1]"]
    command = [sys.executable, "-c", code, str(diary), *words, "--workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, f"name={name}"], stderr=subprocess.PIPE, text=True, env=environment)
        for name in ("left", "right")
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    once = [line for line in diary.read_text().split() if ".measuring-" not in line]
    assert len(once) == len(set(once)) == 5  # a pre-training, two contenders with two draws
    left, right = (
        (tmp_path / "out" / name / "table-dice.csv").read_text(encoding="utf-8") for name in ("left", "right")
    )
    assert left == right
    assert "pcl" in left


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`glocal WORDS` in this process: exit code and what was said."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["glocal", *words])
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return int(end.value.code or 0), said.out + said.err

    return run


def test_what_failed_is_said_and_tried_again(
    recipe: str,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: Callable[..., tuple[int, str]],
) -> None:
    """The label map of a case that only split 1 tests on breaks after preprocessing."""
    own, out = shutil.copytree(raw, tmp_path / "raw"), tmp_path / "out"
    words = [f"data={own}", f"out={out}", "protocol.splits=2", "protocol.draws=1", "experiment.vary.labels=[1]"]
    design = read_experiment(recipe, words)
    dataset = whole_experiment.preprocess(own, out / "stores" / "for-the-split", design.variants[0].recipe.preprocess)
    stores = {store_folder(design.out, design.variants[0].recipe): dataset}
    (victim,) = {t.split.test for t in plan(design.variants, stores, out) if t.split.index == 1}.pop()
    shutil.rmtree(out)
    label = own / "labelsTr" / f"{victim}.nii.gz"
    healthy = label.read_bytes()
    preprocess = whole_experiment.preprocess

    def breaking(*arguments: Any) -> Store:
        store = preprocess(*arguments)
        label.write_bytes(b"broken")
        return store

    command = ["experiment", recipe, *words, "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(whole_experiment, "preprocess", breaking)
        code, said = shell(*command)
    assert code == 2
    assert "2 trainings of first failed or could not begin, first" in said
    assert "the same command tries them again" in said.replace("\n", " ")
    page = (out / "first" / "index.html").read_text(encoding="utf-8")
    assert "2 of 4 fine-tunings done" in page
    assert page.count(f"{victim}.nii.gz") >= 2  # the reason, for each of the two
    assert "(not done)" in (out / "first" / "runs.html").read_text(encoding="utf-8")
    assert set(pd.read_csv(out / "first" / "results.csv")["split"]) == {0}
    notes = list((out / "finetune").glob("*/failure.txt"))
    assert len(notes) == 2
    assert all(victim in note.read_text(encoding="utf-8") for note in notes)
    healthy_ones = {path: n for path, n in times(out).items() if not {note.parent for note in notes} & {*path.parents}}
    label.write_bytes(healthy)
    code, said = shell(*command)
    assert code == 0, said
    assert "| pcl |" in said
    assert f"Page: {out / 'first' / 'index.html'}" in said.replace("\n", "")
    assert "4 of 4 fine-tunings done" in (out / "first" / "index.html").read_text(encoding="utf-8")
    assert set(pd.read_csv(out / "first" / "results.csv")["split"]) == {0, 1}
    after = times(out)
    assert {path: after[path] for path in healthy_ones} == healthy_ones


def test_it_is_refused_where_nothing_would_be_measured(recipe: str, write_dataset: Any, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    data = write_dataset(tmp_path / "small", dict.fromkeys(names, 5), names, None)
    words = [f"data={data}", f"out={tmp_path / 'out'}", "experiment.vary.labels=[1]", "protocol.draws=1"]
    with pytest.raises(GlocalError, match="Split 0 has no labelled test subject, so nothing would be measured"):
        read_experiment(recipe, words)
    assert read_experiment(recipe, [*words, "protocol.test=1"]).variants


def test_datasets_are_compared_each_by_itself_and_one_training_serves_two_methods(
    raw: Path, write_dataset: Any, tmp_path: Path
) -> None:
    """Each dataset has subjects of its own; `random` is the same training whatever the pre-training's temperature."""
    names = ["u", "v", "w", "x"]
    split = {"pretrain": names[:3], "development": [], "test": names[3:]}
    other = write_dataset(tmp_path / "other", dict.fromkeys(names, 5), names, split)
    path = tmp_path / "both.yaml"
    datasets = {"one": {"data": str(raw)}, "other": {"data": str(other)}}
    vary = {"contender": ["random", "pcl"], "dataset": datasets, "pretrain.pcl.temperature": [0.1, 0.5], "labels": [1]}
    part = {"vary": vary, "names": {str(raw): "One", str(other): "Other"}, "statistics": {"resamples": 20}}
    page = experiment(
        written(path, protocol={"draws": 1}, experiment=part), [f"data={raw}", f"out={tmp_path / 'out'}"], workers=1
    )
    assert page is not None
    said = html.unescape(page.read_text(encoding="utf-8"))
    assert len(trained(tmp_path / "out")) == 2 * (1 + 2 + 2)
    assert "No pictures of cases" not in said
    assert (
        said.count("labelled, One, first draw: worst") == said.count("labelled, Other, first draw: worst") == 2
    )  # caption and alternative text
    ranked = said[said.rindex("How sure is the order?") : said.index("Two draws or splits")]
    assert ranked.count("1 labelled, One") == ranked.count("1 labelled, Other") == 4
    assert "(right is better)" in (page.parent / "figures" / "dice-1.svg").read_text(encoding="utf-8")
    written(path, protocol={"draws": 1}, experiment=part | {"tables": {"iou": {"rows": list(vary)[:3]}}})
    assert experiment(str(path), [f"data={raw}", f"out={tmp_path / 'out'}"], workers=1) == page
    assert {path.name for path in page.parent.glob("table-*")} == {"table-iou.md", "table-iou.csv", "table-iou.tex"}


def test_the_page_is_written_where_methods_have_no_training_in_common(recipe: str, raw: Path, tmp_path: Path) -> None:
    words = [f"data={raw}", f"out={tmp_path / 'out'}", "experiment.vary.labels=[1]"]
    design = read_experiment(recipe, words)
    assert experiment(recipe, words, workers=1)
    stores = whole_experiment._stores(design)
    trainings = plan(design.variants, stores, design.out)
    for training in trainings:  # as if one draw of each had failed
        if (training.variant.contender == "pcl") == (training.draw == 0):
            (training.job.folder / "manifest.json").unlink()
    said = write_results(design, trainings, [], stores).read_text(encoding="utf-8")
    assert "2 of 4 fine-tunings done" in said
    assert "How sure is the order?" not in said


def test_transductive_is_said_in_every_table(raw: Path, tmp_path: Path) -> None:
    """With an axis of its own name, tables of two metrics, and names for options."""
    methods = {"random": {"contender": "random"}, "slow": {"contender": "pcl", "finetune.learning_rate": 0.0001}}
    tables = {name: {"rows": ["method"], "metric": name, "show": ["difference", "better"]} for name in ("dice", "hd95")}
    varied = {"vary": {"method": methods, "labels": {1: {}}}, "tables": tables, "names": {"slow": "PCL, slow"}}
    recipe = written(
        tmp_path / "r.yaml",
        protocol={"transductive": True},
        experiment=varied | {"statistics": {"resamples": 20}},
    )
    page = experiment(recipe, [f"data={raw}", f"out={tmp_path / 'out'}"], workers=1)
    assert page is not None
    for name in ("dice", "hd95"):
        for ending in ("md", "tex"):
            assert "transductive" in (page.parent / f"table-{name}.{ending}").read_text(encoding="utf-8")
        assert "PCL, slow" in (page.parent / f"table-{name}.md").read_text(encoding="utf-8")
    assert "Transductive: the images of test subjects" in page.read_text(encoding="utf-8")
    results = pd.read_csv(page.parent / "results.csv")
    assert results.groupby("method")["transductive"].unique().map(list).to_dict() == {"random": [False], "slow": [True]}
    anchors = {link.partition("#")[2] for link in links(page) if link.startswith("runs.html#")}
    assert anchors == {"random", "slow"}
    kept = read_experiment(str(page.parent / "recipe.yaml"))  # budgets that are keys of a mapping stay numbers
    assert [(v.axes["method"], v.recipe.finetune["labels"]) for v in kept.variants] == [("random", 1), ("slow", 1)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["experiment.vary.labels=[[case5]]", "protocol.draws=1"], "case5 belongs to a test or development subject"),
        (["experiment.vary.labels=[[case4]]", "protocol.draws=1"], "case4 belongs to a test or development subject"),
        (["protocol.draws=20"], "would label the same volumes"),
        (["experiment.vary.labels=[4]"], "only 3 may be trained on"),
        (["protocol.splits=50"], "use a smaller protocol.splits"),
        (
            ["protocol.folds=2", "protocol.leave_one_out=true"],
            "folds and .*leave_one_out each say how subjects are split",
        ),
        (["experiment.vary.strategy=[mean_teacher]"], "strategy=mean_teacher"),
        (
            ["experiment.vary={finetune.batch: [2, 3]}", "experiment.tables.dice.metric=dice"],
            "would mix 2, 3 in one cell",
        ),
        (["experiment.tables.dice.rows=[contendr]"], "did you mean 'contender'"),
        (["experiment.tables.dice.metrik=dice"], "did you mean 'metric'"),
        (["experiment.vari=[1]"], "experiment.vari is not a setting: did you mean 'vary'"),
        (["experiment.baseline.contender=simclr"], "experiment.baseline names contender=simclr"),
        (["name=finetune"], "name=finetune is what experiments share in their folder"),
        (["name=machine.json"], "is what experiments share in their folder"),
        (["name=../elsewhere"], r"name: '\.\./elsewhere' cannot be the name of a file"),
        (["name=.."], "cannot be the name of a file"),
        (["experiment.tables={a/b: {}}"], "experiment.tables: 'a/b' cannot be the name of a file"),
        (["experiment.names={random: A, pcl: A}"], "Two methods would be called 'A'"),
        (["experiment.tables.dice.structure=wal"], "names the structure 'wal': did you mean"),
        (["experiment.tables.dice.checkpoint=best"], "needs validation volumes: set finetune.validation"),
        (["experiment.tables.dice.metric=nsd", "preprocess.spacing_known=false"], "nsd, which is in mm"),
        (
            ["experiment.vary={protocol.evaluate: [test, development]}"],
            "protocol.evaluate is test here and development there: what is compared needs one value of it",
        ),
        (["experiment.vary={protocol.tta: [false, true]}"], "protocol.tta is false here and true there"),
        (["experiment.vary={protocol.budget: [volumes, subjects]}"], "protocol.budget is volumes here and subjects"),
        (["experiment.vary.labels=[3]"], "With labels=3 two of the 2 draws of split 0 would label the same volumes"),
        (["data=nowhere"], r"nowhere has no dataset\.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    recipe: str, raw: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    with pytest.raises(GlocalError, match=sentence) as refused:
        experiment(recipe, [f"data={raw}", f"out={tmp_path / 'out'}", *words], workers=1)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(recipe: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GlocalError, match="Say which data: data=DATASET"):
        experiment(recipe)
    with pytest.raises(GlocalError, match="Say which data: data=DATASET"):
        experiment(written(tmp_path / "empty.yaml", data=None))
    write_json(tmp_path / "run" / "recipe.yaml", {})
    with pytest.raises(GlocalError, match="run holds a run, not experiments: choose another folder with out=FOLDER"):
        experiment(recipe, [f"data={raw}", f"out={tmp_path / 'run'}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GlocalError, match="start it without torchrun or srun"):
        experiment(recipe, [f"data={raw}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_table_of_what_nothing_measured_takes_no_other_with_it(out: Path, recipe: str, raw: Path) -> None:
    design = read_experiment(recipe, [f"data={raw}", f"out={out}", "name=holes"])
    folder = store_folder(design.out, design.variants[0].recipe)
    stores = {folder: Store.open(folder)}
    best = TableOptions(rows=("contender",), columns=("labels",), checkpoint="best")  # there is no validation volume
    design = replace(design, tables={"best": best, **design.tables})
    page = write_results(design, plan(design.variants, stores, design.out), [], stores)
    assert (design.folder / "table-dice.md").exists()
    assert not (design.folder / "table-best.md").exists()
    assert "There is no table best. A table shows dice of the best checkpoint" in page.read_text(encoding="utf-8")


def test_data_that_have_changed_since_are_refused(store: Store, tmp_path: Path) -> None:
    def train(store: Path, run: Path) -> None:
        raise AssertionError("nothing is to be trained")

    with pytest.raises(GlocalError, match="have changed since this experiment began: start it again"):
        planning.train_and_report(train, "of another day", store.path, tmp_path / "run")


def test_folds_test_on_every_labelled_subject_but_those_for_development(
    recipe: str, raw: Path, store: Store, tmp_path: Path
) -> None:
    words = [f"data={raw}", f"out={tmp_path}", "protocol.folds=2", "protocol.draws=1", "experiment.vary.labels=[1]"]
    design = read_experiment(recipe, words)
    trainings = plan(design.variants, {store_folder(design.out, design.variants[0].recipe): store}, design.out)
    assert [(t.split.index, t.variant.contender) for t in trainings] == [
        (0, "random"),
        (0, "pcl"),
        (1, "random"),
        (1, "pcl"),
    ]
    tested = [set(t.split.test) for t in trainings[::2]]
    assert tested[0] | tested[1] == {"case0", "case1", "case2", "case5"}
    assert not tested[0] & tested[1]
    for training in trainings:
        assert not set(training.split.pretrain) & (set(training.split.test) | {"case4"})
    folders = [job.folder for job in jobs_of(trainings)]
    assert len(set(folders)) == len(folders) == 6  # a pre-training of each fold's own
    assert len({t.before.folder for t in trainings if t.before}) == 2


def test_precision_is_decided_once_for_a_folder(recipe: str, raw: Path, tmp_path: Path) -> None:
    words = [f"data={raw}", f"out={tmp_path}", "precision=auto"]
    write_json(tmp_path / "machine.json", {"precision": "bfloat16"})
    assert {v.recipe.precision for v in read_experiment(recipe, words).variants} == {"bfloat16"}
    assert {v.recipe.precision for v in read_experiment(recipe, words[:2]).variants} == {"float32"}
    assert {v.recipe.threads for v in read_experiment(recipe, words).variants} == {1}


def fake(settings: Mapping[str, Any], folder: Path, work: Callable[..., Any]) -> Job:
    return Job(work, {"settings": dict(settings), "store": Path("store"), "run": folder}, folder, 100)


def quick(run: Path, settings: Mapping[str, Any], store: Path) -> None:
    run.mkdir(parents=True)


def stumble(run: Path, settings: Mapping[str, Any], store: Path) -> None:
    raise GlocalError("This cannot be trained.")


def test_an_estimate_groups_what_costs_the_same(tmp_path: Path) -> None:
    base = {"strategy": "supervised", "labels": 1, "draw": 0, "seed": 0, "max_iterations": 100, "batch": 2}
    same = [base, base | {"labels": 8}, base | {"draw": 1}, base | {"seed": 2}]
    tuned = [fake(s, tmp_path / "finetune" / str(n), quick) for n, s in enumerate([*same, base | {"batch": 4}])]
    before = fake({"method": "pcl"}, tmp_path / "pretrain" / "a", quick)
    known = fake({"strategy": "supervised", "batch": 8}, tmp_path / "finetune" / "c", stumble)
    done = [fake({"method": "gcl", "seed": n}, tmp_path / "pretrain" / f"b{n}", stumble) for n in range(3)]
    other = fake({"method": "gcl", "seed": 3}, tmp_path / "pretrain" / "b3", stumble)  # its kind is known: not measured
    for job, seconds in zip([known, *done], (50, 300, 200, 1), strict=True):
        write_json(job.folder / "manifest.json", {"seconds": seconds})
    kinds = estimate([*tuned, known, before, *done, other], Here(), tmp_path / "out")
    assert [(k.name, len(k.jobs), len(k.open_jobs)) for k in kinds] == [
        ("fine-tuning, supervised (batch=2)", 4, 4),
        ("fine-tuning, supervised (batch=4)", 1, 1),
        ("fine-tuning, supervised (batch=8)", 1, 0),
        ("pre-training, pcl", 1, 1),
        ("pre-training, gcl", 4, 1),
    ]
    assert kinds[0].seconds == pytest.approx(4 * (kinds[0].fixed + 100 * kinds[0].step))
    assert kinds[2].seconds == 0
    assert (kinds[4].step, kinds[4].seconds) == (2.0, 200.0)  # the median of three
    assert not any(kind.problem for kind in kinds)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("kinds", "jobs", "copies"), [(1, 9, 4), (1, 3, 3), (3, 9, 2), (6, 1, 1)])
def test_a_step_is_measured_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: int, jobs: int, copies: int
) -> None:
    """As many as will run at the same time, of several kinds if there are several."""
    monkeypatch.setattr(Here, "slots", lambda self: 4)
    begun: list[int] = []

    def counted(run: Path, settings: Mapping[str, Any], store: Path) -> None:
        begun.append(settings["batch"])

    asked = [
        fake({"strategy": "mixup", "batch": kind + 1, "draw": draw}, tmp_path / "finetune" / f"{kind}-{draw}", counted)
        for kind in range(kinds)
        for draw in range(jobs)
    ]
    estimate(asked, Here(), tmp_path / "out")
    assert sorted(begun) == sorted([*range(1, kinds + 1)] * copies)


def test_kinds_of_one_name_say_what_tells_them_apart(tmp_path: Path) -> None:
    def named(settings: Sequence[dict[str, Any]]) -> list[str]:
        jobs = [fake({"strategy": "mixup", **s}, tmp_path / "finetune" / str(n), quick) for n, s in enumerate(settings)]
        return [kind.name.removeprefix("fine-tuning, ") for kind in estimate(jobs, Here(), tmp_path / "out")]

    spatial = [{"scale": [0.5, 2]}, {"rotation": 1, "scale": [1, 1], "shift": 0.1}]
    groups: list[dict[str, Any]] = [{"batch": 3, "augmentation": {"noise": 1, "spatial": group}} for group in spatial]
    assert named([{"batch": 3}, *groups]) == ["mixup", "mixup (scale=[0.5, 2])", "mixup (scale=[1, 1])"]
    assert named([*groups, groups[0] | {"batch": 4}]) == [
        "mixup (batch=3)",
        "mixup (rotation=1, batch=3)",
        "mixup (batch=4)",
    ]


def test_what_cannot_be_trained_is_known_before_hours_are_spent(tmp_path: Path) -> None:
    (kind,) = estimate([fake({}, tmp_path / "finetune" / "a", stumble)], Here(), tmp_path / "out")
    assert kind.problem.startswith("This cannot be trained.")
    assert kind.seconds == 0
    assert not list((tmp_path / "out").iterdir())


def test_a_step_is_timed_from_one_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 5 s for beginning, and iterations of two kinds of which one also labels all slices."""
    now, weight = [0.0], torch.nn.Parameter(torch.ones(1))

    def work(run: Path, settings: Mapping[str, Any]) -> None:
        now[0] += 5
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(settings["max_iterations"]):
            now[0] += 9 if step < 3 else 60 if step == 10 else 2 if step % 2 else 3
            optimizer.step()

    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measuring, "ITERATIONS", 30)
    measuring.measure(work, tmp_path, {"max_iterations": 1000})
    steps = [2.0 if step % 2 else 3.0 for step in range(4, 30) if step != 10]  # the first three are warming up
    found = read_json(tmp_path / "manifest.json")
    assert found["step"] == pytest.approx(sum(steps) / len(steps))
    assert found["fixed"] == pytest.approx(now[0] - 30 * found["step"])
    before = dict(found)
    torch.optim.SGD([weight], lr=0.1).step()  # nobody listens any more
    assert read_json(tmp_path / "manifest.json") == before


def test_durations_as_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 89, 91, 720, 7500)] == ["0 s", "89 s", "2 min", "12 min", "2 h 05 min"]
