"""A training's folder is named after all that decides its results, and after nothing else."""

import pickle
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import create_model
from safetensors.torch import load_file

from glocal import engine, inference, runs
from glocal.contrast import losses
from glocal.data import preprocess as preprocessing_module
from glocal.data import sampling
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.evaluation import metrics
from glocal.experiments.estimate import _probe
from glocal.experiments.grid import Variant
from glocal.experiments.plan import Training, jobs_of, plan, store_folder
from glocal.experiments.trainings import refuse_impossible_draws
from glocal.files import read_json
from glocal.finetuning import base
from glocal.finetuning.finetune import finetune
from glocal.finetuning.registry import STRATEGIES
from glocal.networks.registry import NETWORKS
from glocal.options import merged
from glocal.pretraining.registry import METHODS
from glocal.views import view

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "data": "raw",
    "out": "out",
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
    "preprocess": {"size": [32, 32]},
    "network": {"widths": [4, 8, 8]},
    "max_iterations": 2,
    "pretrain": {
        "pcl": {"method": "pcl", "batch": 6, "outputs": 8, "log": []},
        "gcl": {"method": "gcl", "volumes": 2, "hidden": 16, "outputs": 8, "local_batch": 3, "blocks": 1, "log": []},
    },
    "finetune": {"labels": 1, "batch": 2, "log": []},
}
CONTENDERS = ("random", "pcl", "gcl", "gcl@global")
PRETRAININGS = {"pcl pre-training", "gcl pre-training", "gcl@global pre-training"}
FINETUNINGS = {f"{contender} fine-tuning" for contender in CONTENDERS}
OF_PCL, OF_GCL = ({name for name in PRETRAININGS | FINETUNINGS if method in name} for method in ("pcl", "gcl"))

Identities = dict[str, str]
Identify = Callable[..., Identities]


def variant(contender: str, over: Mapping[str, Any] | None = None) -> Variant:
    """A contender at one budget; `over` are other settings."""
    settings = merged(merged(SETTINGS, {"compare": [contender]}), dict(over or {}))
    return Variant({"contender": contender, "labels": str(settings["finetune"]["labels"])}, settings)


def planned(store: Store, out: Path, *variants: Variant) -> list[Training]:
    return plan(variants, defaultdict(lambda: store), out)


@pytest.fixture
def identities(store: Store, tmp_path: Path) -> Identify:
    """The folders of the pre-training and the fine-tuning of every contender, by what they are."""

    def find(over: Mapping[str, Any] | None = None, of: Store = store, out: Path = tmp_path) -> Identities:
        found = {}
        for contender in CONTENDERS:
            training = planned(of, out, variant(contender, over))[0]
            found[f"{contender} fine-tuning"] = str(training.job.folder.relative_to(out))
            if training.before:
                found[f"{contender} pre-training"] = str(training.before.folder.relative_to(out))
        return found

    return find


def changed(before: Identities, after: Identities) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_a_training_lies_in_a_folder_that_says_what_it_is(identities: Identify, tmp_path: Path) -> None:
    found = identities()
    assert found.keys() == PRETRAININGS | FINETUNINGS
    assert {name: folder.rpartition("-")[0] for name, folder in found.items() if name.startswith("gcl ")} == {
        "gcl pre-training": "pretrain/gcl",
        "gcl fine-tuning": "finetune/supervised",
    }
    assert identities(out=tmp_path / "elsewhere") == found
    fine = [found[name] for name in FINETUNINGS]
    assert len(set(fine)) == len(fine)
    # The weights after a stage are made on the way to those after the last.
    assert found["gcl@global pre-training"] == found["gcl pre-training"] != found["pcl pre-training"]


