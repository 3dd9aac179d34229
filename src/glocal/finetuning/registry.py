"""The fine-tuning strategies a recipe can name."""

from collections.abc import Mapping
from typing import Any

from glocal.errors import GlocalError
from glocal.finetuning.adversarial import ADVERSARIAL
from glocal.finetuning.base import FinetuningOptions, StrategyEntry
from glocal.finetuning.bcp import BCP
from glocal.finetuning.cps import CPS
from glocal.finetuning.cross_consistency import CROSS_CONSISTENCY
from glocal.finetuning.fixmatch import FIXMATCH
from glocal.finetuning.ict import ICT
from glocal.finetuning.mc_net import MC_NET
from glocal.finetuning.mean_teacher import MEAN_TEACHER
from glocal.finetuning.mixup import MIXUP
from glocal.finetuning.self_training import SELF_TRAINING
from glocal.finetuning.supervised import SUPERVISED
from glocal.finetuning.task_augmentation import TASK_AUGMENTATION
from glocal.finetuning.uncertainty_mean_teacher import UNCERTAINTY_MEAN_TEACHER
from glocal.finetuning.unimatch import UNIMATCH
from glocal.options import closest, validated

STRATEGIES: dict[str, StrategyEntry] = {
    "adversarial": ADVERSARIAL,
    "bcp": BCP,
    "cps": CPS,
    "cross-consistency": CROSS_CONSISTENCY,
    "fixmatch": FIXMATCH,
    "ict": ICT,
    "mc-net": MC_NET,
    "mean-teacher": MEAN_TEACHER,
    "mixup": MIXUP,
    "self-training": SELF_TRAINING,
    "supervised": SUPERVISED,
    "task-augmentation": TASK_AUGMENTATION,
    "uncertainty-mean-teacher": UNCERTAINTY_MEAN_TEACHER,
    "unimatch": UNIMATCH,
}


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
