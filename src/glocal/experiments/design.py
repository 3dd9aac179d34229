"""The design of an experiment: its recipe read and checked, its combinations, its baseline and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glocal.data.dataset import Dataset, read_dataset
from glocal.devices import device_named, precision_of
from glocal.errors import GlocalError
from glocal.evaluation.metrics import OVERLAPS
from glocal.experiments.derive import derived
from glocal.experiments.grid import (
    ExperimentOptions,
    Variant,
    baseline_of,
    chosen_options,
    experiment_options,
    option_name,
    variants,
)
from glocal.experiments.layout import TableOptions, check_layout
from glocal.experiments.recipe import read_recipe
from glocal.experiments.trainings import refuse_impossible_draws, refuse_unmeasured
from glocal.experiments.tuning import Trial, refuse_untunable, trials_of
from glocal.files import read_json
from glocal.finetuning.registry import finetuning_options
from glocal.options import closest

OUT = "experiments"  # where results go if a recipe does not say
SHARED = ("stores", "pretrain", "finetune", "machine.json")  # what all experiments of `out` share


@dataclass(frozen=True)
class Experiment:
    """An experiment, ready to be planned."""

    name: str
    out: Path
    settings: Mapping[str, Any]  # as they were asked for
    options: ExperimentOptions
    variants: list[Variant]
    trials: list[Trial]  # of the tuning; none without
    baseline: Mapping[str, str]
    tables: Mapping[str, TableOptions]

    @property
    def folder(self) -> Path:
        """Where its tables, figures and page go."""
        return self.out / self.name

    @property
    def axes(self) -> dict[str, list[str]]:
        """The options of every axis but split and draw, in their order."""
        return axes_of(self.variants)

    @property
    def transductive(self) -> bool:
        """Whether images of test subjects are part of any pre-training."""
        return any(variant.recipe.protocol.transductive for variant in self.variants)

    def method_name(self, place: Mapping[Any, Any]) -> str:
        """What a combination of the axes is called, its budget apart: the options that vary, or the first."""
        axes = [axis for axis, options in self.axes.items() if axis != "labels" and len(options) > 1]
        return " + ".join(self._name(axis, str(place[axis])) for axis in axes or list(self.axes)[:1])

    def group_name(self, variant: Variant) -> str:
        """Within what methods are ranked and pictured: a budget, and where there are several datasets, one of them."""
        data, several = str(variant.recipe.data), len({other.recipe.data for other in self.variants}) > 1
        return f"{variant.axes['labels']} labelled{f', {self.options.names.get(data, data)}' if several else ''}"

    @property
    def baseline_name(self) -> str:
        """What all else is compared with, in words."""
        return ", ".join(self.options.names.get(option, option) for option in self.baseline.values())

    def _name(self, axis: str, option: str) -> str:
        bare = option not in self.options.names and (option in ("true", "false") or option[:1] in "-.0123456789")
        return f"{axis} {option}" if bare else self.options.names.get(option, option)


def axes_of(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """The options of every axis in their order."""
    return {axis: list(dict.fromkeys(v.axes[axis] for v in variants)) for axis in variants[0].axes}


def read_experiment(recipe: str, words: Sequence[str] = ()) -> Experiment:
    """Read and validate an experiment; refuses what its splits and draws could not do.

    Raises:
        GlocalError: what the user can correct.
    """
    settings = read_recipe(recipe, words)
    if not settings.get("data"):
        raise GlocalError("Say which data: data=DATASET (and where to with out=FOLDER, else `experiments`).")
    options = experiment_options(settings.pop("experiment", {}))
    of_recipe = experiment_options(read_recipe(recipe).get("experiment", {}))
    vary = chosen_options(options.vary, of_recipe.vary)
    tables = {name: _without_left_out(table, vary, of_recipe.vary) for name, table in options.tables.items()}
    options = options.model_copy(update={"vary": vary, "tables": tables})
    asked = {**settings, "experiment": options.model_dump(mode="json") | {"vary": options.vary}}
    out = Path(str(settings.get("out") or OUT)).resolve()
    if (out / "recipe.yaml").exists():
        raise GlocalError(f"{out} holds a run, not experiments: choose another folder with out=FOLDER.")
    settings = derived(settings | {"data": str(Path(str(settings["data"])).resolve()), "out": str(out)}, options.vary)
    found = variants(_decided(settings, out), options)
    _refuse_names(settings["name"], options.tables)
    _refuse_mixed_protocols(found)
    axes = axes_of(found)
    rows = tuple(axis for axis in axes if axis != "labels" and (len(axes[axis]) > 1 or axis == "contender"))
    tables = dict(options.tables) or {"dice": TableOptions(rows=rows or (next(iter(axes)),))}
    trials = trials_of(found, options.tune) if options.tune else []
    datasets = {data: read_dataset(data) for data in dict.fromkeys(variant.recipe.data for variant in found)}
    for table in tables.values():
        check_layout(table, axes)
        _refuse_unknown_figures(table, found, list(datasets.values()))
    tried = [trial.variant for trial in trials]
    for refuse, refused in ((refuse_untunable, tried), (refuse_impossible_draws, found), (refuse_unmeasured, found)):
        for variant in refused:
            dataset = datasets[variant.recipe.data]
            refuse(variant.recipe, dataset.members, dataset.split)
    design = Experiment(settings["name"], out, asked, options, found, trials, baseline_of(options, found), tables)
    _refuse_namesakes(design)
    return design


def _without_left_out(table: TableOptions, vary: Mapping[str, Any], of_recipe: Mapping[str, Any]) -> TableOptions:
    """Without a paper's numbers for options that the recipe has on its axes and a list in the command has not."""

    def kept(name: str, axes: Sequence[str]) -> bool:
        parts = zip(axes, name.split(" / "), strict=False)
        now, before = ({axis: set(map(option_name, of)) for axis, of in each.items()} for each in (vary, of_recipe))
        return all(part in now.get(axis, ()) or part not in before.get(axis, ()) for axis, part in parts)

    paper = {
        row: {column: number for column, number in numbers.items() if kept(column, table.columns)}
        for row, numbers in table.paper.items()
        if kept(row, table.rows)
    }
    return table.model_copy(update={"paper": {row: numbers for row, numbers in paper.items() if numbers}})