@pytest.mark.parametrize(
    ("what", "concerned"),
    [
        ((METHODS, "pcl"), OF_PCL),
        ((METHODS, "gcl"), OF_GCL),
        ((STRATEGIES, "supervised"), FINETUNINGS),
        ((NETWORKS, "unet"), PRETRAININGS | FINETUNINGS),
        (losses, OF_PCL | OF_GCL),
        (engine, PRETRAININGS | FINETUNINGS),
        (sampling, PRETRAININGS | FINETUNINGS),
        (view, PRETRAININGS | FINETUNINGS),
        (inference, FINETUNINGS),
        (metrics, FINETUNINGS),
    ],
)
def test_a_component_whose_version_rises_renames_exactly_the_trainings_it_is_part_of(
    identities: Identify, what: Any, concerned: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identities()
    if isinstance(what, tuple):
        registry, name = what
        monkeypatch.setitem(registry, name, replace(registry[name], version=registry[name].version + 1))
    else:
        monkeypatch.setattr(what, "VERSION", what.VERSION + 1)
    assert changed(before, identities()) == concerned


OFF = "none"


@pytest.mark.parametrize(
    ("over", "concerned"),
    [
        ({"seed": 1}, PRETRAININGS | FINETUNINGS),
        ({"precision": "bfloat16"}, PRETRAININGS | FINETUNINGS),
        ({"max_iterations": 3}, PRETRAININGS | FINETUNINGS),
        ({"network": {"widths": [4, 8]}}, PRETRAININGS | FINETUNINGS),
        ({"protocol": {"folds": 2}}, PRETRAININGS | FINETUNINGS),  # other cases are trained on
        ({"protocol": {"transductive": True}}, OF_PCL | OF_GCL),
        ({"protocol": {"evaluate": "development"}}, set()),  # whom it is measured on decides nothing of a training
        ({"protocol": {"budget": "subjects"}}, FINETUNINGS),
        ({"pretrain": {"pcl": {"temperature": 0.2}}}, OF_PCL),
        ({"pretrain": {"pcl": {"augmentation": OFF}}}, OF_PCL),  # no augmentation is not the default one
        ({"finetune": {"augmentation": OFF}}, FINETUNINGS),
        ({"finetune": {"augmentation": {"spatial": {"rotation": 5}, "intensity": {}}}}, FINETUNINGS),
        ({"finetune": {"labels": 2}}, FINETUNINGS),
        ({"finetune": {"labels": "all"}}, FINETUNINGS),
        ({"finetune": {"labels": ["case0"]}}, FINETUNINGS),
        ({"finetune": {"validation": 1}}, FINETUNINGS),
        ({"finetune": {"loss": "dice"}}, FINETUNINGS),
    ],
)
def test_a_setting_renames_exactly_the_trainings_it_decides_on(
    identities: Identify, over: dict[str, Any], concerned: set[str]
) -> None:
    assert changed(identities(), identities(over)) == concerned


@pytest.mark.parametrize(
    "over",
    [
        {"device": "cuda:1"},
        {"pretrain": {"pcl": {"device": "cuda"}}, "finetune": {"log": ["mlflow"]}},
        {"name": "another", "summary": "words", "data": "elsewhere", "out": "there"},
        {"protocol": {"draws": 3}},
    ],
)
def test_where_and_how_fast_and_how_often_does_not_matter(identities: Identify, over: dict[str, Any]) -> None:
    assert identities(over) == identities()


def test_a_default_that_is_said_and_another_name_of_a_contender_do_not_matter(store: Store, tmp_path: Path) -> None:
    (first,) = planned(store, tmp_path, variant("pcl"))
    settings = {**SETTINGS["pretrain"]["pcl"], "temperature": 0.1, "threshold": 0.11}
    (second,) = planned(store, tmp_path, variant("mine", {"pretrain": {"mine": settings}}))
    assert jobs_of([first, second]) == jobs_of([first])
    assert [job.folder for job in jobs_of([second])] == [job.folder for job in jobs_of([first])]


def test_draws_and_splits_have_folders_of_their_own(store: Store, tmp_path: Path) -> None:
    protocol = {"protocol": {"draws": 2, "folds": 2}}
    trainings = planned(store, tmp_path, variant("random", protocol), variant("pcl", protocol))
    places = [(t.place["draw"], t.place["split"], t.place["contender"]) for t in trainings]
    # Draws outermost: an experiment that is stopped half-way has whole pairs.
    assert places == [(draw, split, name) for draw in (0, 1) for split in (0, 1) for name in ("random", "pcl")]
    assert len({t.job.folder for t in trainings}) == 8
    before = {t.place["split"]: t.before.folder for t in trainings if t.before}
    assert len(set(before.values())) == 2  # one for both draws of a split
    assert all(t.job.needs == ((before[t.place["split"]],) if t.before else ()) for t in trainings)


@pytest.mark.parametrize(
    ("registry", "name", "over", "concerned"),
    [
        (METHODS, "pcl", {"pretrain": {"pcl": {"sharpness": 1.0}}}, OF_PCL),
        (STRATEGIES, "supervised", {"finetune": {"sharpness": 1.0}}, FINETUNINGS),
    ],
)
def test_an_option_that_is_added_leaves_finished_trainings_valid(
    identities: Identify, registry: Any, name: str, over: Any, concerned: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identities()
    more = create_model("More", __base__=registry[name].options, sharpness=(float, 0.5))
    monkeypatch.setitem(registry, name, replace(registry[name], options=more))
    assert identities() == before
    assert changed(before, identities(over)) == concerned


@pytest.fixture
def copied(raw: Path, tmp_path: Path) -> Path:
    """The same dataset in another place."""
    return Path(shutil.copytree(raw, tmp_path / "moved"))


def test_the_place_of_the_dataset_does_not_matter_and_its_content_does(
    identities: Identify, copied: Path, store: Store, preprocessing: PreprocessOptions, tmp_path: Path
) -> None:
    moved = preprocess(copied, tmp_path / "store", preprocessing, workers=1)
    assert moved.digest() == store.digest()
    assert identities(of=moved) == identities()
    shutil.copyfile(copied / "labelsTr" / "case0.nii.gz", copied / "labelsTr" / "case4.nii.gz")  # both have five slices
    other = preprocess(copied, tmp_path / "store", preprocessing, workers=1)
    assert changed(identities(), identities(of=other)) == PRETRAININGS | FINETUNINGS


def test_another_preprocessing_version_makes_the_store_and_all_trainings_anew(
    identities: Identify,
    copied: Path,
    preprocessing: PreprocessOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = preprocess(copied, tmp_path / "store", preprocessing, workers=1)
    before, image = identities(of=first), tmp_path / "store" / "images" / "case0.npy"
    image.write_bytes(b"of the old version")
    assert preprocess(copied, tmp_path / "store", preprocessing, workers=1).digest() == first.digest()
    assert image.read_bytes() == b"of the old version"
    monkeypatch.setattr(preprocessing_module, "VERSION", preprocessing_module.VERSION + 1)
    second = preprocess(copied, tmp_path / "store", preprocessing, workers=1)
    assert image.stat().st_size > 1000
    assert second.digest() != first.digest()
    assert changed(before, identities(of=second)) == PRETRAININGS | FINETUNINGS


LABELLED = {"pretrain": {"le": {"method": "label-efficient", "batch": 4, "outputs": 8, "log": []}}}


def test_a_pretraining_with_labels_is_one_per_budget_and_draw(store: Store, tmp_path: Path) -> None:
    """All its fine-tunings are of its own labels; one without labels serves them all."""
    budgets = [1, 2, "all", ["case0", "case2"]]
    trainings = [
        training
        for labels in budgets
        for contender in ("pcl", "le")
        for training in planned(
            store,
            tmp_path,
            variant(contender, {**LABELLED, "finetune": {"labels": labels}, "protocol": {"draws": 2}}),
        )
    ]
    assert len(trainings) == 16
    folders: dict[str, set[Path]] = {"pcl": set(), "le": set()}
    for training in trainings:
        assert training.before is not None
        before, after = training.before.arguments["settings"], training.job.arguments["settings"]
        folders[training.variant.contender].add(training.before.folder)
        if training.variant.contender == "le":
            assert training.before.folder.name.startswith("label-efficient-")
            assert [before[key] for key in ("labels", "draw", "seed")] == [
                after[key] for key in ("labels", "draw", "seed")
            ]
        else:
            assert not {"labels", "draw", "validation"} & set(before)
        assert training.before.folder in training.job.needs
    assert len(folders["pcl"]) == 1
    assert len(folders["le"]) == 8
    assert len({training.job.folder for training in trainings}) == 16


@pytest.mark.parametrize(
    ("over", "renamed"),
    [
        ({"protocol": {"budget": "subjects"}}, True),  # which volumes are labelled
        ({"finetune": {"validation": 1}}, True),
        ({"finetune": {"batch": 3}}, False),
        ({"protocol": {"evaluate": "development"}}, False),
    ],
)
def test_what_says_which_volumes_are_labelled_renames_a_pretraining_with_labels(
    over: dict[str, Any], renamed: bool, store: Store, tmp_path: Path
) -> None:
    def before(of: Mapping[str, Any]) -> dict[str, Path]:
        found = {name: planned(store, tmp_path, variant(name, merged(LABELLED, of)))[0] for name in ("pcl", "le")}
        return {name: training.before.folder for name, training in found.items() if training.before}

    first, second = before({}), before(over)
    assert (first["le"] != second["le"]) == renamed
    assert first["pcl"] == second["pcl"]


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"pretrain": {"le": {"labels": 2}}}, r"pretrain\.le\.labels is always that of the fine-tuning: leave it out"),
        ({"pretrain": {"le": {"draw": 1}}}, r"pretrain\.le\.draw is always"),
        ({"pretrain": {"le": {"seed": 1}}}, r"pretrain\.le\.seed=1 would draw other .* than finetune\.seed=0"),
        ({"finetune": {"seed": 1}}, r"pretrain\.le\.seed=0 would draw other .* than finetune\.seed=1"),
    ],
)
def test_labels_other_than_those_of_the_fine_tuning_are_refused(
    over: dict[str, Any], sentence: str, store: Store, tmp_path: Path
) -> None:
    recipe = variant("le", merged(LABELLED, over)).recipe
    with pytest.raises(GlocalError, match=sentence):
        refuse_impossible_draws(recipe, store.volumes, store.split)
    refuse_impossible_draws(variant("le", LABELLED).recipe, store.volumes, store.split)


