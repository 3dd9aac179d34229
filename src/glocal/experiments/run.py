"""The whole road: preprocess, pre-train every contender on every split, fine-tune every draw, measure, report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glocal import distributed, runs
from glocal.data.dataset import Dataset, read_dataset
from glocal.data.preprocess import preprocess
from glocal.data.split import Member, Split, draw_labels, make_split, read_split
from glocal.data.store import Store
from glocal.devices import device_named, precision_of
from glocal.errors import GlocalError
from glocal.experiments.derive import derived
from glocal.experiments.jobs import Job, default_workers, do, gpus_for
from glocal.experiments.recipe import Recipe, make_recipe, read_recipe
from glocal.experiments.report import report, warnings_below
from glocal.experiments.tables import write_tables
from glocal.files import read_json, write_json
from glocal.finetuning.base import FinetuningOptions
from glocal.finetuning.finetune import finetune, measured_cases, predict_cases
from glocal.finetuning.registry import finetuning_options
from glocal.model import load_network
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import method_named, pretraining_options
from glocal.processes import cores
from glocal.progress import console

NOT_MEASURED = (
    "No labelled volume is left for testing, so there will be no Dice of unseen cases: look at the masks of the "
    "unlabelled ones, or measure by leave-one-out, which trains once per labelled volume and tests on it "
    "(protocol.leave_one_out=true, finetune.labels one less than you have, in another run folder)."
)


def run(recipe: str, words: Sequence[str] = (), workers: int | None = None) -> Path:
    """Do all that a recipe says; started again, it continues where it stopped.

    Args:
        recipe: the name of a packaged recipe, or a YAML file.
        words: `key=value` settings over the recipe's; `data` and `out` are needed somewhere.
        workers: runs at the same time, which share the cores; None decides by the machine.

    Returns:
        The run folder, with `results.csv`, `table.md` and `report.html`.

    Raises:
        GlocalError: what the user can correct, before anything runs where possible.
    """
    settings = read_recipe(recipe, words)
    if "data" not in settings or "out" not in settings:
        raise GlocalError("Say which data and where to: data=DATASET out=RUN.")
    return run_recipe(make_recipe(derived(settings)), workers)


def run_recipe(recipe: Recipe, workers: int | None = None) -> Path:
    """Do all that a validated recipe says; see `run`."""
    started = time.time()
    if distributed.started() > 1:
        raise GlocalError(
            "`glocal run` shares the trainings out among processes of its own: start it without torchrun or srun. "
            "A long pre-training on several GPUs is `torchrun --nproc-per-node=GPUS -m glocal pretrain ...`."
        )
    recipe = recipe.model_copy(update={"data": recipe.data.resolve()})  # however it was spelled
    out = recipe.out
    _refuse_impossible(recipe, read_dataset(recipe.data))
    runs.begin(out, "run", recipe.model_dump(mode="json", exclude={"out"}))
    with runs.held(out):
        _whole_road(recipe, workers)
        if not runs.finished(out):
            runs.finish(out, started, kind="run", warnings=[])
        report(out)
    for warning in warnings_below(out):
        console.print(f"Warning: {warning}", style="yellow", markup=False)
    return out


def _whole_road(recipe: Recipe, workers: int | None) -> None:
    out = recipe.out
    store = preprocess(recipe.data, out / "store", recipe.preprocess, workers=workers)
    workers = workers or default_workers(recipe.device)
    splits = [
        make_split(store.volumes, store.split, recipe.protocol, recipe.seed, index)
        for index in range(split_count(recipe, store.volumes))
    ]
    measured = any(measured_cases(store, split, recipe.protocol) for split in splits)
    _say(store, splits, measured)
    contenders = recipe.contenders(measured)
    pretraining, finetuning = pretraining_jobs(recipe, splits, contenders), finetuning_jobs(recipe, splits, contenders)
    machine = _on_this_machine(recipe, workers, len(pretraining), len(finetuning))
    for part, jobs in (("pretrain", pretraining), ("finetune", finetuning)):
        for job in jobs:
            job.arguments["settings"] |= machine[part]
    _refuse_other_data([*pretraining, *finetuning], store)
    gpus = gpus_for(recipe.device)
    do(pretraining, "Pre-training", workers, gpus)
    do(finetuning, "Fine-tuning", workers, gpus)
    write_json(out / "split.json", {"splits": [split.__dict__ for split in splits]})
    write_tables(out)
    write_masks(store, finetuning[-1].folder, out / "masks", device_named(recipe.device))


def write_masks(store: Store, training: Path, folder: Path, device: torch.device) -> None:
    """Masks of the unlabelled volumes by one training (the last contender's), native geometry; none is made twice."""
    dataset = read_dataset(store.dataset)
    cases = tuple(v.case for v in store.volumes if not v.labelled)
    missing = tuple(case for case in cases if not (folder / f"{case}{dataset.file_ending}").exists())
    if missing:
        network = load_network(training / "model.safetensors")[0].to(device)
        predict_cases(network, store, dataset, missing, folder, device)


def _refuse_impossible(recipe: Recipe, dataset: Dataset) -> None:
    """What the splits and draws would refuse is said before a folder is begun or anything is computed."""
    members = dataset.members
    options: Any = finetuning_options(recipe.part(recipe.finetune))
    for index in range(split_count(recipe, members)):
        split = make_split(members, dataset.split, recipe.protocol, recipe.seed, index)
        for budget in budgets_of(options):
            drawn = [
                draw_labels(members, split, budget, options.validation, options.seed, draw).train
                for draw in range(recipe.protocol.draws)
            ]
            if len({frozenset(cases) for cases in drawn}) < len(drawn):
                raise GlocalError(
                    f"Two of the {len(drawn)} draws would label the same volumes, so they would not tell chance from "
                    "effect: use a smaller protocol.draws, or another seed."
                )


def _on_this_machine(recipe: Recipe, workers: int, pretrainings: int, finetunings: int) -> dict[str, dict[str, Any]]:
    """Precision and threads, decided once for all pre-trainings and once for all fine-tunings of a run.

    They are kept in `machine.json`, so that trainings which are compared never differ in them, whatever the run is
    continued with.
    """
    path = recipe.out / "machine.json"
    if not path.exists():
        precision = precision_of(device_named(recipe.device), recipe.precision)
        counts = {"pretrain": pretrainings, "finetune": finetunings}
        threads = {part: recipe.threads or max(1, cores() // max(1, min(workers, n))) for part, n in counts.items()}
        write_json(path, {part: {"precision": precision, "threads": threads[part]} for part in counts})
    content: dict[str, dict[str, Any]] = read_json(path)
    return content


def split_count(recipe: Recipe, members: Sequence[Member]) -> int:
    """How many splits there are: with leave-one-out one per labelled subject."""
    if recipe.protocol.leave_one_out:
        return max(1, len({member.subject for member in members if member.labelled}))
    return recipe.protocol.splits


def budgets_of(options: FinetuningOptions) -> list[Any]:
    """The budgets to train with: numbers of volumes, or one list of cases."""
    labels = options.labels
    return list(dict.fromkeys(labels)) if isinstance(labels, tuple) and isinstance(labels[0], int) else [labels]


def _refuse_other_data(jobs: Sequence[Job], store: Store) -> None:
    """Trainings that were finished on other data are said before the first one runs."""
    for job in jobs:
        split: Split = job.arguments["split"]
        made_of = (runs.settings_of(job.folder)["store"], read_split(job.folder)) if job.done() else None
        if made_of not in (None, (store.digest(), split)):
            raise GlocalError(f"The data have changed since {job.folder} was trained: choose another run folder.")


def pretraining_jobs(recipe: Recipe, splits: Sequence[Split], contenders: Sequence[str]) -> list[Job]:
    """One pre-training per contender and split; it serves all draws and budgets."""
    jobs = []
    for split in splits:
        for name in dict.fromkeys(contender.partition("@")[0] for contender in contenders):
            if name == "random":
                continue
            settings = recipe.part(recipe.pretrain[name])
            options = pretraining_options(settings)
            stages = method_named(settings["method"]).stages(options)
            folder = pretraining_folder(recipe.out, split.index, name)
            arguments: dict[str, Any] = {
                "store": recipe.out / "store",
                "run": folder,
                "settings": settings,
                "protocol": recipe.protocol,
                "split": split,
            }
            jobs.append(Job(pretrain, arguments, folder, options.max_iterations * len(stages)))
    return jobs


def finetuning_jobs(recipe: Recipe, splits: Sequence[Split], contenders: Sequence[str]) -> list[Job]:
    """One fine-tuning per split, contender, budget and draw."""
    options = finetuning_options(recipe.part(recipe.finetune))
    budgets = budgets_of(options)
    jobs = []
    # Draws outermost: a run that is stopped half-way has whole pairs to compare.
    for draw in range(recipe.protocol.draws):
        for split in splits:
            for budget in budgets:
                for contender in contenders:
                    source = contender_model(recipe, split.index, contender)
                    settings = recipe.part(recipe.finetune) | {"labels": budget, "draw": draw}
                    count = budget if isinstance(budget, int) else len(budget)
                    folder = (
                        recipe.out / "finetune" / f"split-{split.index}" / contender / f"labels-{count}-draw-{draw}"
                    )
                    arguments: dict[str, Any] = {
                        "store": recipe.out / "store",
                        "run": folder,
                        "settings": settings,
                        "pretrained": source,
                        "protocol": recipe.protocol,
                        "split": split,
                    }
                    jobs.append(Job(finetune, arguments, folder, options.max_iterations))
    return jobs


def pretraining_folder(out: Path, split: int, name: str) -> Path:
    """Where a contender's pre-training on a split lies."""
    return out / "pretrain" / f"split-{split}" / name


def contender_model(recipe: Recipe, split: int, contender: str) -> Path | None:
    """The model file of a contender: of its last stage, or with `NAME@STAGE` of that stage; None for `random`."""
    name, _, stage = contender.partition("@")
    if name == "random":
        return None
    folder = pretraining_folder(recipe.out, split, name)
    if not stage:
        return folder / "model.safetensors"
    settings = recipe.part(recipe.pretrain[name])
    stages = [found for found, _ in method_named(settings["method"]).stages(pretraining_options(settings))]
    if stage not in stages:
        raise GlocalError(f"compare names {contender!r}, but {name} has the stages {', '.join(stages)}.")
    return folder / f"stage-{stages.index(stage) + 1}-{stage}" / "model.safetensors"


def _say(store: Store, splits: Sequence[Split], measured: bool) -> None:
    labelled = sum(volume.labelled for volume in store.volumes)
    first = splits[0]
    console.print(
        f"{store.name}: {len(store.volumes)} volumes, {labelled} labelled; {len(first.pretrain)} to train on, "
        f"{len(first.development)} for development, {len(first.test)} for testing"
        + (f"; {len(splits)} splits" if len(splits) > 1 else "")
        + ".",
        soft_wrap=True,
    )
    if not measured:
        console.print(NOT_MEASURED, soft_wrap=True)
