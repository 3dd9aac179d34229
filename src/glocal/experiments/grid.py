"""What an experiment varies: axes with their options, and every combination of these as a recipe of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from glocal.errors import GlocalError
from glocal.evaluation.significance import SUMMARY, StatisticsOptions
from glocal.experiments.layout import METRIC_NAMES, TableOptions
from glocal.experiments.recipe import Recipe, make_recipe
from glocal.experiments.trainings import budgets_of
from glocal.options import closest, merged, validated
from glocal.runs import flatten

# Axes with a name shorter than the key of the recipe that they set.
KEYS = {"contender": "compare", "labels": "finetune.labels", "strategy": "finetune.strategy", "network": "network.name"}
OF_RECIPE = (*KEYS, "data", "seed", "precision", "threads", "max_iterations")  # and every key with a dot
OF_TRAINING = ("split", "draw", "trial", "run", "pretraining", "done", "checkpoint", "validation", "transductive")
OF_CASE = ("subject", "case", "class", "value", "note", "paper")
TAKEN = {*OF_TRAINING, *OF_CASE, *METRIC_NAMES, *SUMMARY}  # columns of the results, so no names for an axis

Option = dict[str, Any]


def option_name(value: Any) -> str:
    """An option as tables call it: as people write it in YAML; named cases as their number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return str(len(value))
    return str(value)


Name = Annotated[str, BeforeValidator(option_name)]  # YAML reads some options as numbers or as true


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

    vary: dict[str, Any] = Field(
        default_factory=dict,
        description="axis: [values], or axis: {option: settings besides}; an axis is contender, labels, strategy, "
        "network, any key of the recipe, or a name of its own with the settings of each option",
    )
    baseline: dict[str, Name] = Field(
        default_factory=dict, description="axis: option that all else is compared with; the first contender if not said"
    )
    names: dict[Name, str] = Field(default_factory=dict, description="option: how tables and figures call it")
    tables: dict[Name, TableOptions] = Field(
        default_factory=dict, description="tables by name; one of Dice if not said"
    )
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


def chosen_options(vary: Mapping[str, Any], of_recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The axes as `key=value` words leave them: an option that a list names keeps the settings it has in the recipe.

    Args:
        vary: the axes after the words.
        of_recipe: the axes before.

    Raises:
        GlocalError: on an axis with a name of its own, an option that the recipe does not have.
    """
    result = dict(vary)
    for axis, values in vary.items():
        known = of_recipe.get(axis)
        if not isinstance(known, Mapping) or not isinstance(values, list):
            continue
        if any(isinstance(value, (list, Mapping)) for value in values):
            continue  # such as named cases, which are no option's name
        besides = {option_name(value): settings for value, settings in known.items()}
        names = [option_name(value) for value in values]
        unknown = [name for name in names if name not in besides]
        if unknown and _own(axis):
            raise GlocalError(f"experiment.vary.{axis} has no option {unknown[0]!r}: {closest(unknown[0], besides)}")
        if len(set(names)) == len(names):  # else refused as a list
            result[axis] = {value: besides.get(name) or {} for value, name in zip(values, names, strict=True)}
    return result


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
            _refuse_several(variant.recipe)
        except GlocalError as error:
            where = ", ".join(f"{axis}={option}" for axis, option in places.items())
            raise GlocalError(f"The combination {where} is not possible: {error}") from error
        found.append(variant)
    return found


def _refuse_several(recipe: Recipe) -> None:
    for axis, chosen in (("contender", recipe.compare), ("labels", budgets_of(recipe))):
        if len(chosen) != 1:
            named = " and ".join(map(option_name, chosen)) or "none"
            raise GlocalError(f"it needs one value of {axis}, not {named}: say it in the settings of every option.")


def _axes(recipe: Recipe, options: ExperimentOptions) -> dict[str, dict[str, Option]]:
    """The options of every axis by name; contender and budget are axes of every experiment."""
    axes = {axis: _options(axis, values) for axis, values in options.vary.items()}
    for axis, values in (("contender", list(recipe.contenders())), ("labels", budgets_of(recipe))):
        if not any(KEYS[axis] in flatten(option) for found in axes.values() for option in found.values()):
            axes[axis] = _options(axis, values)
    of: dict[str, str] = {}
    for axis, found in axes.items():
        for key in {key: None for option in found.values() for key in flatten(option)}:
            if of.setdefault(key, axis) != axis:
                raise GlocalError(f"The axes {of[key]} and {axis} of experiment.vary both set {key}: leave it to one.")
    axes["labels"] = axes.pop("labels", {"-": {}})  # last, so that tables of the plan read by method
    return axes


def _options(axis: str, values: Any) -> dict[str, Option]:
    """The options of an axis by name, each with its settings; on a key of the recipe the value is one of them."""
    where = f"experiment.vary.{axis}"
    given = _pairs(where, values)
    if not given:
        raise GlocalError(f"{where} names no option: give a list of values.")
    own = _own(axis)
    _refuse_axis(axis, own, any(besides for _, besides in given))
    found: dict[str, Option] = {}
    for value, besides in given:
        name = option_name(value)
        if name in found:
            raise GlocalError(f"{where} has two options called {name}: give them names (name: {{key: value}}).")
        found[name] = merged({} if own else nested({axis: value}), nested(besides))
    for one, other in combinations(found, 2):
        if found[one] == found[other]:
            raise GlocalError(f"The options {one} and {other} of {where} have the same settings: leave one out.")
    return found


def _own(axis: str) -> bool:
    """Whether it is no key of the recipe but a name of its own, whose options say all their settings."""
    return "." not in axis and axis not in OF_RECIPE


def _pairs(where: str, values: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    """Options with the settings that each brings; in YAML these may be left empty."""
    if isinstance(values, list):
        return [(value, {}) for value in values]
    if isinstance(values, Mapping) and all(isinstance(besides or {}, Mapping) for besides in values.values()):
        return [(value, besides or {}) for value, besides in values.items()]
    raise GlocalError(
        f"{where} does not fit: give a list of values, or for every option its settings (option: {{key: value}}); "
        "a key of the recipe is written in one, such as finetune.batch: [2, 4]."
    )


def _refuse_axis(axis: str, own: bool, settings: bool) -> None:
    short = {key: name for name, key in KEYS.items()}
    if axis in short:
        raise GlocalError(f"experiment.vary.{axis} has a shorter name: call this axis {short[axis]}.")
    if axis in TAKEN:
        raise GlocalError(f"experiment.vary.{axis} is called like a column of the results: choose another name.")
    if own and not settings:
        raise GlocalError(
            f"experiment.vary.{axis} is no key of the recipe, and no option has settings: {closest(axis, OF_RECIPE)}"
        )


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