def test_a_store_has_a_folder_for_each_dataset_and_way_of_preprocessing(tmp_path: Path) -> None:
    first = store_folder(tmp_path, variant("random").recipe)
    assert first.parent == tmp_path / "stores"
    assert first == store_folder(tmp_path, variant("pcl", {"seed": 3}).recipe)
    others: tuple[Any, ...] = ({"data": "other/raw"}, {"preprocess": {"size": [32, 16]}}, {"preprocess": {"n4": True}})
    folders = {first, *(store_folder(tmp_path, variant("random", over).recipe) for over in others)}
    assert len(folders) == 4
    assert all(folder.name.startswith("raw-") for folder in folders)


def test_every_job_is_listed_once_and_after_what_it_needs(store: Store, tmp_path: Path) -> None:
    draws = {"protocol": {"draws": 2}}
    trainings = planned(store, tmp_path, *(variant(contender, draws) for contender in CONTENDERS))
    jobs = jobs_of(trainings)
    folders = [job.folder for job in jobs]
    assert len(folders) == len(set(folders)) == 2 + 2 * len(CONTENDERS)
    assert {t.job.folder for t in trainings} | {t.before.folder for t in trainings if t.before} == set(folders)
    for job in jobs:
        assert all(folders.index(need) < folders.index(job.folder) for need in job.needs)
    stage = next(t for t in trainings if t.variant.contender == "gcl@global")
    assert stage.before is not None
    model = stage.before.folder / "stage-1-global" / "model.safetensors"
    assert stage.job.arguments["pretrained"] == model


