import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from glocal.data.image import read_image, read_labels, write_volume
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.split import ProtocolOptions, Split
from glocal.data.store import Store
from glocal.errors import Busy, GlocalError
from glocal.evaluation.metrics import METRICS, dice
from glocal.experiments.report import report
from glocal.files import read_json, write_bytes, write_json
from glocal.finetuning.finetune import NOTHING_UNLABELLED, finetune
from glocal.finetuning.measure import Validation
from glocal.inference import folded, predict, slice_probabilities
from glocal.model import load_network, read_header
from glocal.pretraining.pretrain import pretrain
from glocal.runs import held, manifest_of

SHORT = {"labels": 2, "max_iterations": 2, "batch": 2}


def test_the_run_holds_models_masks_and_figures(finetuned: Path, store: Store) -> None:
    table = pd.read_csv(finetuned / "evaluation-test.csv")
    rows = [(row.checkpoint, row.case, row.subject, row["class"]) for _, row in table.iterrows()]
    assert rows == [(name, "case5", "case5", label) for name in ("last", "best") for label in ("wall", "blood")]
    assert table["dice"].min() > 0.7
    assert {"dice", "iou", "hd95", "hd", "assd", "nsd", "note"} <= set(table.columns)
    assert table[list(METRICS)].notna().all(axis=None)
    for name in ("predictions", "predictions-best"):
        (file,) = (finetuned / name).iterdir()
        mask, truth = read_labels(file), read_labels(store.dataset / "labelsTr" / file.name)
        assert mask.geometry == truth.geometry
    measured = table[table["checkpoint"] == "best"].set_index("class")["dice"]
    assert measured["wall"] == pytest.approx(dice(mask.array == 1, truth.array == 1))
    manifest = manifest_of(finetuned)
    assert (manifest["kind"], manifest["evaluated"]) == ("finetune", {"test": ["case5"]})
    assert Path(manifest["store"]) == store.path


def test_only_what_was_drawn_was_trained_on(finetuned: Path) -> None:
    split = read_json(finetuned / "split.json")
    train, validation = split["draw"]["train"], split["draw"]["validation"]
    assert (len(train), len(validation)) == (2, 1)
    assert set(train + validation) == {"case0", "case1", "case2"}  # case3 has no labels, 4 and 5 are held out
    header = read_header(finetuned / "model.safetensors")
    assert header.provenance["labelled"] == train
    assert header.provenance["validation"] == validation
    assert header.provenance["subjects"] == ["case0", "case1", "case2"]


def test_the_best_weights_on_validation_are_kept_beside_the_last(finetuned: Path, store: Store) -> None:
    lines = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {line["iteration"]: line["validation_dice"] for line in lines if "validation_dice" in line}
    assert list(values) == [25, 50, 75, 100, 125, 150]
    best, last = (load_network(finetuned / f"{name}.safetensors") for name in ("best", "model"))
    assert best[1].provenance["validation_dice"] == max(values.values())
    assert "validation_dice" not in last[1].provenance
    (case,) = read_json(finetuned / "split.json")["draw"]["validation"]
    number = store.index_of(case)
    truth = store.labels_of(store.first[number] + torch.arange(store.volumes[number].slices))
    for (network, _), expected in ((best, max(values.values())), (last, values[150])):
        parts = slice_probabilities(folded(network), store.volume(case), torch.device("cpu"))
        mask = torch.cat([part.argmax(1) for part in parts])
        overlaps = [dice((mask == k).numpy(), (truth == k).numpy()) for k in (1, 2)]
        assert np.mean(overlaps) == pytest.approx(expected, abs=2e-3)


def test_a_worse_look_at_validation_changes_nothing(store: Store, finetuned: Path, tmp_path: Path) -> None:
    network, header = load_network(finetuned / "model.safetensors")
    validation = Validation(store, ("case2",), tmp_path / "best.safetensors", header, torch.device("cpu"))
    strategy = torch.nn.Module()
    strategy.predictor = network
    good = validation(strategy)["validation_dice"]
    kept = (tmp_path / "best.safetensors").read_bytes()
    network.get_parameter("head.2.weight").data.neg_()
    # A run that is continued compares with what the file says.
    again = Validation(store, ("case2",), tmp_path / "best.safetensors", header, torch.device("cpu"))
    assert again(strategy)["validation_dice"] < good
    assert (tmp_path / "best.safetensors").read_bytes() == kept


