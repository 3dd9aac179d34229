"""The report of a run says in words what was done, whatever the budgets and the splits."""

import json
import shutil
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.split import ProtocolOptions, Split
from glocal.errors import GlocalError
from glocal.experiments.probed import all_probed, probed, verdict
from glocal.experiments.report import _budget, _lead, report
from glocal.experiments.run import run
from glocal.experiments.sections import curve, fullest_slice
from glocal.files import read_json, write_json
from glocal.finetuning.finetune import finetune
from glocal.finetuning.measure import evaluation_of
from glocal.finetuning.registry import STRATEGIES
from glocal.model import read_header
from glocal.networks.registry import NETWORKS
from glocal.pretraining.registry import METHODS


@pytest.mark.parametrize(
    ("labels", "unit", "words"),
    [
        (1, "volumes", "1 labelled volume"),
        ([1], "subjects", "1 labelled subject"),
        ([1, 8], "volumes", "1 or 8 labelled volumes"),
        ("all", "volumes", "all labelled volumes"),
        ([2, "all"], "subjects", "2 or all labelled subjects"),
        (["all", 2], "volumes", "all or 2 labelled volumes"),
        (["case1", "case2"], "volumes", "the labelled volumes case1, case2"),
    ],
)
def test_a_budget_in_words(labels: Any, unit: str, words: str) -> None:
    assert _budget(labels, unit) == words


@pytest.mark.parametrize(
    ("labels", "protocol", "words"),
    [
        ([1, "all"], {"draws": 3}, "fine-tuned on 1 or all labelled volumes, chosen 3 times at random."),
        ("all", {"draws": 3}, "fine-tuned on all labelled volumes, 3 times at random."),  # nothing was chosen
        (2, {"folds": 5}, "fine-tuned on 2 labelled volumes, in 5-fold cross-validation by subject."),
        (2, {"budget": "subjects"}, "fine-tuned on 2 labelled subjects."),
    ],
)
def test_the_first_sentences_say_budgets_draws_and_folds(labels: Any, protocol: dict[str, Any], words: str) -> None:
    settings = {"protocol": ProtocolOptions(**protocol).model_dump(mode="json"), "finetune": {"labels": labels}}
    store: Any = SimpleNamespace(name="Tiny", volumes=[])
    assert _lead(settings, store, ["random"]).endswith(words)