def test_jobs_of_a_plan_train_report_and_are_never_repeated(store: Store, tmp_path: Path) -> None:
    def jobs() -> list[Any]:
        return jobs_of(planned(store, tmp_path, variant("pcl")))

    for job in jobs():
        assert not job.done()
        job.work(**job.arguments)
        assert (job.folder / "report.html").exists()
        assert runs.settings_of(job.folder)["versions"]["engine"] == engine.VERSION
    assert all(job.done() for job in jobs())
    pretraining, finetuning = jobs()
    assert read_json(finetuning.folder / "transfer.json")["transferred"]
    assert runs.settings_of(finetuning.folder)["pretrained"]["method"] == "pcl"
    assert pretraining.folder in finetuning.needs


def test_draws_of_all_labels_differ_in_batches_and_views(
    store: Store, cheap: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The volumes are the same, so that without this all draws of a pre-training would be nearly one training."""
    seen: list[Any] = []
    uniform, draw_view = Pool.uniform, base.draw_view

    def batch(self: Pool, size: int, rng: torch.Generator) -> Any:
        slices = uniform(self, size, rng)
        seen.append(slices.index.tolist())
        return slices

    def one_view(options: Any, size: int, shape: Any, rng: torch.Generator) -> Any:
        seen.append(rng.initial_seed())
        return draw_view(options, size, shape, rng)

    monkeypatch.setattr(Pool, "uniform", batch)
    monkeypatch.setattr(base, "draw_view", one_view)
    settings = {**cheap, "labels": "all", "max_iterations": 2, "batch": 8}
    weights, drawn = {}, {}
    for name, draw in (("first", 0), ("again", 0), ("other", 1)):
        weights[name] = load_file(finetune(store, tmp_path / name, {**settings, "draw": draw}))
        drawn[name] = seen.copy()
        seen.clear()
    train = {name: read_json(tmp_path / name / "split.json")["draw"]["train"] for name in weights}
    assert sorted(train["first"]) == sorted(train["other"]) == ["case0", "case1", "case2"]
    assert drawn["first"] == drawn["again"]
    assert all(value.equal(weights["again"][name]) for name, value in weights["first"].items())
    assert all(one != other for one, other in zip(drawn["first"], drawn["other"], strict=True))
    assert not weights["first"]["head.2.weight"].equal(weights["other"]["head.2.weight"])


def test_every_job_and_its_measurement_can_be_sent_to_another_process(store: Store, tmp_path: Path) -> None:
    jobs = jobs_of(planned(store, tmp_path, variant("pcl")))
    for job in [*jobs, *(_probe(job, tmp_path / "probe") for job in jobs)]:
        sent = pickle.loads(pickle.dumps(job))
        assert sent.work is job.work
        assert sent.arguments == job.arguments
