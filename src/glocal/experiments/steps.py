"""The single steps as people give them: words from the command line over defaults.

Each imports what it needs and no more, because what all of them need takes seconds to import.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glocal.data.plan import PreprocessOptions
from glocal.data.split import ProtocolOptions
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.options import merged, parse_words, validated


def preprocess_with(dataset: Path, store: Path, recipe: str, words: Sequence[str], workers: int | None) -> Store:
    """Preprocess a dataset as a recipe says, with `key=value` words over its part `preprocess`.

    Raises:
        GlocalError: what the user can correct.
    """
    from glocal.data.preprocess import preprocess
    from glocal.experiments.derive import derived
    from glocal.experiments.recipe import read_recipe

    settings = read_recipe(recipe, [f"data={dataset}"])
    part = merged(settings.get("preprocess", {}), parse_words(words))
    filled = derived({**settings, "preprocess": part, "data": str(dataset)})
    return preprocess(dataset, store, validated(PreprocessOptions, filled["preprocess"], ""), workers=workers)


def pretrain_with(store: Path, run: Path, method: str, words: Sequence[str], labels: str | None = None) -> Path:
    """Pre-train with `method` and `key=value` words; words of `protocol` say how cases are split.

    `labels` (`2`, `all`, cases) are for a method that uses them.

    Raises:
        GlocalError: labels are missing, or the method has no use for them; and what `pretrain` refuses.
    """
    from glocal.pretraining.pretrain import pretrain
    from glocal.pretraining.registry import method_named

    settings = parse_words(words)
    _refuse_twice(settings, "method")
    if method_named(method).uses_labels:
        if labels is None:
            raise GlocalError(f"{method} learns from labels, too: say --labels, as the fine-tuning will have them.")
        _refuse_twice(settings, "labels")
        settings["labels"] = parse_labels(labels)
    elif labels is not None:
        raise GlocalError(f"{method} learns from images alone: leave --labels to the fine-tuning.")
    protocol = validated(ProtocolOptions, settings.pop("protocol", {}), "protocol")
    return pretrain(store, run, {"method": method, **settings}, protocol)


def finetune_with(
    store: Path, run: Path, labels: str, pretrained: Path | None, words: Sequence[str], strategy: str | None = None
) -> Path:
    """Fine-tune on `labels` (`2`, `all`, cases) with `key=value` words; those of `protocol` say how cases are split."""
    from glocal.finetuning.finetune import finetune

    settings = parse_words(words)
    _refuse_twice(settings, "labels")
    settings["labels"] = parse_labels(labels)
    if strategy is not None:
        _refuse_twice(settings, "strategy")
        settings["strategy"] = strategy
    protocol = validated(ProtocolOptions, settings.pop("protocol", {}), "protocol")
    return finetune(store, run, settings, pretrained, protocol)


def _refuse_twice(settings: Mapping[str, Any], key: str) -> None:
    if key in settings:
        raise GlocalError(f"{key}={settings[key]} is given beside --{key}: give it once, as --{key}.")


def parse_labels(text: str) -> int | str | list[str]:
    """`2` is a number of volumes, `all` are all there are, `CASE,CASE` are cases.

    Raises:
        GlocalError: none of these.
    """
    if text.strip() == "all":
        return "all"
    if text.strip().isdigit() and int(text) > 0:
        return int(text)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or text.strip().lstrip("+-").replace(".", "").isdigit():
        raise GlocalError(f"--labels {text!r} is neither a number of volumes from 1 on nor all nor a list of cases.")
    return names
