"""The tables of a run: every measured row, one score per training, and differences paired with random."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from glocal import runs
from glocal.data.split import ProtocolOptions
from glocal.errors import GlocalError
from glocal.evaluation.evaluate import per_subject
from glocal.files import read_json, replacing, write_text
from glocal.finetuning.measure import evaluation_file, evaluation_of

KEYS = ["split", "contender", "labels", "draw", "checkpoint"]


def collect_results(out: Path) -> pd.DataFrame:
    """Everything that the trainings of a run have measured, with split, contender, budget and draw.

    Returns:
        One row per training, checkpoint, case and class; empty if nothing was measured.
    """
    frames = []
    recipe = runs.settings_of(out)
    order = {name: place for place, name in enumerate(["random", *(recipe["compare"] or recipe["pretrain"])])}
    measured = ProtocolOptions.model_validate(recipe["protocol"]).measured
    trainings = sorted((out / "finetune").glob("split-*/*/labels-*"))
    for run in sorted(trainings, key=lambda run: order[run.parent.name]):  # contenders as the recipe has them
        if not evaluation_file(run, measured).exists():
            continue
        settings, draw = runs.settings_of(run), read_json(run / "split.json")["draw"]
        labels, frame = settings["labels"], evaluation_of(run, measured)
        facts = {
            "split": settings["split"],
            "contender": run.parent.name,
            "labels": len(labels) if isinstance(labels, list) else labels,
            "validation": settings["validation"],
            "draw": draw["index"],
        }
        for place, (key, value) in enumerate(facts.items()):
            frame.insert(place, key, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*KEYS, "validation", "dice"])


def scores(results: pd.DataFrame) -> pd.DataFrame:
    """Mean foreground Dice of each training: over classes per case, then over a subject's cases, then over subjects.

    Returns:
        Columns split, contender, labels, draw, checkpoint, validation, dice.
    """
    keys = [*KEYS, "validation"]
    return per_subject(results, "dice", keys).groupby(keys, sort=False).mean().reset_index()


def paired(table: pd.DataFrame, baseline: str = "random") -> pd.DataFrame:
    """Score minus that of the baseline with the same split, budget, draw and checkpoint.

    Returns:
        The columns of `scores` and `difference`; the baseline's own rows are left out.
    """
    keys = ["split", "labels", "draw", "checkpoint"]
    base = table[table["contender"] == baseline].set_index(keys)["dice"].rename("base")
    joined = table[table["contender"] != baseline].join(base, on=keys, how="inner")
    return joined.assign(difference=joined["dice"] - joined["base"]).drop(columns="base")


def summarise(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per budget and contender, random first: mean and deviation of score and of difference to random."""
    rows = []
    differences = paired(table[table["checkpoint"] == "last"])
    budgets = dict(list(table.groupby(["labels", "validation"], sort=False)))
    for labels, validation in sorted(budgets, key=lambda budget: (budget_size(budget[0]), budget[1])):
        of_budget = budgets[labels, validation]
        for contender in of_budget["contender"].unique():
            mine = of_budget[of_budget["contender"] == contender]
            last = mine[mine["checkpoint"] == "last"]["dice"]
            best = mine[mine["checkpoint"] == "best"]["dice"]
            delta = differences[(differences["labels"] == labels) & (differences["contender"] == contender)][
                "difference"
            ]
            rows.append(
                {
                    "labels": f"{labels} + {validation} for validation" if validation else str(labels),
                    "contender": contender,
                    "trainings": len(last),
                    "dice": _spread(last),
                    "best_dice": _spread(best) if len(best) else "",
                    "difference": _spread(delta, signed=True) if len(delta) else "",
                    "positive": f"{int((delta > 0).sum())} of {len(delta)}" if len(delta) else "",
                }
            )
    return rows


def budget_size(labels: Any) -> float:
    """A budget for sorting: its number of labels; `all` comes after every number."""
    return math.inf if labels == "all" else int(labels)


def _spread(values: pd.Series, signed: bool = False) -> str:
    mean = f"{values.mean():+.3f}" if signed else f"{values.mean():.3f}"
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def caption(out: Path) -> str:
    """What the numbers of a run's table are, in words."""
    settings = runs.settings_of(out)
    protocol = settings["protocol"]
    draws = f"{protocol['draws']} draw{'s' * (protocol['draws'] != 1)}"
    subjects = (
        "development subjects (for choosing settings)" if protocol["evaluate"] == "development" else "test subjects"
    )
    words = (
        f"Volume-wise Dice in native resolution, mean over foreground classes, then over {subjects}; last checkpoint; "
        f"mean ± standard deviation over all trainings, {draws} of the labelled volumes a split. "
        "Differences are paired with random initialisation: same split, same labelled volumes. Draws of one split "
        "share test subjects and pre-trained weights, so they are no independent trials."
    )
    if protocol.get("tta"):
        words += " Masks are means over moved views of each slice (test-time augmentation)."
    if protocol["budget"] == "subjects":
        words += " Labels are counted in subjects: each brings all its labelled volumes."
    if protocol["transductive"]:
        words += " Transductive: the images of test subjects were part of the pre-training."
    return words


HEADINGS = {
    "labels": "Labelled volumes",
    "contender": "Pre-training",
    "trainings": "Trainings",
    "dice": "Dice",
    "best_dice": "Dice, best on validation",
    "difference": "Difference to random",
    "positive": "Better than random",
}


def write_tables(out: Path) -> list[dict[str, Any]]:
    """Write `results.csv`, `scores.csv` and `table.md` of a run; nothing if nothing was measured.

    Returns:
        The rows of the table.
    """
    results = collect_results(out)
    if results.empty:
        return []
    table = scores(results)
    for name, frame in (("results", results), ("scores", table)):
        with replacing(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
    rows = summarise(table)
    shown = [key for key in HEADINGS if any(row[key] != "" for row in rows)]
    lines = [
        "| " + " | ".join(HEADINGS[key] for key in shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(str(row[key]) for key in shown) + " |" for row in rows),
    ]
    write_text(out / "table.md", "\n".join([*lines, "", caption(out), ""]))
    return rows


def read_table(out: Path) -> list[dict[str, Any]]:
    """The rows of a finished run's table.

    Raises:
        GlocalError: the run has measured nothing.
    """
    if not (out / "scores.csv").exists():
        raise GlocalError(f"{out} has measured nothing: no labelled volume was kept for testing.")
    return summarise(pd.read_csv(out / "scores.csv"))
