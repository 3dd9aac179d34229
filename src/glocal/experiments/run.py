"""The whole road: preprocess, pre-train every contender on every split, fine-tune every draw, measure, report."""

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from glocal import distributed, runs
from glocal.data.dataset import read_dataset
from glocal.data.inputs import input_of
from glocal.data.preprocess import preprocess
from glocal.data.split import Split, read_split
from glocal.data.store import Store
from glocal.devices import device_named, precision_of
from glocal.errors import GlocalError
from glocal.experiments.derive import derived
from glocal.experiments.executors import default_workers, executor_named
from glocal.experiments.jobs import Job, do
from glocal.experiments.recipe import Recipe, make_recipe, read_recipe
from glocal.experiments.report import report, warnings_below
from glocal.experiments.tables import write_tables
from glocal.experiments.trainings import (
    budgets_of,
    finetuning_job,
    pretraining_job,
    refuse_impossible_draws,
    refuse_unmeasured,
    splits_of,
    uses_labels,
)
from glocal.files import read_json, write_json
from glocal.finetuning.measure import measured_cases
from glocal.inference import predict
from glocal.predictions import PAGE
from glocal.processes import cores
from glocal.progress import console

NOT_MEASURED = (
    "No labelled volume is left for testing, so there will be no Dice of unseen cases: look at the masks of the "
    "unlabelled ones, or measure by leave-one-out, which trains once per labelled volume and tests on it "
    "(protocol.leave_one_out=true, with finetune.labels=all or one less than you have, in another run folder)."
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
    settings.pop("experiment", None)  # what varies beyond contenders, budgets and draws is for `glocal experiment`
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
    dataset = read_dataset(recipe.data)
    device_named(recipe.device)  # refused now, not after hours of preprocessing
    refuse_impossible_draws(recipe, dataset.members, dataset.split)
    if recipe.protocol.evaluate == "development":  # who names them wants to measure; test subjects one may do without
        refuse_unmeasured(recipe, dataset.members, dataset.split)
    runs.begin(out, "run", recipe.model_dump(mode="json", exclude={"out"}))
    with runs.held(out):
        last = _whole_road(recipe, workers)
        if not runs.finished(out):
            runs.finish(out, started, kind="run", warnings=[], masks_by=str(last.relative_to(out)))
        report(out)
    for warning in warnings_below(out):
        console.print(f"Warning: {warning}", style="yellow", markup=False)
    return out


def _whole_road(recipe: Recipe, workers: int | None) -> Path:
    """All steps but the report; the training that made the masks of the unlabelled volumes."""
    out = recipe.out
    store = preprocess(recipe.data, out / "store", recipe.preprocess, workers=workers)
    workers = workers or default_workers(recipe.device)
    splits = splits_of(recipe, store.volumes, store.split)
    measured = any(measured_cases(store, split, recipe.protocol) for split in splits)
    _say(store, splits, measured)
    contenders = recipe.contenders(measured)
    pretraining, finetuning = pretraining_jobs(recipe, splits, contenders), finetuning_jobs(recipe, splits, contenders)
    machine = _on_this_machine(recipe, workers, len(pretraining), len(finetuning))
    for part, jobs in (("pretrain", pretraining), ("finetune", finetuning)):
        for job in jobs:
            job.arguments["settings"] |= machine[part]
    _refuse_other_data([*pretraining, *finetuning], store)
    with executor_named("local", workers, recipe.device) as executor:
        do([*pretraining, *finetuning], "Training", executor)
    write_json(out / "split.json", {"splits": [split.__dict__ for split in splits]})
    write_tables(out)
    last = finetuning[-1].folder
    predict_unlabelled(store, last, out / "masks", recipe.protocol.tta, recipe.device)
    return last


def predict_unlabelled(store: Store, training: Path, folder: Path, tta: bool, device: str) -> None:
    """Masks of the unlabelled volumes by one training, with maps of doubt and a page of those to look at first."""
    unlabelled = {volume.case for volume in store.volumes if not volume.labelled}
    inputs = [input_of(case.name, case.images) for case in read_dataset(store.dataset).cases if case.name in unlabelled]
    wanted = [folder / PAGE, *(folder / case.target for case in inputs)]  # the page is written last
    if inputs and not all(path.exists() for path in wanted):
        predict(training / "model.safetensors", inputs, folder, device=device, tta=tta, uncertainty=True)


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


def _refuse_other_data(jobs: Sequence[Job], store: Store) -> None:
    """Trainings that were finished on other data are said before the first one runs."""
    for job in jobs:
        split: Split = job.arguments["split"]
        made_of = (runs.settings_of(job.folder)["store"], read_split(job.folder)) if job.done() else None
        if made_of not in (None, (store.digest(), split)):
            raise GlocalError(f"The data have changed since {job.folder} was trained: choose another run folder.")


def pretraining_jobs(recipe: Recipe, splits: Sequence[Split], contenders: Sequence[str]) -> list[Job]:
    """One pre-training per contender and split, which serves all draws and budgets; with labels, one for each."""
    names = [
        name for name in dict.fromkeys(contender.partition("@")[0] for contender in contenders) if name != "random"
    ]
    jobs: dict[Path, Job] = {}
    for draw, split, budget, name in product(range(recipe.protocol.draws), splits, budgets_of(recipe), names):
        folder = _pretraining_folder(recipe, split, name, budget, draw)
        if folder not in jobs:
            jobs[folder] = pretraining_job(recipe, name, split, budget, draw, recipe.out / "store", folder)
    return list(jobs.values())


def finetuning_jobs(recipe: Recipe, splits: Sequence[Split], contenders: Sequence[str]) -> list[Job]:
    """One fine-tuning per split, contender, budget and draw."""
    budgets = budgets_of(recipe)
    # Draws outermost: a run that is stopped half-way has whole pairs to compare.
    places = product(range(recipe.protocol.draws), splits, budgets, contenders)
    return [_finetuning_job(recipe, *place) for place in places]


def _finetuning_job(recipe: Recipe, draw: int, split: Split, budget: Any, contender: str) -> Job:
    name = contender.partition("@")[0]
    before = None if contender == "random" else _pretraining_folder(recipe, split, name, budget, draw)
    folder = recipe.out / "finetune" / f"split-{split.index}" / contender / _of_draw(budget, draw)
    return finetuning_job(recipe, contender, split, budget, draw, recipe.out / "store", folder, before)


def _pretraining_folder(recipe: Recipe, split: Split, name: str, budget: Any, draw: int) -> Path:
    own = f"{name}-{_of_draw(budget, draw)}" if uses_labels(recipe, name) else name
    return recipe.out / "pretrain" / f"split-{split.index}" / own


def _of_draw(budget: Any, draw: int) -> str:
    return f"labels-{len(budget) if isinstance(budget, tuple) else budget}-draw-{draw}"


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
