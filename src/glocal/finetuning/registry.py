"""The fine-tuning strategies a recipe can name."""

from collections.abc import Mapping
from typing import Any

from glocal.errors import GlocalError
from glocal.finetuning.base import FinetuningOptions, StrategyEntry
from glocal.finetuning.supervised import SUPERVISED
from glocal.options import closest, validated

STRATEGIES: dict[str, StrategyEntry] = {"supervised": SUPERVISED}


def strategy_named(name: str) -> StrategyEntry:
    """The strategy `name`.

    Raises:
        GlocalError: there is none; suggests the closest.
    """
    if name not in STRATEGIES:
        raise GlocalError(f"There is no fine-tuning strategy {name!r}: {closest(name, STRATEGIES)}")
    return STRATEGIES[name]


def finetuning_options(settings: Mapping[str, Any]) -> FinetuningOptions:
    """The typed options of `settings`, whose key `strategy` names the strategy (`supervised` if absent).

    Raises:
        GlocalError: unknown strategy, unknown key, or a value that does not fit.
    """
    return validated(strategy_named(str(settings.get("strategy", "supervised"))).options, settings, "finetune")