def test_a_run_with_all_labels_has_its_table_and_its_report(raw: Path, tmp_path: Path) -> None:
    """In folds of subjects with one case more or less, `all` is one budget."""
    recipe = {
        "name": "tiny",
        "device": "cpu",
        "precision": "float32",
        "preprocess": {"size": [32, 32]},
        "network": {"widths": [4, 8]},
        "finetune": {"labels": ["all", 1], "batch": 2, "log": [], "max_iterations": 1},
        "protocol": {"folds": 3},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    out = run(str(tmp_path / "tiny.yaml"), [f"data={raw}", f"out={tmp_path / 'run'}"], workers=1)
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert [row.split(" | ")[:3] for row in table[2:4]] == [["| 1", "random", "3"], ["| all", "random", "3"]]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "random/labels-1-draw-0" in page  # the training that is shown is one of the smallest budget
    assert "Dice, random, all labelled" in page


def test_names_that_look_like_numbers_stay_names(
    write_dataset: Any, preprocessing: PreprocessOptions, cheap: dict[str, Any], tmp_path: Path
) -> None:
    raw = write_dataset(tmp_path / "raw", dict.fromkeys(("001", "002", "007"), 5), ["001", "002", "007"])
    description = read_json(raw / "dataset.json")
    write_json(raw / "dataset.json", {**description, "labels": {"background": 0, "1": 1, "2": 2}})
    store = preprocess(raw, tmp_path / "store", preprocessing, workers=1)
    split = Split(0, ("001", "002"), (), ("007",))
    finetune(store, tmp_path / "run", {**cheap, "labels": 1, "max_iterations": 1, "batch": 2}, split=split)
    frame = evaluation_of(tmp_path / "run", "test")
    assert (set(frame["case"]), set(frame["class"])) == ({"007"}, {"1", "2"})
    page = report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Best case: 007" in page


def test_reports_say_what_to_cite_each_paper_once(pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    used = [NETWORKS["unet"].paper, METHODS["pcl"].paper]
    assert STRATEGIES["supervised"].paper == METHODS["gcl"].paper == used[0]
    assert read_header(finetuned / "model.safetensors").papers == used
    assert read_header(pretrained / "model.safetensors").papers == used
    pages = {finetuned: used, pretrained: used}
    for number, (folder, cited) in enumerate(pages.items()):
        shutil.copytree(folder, tmp_path / str(number))
        page = report(tmp_path / str(number)).read_text(encoding="utf-8")
        assert "Papers to cite" in page
        assert [page.count(escape(paper)) for paper in cited] == [1] * len(cited)


def found(probe: float, neighbour: float, **more: Any) -> dict[str, Any]:
    """A `probe.json` with these gains, in standard errors."""
    one = {"off": 0.1, "r2": 0.8, "neighbour_off": 0.12, "neighbour_near": 0.6}
    gain = {"off": {"mean": 0.01 * probe, "error": 0.01}, "neighbour_off": {"mean": 0.01 * neighbour, "error": 0.01}}
    return {
        **{"single": 0, "slices": 75, "subjects": 8, "held_out": True, "gain": gain},
        **{"pretrained": one, "random": {**one, "off": 0.2}, "guess": {**one, "off": 0.25}},
        **more,
    }


@pytest.mark.parametrize(
    ("probe", "neighbour", "words"),
    [
        (3, 3, "(random weights 0.20, guessing 0.25)"),
        (3, 3, ": pre-training has learnt where a slice lies."),
        (3, 1, "only the probe is clearly better"),
        (1, 3, "only the neighbour is clearly better"),
        (1.9, 0, "neither is clearly better than with random weights"),
        (-5, -5, "neither is clearly better than with random weights"),
    ],
)
def test_what_pretraining_has_learnt_in_words(probe: float, neighbour: float, words: str) -> None:
    assert words in verdict(found(probe, neighbour))


def test_volumes_of_one_slice_are_said_to_be_left_out() -> None:
    assert verdict(found(3, 3, single=2)).endswith("left out (2).")
    assert verdict({"single": 2, "note": "Nothing to say."}).startswith("Nothing to say. Volumes of one slice")


def test_a_pretraining_shows_what_it_has_learnt_if_it_was_probed(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pretrained, folder)
    page = report(folder).read_text(encoding="utf-8")
    (section,) = probed(folder)
    assert verdict(read_json(folder / "probe.json")) in page
    assert section.pictures[0].uri in page
    (folder / "probe.json").unlink()  # of an earlier version
    assert section.title not in report(folder).read_text(encoding="utf-8")
    write_json(folder / "probe.json", {"single": 4, "note": "Too few."})
    assert "Too few. Volumes of one slice" in report(folder).read_text(encoding="utf-8")


def test_the_probes_of_a_run_are_one_table_of_means_over_splits(tmp_path: Path) -> None:
    assert all_probed(tmp_path) == []
    for split, gain in enumerate((3, 1)):
        write_json(tmp_path / f"pretrain/split-{split}/pcl/probe.json", found(gain, 0, slices=split))
    write_json(tmp_path / "pretrain/split-0/gcl/probe.json", found(3, 0))
    write_json(tmp_path / "pretrain/split-0/moco/probe.json", {"single": 4, "note": "Too few."})
    (section,) = all_probed(tmp_path)
    rows = section.tables[0].rows
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("gcl", "0.10 / 0.20", "1 of 1"),
        ("pcl", "0.10 / 0.20", "1 of 2"),
    ]


def test_a_case_is_shown_where_most_of_its_structures_are() -> None:
    mask = np.zeros((4, 10, 10), dtype=np.uint8)
    mask[0] = 1  # by far the largest area, of one structure
    mask[1, :8] = 1
    mask[1, 9, :2] = 2
    mask[2, :2] = 1
    mask[2, 9, :3] = 2
    assert fullest_slice(mask) == 1  # 0.8 of the one and 2 / 3 of the other
    assert fullest_slice(mask[3:]) == 0  # nothing anywhere


def test_the_loss_of_labelled_slices_is_drawn_beside_that_of_all(tmp_path: Path) -> None:
    lines = [{"iteration": 10, "loss": 0.5}, {"iteration": 20, "loss": 0.9, "supervised": 0.4, "pseudo": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert b"of labelled slices" in curve(tmp_path, "loss").data
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]))
    assert b"of labelled slices" not in curve(tmp_path, "loss").data


def test_a_log_or_evaluation_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    for damage in (None, "a,b\n"):
        if damage:
            (tmp_path / "metrics.jsonl").write_text(damage)
            (tmp_path / "evaluation-test.csv").write_text(damage)
        with pytest.raises(GlocalError, match=r"metrics\.jsonl is missing or damaged"):
            curve(tmp_path, "loss")
        with pytest.raises(GlocalError, match=r"evaluation-test\.csv is missing or damaged"):
            evaluation_of(tmp_path, "test")