def test_pretrained_weights_are_where_training_starts(
    store: Store, pretrained: Path, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    # A learning rate that changes nothing leaves what was transferred, and only that, as it was.
    settings = {**cheap, **SHORT, "learning_rate": 1e-30, "weight_decay": 0}
    weights = load_file(finetune(store, tmp_path / "a", settings, pretrained))
    before = load_file(pretrained / "model.safetensors")
    report_ = read_json(tmp_path / "a" / "transfer.json")
    assert set(report_["transferred"]) == set(before)
    assert set(report_["fresh"]) == set(weights) - set(before)
    assert report_["unused"] == report_["mismatched"] == []
    assert all(weights[name].equal(before[name]) for name in before if name.endswith(("weight", "bias")))
    scratch = load_file(finetune(store, tmp_path / "b", settings))
    assert not (tmp_path / "b" / "transfer.json").exists()
    for name, value in weights.items():
        if value.ndim == 4:
            # The rest starts with the same random weights with and without pre-training: comparisons are paired.
            assert value.equal(scratch[name]) == (name not in before), name
    other = load_file(finetune(store, tmp_path / "c", {**settings, "draw": 1}))
    assert not other["head.2.weight"].equal(scratch["head.2.weight"])


def test_a_test_subject_seen_in_pretraining_is_refused(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 8}
    everyone = Split(0, ("case0", "case1", "case2", "case3", "case5"), ("case4",), ())
    pretrain(store, tmp_path / "all", settings, split=everyone)
    split = Split(0, ("case0", "case1", "case2", "case3"), ("case4",), ("case5",))
    with pytest.raises(GlocalError, match=r"Subject case5 would be tested on but was seen in pre-training"):
        finetune(store, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "all", split=split)
    assert not (tmp_path / "run").exists()
    with pytest.raises(GlocalError, match="case5 would be tested on but would be pre-trained on"):
        pretrain(store, tmp_path / "x", settings, split=Split(0, everyone.pretrain, (), ("case5",)))
    assert not (tmp_path / "x").exists()

    protocol = ProtocolOptions(transductive=True)
    pretrain(store, tmp_path / "open", settings, protocol, split)
    assert "case5" in read_header(tmp_path / "open" / "model.safetensors").provenance["subjects"]
    assert finetune(store, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "open", split=split).exists()
    # Whatever is read of it afterwards says so.
    assert pd.read_csv(tmp_path / "run" / "evaluation-test.csv")["transductive"].all()
    assert any("Transductive" in warning for warning in manifest_of(tmp_path / "run")["warnings"])
    assert "Transductive" in report(tmp_path / "run").read_text(encoding="utf-8")


def test_names_of_another_dataset_are_other_people(
    store: Store, tmp_path: Path, write_dataset: Any, preprocessing: PreprocessOptions, cheap: dict[str, Any]
) -> None:
    """Equal names in two datasets: the other's split is not taken, nor are its subjects held against us."""
    labelled = ["case0", "case1", "case5"]
    split = {"pretrain": ["case0", "case5"], "test": ["case1"]}
    raw = write_dataset(tmp_path / "raw", {"case0": 8, "case1": 9, "case5": 7}, labelled, split)
    write_json(raw / "dataset.json", {**read_json(raw / "dataset.json"), "name": "Another"})
    other = preprocess(raw, tmp_path / "store", preprocessing, workers=1)
    pretrain(store, tmp_path / "pre", {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 8})
    finetune(other, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "pre")
    assert read_json(tmp_path / "run" / "split.json")["split"]["test"] == ["case1"]


def test_an_image_that_was_seen_under_another_name_is_refused(
    store: Store, raw: Path, tmp_path: Path, preprocessing: PreprocessOptions, cheap: dict[str, Any]
) -> None:
    """A folder that was collected again is another dataset by its name, and lies as its first case does."""
    again = tmp_path / "again"
    for path in (*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")):
        write_bytes(again / path.parent.name / path.name.replace("case", "S"), path.read_bytes())
    turned = replace(
        read_image([raw / "imagesTr" / "case0_0000.nii.gz"]).geometry, direction=(0, 1, 0, 1, 0, 0, 0, 0, 1)
    )
    write_volume(again / "imagesTr" / "A_0000.nii.gz", np.random.default_rng(0).normal(size=(8, 32, 32)), turned)
    write_json(again / "dataset.json", {**read_json(raw / "dataset.json"), "name": "Again"})
    write_json(again / "split.json", {"pretrain": ["A", "S0", "S2"], "test": ["S1"]})
    other = preprocess(again, tmp_path / "store", preprocessing, workers=1)
    assert other.plan.axes != store.plan.axes
    pretrain(store, tmp_path / "pre", {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 8})
    with pytest.raises(GlocalError, match=r"Subject S1 would be tested on but was seen in pre-training"):
        finetune(other, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "pre")
    held_out = Split(0, ("A", "S0", "S2"), (), ("S5",))  # store's test subject
    finetune(other, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "pre", split=held_out)


def test_the_split_of_the_pretraining_is_taken(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, "method": "pcl", "max_iterations": 1, "batch": 4, "outputs": 8}
    split = Split(3, ("case3", "case4", "case5"), (), ("case0",))
    pretrain(store, tmp_path / "pre", settings, split=split)
    sources = (tmp_path / "pre", tmp_path / "pre" / "model.safetensors", tmp_path / "pre" / "stage-1-encoder")
    for number, source in enumerate(sources):
        run = tmp_path / f"run{number}"
        finetune(store, run, {**cheap, **SHORT}, source)
        assert read_json(run / "split.json")["split"]["test"] == ["case0"]
        assert set(pd.read_csv(run / "evaluation-test.csv")["case"]) == {"case0"}


def test_two_labelled_cases_and_nothing_to_test_on(
    tmp_path: Path, write_dataset: Any, preprocessing: PreprocessOptions, cheap: dict[str, Any]
) -> None:
    raw = write_dataset(tmp_path / "raw", {"a": 5, "b": 6, "c": 5}, ["a", "c"])
    store = preprocess(raw, tmp_path / "store", preprocessing, workers=1)
    model = finetune(store, tmp_path / "run", {**cheap, **SHORT})
    assert sorted(read_header(model).provenance["labelled"]) == ["a", "c"]
    assert not list((tmp_path / "run").glob("evaluation*"))
    assert not (tmp_path / "run" / "predictions").exists()
    assert manifest_of(tmp_path / "run")["evaluated"] == {"test": []}
    page = report(tmp_path / "run").read_text(encoding="utf-8")
    assert "No labelled volume was kept for testing" in page
    assert "leave_one_out" in page
    with pytest.raises(GlocalError, match=r"only 2 may be trained on"):
        finetune(store, tmp_path / "more", {**cheap, **SHORT, "validation": 1})
    assert not (tmp_path / "more").exists()


def test_structures_that_no_labelled_volume_has_are_named(
    store: Store, tmp_path: Path, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(store, tmp_path / "run", {**cheap, **SHORT})
    assert not any("No labelled volume holds" in warning for warning in manifest_of(tmp_path / "run")["warnings"])
    monkeypatch.setattr(Store, "labels_of", lambda store, index: torch.zeros(len(index), 32, 32, dtype=torch.long))
    finetune(store, tmp_path / "empty", {**cheap, **SHORT})
    foreground = ", ".join(name for name, value in store.labels.items() if value)
    assert (
        f"No labelled volume holds {foreground}, so the network has not learnt it: label one that does."
        in manifest_of(tmp_path / "empty")["warnings"]
    )


def test_labelled_cases_by_name(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    model = finetune(store, tmp_path / "run", {**cheap, **SHORT, "labels": ["case2", "case0"]})
    assert read_header(model).provenance["labelled"] == ["case2", "case0"]
    for labels, sentence in (
        (["case3"], "case3 is not a labelled case"),
        (["case5"], "case5 belongs to a test or development subject"),
        (["case0", "case0"], "only once"),
        ([2, 3], "A single fine-tuning takes one number of labels"),
        ([], "finetune.labels"),
        (0, "finetune.labels=0"),
        (-1, "finetune.labels=-1"),
        (9, "only 3 may be trained on"),
    ):
        with pytest.raises(GlocalError, match=sentence):
            finetune(store, tmp_path / "other", {**cheap, **SHORT, "labels": labels})
    assert not (tmp_path / "other").exists()


def test_development_subjects_are_measured_when_asked_and_test_subjects_later(
    store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    """What was chosen on development subjects is not trained again to be measured on test subjects."""
    run, settings = tmp_path / "run", {**cheap, **SHORT, "validation": 1}
    finetune(store, run, settings, protocol=ProtocolOptions(evaluate="development"))
    development = (run / "evaluation-development.csv").read_bytes()
    assert set(pd.read_csv(run / "evaluation-development.csv")["case"]) == {"case4"}
    assert [file.name for file in (run / "predictions").iterdir()] == ["case4.nii.gz"]
    assert not (run / "evaluation-test.csv").exists()
    first = manifest_of(run)
    assert first["evaluated"] == {"development": ["case4"]}
    page = report(run).read_text(encoding="utf-8")
    assert "mean Dice of 1 development case" in page
    assert "mean Dice of 1 test case" not in page
    trained = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl")}

    with held(run), pytest.raises(Busy):
        finetune(store, run, settings)
    moved = Store.open(store.path)
    moved.dataset = tmp_path / "gone"
    with pytest.raises(GlocalError, match=r"gone has no dataset\.json"):
        finetune(moved, run, settings)
    assert (run / "report.html").exists()  # nothing is lost
    finetune(store, run, settings)
    assert not (run / "report.html").exists()  # it would not say all
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert manifest_of(run) == {**first, "evaluated": {"development": ["case4"], "test": ["case5"]}}
    assert (run / "evaluation-development.csv").read_bytes() == development
    page = report(run).read_text(encoding="utf-8")
    assert "mean Dice of 1 development case" in page
    assert "mean Dice of 1 test case" in page

    finetune(store, tmp_path / "at-once", settings)
    both = [pd.read_csv(folder / "evaluation-test.csv") for folder in (run, tmp_path / "at-once")]
    pd.testing.assert_frame_equal(*both)
    assert sorted(file.name for file in (run / "predictions").iterdir()) == ["case4.nii.gz", "case5.nii.gz"]


def test_moved_views_are_measured_apart_and_without_training_again(
    store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    """As `predict --tta` predicts."""
    run, settings = tmp_path / "run", {**cheap, **SHORT, "validation": 1}
    finetune(store, run, settings)
    plain = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".csv", ".gz", ".safetensors")}
    finetune(store, run, settings, protocol=ProtocolOptions(tta=True))
    assert {path: path.read_bytes() for path in plain} == plain
    assert manifest_of(run)["evaluated"] == {"test": ["case5"], "test-tta": ["case5"]}
    table = pd.read_csv(run / "evaluation-test-tta.csv")
    assert list(table["checkpoint"].unique()) == ["last", "best"]
    image = store.dataset / "imagesTr" / "case5_0000.nii.gz"
    for model, folder in (("model", "predictions"), ("best", "predictions-best")):
        predict(run / f"{model}.safetensors", image, tmp_path / folder, tta=True)
        (mine,) = (run / f"{folder}-tta").iterdir()
        mask = read_labels(mine).array
        assert (mask == read_labels(tmp_path / folder / "case5.nii.gz").array).all()
        assert (mask != read_labels(run / folder / "case5.nii.gz").array).any()
    page = report(run).read_text(encoding="utf-8")
    assert "mean Dice of 1 test case<" in page
    assert "mean Dice of 1 test case, predicted with moved views (--tta)<" in page


def test_moved_views_of_slices_that_never_moved_are_refused(
    store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    settings = {**cheap, **SHORT, "augmentation": {"spatial": "none"}}
    with pytest.raises(GlocalError, match="slices are never turned, zoomed"):
        finetune(store, tmp_path / "run", settings, protocol=ProtocolOptions(tta=True))
    assert not (tmp_path / "run").exists()


def test_other_slices_than_those_of_the_pretraining_are_refused(
    raw: Path, pretrained: Path, finetuned: Path, store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    other = preprocess(raw, tmp_path / "store", PreprocessOptions(size=(32, 32), percentiles=(0, 100)), workers=1)
    with pytest.raises(GlocalError, match="preprocessed in another way: use the same preprocessing"):
        finetune(other, tmp_path / "run", {**cheap, **SHORT}, pretrained)
    with pytest.raises(GlocalError, match="was fine-tuned already"):
        finetune(store, tmp_path / "run", {**cheap, **SHORT}, finetuned)
    with pytest.raises(GlocalError, match="does not exist"):
        finetune(store, tmp_path / "run", {**cheap, **SHORT}, tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_kept_and_other_settings_are_refused(
    store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    run, settings = tmp_path / "run", {**cheap, **SHORT}
    finetune(store, run, settings)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert finetune(store, run, settings) == run / "model.safetensors"
    assert finetune(store, run, {**settings, "device": "auto", "log": ["tensorboard"]}).exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for key, value in (("seed", 5), ("labels", 1), ("loss", "dice"), ("network", {"widths": [4, 8]})):
        with pytest.raises(GlocalError, match=f"was begun with {key}"):
            finetune(store, run, {**settings, key: value})
    with pytest.raises(GlocalError, match="begun with another split of the cases"):
        finetune(store, run, settings, split=Split(0, ("case0", "case1", "case2"), (), ("case5",)))


def test_the_time_of_an_interrupted_run_counts(
    store: Store,
    tmp_path: Path,
    cheap: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    begun_long_ago: Callable[[Path], None],
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glocal.finetuning.finetune.measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(store, tmp_path, {**cheap, **SHORT})
    monkeypatch.undo()
    begun_long_ago(tmp_path)
    finetune(store, tmp_path, {**cheap, **SHORT})
    assert 1000 <= manifest_of(tmp_path)["seconds"] < 1100


def test_a_dataset_that_has_moved_is_said(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    moved = Store.open(store.path)
    moved.dataset = tmp_path / "gone"
    with pytest.raises(GlocalError, match=r"gone has no dataset\.json"):
        finetune(moved, tmp_path / "run", {**cheap, **SHORT})
    assert not (tmp_path / "run" / "model.safetensors").exists()  # said before the training, not after
    assert finetune(store, tmp_path / "run", {**cheap, **SHORT}).exists()
    assert (tmp_path / "run" / "evaluation-test.csv").exists()


def test_the_report_shows_cases_and_pictures(finetuned: Path, store: Store) -> None:
    page = report(finetuned).read_text(encoding="utf-8")
    for text in (
        "fine-tuned on 2 labelled volumes of Tiny",
        "weights pre-trained by pcl",
        "mean Dice",
        "case5",
        "wall",
    ):
        assert text in page
    assert "Dice on validation volumes" in page
    assert page.count("data:image/png;base64") == 1
    assert page.count("data:image/svg+xml;base64") == 4  # Dice, HD95, loss, validation
    assert "± nan" not in page
    assert "No labelled volume" not in page
    assert read_image([store.dataset / "imagesTr" / "case5_0000.nii.gz"]).array.shape[1] == 6


@pytest.mark.parametrize("choice", [False, True])
def test_a_network_is_compiled_where_that_is_asked_for(
    store: Store, tmp_path: Path, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch, choice: bool
) -> None:
    made: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: made.append(self))
    finetune(store, tmp_path, {**cheap, **SHORT, "compile": choice})
    assert bool(made) == choice


def test_weights_of_another_network_are_refused(
    store: Store, pretrained: Path, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    with pytest.raises(GlocalError, match="was pre-trained with another network: leave network out"):
        finetune(store, tmp_path, {**cheap, **SHORT, "network": {"widths": [4, 8]}}, pretrained)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_strategy_without_unlabelled_volumes_says_so(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    split = Split(0, ("case0", "case1"), (), ("case5",))
    settings = {**cheap, **SHORT, "labels": "all", "strategy": "mean-teacher"}
    finetune(store, tmp_path, settings, split=split)
    assert NOTHING_UNLABELLED in manifest_of(tmp_path)["warnings"]
