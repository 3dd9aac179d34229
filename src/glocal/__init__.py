"""glocal: segment medical volumes from a handful of labels.

Every command is a function of the same name here: `glocal.predict(model, images, out)` is `glocal predict`. They are
imported when first used, so that `import glocal` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glocal.data.check import check
    from glocal.data.collect import collect
    from glocal.data.phantom import phantom
    from glocal.data.preprocess import preprocess
    from glocal.evaluation.evaluate import evaluate
    from glocal.experiments.demo import demo
    from glocal.experiments.experiment import experiment
    from glocal.experiments.methods import methods
    from glocal.experiments.recipe import recipe_names as recipes
    from glocal.experiments.report import report
    from glocal.experiments.run import run
    from glocal.finetuning.finetune import finetune
    from glocal.inference import predict
    from glocal.pretraining.pretrain import pretrain

__version__ = "0.1.0"
__all__ = [
    "check",
    "collect",
    "demo",
    "evaluate",
    "experiment",
    "finetune",
    "methods",
    "phantom",
    "predict",
    "preprocess",
    "pretrain",
    "recipes",
    "report",
    "run",
]

_WHERE = {
    "check": "glocal.data.check:check",
    "collect": "glocal.data.collect:collect",
    "demo": "glocal.experiments.demo:demo",
    "evaluate": "glocal.evaluation.evaluate:evaluate",
    "experiment": "glocal.experiments.experiment:experiment",
    "finetune": "glocal.finetuning.finetune:finetune",
    "methods": "glocal.experiments.methods:methods",
    "phantom": "glocal.data.phantom:phantom",
    "predict": "glocal.inference:predict",
    "preprocess": "glocal.data.preprocess:preprocess",
    "pretrain": "glocal.pretraining.pretrain:pretrain",
    "recipes": "glocal.experiments.recipe:recipe_names",
    "report": "glocal.experiments.report:report",
    "run": "glocal.experiments.run:run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _WHERE[name].partition(":")
    return getattr(import_module(module), function)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
