"""The whole road: preprocess, pre-train every contender on every split, fine-tune every draw, measure, report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glocal import runs
from glocal.data.dataset import read_dataset
from glocal.data.preprocess import preprocess
from glocal.data.split import Split, draw_labels, make_split, read_split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments.derive import derived
from glocal.experiments.jobs import Job, default_workers, do
from glocal.experiments.recipe import Recipe, make_recipe, read_recipe
from glocal.experiments.tables import write_tables
from glocal.files import write_json
from glocal.finetuning.finetune import finetune
from glocal.finetuning.registry import finetuning_options
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import method_named, pretraining_options
from glocal.progress import console


def run(recipe: str, words: Sequence[str] = (), workers: int | None = None) -> Path:
    """Do all that a recipe says; started again, it continues where it stopped.

    Args:
        recipe: the name of a packaged recipe, or a YAML file.
        words: `key=value` settings over the recipe's; `data` and `out` are needed somewhere.
        workers: runs at the same time, each with one thread; None decides by the machine.

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
    from glocal.reporting.report import report

    started = time.time()
    if recipe.data is None or recipe.out is None:
        raise GlocalError("Say which data and where to: data=DATASET out=RUN.")
    out, workers = recipe.out, workers or default_workers()
    read_dataset(recipe.data)  # a malformed dataset is said before a folder is made
    runs.begin(out, "run", recipe.model_dump(mode="json", exclude={"out"}))
    store = preprocess(recipe.data, out / "store", recipe.preprocess, workers=workers)
    splits = [
        make_split(store.volumes, store.split, recipe.protocol, recipe.seed, index)
        for index in range(split_count(recipe, store))
    ]
    _say(recipe, store, splits)
    pretraining, finetuning = pretraining_jobs(recipe, splits), finetuning_jobs(recipe, splits)
    _refuse_early([*pretraining, *finetuning], store)
    do(pretraining, "Pre-training", workers)
    do(finetuning, "Fine-tuning", workers)
    write_json(out / "split.json", {"splits": [split.__dict__ for split in splits]})
    write_tables(out)
    if not runs.finished(out):
        runs.finish(out, started, kind="run", warnings=[])
    report(out)
    return out


def split_count(recipe: Recipe, store: Store) -> int:
    """How many splits there are: with leave-one-out one per labelled subject."""
    if recipe.protocol.leave_one_out:
        return len({volume.subject for volume in store.volumes if volume.labelled})
    return recipe.protocol.splits


def _refuse_early(jobs: Sequence[Job], store: Store) -> None:
    """What the last job could not do is said before the first one runs."""
    for job in jobs:
        split: Split = job.arguments["split"]
        made_of = (runs.settings_of(job.folder)["store"], read_split(job.folder)) if job.done() else None
        if made_of not in (None, (store.digest(), split)):
            raise GlocalError(f"The data have changed since {job.folder} was trained: choose another run folder.")
        if job.work is finetune:
            options: Any = finetuning_options(job.arguments["settings"])
            draw_labels(store.volumes, split, options.labels, options.validation, options.seed, options.draw)


def pretraining_jobs(recipe: Recipe, splits: Sequence[Split]) -> list[Job]:
    """One pre-training per contender and split; it serves all draws and budgets."""
    assert recipe.out is not None
    jobs = []
    for split in splits:
        for name in dict.fromkeys(contender.partition("@")[0] for contender in recipe.contenders()):
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


def finetuning_jobs(recipe: Recipe, splits: Sequence[Split]) -> list[Job]:
    """One fine-tuning per split, contender, budget and draw."""
    assert recipe.out is not None
    options = finetuning_options(recipe.part(recipe.finetune))
    labels = options.labels
    budgets = dict.fromkeys(labels) if isinstance(labels, tuple) and isinstance(labels[0], int) else (labels,)
    jobs = []
    # Draws outermost: a run that is stopped half-way has whole pairs to compare.
    for draw in range(recipe.protocol.draws):
        for split in splits:
            for budget in budgets:
                for contender in recipe.contenders():
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
    assert recipe.out is not None
    folder = pretraining_folder(recipe.out, split, name)
    if not stage:
        return folder / "model.safetensors"
    settings = recipe.part(recipe.pretrain[name])
    stages = [found for found, _ in method_named(settings["method"]).stages(pretraining_options(settings))]
    if stage not in stages:
        raise GlocalError(f"compare names {contender!r}, but {name} has the stages {', '.join(stages)}.")
    return folder / f"stage-{stages.index(stage) + 1}-{stage}" / "model.safetensors"


def _say(recipe: Recipe, store: Store, splits: Sequence[Split]) -> None:
    labelled = sum(volume.labelled for volume in store.volumes)
    first = splits[0]
    console.print(
        f"{store.name}: {len(store.volumes)} volumes, {labelled} labelled; {len(first.pretrain)} to train on, "
        f"{len(first.development)} for development, {len(first.test)} for testing"
        + (f"; {len(splits)} splits" if len(splits) > 1 else "")
        + "."
    )
    if not first.test and recipe.protocol.evaluate == "test":
        console.print(
            "No labelled volume is left for testing: there will be masks but no Dice of unseen cases "
            "(protocol.leave_one_out=true measures one by training once per labelled volume)."
        )