def _refuse_names(name: str, tables: Mapping[str, TableOptions]) -> None:
    """Results lie in a folder and in files that are called like these."""
    if name in SHARED:
        raise GlocalError(f"name={name} is what experiments share in their folder: choose another name.")
    for key, chosen in (("name", name), *(("experiment.tables", table) for table in tables)):
        if Path(chosen).name != chosen or not chosen or chosen.startswith("."):
            raise GlocalError(
                f"{key}: {chosen!r} cannot be the name of a file, choose one without / and dots in front."
            )


def _refuse_mixed_protocols(found: Sequence[Variant]) -> None:
    """Refuse what a table could not say: its subjects, how they are predicted and what its budgets count."""
    for key in ("evaluate", "tta", "budget"):
        chosen = list(dict.fromkeys(str(getattr(variant.recipe.protocol, key)).lower() for variant in found))
        if len(chosen) > 1:
            raise GlocalError(
                f"protocol.{key} is {' here and '.join(chosen)} there: what is compared needs one value of it; make "
                "an experiment of each."
            )


def _refuse_namesakes(design: Experiment) -> None:
    methods: dict[str, Mapping[str, str]] = {}
    for variant in design.variants:
        name = design.method_name(variant.axes)
        if methods.setdefault(name, variant.method) != variant.method:
            raise GlocalError(f"Two methods would be called {name!r}: give each its own name in experiment.names.")


def _refuse_unknown_figures(table: TableOptions, found: Sequence[Variant], datasets: Sequence[Dataset]) -> None:
    """A table of what no training measures is refused now, not when all have ended."""
    structures = ["mean", *dict.fromkeys(name for dataset in datasets for name in dataset.foreground)]
    if table.structure not in structures:
        raise GlocalError(f"A table names the structure {table.structure!r}: {closest(table.structure, structures)}")
    recipes = [variant.recipe for variant in found]
    if table.checkpoint == "best" and not any(finetuning_options(r.part(r.finetune)).validation for r in recipes):
        raise GlocalError("A table shows the best checkpoint, which needs validation volumes: set finetune.validation.")
    if table.metric not in OVERLAPS and not any(recipe.preprocess.spacing_known for recipe in recipes):
        raise GlocalError(f"A table shows {table.metric}, which is in mm, but preprocess.spacing_known is false.")


def _decided(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """The settings with precision and threads decided, once for all experiments of a folder: they must not differ
    between trainings that are compared, whatever machine they run on."""
    path = out / "machine.json"
    precision = settings.get("precision", "auto")
    if precision == "auto":
        precision = (
            read_json(path)["precision"]
            if path.exists()
            else precision_of(device_named(settings.get("device", "auto")), "auto")
        )
    return settings | {"precision": precision, "threads": settings.get("threads") or 1}
