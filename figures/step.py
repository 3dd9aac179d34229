"""Watching one step of a method: what its networks see, and what its functions are given and answer."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from glocal.data.phantom import phantom
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import build
from glocal.pretraining.base import Stage
from glocal.pretraining.registry import method_named, pretraining_options

SIDE = 96  # pixels of 1.5 mm
NETWORK = {"name": "unet", "widths": [8, 16, 16, 16, 16]}  # a cell of its bottleneck is 16 pixels wide


class Call(NamedTuple):
    """What a function was given and what it answered."""

    given: tuple[Any, ...]
    result: Any


@dataclass
class Seen:
    """What happened in a step: the inputs of every network's encoder, the trained one first, and calls by name."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)


def hearts(folder: Path) -> Store:
    """The first subjects of the phantom at the resolution of the pictures, from a scanner with little noise."""
    with patch("glocal.data.phantom.NOISE", (0.004, 0.01)):  # noise is what makes a picture's file large
        phantom(folder / "raw", subjects=8)
    options = PreprocessOptions(spacing=(1.5, 1.5), field=(SIDE, SIDE), size=(SIDE, SIDE))
    return preprocess(folder / "raw", folder / "store", options, workers=1)


def pool_of(store: Store, *volumes: int) -> Pool:
    """Some volumes; all without any."""
    return Pool(store, [store.volumes[volume].case for volume in volumes or range(len(store.volumes))])


def stage_of(pool: Pool, method: str, number: int = 0, **options: Any) -> Stage:
    """A stage of a method as pre-training makes it; methods that use labels get those of the whole pool."""
    settings: Any = pretraining_options({"network": NETWORK, "method": method, "device": "cpu", **options})
    _, make = method_named(method).stages(settings)[number]
    torch.manual_seed(settings.seed)
    network = build(settings.network, 1, 4)
    return make(network, pool, settings, *([pool] if method_named(method).uses_labels else [])).train()


def watched(stage: Stage, *functions: str, step: int = 0) -> Seen:
    """Take the losses of a step and listen to `functions` of the method's file."""
    module, seen = sys.modules[type(stage).__module__], Seen()
    with ExitStack() as stack:
        for network in (part for part in stage.modules() if isinstance(part, SegmentationNetwork)):
            seen.inputs.append([])
            stack.enter_context(_inputs(network, seen.inputs[-1]))
        for name in functions:
            seen.calls[name] = []
            listener = _listening(getattr(module, name), seen.calls[name])
            stack.enter_context(patch.object(module, name, listener))
        with torch.no_grad():
            stage.losses(step)
    return seen


def trained(stage: Stage, steps: int, learning_rate: float = 1e-3) -> Stage:
    """The stage after some steps, where one that knows nothing has nothing to show."""
    optimizer = torch.optim.Adam([weight for weight in stage.parameters() if weight.requires_grad], learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(stage.losses(step)["loss"])
        optimizer.step()
    return stage


@contextmanager
def _inputs(network: SegmentationNetwork, heard: list[Tensor]) -> Iterator[None]:
    hook = network.encoder.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    yield
    hook.remove()


def _listening(function: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    def listener(*given: Any, **named: Any) -> Any:
        calls.append(Call(given, function(*given, **named)))
        return calls[-1].result

    return listener
