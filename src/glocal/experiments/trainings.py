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


def uses_labels(recipe: Recipe, contender: str) -> bool:
    """Whether a contender (not `random`) is pre-trained with labels, and so for one draw and budget."""
    return method_named(pretraining_settings(recipe, contender)["method"]).uses_labels


def pretraining_of_draw(recipe: Recipe, contender: str, budget: Any, draw: int) -> dict[str, Any]:
    """The settings of a contender's pre-training before one fine-tuning, whose labels it has if it uses any.

    Raises:
        GlocalError: it uses labels, and the recipe wants it to have others than the fine-tuning.
    """
    settings, name = pretraining_settings(recipe, contender), contender.partition("@")[0]
    if not uses_labels(recipe, contender):
        return settings
    for key in ("labels", "validation", "draw"):
        if key in settings:
            raise GlocalError(f"pretrain.{name}.{key} is always that of the fine-tuning: leave it out.")
    tuning = finetuning_options(finetuning_settings(recipe, budget, draw))
    if settings["seed"] != tuning.seed:
        raise GlocalError(
            f"pretrain.{name}.seed={settings['seed']} would draw other labelled volumes than finetune.seed="
            f"{tuning.seed}: set one seed for the whole recipe."
        )
    return settings | {"labels": budget, "validation": tuning.validation, "draw": draw}


def pretraining_job(
    recipe: Recipe, contender: str, split: Split, budget: Any, draw: int, store: Path, folder: Path
) -> Job:
    """The pre-training of a contender (not `random`) on a split; without labels it serves all budgets and draws."""
    settings = pretraining_of_draw(recipe, contender, budget, draw)
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
    iterations = finetuning_options(settings).max_iterations
    return Job(finetune, arguments, folder, iterations, needs, recipe.protocol.measured)


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
        GlocalError: too few labelled volumes, two draws that label the same ones, or a pre-training with others than
            those of its fine-tuning.
    """
    protocol = recipe.protocol
    for name in recipe.pretrain:
        pretraining_of_draw(recipe, name, budgets_of(recipe)[0], 0)
    for split in splits_of(recipe, members, given):
        for budget in budgets_of(recipe):
            options = [finetuning_options(finetuning_settings(recipe, budget, draw)) for draw in range(protocol.draws)]
            drawn = [draw_of(members, split, of_draw, protocol).train for of_draw in options]
            # Draws of all volumes differ in what else is random.
            if budget != "all" and len({frozenset(cases) for cases in drawn}) < len(drawn):
                raise GlocalError(
                    f"With labels={budget} two of the {len(drawn)} draws of split {split.index} would label the same "
                    "volumes, so they would not tell chance from effect: use a smaller protocol.draws, or another seed."
                )


def refuse_unmeasured(recipe: Recipe, members: Sequence[Member], given: dict[str, list[str]] | None) -> None:
    """Trainings that nothing can be measured of compare nothing.

    Raises:
        GlocalError: a split keeps no labelled subject to measure.
    """
    labelled, kind = {member.case for member in members if member.labelled}, recipe.protocol.evaluate
    for split in splits_of(recipe, members, given):
        if not labelled & set(split.test if kind == "test" else split.development):
            others = ", or set protocol.folds, protocol.leave_one_out=true or, without split.json, protocol.test"
            raise GlocalError(
                f"Split {split.index} has no labelled {kind} subject, so nothing would be measured: list some cases as "
                f"`{kind}` in the split.json of the dataset{others * (kind == 'test')}."
            )
