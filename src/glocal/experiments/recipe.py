"""A recipe: one YAML file that says everything a run does. Validated before anything starts."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from glocal.data.plan import PreprocessOptions
from glocal.data.split import ProtocolOptions
from glocal.errors import GlocalError
from glocal.options import closest, merged, parse_words, validated


class Recipe(BaseModel):
    """The parts of a recipe. `pretrain` names contenders; `random` (no pre-training) is always there.

    `seed`, `device`, `precision` and `network` hold for every training that does not say otherwise; `max_iterations`
    holds for every training whatever its part says, so that one word makes any recipe short.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str = ""
    data: Path = Field(description="the raw dataset")
    out: Path = Field(description="the run folder")
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(0, ge=0, description="of every training; 0: the cores are shared by those at the same time")
    max_iterations: int | None = Field(
        None, ge=1, description="of every training (each stage), over what the parts say"
    )
    network: dict[str, Any] = Field(default_factory=dict)
    preprocess: PreprocessOptions
    pretrain: dict[str, dict[str, Any]] = Field(default_factory=dict, description="contenders by name")
    finetune: dict[str, Any] = Field(default_factory=dict)
    compare: tuple[str, ...] = Field(
        (), description="contenders to compare, NAME@STAGE for the weights after a stage; empty: random and all"
    )
    protocol: ProtocolOptions = ProtocolOptions()

    def part(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one training, completed by what the recipe says once for all."""
        common = {"seed": self.seed, "device": self.device, "precision": self.precision, "threads": self.threads}
        short = {"max_iterations": self.max_iterations} if self.max_iterations else {}
        return merged(common | ({"network": self.network} if self.network else {}), settings) | short

    def contenders(self, measured: bool = True) -> tuple[str, ...]:
        """The contenders to compare, `random` first; where nothing can be measured, only those that are pre-trained."""
        if not measured and not self.compare and self.pretrain:
            return tuple(self.pretrain)
        return tuple(dict.fromkeys(("random", *(self.compare or self.pretrain))))


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _folder() -> Any:
    return files("glocal") / "recipes"


def recipe_text(name: str) -> str:
    """The YAML text of a packaged recipe, or of a file.

    Raises:
        GlocalError: there is neither, or the file cannot be read.
    """
    if name in recipe_names():
        return str((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GlocalError(f"The recipe {path} cannot be read: save it as plain text (UTF-8).") from error
    raise GlocalError(f"There is no recipe {name!r} and no such YAML file: {closest(name, recipe_names())}")


def read_recipe(name: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a packaged recipe or a YAML file, with `key=value` words over them, not yet validated.

    Raises:
        GlocalError: no such recipe, not YAML, or words that are not understood.
    """
    try:
        settings = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "it holds characters that no text has"
        raise GlocalError(f"The recipe {name} is not valid YAML ({where}): correct it.") from error
    if not isinstance(settings, dict):
        raise GlocalError(f"The recipe {name} is not a list of `key: value` settings.")
    settings.setdefault("name", Path(name).stem)
    return merged(settings, parse_words(words))


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Validate settings, those of every contender and of the fine-tuning included.

    Raises:
        GlocalError: an unknown key (suggests the right one), a value that does not fit, or an unknown contender.
    """
    from glocal.finetuning.registry import finetuning_options
    from glocal.networks.registry import network_options
    from glocal.views.moves import refuse_still

    recipe = validated(Recipe, settings, "")
    if recipe.network:  # said here once, and not as a fault of the first part that takes it over
        network_options(recipe.network)
    stages = {name: _stages(recipe, name) for name in recipe.pretrain}
    options = finetuning_options(recipe.part(recipe.finetune))
    if recipe.protocol.tta:
        refuse_still(options.augmentation.spatial, "protocol.tta=true")
    for contender in recipe.contenders():
        name, at, stage = contender.partition("@")
        if contender != "random" and name not in stages:
            raise GlocalError(f"compare names {contender!r}: {closest(name, ['random', *stages])}")
        if at and stage not in stages[name]:
            raise GlocalError(f"compare names {contender!r}: {closest(stage, stages[name])}")
    return recipe


def _stages(recipe: Recipe, name: str) -> list[str]:
    """The names of the stages of a contender's pre-training."""
    from glocal.pretraining.registry import method_named, pretraining_options

    if not re.fullmatch(r"[\w.-]+", name) or name == "random":
        raise GlocalError(f"pretrain.{name}: choose another name, of letters, digits, - and _ (random is taken).")
    part = recipe.part(recipe.pretrain[name])
    try:
        options = pretraining_options(part)
        return [stage for stage, _ in method_named(part["method"]).stages(options)]
    except GlocalError as error:
        key, text = f"pretrain.{name}", str(error)
        named = text.startswith("pretrain.")
        raise GlocalError(key + text.removeprefix("pretrain") if named else f"{key}: {text}") from error
