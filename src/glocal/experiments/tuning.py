"""Tuning as a part of an experiment: equally many trials for every method, judged on development subjects only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from glocal.data.split import Member, shuffled
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.experiments.grid import KEYS, TuneOptions, Variant, option_name
from glocal.experiments.layout import TableOptions
from glocal.experiments.plan import Training, plan
from glocal.experiments.recipe import Recipe
from glocal.experiments.results import collect, values_of
from glocal.experiments.trainings import (
    finetuning_settings,
    pretraining_settings,
    refuse_impossible_draws,
    splits_of,
)
from glocal.finetuning.registry import finetuning_options
from glocal.pretraining.registry import pretraining_options
from glocal.runs import flatten

Settings = dict[str, Any]

TUNABLE = ("network", "preprocess", "pretrain", "finetune", "max_iterations")
# These say on whom a method is trained, or by which chance: methods that differ in them cannot be compared.
SAME_FOR_ALL = ("seed", "labels", "validation", "draw")


@dataclass(frozen=True)
class Trial:
    """Settings (dotted keys) that are tried for one method; number 0 are the recipe's own."""

    method: tuple[str, ...]
    number: int
    settings: Settings
    variant: Variant


def trials_of(variants: Sequence[Variant], options: TuneOptions) -> list[Trial]:
    """Equally many trials for every method: the recipe's own settings, and others drawn by the recipe's seed.

    Raises:
        GlocalError: a method has fewer settings to try, a key is an axis, or a key or value does not fit.
    """
    for key in options.keys:
        _refuse_key(key, variants)
    found = []
    firsts: dict[tuple[str, ...], Variant] = {}
    for variant in variants:
        firsts.setdefault(tuple(variant.method.values()), variant)
    for method, variant in firsts.items():
        grid = _grid(variant, options.keys)
        if len(grid) < options.trials - 1:
            raise GlocalError(
                f"experiment.tune.trials={options.trials}, but {' + '.join(method)} has only {len(grid)} settings to "
                "try beside its own: lower trials, or give more values, so that every method is tuned as long."
            )
        order = shuffled(map(str, range(len(grid))), variant.recipe.seed, "tune", *method)
        for number, settings in enumerate([{}, *(grid[int(k)] for k in order[: options.trials - 1])]):
            shown = {axis: option for axis, option in variant.axes.items() if axis != "labels"}
            places = {**shown, "labels": option_name(options.labels), "trial": str(number)}
            short = {"finetune.labels": options.labels, "protocol.evaluate": "development"}
            tried = variant.given(settings).given({**short, "protocol.draws": options.draws})
            found.append(Trial(method, number, settings, Variant(places, tried.settings)))
    return sorted(found, key=lambda trial: trial.number)


def _refuse_key(key: str, variants: Sequence[Variant]) -> None:
    """What an axis or any of its options sets is not tuned: the choice would take its place everywhere."""
    settings = [flatten(dict(variant.settings)) for variant in variants]
    axes = [KEYS.get(axis, axis) for axis in variants[0].axes]
    for full in {KEYS.get(name, name) for variant in variants for name in _keys_of(variant, {key: ()})}:
        if full in axes or len({str(found.get(full)) for found in settings}) > 1:
            raise GlocalError(
                f"experiment.tune.keys names {key}, which experiment.vary varies: leave it to one of them."
            )
        if full.partition(".")[0] not in TUNABLE or full.rpartition(".")[2] in SAME_FOR_ALL:
            raise GlocalError(
                f"experiment.tune.keys names {key}, which must be the same for all methods: tune keys of "
                f"{', '.join(TUNABLE)}, but not {', '.join(SAME_FOR_ALL)}."
            )


