"""`glocal experiment`: plan a grid of trainings, do what is not done yet, and say what came out."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path

from rich.table import Table

from glocal import distributed, runs
from glocal.data.preprocess import preprocess
from glocal.data.store import Store
from glocal.errors import Busy, GlocalError
from glocal.experiments.design import Experiment, read_experiment
from glocal.experiments.estimate import Kind, estimate
from glocal.experiments.executors import Executors, executor_named
from glocal.experiments.jobs import Failure, do
from glocal.experiments.page import write_results
from glocal.experiments.plan import Training, jobs_of, plan, store_folder
from glocal.experiments.sections import count
from glocal.experiments.tuning import judged, tuned, tuning_trainings
from glocal.files import write_json
from glocal.progress import console, duration

WAIT_SECONDS = 2.0  # before a store that another experiment is making is looked at again


def experiment(
    recipe: str,
    words: Sequence[str] = (),
    executor: str | Executor = "local",
    workers: int | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Do all trainings of an experiment that are not done yet, then write its tables, figures and page.

    Args:
        recipe: the name of a packaged recipe, or a YAML file; its part `experiment` says what varies.
        words: `key=value` settings over the recipe's; `data` is needed somewhere.
        executor: `local`, or `dask://HOST:PORT`; or any executor of `concurrent.futures` whose workers are processes
            that see the same folders.
        workers: trainings at the same time; None decides by the machine or the cluster.
        dry_run: preprocess, measure a few steps, say how many trainings there are and how long they take, and stop.

    Returns:
        The page, `OUT/NAME/index.html`; None for a dry run.

    Raises:
        GlocalError: what the user can correct, before anything runs where possible; at the end if trainings failed.
    """
    if distributed.started() > 1:
        raise GlocalError(
            "`glocal experiment` shares the trainings out among workers of its own: start it without torchrun or srun."
        )
    design = read_experiment(recipe, words)
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(runs.held(design.folder))
        at = stack.enter_context(executor_named(executor, workers, design.variants[0].recipe.device))
        return _all_of_it(design, at, dry_run)


def _all_of_it(design: Experiment, executor: Executors, dry_run: bool) -> Path | None:
    machine = design.out / "machine.json"
    if not dry_run and design.settings.get("precision", "auto") == "auto" and not machine.exists():
        write_json(machine, {"precision": design.variants[0].recipe.precision})
    stores = _stores(design)
    searching = tuning_trainings(design.trials, stores, design.out)
    trainings = plan(design.variants, stores, design.out)
    _say(design, searching, trainings, estimate(jobs_of([*searching, *trainings]), executor, design.out), executor)
    if dry_run:
        return None
    failures: list[Failure] = []
    tuning = None
    if searching:
        failures += do(jobs_of(searching), "Tuning", executor, keep_going=True)
        tuning = judged(design.trials, searching)
        trainings = plan(tuned(design.variants, design.trials, tuning), stores, design.out)
    failures += do(jobs_of(trainings), design.name, executor, keep_going=True)
    page = write_results(design, trainings, failures, stores, tuning)
    if failures:
        raise GlocalError(
            f"{count(failures, 'training')} of {design.name} failed or could not begin, first "
            f"{failures[0].job.folder}: {failures[0].reason} All are listed in {page}; the same command tries them "
            "again."
        )
    return page


def _stores(design: Experiment) -> dict[Path, Store]:
    """One store for each way of preprocessing; one that another experiment is making is waited for."""
    variants = [*design.variants, *(trial.variant for trial in design.trials)]
    recipes = {store_folder(design.out, variant.recipe): variant.recipe for variant in variants}
    stores = {}
    for folder, recipe in recipes.items():
        while folder not in stores:
            try:
                stores[folder] = preprocess(recipe.data, folder, recipe.preprocess)
            except Busy:
                time.sleep(WAIT_SECONDS)
    return stores


def _say(
    design: Experiment,
    searching: Sequence[Training],
    trainings: Sequence[Training],
    kinds: Sequence[Kind],
    executor: Executors,
) -> None:
    """The plan: what varies, how many trainings of each kind, how many of them are done, and the time that is left."""
    axes = {**design.axes, "split": {str(t.split.index) for t in trainings}, "draw": {str(t.draw) for t in trainings}}
    varied = " x ".join(f"{axis} ({len(options)})" for axis, options in axes.items())
    console.print(f"{design.name}: {varied}; compared with {_words(design.baseline)}.", soft_wrap=True, highlight=False)
    if searching:
        console.print(
            f"First {len(searching)} trainings, measured on development subjects, choose settings.", highlight=False
        )
    table = Table("Training", "In all", "Left", "Seconds an iteration", "Time left", box=None, pad_edge=False)
    for kind in kinds:
        left = _to_train(kind)
        figures = (f"{kind.step:.3f}", duration(kind.seconds)) if left else ("", "")
        table.add_row(kind.name, str(len(kind.jobs)), str(left), *figures)
    console.print(table)
    for kind in kinds:
        if kind.problem:
            text = f"Warning: {kind.name} cannot be done: {kind.problem}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)
    left = sum(map(_to_train, kinds))
    measured = sum(len(kind.open_jobs) for kind in kinds) - left
    slots = max(1, executor.slots())
    seconds = sum(kind.seconds for kind in kinds) / slots
    at_once = f", {slots} at a time" if slots > 1 else ""
    text = f"{left} of {sum(len(kind.jobs) for kind in kinds)} trainings to do{at_once}: about {duration(seconds)}."
    text = text if left else "Every training is done."
    text += f" {count(range(measured), 'finished one')} only to be measured." if measured else ""
    console.print(text, soft_wrap=True, highlight=False)


def _to_train(kind: Kind) -> int:
    return sum(job.left > 0 for job in kind.open_jobs)


def _words(place: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}={option}" for axis, option in place.items())
