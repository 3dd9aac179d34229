"""The pre-training methods a recipe can name."""

from collections.abc import Mapping
from typing import Any

from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.options import closest, validated
from glocal.pretraining.base import Method
from glocal.pretraining.gcl import GCL
from glocal.pretraining.pcl import PCL

METHODS: dict[str, Method] = {"gcl": GCL, "pcl": PCL}


def method_named(name: str) -> Method:
    """The method `name`.

    Raises:
        GlocalError: there is none; suggests the closest.
    """
    if name not in METHODS:
        raise GlocalError(f"There is no pre-training method {name!r}: {closest(name, METHODS)}")
    return METHODS[name]


def pretraining_options(settings: Mapping[str, Any]) -> TrainingOptions:
    """The typed options of `settings`, whose key `method` names the method.

    Raises:
        GlocalError: unknown method, unknown key, or a value that does not fit.
    """
    if "method" not in settings:
        raise GlocalError(f"A pre-training needs the key method: {closest('', METHODS)}")
    return validated(method_named(str(settings["method"])).options, settings, "pretrain")
