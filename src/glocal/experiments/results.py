"""What the trainings of an experiment have measured, as tidy frames."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from glocal.errors import GlocalError
from glocal.evaluation.evaluate import per_subject
from glocal.experiments.layout import TableOptions
from glocal.experiments.plan import Training
from glocal.finetuning.measure import evaluation_file, evaluation_of


def collect(trainings: Sequence[Training]) -> pd.DataFrame:
    """Every measured row of the finished trainings.

    Returns:
        The axes, split, draw, validation (how many volumes), run (its folder) and the columns of `evaluate`; empty
        where nothing was measured.
    """
    frames = []
    for training in trainings:
        job = training.job
        if not job.done() or not evaluation_file(job.folder, job.measured).exists():
            continue
        validation = job.arguments["settings"].get("validation", 0)
        facts = {**training.place, "validation": validation, "run": str(job.folder)}
        frames.append(evaluation_of(job.folder, job.measured).assign(**facts))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def values_of(results: pd.DataFrame, axes: Sequence[str], table: TableOptions) -> pd.DataFrame:
    """The values that a table is made of: one row per training and subject.

    Args:
        results: of `collect`.
        axes: names of the axes.
        table: says which metric, structure and checkpoint.

    Returns:
        The axes, split, draw, subject, validation and value: the mean over classes per case, then over a subject's
        cases.

    Raises:
        GlocalError: there is no such structure, or nothing was measured in this way.
    """
    classes = list(results["class"].unique())
    if table.structure not in ("mean", *classes):
        raise GlocalError(f"A table names the structure {table.structure!r}: choose mean or {', '.join(classes)}.")
    chosen = results[results["checkpoint"] == table.checkpoint]
    if table.structure != "mean":
        chosen = chosen[chosen["class"] == table.structure]
    keys = [*axes, "split", "draw", "validation"]
    values = per_subject(chosen, table.metric, keys).rename("value").reset_index()
    if values["value"].isna().all():
        raise GlocalError(
            f"A table shows {table.metric} of the {table.checkpoint} checkpoint, which no training has measured: the "
            "best checkpoint needs finetune.validation, and distances need a spacing that is known."
        )
    return values


def scores_of(trainings: Sequence[Training], results: pd.DataFrame) -> pd.DataFrame:
    """One row per training of the plan: its place, its folder, and its Dice if it has been measured.

    Returns:
        The axes, split, draw, run, pretraining (folder's name), done, dice (of the last checkpoint: mean over classes,
        then over a subject's cases, then over subjects).
    """
    dice: dict[Any, Any] = {}
    if not results.empty:
        last = results[results["checkpoint"] == "last"]
        dice = per_subject(last, "dice", ["run"]).groupby("run").mean().to_dict()
    return pd.DataFrame(
        [
            {
                **training.place,
                "run": str(training.job.folder),
                "pretraining": training.before.folder.name if training.before else "",
                "done": training.job.done(),
                "dice": dice.get(str(training.job.folder), float("nan")),
            }
            for training in trainings
        ]
    )
