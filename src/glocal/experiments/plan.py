"""The plan of an experiment: every training with its place in the grid, in a folder named after its identity.

A training that two experiments ask for lies in one folder, and one that was finished is never repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glocal import runs
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.experiments.executors import Work
from glocal.experiments.grid import Variant
from glocal.experiments.jobs import Job
from glocal.experiments.recipe import Recipe
from glocal.experiments.report import report
from glocal.experiments.trainings import (
    budgets_of,
    finetuning_job,
    finetuning_settings,
    pretraining_job,
    pretraining_of_draw,
    splits_of,
)
from glocal.finetuning import finetune as finetuning
from glocal.finetuning.registry import finetuning_options
from glocal.pretraining import pretrain as pretraining
from glocal.pretraining.registry import pretraining_options


@dataclass(frozen=True)
class Training:
    """One fine-tuning of the grid, its place there, and the pre-training it begins with (none for `random`)."""

    variant: Variant
    split: Split
    draw: int
    job: Job
    before: Job | None

    @property
    def place(self) -> dict[str, Any]:
        """Option on every axis, split and draw."""
        return {**self.variant.axes, "split": self.split.index, "draw": self.draw}


def store_folder(out: Path, recipe: Recipe) -> Path:
    """Where the slices lie that a recipe's preprocessing makes of its dataset."""
    made_of = {"data": str(recipe.data.resolve()), **recipe.preprocess.model_dump(mode="json", exclude_defaults=True)}
    return out / "stores" / f"{recipe.data.name}-{runs.identity(made_of)}"


def plan(variants: Sequence[Variant], stores: Mapping[Path, Store], out: Path) -> list[Training]:
    """Every training of the grid; draws outermost, so that an experiment which is stopped half-way has whole pairs.

    Args:
        variants: the combinations of axes, with precision and threads decided.
        stores: by `store_folder`.
        out: the folder that trainings are shared in.
    """
    found = []
    for draw in range(max((variant.recipe.protocol.draws for variant in variants), default=0)):
        for variant in variants:
            recipe = variant.recipe
            store = stores[store_folder(out, recipe)]
            if draw < recipe.protocol.draws:
                splits = splits_of(recipe, store.volumes, store.split)
                found += [_training(variant, split, draw, store, out) for split in splits]
    return sorted(found, key=lambda training: (training.draw, training.split.index))


def _training(variant: Variant, split: Split, draw: int, store: Store, out: Path) -> Training:
    recipe, contender = variant.recipe, variant.contender
    before, source = None, None
    (budget,) = budgets_of(recipe)
    if contender != "random":
        options = pretraining_options(pretraining_of_draw(recipe, contender, budget, draw))
        facts = pretraining.facts_of_run(store, options, recipe.protocol)
        source = _identity(options, facts, split)
        folder = out / "pretrain" / f"{options.method}-{source}"  # type: ignore[attr-defined]  # every method has it
        before = _reported(pretraining_job(recipe, contender, split, budget, draw, store.path, folder), store)
    tuning = finetuning_options(finetuning_settings(recipe, budget, draw))
    facts = finetuning.facts_of_run(store, tuning, split, recipe.protocol)
    facts |= {"pretrained": source, "stage": contender.partition("@")[2]}
    folder = out / "finetune" / f"{tuning.strategy}-{_identity(tuning, facts, split)}"
    job = finetuning_job(recipe, contender, split, budget, draw, store.path, folder, before.folder if before else None)
    return Training(variant, split, draw, _reported(job, store), before)


def _reported(job: Job, store: Store) -> Job:
    return replace(job, work=train_and_report, arguments={"train": job.work, "data": store.digest(), **job.arguments})


def train_and_report(train: Work, data: str, store: Path, run: Path, **arguments: Any) -> None:
    """Train, and write the training's own report, where its worker has the time.

    Raises:
        GlocalError: the store no longer has the digest `data`, of which the folder of the training is named.
    """
    if Store.open(store).digest() != data:
        raise GlocalError(
            f"The data of {store} have changed since this experiment began: start it again, and it plans its trainings "
            "on what is there now."
        )
    train(store=store, run=run, **arguments)
    report(run)


def _identity(options: TrainingOptions, facts: dict[str, Any], split: Split) -> str:
    """Of all that decides a training's results; options at their defaults are covered by the components' versions.

    So an option that a later version adds leaves finished trainings valid; who changes a default raises a version.
    """
    return runs.identity({**facts, "options": options.model_dump(mode="json", exclude_defaults=True), **asdict(split)})


def jobs_of(trainings: Sequence[Training]) -> list[Job]:
    """Every job once, pre-trainings before the fine-tunings that need them; the first of the list are done first.

    A pre-training that was removed for its space is not done again while all its fine-tunings are there, though they be
    measured on other subjects.
    """
    jobs: dict[Path, Job] = {}
    for training in trainings:
        if training.before is not None and (training.before.done() or training.job.left):
            jobs.setdefault(training.before.folder, training.before)
        jobs.setdefault(training.job.folder, training.job)
    return list(jobs.values())
