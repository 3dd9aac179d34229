"""What an experiment varies: axes with their options, and every combination of these as a recipe of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glocal.errors import GlocalError
from glocal.evaluation.significance import StatisticsOptions
from glocal.experiments.layout import TableOptions
from glocal.experiments.recipe import Recipe, make_recipe
from glocal.experiments.trainings import budgets_of
from glocal.options import closest, merged, validated

# Axes with a name shorter than the key of the recipe that they set.
KEYS = {"contender": "compare", "labels": "finetune.labels", "strategy": "finetune.strategy", "network": "network.name"}

Option = dict[str, Any]


class TuneOptions(BaseModel):
    """A search on the development subjects of split 0, equally long for every method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[str, tuple[Any, ...]] = Field(
        min_length=1,
        description="keys of the recipe and the values to try; pretrain.KEY is that of each contender's pre-training",
    )
    trials: int = Field(ge=2, description="settings to try per method; the recipe's own are the first of them")
    labels: int | Literal["all"] = Field(2, description="labelled volumes of every trial")
    draws: int = Field(1, ge=1, description="draws of every trial; their mean decides")


class ExperimentOptions(BaseModel):
    """The part `experiment` of a recipe: what varies, what it is compared with, and what is shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vary: dict[str, list[Any] | dict[str | int | float | bool, dict[str, Any]]] = Field(
        default_factory=dict,
        description="axis: [values], or axis: {option: settings besides}; an axis is contender, labels, strategy, "
        "network, any key of the recipe, or a name of its own with the settings of each option",
    )
    baseline: dict[str, str] = Field(
        default_factory=dict, description="axis: option that all else is compared with; the first contender if not said"
    )
    names: dict[str, str] = Field(default_factory=dict, description="option: how tables and figures call it")
    tables: dict[str, TableOptions] = Field(default_factory=dict, description="tables by name; one of Dice if not said")
    statistics: StatisticsOptions = StatisticsOptions()
    tune: TuneOptions | None = None


@dataclass(frozen=True)
class Variant:
    """One combination of the axes (split and draw apart): its option on each, and the settings that hold there."""

    axes: Mapping[str, str]
    settings: Mapping[str, Any]

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that holds here, with one contender and one budget."""
        return make_recipe(self.settings)

    @property
    def contender(self) -> str:
        """The way to begin."""
        return self.recipe.compare[0]

    @property
    def method(self) -> dict[str, str]:
        """Its options on all axes but the budget."""
        return {axis: option for axis, option in self.axes.items() if axis != "labels"}

    def given(self, settings: Mapping[str, Any]) -> "Variant":
        """The same with other settings (dotted keys) over its own."""
        return Variant(self.axes, merged(self.settings, nested(settings)))


def variants(settings: Mapping[str, Any], options: ExperimentOptions) -> list[Variant]:
    """Every combination of the axes' options.

    Args:
        settings: of the recipe without its part `experiment`.
        options: that part.

    Raises:
        GlocalError: an axis or an option that the recipe does not allow.
    """
    axes = _axes(make_recipe(settings), options)
    found = []
    for chosen in product(*(axis.items() for axis in axes.values())):
        places = dict(zip(axes, (name for name, _ in chosen), strict=True))
        over: dict[str, Any] = {}
        for _, option in chosen:
            over = merged(over, option)
        variant = Variant(places, merged(settings, over))
        try:
            _ = variant.recipe
        except GlocalError as error:
            where = ", ".join(f"{axis}={option}" for axis, option in places.items())
            raise GlocalError(f"The combination {where} is not possible: {error}") from error
        found.append(variant)
    return found


def _axes(recipe: Recipe, options: ExperimentOptions) -> dict[str, dict[str, Option]]:
    """The options of every axis by name; contender and budget are axes of every experiment."""
    axes = {axis: dict(_options(axis, values)) for axis, values in options.vary.items()}
    for axis, found in axes.items():
        if not found:
            raise GlocalError(f"experiment.vary.{axis} names no option: give a list of values.")
    budgets = budgets_of(recipe)
    for axis, values in (("contender", list(recipe.contenders())), ("labels", budgets)):
        key = KEYS[axis].split(".")
        if not any(_holds(option, key) for found in axes.values() for option in found.values()):
            axes[axis] = dict(_options(axis, values))
    axes["labels"] = axes.pop("labels", {"-": {}})  # last, so that tables of the plan read by method
    return axes


def _options(axis: str, values: Sequence[Any] | Mapping[Any, Mapping[str, Any]]) -> Iterator[tuple[str, Option]]:
    """On the axes of `KEYS`, and where values are only listed, the option's name is the value itself."""
    for value in values:
        own = {axis: value} if axis in KEYS or not isinstance(values, Mapping) else {}
        besides = values[value] if isinstance(values, Mapping) else {}
        yield option_name(value), merged(nested(own), nested(besides))


def option_name(value: Any) -> str:
    """An option as tables call it: as people write it in YAML; named cases as their number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return str(len(value))
    return str(value)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a recipe has them: dotted keys as levels, short names of axes as the keys they stand for."""
    result: dict[str, Any] = {}
    for name, given in settings.items():
        key = name if isinstance(given, Mapping) else KEYS.get(name, name)
        value: Any = [given] if key == "compare" and isinstance(given, str) else given
        for level in reversed(key.split(".")):
            value = {level: value}
        result = merged(result, value)
    return result


def _holds(settings: Mapping[str, Any], key: Sequence[str]) -> bool:
    below = settings.get(key[0])
    return below is not None if len(key) == 1 else isinstance(below, Mapping) and _holds(below, key[1:])


def baseline_of(options: ExperimentOptions, found: Sequence[Variant]) -> dict[str, str]:
    """What everything is compared with: as said, else `random` where it is an option, else the first contender.

    Raises:
        GlocalError: an axis or an option that is not varied.
    """
    axes = {axis: list(dict.fromkeys(variant.axes[axis] for variant in found)) for axis in found[0].axes}
    if not options.baseline:
        first = next(iter(axes))
        axis = "contender" if "contender" in axes else first
        return {axis: "random" if "random" in axes[axis] else axes[axis][0]}
    for axis, option in options.baseline.items():
        if axis not in axes:
            raise GlocalError(f"experiment.baseline names the axis {axis!r}: {closest(axis, axes)}")
        if option not in axes[axis]:
            raise GlocalError(f"experiment.baseline names {axis}={option}: {closest(option, axes[axis])}")
    return dict(options.baseline)


def experiment_options(settings: Mapping[str, Any]) -> ExperimentOptions:
    """The typed part `experiment` of a recipe.

    Raises:
        GlocalError: an unknown key or a value that does not fit.
    """
    return validated(ExperimentOptions, settings, "experiment")