def _grid(variant: Variant, keys: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """All combinations of the values that train a method in another way than its own settings and each other."""
    concerned = _keys_of(variant, keys)
    found: list[tuple[Any, Settings]] = [(_effect(variant.recipe), {})]
    for chosen in product(*concerned.values()):
        settings = dict(zip(concerned, chosen, strict=True))
        effect = _effect(variant.given(settings).recipe)
        if effect not in [known for known, _ in found]:
            found.append((effect, settings))
    return [settings for _, settings in found[1:]]


def _effect(recipe: Recipe) -> tuple[Any, ...]:
    """All options that decide a training, defaults filled in."""
    (contender,) = recipe.compare
    before = None if contender == "random" else pretraining_options(pretraining_settings(recipe, contender))
    return recipe.preprocess, before, finetuning_options(finetuning_settings(recipe, 1, 0))


def _keys_of(variant: Variant, keys: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The keys that concern a method: those of pre-training as its contender's own, none of these for `random`."""
    contender = variant.contender.partition("@")[0]
    concerned: dict[str, Sequence[Any]] = {}
    for key, values in keys.items():
        part, _, below = key.partition(".")
        if part != "pretrain":
            concerned[key] = values
        elif below.partition(".")[0] in variant.recipe.pretrain:
            concerned |= {key: values} if below.partition(".")[0] == contender else {}
        elif contender != "random":
            concerned[f"pretrain.{contender}.{below}"] = values
    return concerned


def refuse_untunable(recipe: Recipe, members: Sequence[Member], given: dict[str, list[str]] | None) -> None:
    """What is chosen must be chosen on somebody.

    Raises:
        GlocalError: split 0 has no labelled development subject, or not the labelled volumes that trials ask for.
    """
    refuse_impossible_draws(recipe, members, given)
    labelled = {member.case for member in members if member.labelled}
    if not labelled & set(splits_of(recipe, members, given)[0].development):
        raise GlocalError(
            "experiment.tune chooses settings on development subjects, and there are none: list some labelled cases "
            "as `development` in the split.json of the dataset (which leave_one_out does not heed)."
        )


def tuning_trainings(trials: Sequence[Trial], stores: Mapping[Path, Store], out: Path) -> list[Training]:
    """The trainings of the trials, on split 0."""
    return [t for t in plan([trial.variant for trial in trials], stores, out) if t.split.index == 0]


def judged(trials: Sequence[Trial], trainings: Sequence[Training]) -> pd.DataFrame:
    """Mean Dice of every trial on the development subjects, and which was chosen of each method (the best, the earlier
    of equals).

    Returns:
        Columns method, trial, settings, dice (NaN for a trial of which a training failed), chosen (none of a method of
        which every trial has failed).
    """
    results = collect(trainings)
    axes = list(trials[0].variant.axes)
    planned: Counter[Any] = Counter(tuple(training.variant.axes.values()) for training in trainings)
    dice = {}
    if not results.empty:
        values = values_of(results, axes, TableOptions())
        per_training = values.groupby([*axes, "split", "draw"], sort=False)["value"].mean()
        for place, found in per_training.groupby(axes, sort=False):
            if len(found) == planned[place]:  # some draws of a trial are no fair comparison with all of another
                dice[place] = found.mean()
    rows = [
        {
            "method": " + ".join(trial.method),
            "trial": trial.number,
            "settings": ", ".join(f"{key}={option_name(value)}" for key, value in trial.settings.items())
            or "as in the recipe",
            "dice": dice.get(tuple(trial.variant.axes.values()), float("nan")),
        }
        for trial in trials
    ]
    frame = pd.DataFrame(rows)
    best = frame.dropna(subset="dice").groupby("method")["dice"].idxmax()
    return frame.assign(chosen=frame.index.isin(best))


def tuned(variants: Sequence[Variant], trials: Sequence[Trial], judgement: pd.DataFrame) -> list[Variant]:
    """The variants with the settings that were chosen for their method; without those for which nothing could be.

    Raises:
        GlocalError: nothing could be chosen for any.
    """
    chosen = {
        trial.method: trial.settings for trial, is_chosen in zip(trials, judgement["chosen"], strict=True) if is_chosen
    }
    if not chosen:
        raise GlocalError(
            "Every tuning trial has failed, so no settings can be chosen: see failure.txt in their folders."
        )
    kept = [variant for variant in variants if tuple(variant.method.values()) in chosen]
    return [variant.given(chosen[tuple(variant.method.values())]) for variant in kept]
