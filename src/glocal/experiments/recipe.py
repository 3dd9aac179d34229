"""A recipe: one YAML file that says everything a run does. Validated before anything starts."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from glocal.data.plan import PreprocessOptions
from glocal.data.split import ProtocolOptions
from glocal.errors import GlocalError
from glocal.options import closest, merged, parse_words, validated

# A value given once at the top holds for pre-training and fine-tuning alike.
COMMON = ("seed", "device", "precision", "network")


class Recipe(BaseModel):
    """The parts of a recipe. `pretrain` names contenders; `random` (no pre-training) is always there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str = ""
    data: Path | None = Field(None, description="the raw dataset")
    out: Path | None = Field(None, description="the run folder")
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    network: dict[str, Any] = Field(default_factory=dict)
    preprocess: PreprocessOptions
    pretrain: dict[str, dict[str, Any]] = Field(default_factory=dict, description="contenders by name")
    finetune: dict[str, Any] = Field(default_factory=dict)
    compare: tuple[str, ...] = Field(
        (), description="contenders to compare, NAME@STAGE for the weights after a stage; empty: random and all"
    )
    protocol: ProtocolOptions = ProtocolOptions()

    def part(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one part, completed by what the recipe says once for all parts."""
        common = {"seed": self.seed, "device": self.device, "precision": self.precision}
        return merged(common | ({"network": self.network} if self.network else {}), settings)

    def contenders(self) -> tuple[str, ...]:
        """The contenders to compare, `random` first."""
        named = self.compare or tuple(self.pretrain)
        return ("random", *(name for name in named if name != "random"))


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _folder() -> Any:
    return files("glocal") / "recipes"


def recipe_text(name: str) -> str:
    """The YAML text of a packaged recipe, or of a file.

    Raises:
        GlocalError: there is neither.
    """
    if name in recipe_names():
        return str((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.read_text(encoding="utf-8")
    raise GlocalError(f"There is no recipe {name!r} and no such YAML file: {closest(name, recipe_names())}")


def read_recipe(name: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a packaged recipe or a YAML file, with `key=value` words over them, not yet validated.

    Raises:
        GlocalError: no such recipe, not YAML, or words that are not understood.
    """
    try:
        settings = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        raise GlocalError(f"The recipe {name} is not valid YAML: {error}.") from error
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
    from glocal.pretraining.registry import pretraining_options

    recipe = validated(Recipe, settings, "")
    for name, part in recipe.pretrain.items():
        try:
            pretraining_options(recipe.part(part))
        except GlocalError as error:
            raise GlocalError(str(error).replace("pretrain.", f"pretrain.{name}.", 1)) from error
    finetuning_options(recipe.part(recipe.finetune))
    for name in recipe.contenders():
        if name != "random" and name.partition("@")[0] not in recipe.pretrain:
            raise GlocalError(f"compare names {name!r}: {closest(name, ['random', *recipe.pretrain])}")
    return recipe
