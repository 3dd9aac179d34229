"""The pre-training methods a recipe can name."""

from collections.abc import Mapping
from typing import Any

from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.options import closest, validated
from glocal.pretraining.base import Method
from glocal.pretraining.byol import BYOL
from glocal.pretraining.context_restoration import CONTEXT_RESTORATION
from glocal.pretraining.dino import DINO
from glocal.pretraining.gcl import GCL
from glocal.pretraining.ideal import IDEAL
from glocal.pretraining.inpainting import INPAINTING
from glocal.pretraining.jcl import JCL
from glocal.pretraining.label_efficient import LABEL_EFFICIENT
from glocal.pretraining.moco import MOCO
from glocal.pretraining.pcl import PCL
from glocal.pretraining.pgl import PGL
from glocal.pretraining.pixel_global import PIXEL_GLOBAL
from glocal.pretraining.rotation import ROTATION
from glocal.pretraining.simclr import SIMCLR
from glocal.pretraining.simsiam import SIMSIAM
from glocal.pretraining.simtriplet import SIMTRIPLET
from glocal.pretraining.swav import SWAV

METHODS: dict[str, Method] = {
    "byol": BYOL,
    "context-restoration": CONTEXT_RESTORATION,
    "dino": DINO,
    "gcl": GCL,
    "ideal": IDEAL,
    "inpainting": INPAINTING,
    "jcl": JCL,
    "label-efficient": LABEL_EFFICIENT,
    "moco": MOCO,
    "pcl": PCL,
    "pgl": PGL,
    "pixel-global": PIXEL_GLOBAL,
    "rotation": ROTATION,
    "simclr": SIMCLR,
    "simsiam": SIMSIAM,
    "simtriplet": SIMTRIPLET,
    "swav": SWAV,
}


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
