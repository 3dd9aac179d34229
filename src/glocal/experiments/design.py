"""The design of an experiment: its recipe read and checked, its combinations, its baseline and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glocal.data.dataset import read_dataset
from glocal.devices import device_named, precision_of
from glocal.errors import GlocalError
from glocal.experiments.derive import derived
from glocal.experiments.grid import ExperimentOptions, Variant, baseline_of, experiment_options, variants
from glocal.experiments.layout import TableOptions, check_layout
from glocal.experiments.recipe import read_recipe
from glocal.experiments.trainings import refuse_impossible_draws
from glocal.experiments.tuning import Trial, refuse_untunable, trials_of
from glocal.files import read_json

OUT = "experiments"  # where results go if a recipe does not say
SHARED = ("stores", "pretrain", "finetune")  # folders of `out` that all its experiments share


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
    if "data" not in settings:
        raise GlocalError("Say which data: data=DATASET (and where to with out=FOLDER, else `experiments`).")
    options = experiment_options(settings.pop("experiment", {}))
    asked = {**settings, "experiment": options.model_dump(mode="json") | {"vary": options.vary}}
    out = Path(settings.get("out", OUT)).resolve()
    settings = derived(settings | {"data": str(Path(settings["data"]).resolve()), "out": str(out)})
    if settings["name"] in SHARED:
        raise GlocalError(f"name={settings['name']} is a folder that experiments share: choose another name.")
    found = variants(_decided(settings, out), options)
    axes = axes_of(found)
    rows = tuple(axis for axis in axes if axis != "labels" and (len(axes[axis]) > 1 or axis == "contender"))
    tables = dict(options.tables) or {"dice": TableOptions(rows=rows or (next(iter(axes)),))}
    for table in tables.values():
        check_layout(table, axes)
    trials = trials_of(found, options.tune) if options.tune else []
    datasets = {data: read_dataset(data) for data in dict.fromkeys(variant.recipe.data for variant in found)}
    for refuse, refused in ((refuse_untunable, (t.variant for t in trials)), (refuse_impossible_draws, found)):
        for variant in refused:
            dataset = datasets[variant.recipe.data]
            refuse(variant.recipe, dataset.members, dataset.split)
    return Experiment(settings["name"], out, asked, options, found, trials, baseline_of(options, found), tables)


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
