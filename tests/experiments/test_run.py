import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from glocal.data.image import read_image, read_labels, write_volume
from glocal.data.phantom import subject
from glocal.data.preprocess import preprocess
from glocal.errors import GlocalError
from glocal.evaluation.cases import doubt
from glocal.experiments import demo as demonstration
from glocal.experiments import run as road
from glocal.experiments import trainings as jobs_of_recipes
from glocal.experiments.executors import Processes, default_workers, gpus_for
from glocal.experiments.jobs import Job, do
from glocal.experiments.report import report
from glocal.experiments.run import run
from glocal.experiments.steps import finetune_with, parse_labels, preprocess_with, pretrain_with
from glocal.files import read_json, write_json
from glocal.finetuning.finetune import finetune
from glocal.model import find_model, read_header
from glocal.overview import read_cases
from glocal.processes import cores
from glocal.runs import manifest_of

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "preprocess": {"size": [32, 32]},
    "network": {"widths": [4, 8, 8]},
    "device": "cpu",
    "precision": "float32",
    "max_iterations": 3,
    "pretrain": {
        "pcl": {"method": "pcl", "batch": 6, "outputs": 8, "log": []},
        "gcl": {"method": "gcl", "volumes": 2, "hidden": 16, "outputs": 8, "local_batch": 3, "blocks": 1, "log": []},
    },
    "finetune": {"labels": [1, 2], "batch": 2, "log": []},
    "compare": ["pcl", "gcl@global"],
    "protocol": {"draws": 2},
}
CONTENDERS = ("random", "pcl", "gcl@global")


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Iterator[None]:
    """A run in one process takes all cores, one in several processes a core for each: here the two are to agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(road, "cores", lambda: 1)
        yield


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def whole(recipe: str, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one process."""
    return run(recipe, [f"data={raw}", f"out={tmp_path_factory.mktemp('whole') / 'run'}"], workers=1)


def trainings(out: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(out / "finetune")) for path in out.glob("finetune/**/manifest.json"))


def test_every_contender_budget_and_draw_has_its_folder(whole: Path) -> None:
    assert trainings(whole) == sorted(
        f"split-0/{contender}/labels-{labels}-draw-{draw}"
        for contender in CONTENDERS
        for labels in (1, 2)
        for draw in (0, 1)
    )
    assert sorted(path.name for path in (whole / "pretrain" / "split-0").iterdir()) == ["gcl", "pcl"]
    for name in ("recipe.yaml", "split.json", "manifest.json", "results.csv", "scores.csv", "table.md", "report.html"):
        assert (whole / name).is_file(), name
    one = whole / "finetune" / "split-0" / "pcl" / "labels-2-draw-1"
    for name in ("recipe.yaml", "split.json", "manifest.json", "metrics.jsonl", "model.safetensors", "transfer.json"):
        assert (one / name).is_file(), name
    assert manifest_of(one)["kind"] == "finetune"
    with pytest.raises(GlocalError, match="holds 12 models"):
        find_model(whole)


def test_results_hold_a_row_for_every_measured_case_and_class(whole: Path) -> None:
    results = pd.read_csv(whole / "results.csv")
    keys = ["split", "contender", "labels", "draw", "checkpoint", "case", "class"]
    assert not results.duplicated(keys).any()
    found = {tuple(row) for row in results[keys].itertuples(index=False)}
    assert found == {
        (0, contender, labels, draw, "last", "case5", label)
        for contender in CONTENDERS
        for labels in (1, 2)
        for draw in (0, 1)
        for label in ("wall", "blood")
    }
    assert results["dice"].between(0, 1).all()
    assert set(results["validation"]) == {0}
    scores = pd.read_csv(whole / "scores.csv")
    assert len(scores) == 12
    first = results[(results["contender"] == "pcl") & (results["labels"] == 1) & (results["draw"] == 0)]
    score = scores.query("contender == 'pcl' and labels == 1 and draw == 0")["dice"].item()
    assert score == pytest.approx(first["dice"].mean(), abs=1e-5)


