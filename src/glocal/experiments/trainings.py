"""The trainings that a recipe asks for, as jobs: pre-trainings, and the fine-tunings that begin with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glocal.data.split import Member, Split, make_split, split_count
from glocal.errors import GlocalError
from glocal.experiments.jobs import Job
from glocal.experiments.recipe import Recipe
from glocal.finetuning.finetune import draw_of, finetune
from glocal.finetuning.registry import finetuning_options
from glocal.pretraining.pretrain import pretrain, stage_folder
from glocal.pretraining.registry import method_named, pretraining_options


def pretraining_settings(recipe: Recipe, contender: str) -> dict[str, Any]:
    """The settings of a contender's pre-training."""
    return recipe.part(recipe.pretrain[contender.partition("@")[0]])


def finetuning_settings(recipe: Recipe, budget: Any, draw: int) -> dict[str, Any]:
    """The settings of one fine-tuning."""
    return recipe.part(recipe.finetune) | {"labels": budget, "draw": draw}


def pretraining_job(recipe: Recipe, contender: str, split: Split, store: Path, folder: Path) -> Job:
    """The pre-training of a contender (not `random`) on a split; it serves all draws and budgets."""
    settings = pretraining_settings(recipe, contender)
    arguments = {"store": store, "run": folder, "settings": settings, "protocol": recipe.protocol, "split": split}
    iterations = pretraining_options(settings).max_iterations * len(_stages(settings))
    return Job(pretrain, arguments, folder, iterations)


def finetuning_job(
    recipe: Recipe, contender: str, split: Split, budget: Any, draw: int, store: Path, folder: Path, before: Path | None
) -> Job:
    """The fine-tuning of one draw, after the pre-training in the folder `before` (None: from random weights)."""
    settings = finetuning_settings(recipe, budget, draw)
    arguments = {
        "store": store,
        "run": folder,
        "settings": settings,
        "pretrained": None if before is None else model_of(recipe, contender, before),
        "protocol": recipe.protocol,
        "split": split,
    }
    needs = () if before is None else (before,)
    return Job(finetune, arguments, folder, finetuning_options(settings).max_iterations, needs)


def model_of(recipe: Recipe, contender: str, folder: Path) -> Path:
    """The model file of a contender in the folder of its pre-training: the last, or with `NAME@STAGE` that stage's."""
    _, _, stage = contender.partition("@")
    if not stage:
        return folder / "model.safetensors"
    stages = _stages(pretraining_settings(recipe, contender))
    return stage_folder(folder, stages.index(stage) + 1, stage) / "model.safetensors"


def _stages(settings: dict[str, Any]) -> list[str]:
    return [name for name, _ in method_named(settings["method"]).stages(pretraining_options(settings))]


def budgets_of(recipe: Recipe) -> list[Any]:
    """The budgets to train with: numbers of volumes and `all`, or one list of cases."""
    labels: Any = finetuning_options(recipe.part(recipe.finetune)).labels
    several = isinstance(labels, tuple) and (isinstance(labels[0], int) or "all" in labels)
    return list(dict.fromkeys(labels)) if several else [labels]


def splits_of(recipe: Recipe, members: Sequence[Member], given: dict[str, list[str]] | None) -> list[Split]:
    """All splits of a recipe.

    Args:
        given: the dataset's `split.json`, if it has one.

    Raises:
        GlocalError: too few labelled subjects for what is asked.
    """
    count = split_count(members, recipe.protocol)
    return [make_split(members, given, recipe.protocol, recipe.seed, index) for index in range(count)]


def refuse_impossible_draws(recipe: Recipe, members: Sequence[Member], given: dict[str, list[str]] | None) -> None:
    """What the splits and draws of a recipe would refuse is said before anything is computed.

    Raises:
        GlocalError: too few labelled volumes, or two draws that label the same ones.
    """
    protocol = recipe.protocol
    for split in splits_of(recipe, members, given):
        for budget in budgets_of(recipe):
            options = [finetuning_options(finetuning_settings(recipe, budget, draw)) for draw in range(protocol.draws)]
            drawn = [draw_of(members, split, of_draw, protocol).train for of_draw in options]
            # Draws of all volumes differ in what else is random.
            if budget != "all" and len({frozenset(cases) for cases in drawn}) < len(drawn):
                raise GlocalError(
                    f"Two of the {len(drawn)} draws would label the same volumes, so they would not tell chance from "
                    "effect: use a smaller protocol.draws, or another seed."
                )