def test_the_table_compares_with_random(whole: Path) -> None:
    lines = (whole / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    heading, body = rows[0], rows[2:]
    assert [row[:3] for row in body] == [[str(n), contender, "2"] for n in (1, 2) for contender in CONTENDERS]
    scores = pd.read_csv(whole / "scores.csv").set_index(["contender", "labels", "draw"])["dice"]
    differences = [scores["pcl", 1, draw] - scores["random", 1, draw] for draw in (0, 1)]
    difference = body[1][heading.index("Difference to random")]
    assert difference.split(" ± ")[0] == f"{sum(differences) / 2:+.3f}"
    assert body[0][heading.index("Difference to random")] == ""
    assert body[1][heading.index("Better than random")] == f"{sum(d > 0 for d in differences)} of 2"


def test_draws_are_paired_between_contenders(whole: Path) -> None:
    draws = {name: read_json(whole / "finetune" / name / "split.json")["draw"]["train"] for name in trainings(whole)}
    for contender in CONTENDERS:
        for labels in (1, 2):
            for draw in (0, 1):
                folder = f"labels-{labels}-draw-{draw}"
                assert draws[f"split-0/{contender}/{folder}"] == draws[f"split-0/random/{folder}"]
                assert set(draws[f"split-0/random/labels-1-draw-{draw}"]) < set(
                    draws[f"split-0/random/labels-2-draw-{draw}"]
                )


def test_a_stage_is_compared_by_name(whole: Path) -> None:
    model = whole / "finetune" / "split-0" / "gcl@global" / "labels-1-draw-0"
    report_ = read_json(model / "transfer.json")
    assert {name.partition(".")[0] for name in report_["transferred"]} == {"encoder"}
    stage = load_file(whole / "pretrain" / "split-0" / "gcl" / "stage-1-global" / "model.safetensors")
    assert set(report_["transferred"]) == set(stage)
    provenance = read_header(model / "model.safetensors").provenance
    assert provenance["pretraining"]["stage"] == "global"
    assert provenance["pretraining"]["pretraining"]["max_iterations"] == 3


def test_the_report_tells_all_of_it(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    for text in (*CONTENDERS, "Tiny", "6 volumes", "wall", "blood", "case5", "Difference to random", "recipe.yaml"):
        assert text in page, text
    assert "data:image/png;base64" in page
    assert "± nan" not in page
    assert "No labelled volume" not in page
    shown = report(whole / "pretrain" / "split-0" / "gcl").read_text(encoding="utf-8")
    for text in ("Pre-training: gcl", "4 subjects", "stage-1-global", "stage-2-local", "encoder"):
        assert text in shown, text


def test_started_again_nothing_is_trained(whole: Path, recipe: str, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*") if path.is_file()}
    for name in ("pretrain", "finetune"):
        monkeypatch.setattr(jobs_of_recipes, name, None)
    assert run(recipe, [f"data={raw}", f"out={whole}", "device=auto"], workers=1) == whole
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    anew = {path.relative_to(whole).as_posix() for path in after if after[path][0] != before[path][0]}
    # Sources of a few seconds' age are read again, and their records written anew.
    anew = {name for name in anew if not name.startswith("store/records/")}
    assert anew <= {"split.json", "results.csv", "scores.csv", "table.md", "report.html", "store/index.json"}
    same = (path for path in after if path.suffix != ".html" and path.parent.name != "records")
    assert all(after[path][1] == before[path][1] for path in same)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("finetune.batch=3", "begun with finetune.batch=2, now it is 3"),
        ("pretrain.pcl.outputs=9", "begun with pretrain.pcl.outputs=8"),
        ("seed=4", "begun with seed=0"),
        ("protocol.draws=1", "begun with protocol.draws=2"),
        ("protocol.draws=20", "would label the same volumes"),
        ("preprocess.size=[16,16]", "begun with preprocess.size"),
        ("compare=[pcl]", "begun with compare"),
        ("finetune.batsh=3", "finetune.batsh is not a setting: did you mean 'batch'"),
        ("pretrain.pcl.treshold=0.2", "pretrain.pcl.treshold is not a setting: did you mean 'threshold'"),
        ("compare=[gcl@locall]", "did you mean 'local'"),
        ("compare=[pcll]", "did you mean 'pcl'"),
    ],
)
def test_other_settings_are_refused_by_name(whole: Path, recipe: str, raw: Path, word: str, sentence: str) -> None:
    with pytest.raises(GlocalError, match=sentence):
        run(recipe, [f"data={raw}", f"out={whole}", word], workers=1)


def test_a_stopped_run_continues(
    whole: Path, recipe: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stopping(**arguments: Any) -> Path:
        calls.append(arguments["run"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return finetune(**arguments)

    words = [f"data={raw}", f"out={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs_of_recipes, "finetune", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, words, workers=1)
    assert len(trainings(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "report.html").exists()
    run(recipe, words, workers=1)
    assert trainings(tmp_path / "run") == trainings(whole)
    assert (tmp_path / "run" / "results.csv").read_text(encoding="utf-8") == (whole / "results.csv").read_text(
        encoding="utf-8"
    )


def test_several_processes_give_the_same(
    whole: Path, recipe: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Preprocessing in several processes has its own test.
    monkeypatch.setattr(road, "preprocess", lambda *words, workers: preprocess(*words, workers=1))
    words = [f"data={raw}", f"out={tmp_path / 'run'}", "finetune.labels=1", "protocol.draws=1", "compare=[pcl]"]
    out = run(recipe, words, workers=2)
    assert trainings(out) == ["split-0/pcl/labels-1-draw-0", "split-0/random/labels-1-draw-0"]
    for name in trainings(out):
        ours, theirs = (load_file(folder / "finetune" / name / "model.safetensors") for folder in (out, whole))
        assert all(value.equal(theirs[key]) for key, value in ours.items())
    assert len(pd.read_csv(out / "results.csv")) == 4
    assert (out / "report.html").exists()


def test_a_pretraining_with_labels_is_made_for_every_budget_and_draw(recipe: str, raw: Path, tmp_path: Path) -> None:
    settings = "{method: label-efficient, batch: 4, local_batch: 2, outputs: 8, hidden: 8, log: []}"
    words = [f"data={raw}", f"out={tmp_path / 'run'}", f"pretrain.le={settings}", "compare=[pcl, le, le@encoder]"]
    out = run(recipe, [*words, "max_iterations=1"], workers=1)
    folders = sorted(path.name for path in (out / "pretrain" / "split-0").iterdir())
    assert folders == sorted(["pcl", *(f"le-labels-{labels}-draw-{draw}" for labels in (1, 2) for draw in (0, 1))])
    for name in trainings(out):
        contender, place = name.split("/")[1:]
        header = read_header(out / "finetune" / name / "model.safetensors").provenance
        before = header["pretraining"]
        if contender in ("le", "le@encoder"):
            folder = out / "pretrain" / "split-0" / f"le-{place}"
            assert before["labelled"] == header["labelled"] == read_json(folder / "split.json")["draw"]["train"]
            assert before["stage"] == ("encoder" if "@" in contender else "pixels")
        else:
            assert "labelled" not in (before or {})
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "le@encoder" in page
    assert len(manifest_of(out)["warnings"]) == 0


def test_leave_one_out_tests_on_every_labelled_subject(recipe: str, write_dataset: Any, tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / "raw", {"a": 5, "b": 6, "c": 5, "d": 5}, ["a", "b", "c"])
    words = [f"data={raw}", "compare=[random]", "protocol.draws=1", "protocol.leave_one_out=true"]
    with pytest.raises(GlocalError, match="only 2 may be trained on"):
        run(recipe, [*words, f"out={tmp_path / 'more'}", "finetune.labels=3", "compare=[pcl]"], workers=1)
    assert not (tmp_path / "more" / "pretrain").exists()
    out = run(recipe, [*words, f"out={tmp_path / 'run'}", "finetune.labels=2"], workers=1)
    results = pd.read_csv(out / "results.csv")
    assert [(int(s), c) for s, c in results[["split", "case"]].drop_duplicates().itertuples(index=False)] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]
    for name in trainings(out):
        content = read_json(out / "finetune" / name / "split.json")
        (test,) = content["split"]["test"]
        assert set(content["draw"]["train"]) == {"a", "b", "c"} - {test}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "every case as predicted by the training that had left it out (3 trainings: split-*/" in page
    shown = dict.fromkeys(re.findall(r"(?:Best|Median|Worst) case: ([abc])", page))  # said for ears, too
    assert list(shown) == list(
        results.query("checkpoint == 'last'").groupby("case")["dice"].mean().sort_values(ascending=False).index
    )


def test_two_labels_and_nothing_to_measure_on(recipe: str, write_dataset: Any, tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / "raw", {"a": 5, "b": 6, "c": 5}, ["a", "b"])
    words = [f"data={raw}", f"out={tmp_path / 'run'}", "finetune.labels=2", "protocol.draws=1", "compare=[pcl]"]
    out = run(recipe, words, workers=1)
    assert not (out / "table.md").exists()
    assert not list(out.rglob("evaluation*.csv"))
    assert "split-0/pcl/labels-2-draw-0" in trainings(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "No labelled volume" in page
    assert "leave_one_out" in page
    # What the user came for: the masks of the volumes nobody has labelled, in their geometry, and a look at them.
    made = {path.name for path in (out / "masks").iterdir()}
    assert made - {".lock"} == {"c.nii.gz", "c_uncertainty.nii.gz", "cases.csv", "predictions.json", "predictions.html"}
    assert read_cases(out / "masks")["case"].tolist() == ["c"]
    mask, image = read_labels(out / "masks" / "c.nii.gz"), read_image([raw / "imagesTr" / "c_0000.nii.gz"])
    assert mask.geometry == image.geometry
    assert "Masks of the unlabelled volumes" in page
    doubted = doubt(read_cases(out / "masks"))
    assert (doubted is not None) == ("Most cases are unsure" in page)
    assert "made by finetune/split-0/pcl/labels-2-draw-0, the last of all fine-tunings" in page
    corrected = np.zeros_like(mask.array[0])
    write_volume(out / "masks" / "c.nii.gz", corrected, mask.geometry)
    assert run(recipe, words, workers=1) == out
    assert not read_labels(out / "masks" / "c.nii.gz").array.any()  # what a person has corrected stays
    (out / "masks" / "c.nii.gz").rename(raw / "labelsTr" / "c.nii.gz")  # it is a label map now
    assert "Masks of the unlabelled volumes" in report(out).read_text(encoding="utf-8")
    (raw / "labelsTr" / "c.nii.gz").unlink()
    again = run(recipe, [words[0], f"out={tmp_path / 'best'}", *words[2:4], "compare=[]"], workers=1)
    assert {path.split("/")[1] for path in trainings(again)} == {"pcl", "gcl"}  # nothing to compare: no random


def test_data_that_changed_under_a_run_are_refused(recipe: str, raw: Path, tmp_path: Path) -> None:
    own = shutil.copytree(raw, tmp_path / "raw")
    words = [f"data={own}", f"out={tmp_path / 'run'}", "compare=[random]", "finetune.labels=1", "protocol.draws=1"]
    run(recipe, words, workers=1)
    write_json(own / "split.json", {"pretrain": ["case0", "case1"], "test": ["case4", "case5"]})
    with pytest.raises(GlocalError, match=r"data have changed since .*: choose another run folder"):
        run(recipe, words, workers=1)


def test_what_is_missing_is_said(recipe: str, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="data=DATASET out=RUN"):
        run(recipe, [f"data={raw}"])
    with pytest.raises(GlocalError, match=r"nowhere has no dataset\.json"):
        run(recipe, [f"data={tmp_path / 'nowhere'}", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(GlocalError, match="There is no recipe 'phantom-smal'"):
        run("phantom-smal", [])


def test_a_failing_job_stops_the_others(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    began = time.monotonic()
    endless = Job(partial(time.sleep, 300), {}, tmp_path / "endless", 1)
    failing = Job(read_json, {"path": tmp_path / "nothing"}, tmp_path / "failing", 1)
    with pytest.raises(GlocalError, match="nothing does not exist"), Processes(2) as executor:
        do([endless, failing], "Testing", executor)
    assert time.monotonic() - began < 200
    left = set(multiprocessing.active_children()) - others
    # Looked at again and again: the pool's own thread waits for them too, and for a moment one of the two sees nothing.
    while any(process.is_alive() for process in left):
        assert time.monotonic() - began < 200
        time.sleep(0.05)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves no worker behind that would go on writing."""
    code = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from glocal.processes import follow_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=follow_parent, initargs=(os.getpid(),))\n"
        "    worker = pool.submit(os.getpid).result()\n"
        "    pool.submit(time.sleep, 60)\n"
        "    print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text(encoding="utf-8").split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by ten seconds")


def test_one_machine_setting_for_all_trainings_of_a_run(whole: Path) -> None:
    one = {"precision": "float32", "threads": 1}
    assert read_json(whole / "machine.json") == {"pretrain": one, "finetune": one}
    for training in whole.glob("finetune/**/recipe.yaml"):
        settings = yaml.safe_load(training.read_text(encoding="utf-8"))
        assert (settings["precision"], settings["threads"]) == ("float32", 1)


def test_every_worker_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    """Each job waits for the other, so that there must be two workers."""
    tell = "echo $CUDA_VISIBLE_DEVICES > {0}; until [ -s {1} ]; do sleep 0.05; done"
    names = [(tmp_path / a, tmp_path / b) for a, b in ("ab", "ba")]
    jobs = [Job(os.system, {"command": tell.format(*pair)}, pair[0].with_suffix(".job"), 1) for pair in names]
    with Processes(2, gpus="35") as executor:
        do(jobs, "Testing", executor)
    assert {pair[0].read_text().strip() for pair in names} == {"3", "5"}


def test_workers_are_as_many_as_cores_or_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (default_workers("auto"), gpus_for("auto")) == (cores(), [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (default_workers("auto"), gpus_for("auto")) == (3, ["0", "1", "2"])
    assert (default_workers("cuda:1"), gpus_for("cuda:1")) == (1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert gpus_for("auto") == ["4", "6"]


def test_it_is_not_for_torchrun(recipe: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GlocalError, match="start it without torchrun or srun"):
        run(recipe, [f"data={raw}", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_the_demonstration_is_the_phantom_s_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    ran: list[list[str]] = []
    monkeypatch.setattr(
        demonstration, "phantom", lambda root: made.append(root) or write_json(root / "dataset.json", {})
    )
    monkeypatch.setattr(demonstration, "run", lambda name, words: ran.append([name, *words]) or tmp_path / "run")
    assert demonstration.demo(tmp_path) == tmp_path / "run" / "report.html"
    demonstration.demo(tmp_path)
    assert made == [tmp_path / "phantom"]
    assert ran == [["phantom-small", f"data={tmp_path / 'phantom'}", f"out={tmp_path / 'run'}"]] * 2


def test_who_asks_for_development_subjects_must_have_some(recipe: str, write_dataset: Any, tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / "raw", {"a": 5, "b": 6, "c": 5}, ["a", "b", "c"])
    words = [f"data={raw}", f"out={tmp_path / 'run'}", "protocol.evaluate=development"]
    with pytest.raises(GlocalError, match=r"no labelled development subject.*split\.json of the dataset\.$"):
        run(recipe, words)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused_before_anything_is_done(recipe: str, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(GlocalError, match="device=gpu is not known: use auto, cpu, cuda"):
        run(recipe, [f"data={raw}", f"out={tmp_path / 'run'}", "device=gpu"])
    assert not (tmp_path / "run").exists()


def test_single_steps_from_words(recipe: str, raw: Path, tmp_path: Path) -> None:
    store = preprocess_with(raw, tmp_path / "store", recipe, ["size=[16,24]", "intensity=zscore"], 1)
    assert (store.plan.options.size, store.plan.options.intensity) == ((16, 24), "zscore")
    short = ["device=cpu", "max_iterations=1", "batch=2", "log=[]", "network.widths=[4,8]"]
    protocol = ["protocol.evaluate=development"]
    pretrain_with(tmp_path / "store", tmp_path / "pre", "pcl", [*short, "outputs=4"])
    assert read_header(tmp_path / "pre" / "model.safetensors").network.widths == (4, 8)
    finetune_with(tmp_path / "store", tmp_path / "fine", "case1,case0", tmp_path / "pre", [*short, *protocol])
    assert set(pd.read_csv(tmp_path / "fine" / "evaluation-development.csv")["case"]) == {"case4"}
    assert read_header(tmp_path / "fine" / "model.safetensors").provenance["labelled"] == ["case1", "case0"]
    labelled = [*short, "outputs=4", "local_batch=1", "hidden=4", "draw=1"]
    pretrain_with(tmp_path / "store", tmp_path / "le", "label-efficient", labelled, "1")
    finetune_with(tmp_path / "store", tmp_path / "tuned", "1", tmp_path / "le", [*short, "draw=1"])
    for name, labels, sentence in (
        ("label-efficient", None, "label-efficient learns from labels, too: say --labels"),
        ("pcl", "2", "pcl learns from images alone: leave --labels to the fine-tuning"),
    ):
        with pytest.raises(GlocalError, match=sentence):
            pretrain_with(tmp_path / "store", tmp_path / "x", name, [], labels)
    with pytest.raises(GlocalError, match="labels=2 is given beside --labels"):
        pretrain_with(tmp_path / "store", tmp_path / "x", "label-efficient", ["labels=2"], "2")
    with pytest.raises(GlocalError, match=r"protocol\.drawz is not a setting"):
        pretrain_with(tmp_path / "store", tmp_path / "x", "pcl", ["protocol.drawz=1"])
    with pytest.raises(GlocalError, match="did you mean 'pcl'"):
        pretrain_with(tmp_path / "store", tmp_path / "x", "pcll", [])


def test_labels_as_people_write_them() -> None:
    assert parse_labels("2") == 2
    assert parse_labels(" 12 ") == 12
    assert parse_labels("a, b,") == ["a", "b"]
    assert parse_labels("case1") == ["case1"]
    assert parse_labels(" all ") == "all"
    for text in ("0", "-1", "1.5", "", ",", "+2"):
        with pytest.raises(GlocalError, match="neither a number of volumes"):
            parse_labels(text)


def test_the_phantom_walks_the_whole_road(recipe: str, write_dataset: Any, tmp_path: Path) -> None:
    """Volumes of other sizes, spacings and directions, resampled: native masks, distances in mm."""
    raw = write_dataset(tmp_path / "raw", {}, ["a", "b", "c"], {"pretrain": ["a", "b"], "test": ["c"]})
    for number, case in enumerate("abc"):
        image, labels, geometry = subject(0, number)
        write_volume(raw / "imagesTr" / f"{case}_0000.nii.gz", image, geometry)
        write_volume(raw / "labelsTr" / f"{case}.nii.gz", labels, geometry)
    names = ["right ventricle", "myocardium", "left ventricle"]
    content = read_json(raw / "dataset.json") | {"labels": {"background": 0} | {n: k for k, n in enumerate(names, 1)}}
    write_json(raw / "dataset.json", content)
    words = [f"data={raw}", f"out={tmp_path / 'run'}", "finetune.labels=2", "protocol.draws=1", "compare=[gcl]"]
    out = run(recipe, [*words, "preprocess.spacing=[3,3]", "preprocess.field=[32,32]"], workers=1)
    results = pd.read_csv(out / "results.csv")
    assert set(results["class"]) == set(names)
    assert (results["hd95"] > 0).all()
    assert set(results["contender"]) == {"random", "gcl"}
