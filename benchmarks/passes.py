"""What the networks of a step cost alone: a step is watched, and exactly its calls of networks are done again.

Watched are the outermost calls of a learner's modules that have weights (encoder, decoder blocks, heads, teachers,
discriminators): on what shapes, in which mode, with or without gradients, and to which outputs gradients came back.
Done again, on random inputs and with random gradients of these shapes, they are the bare cost, together with the
optimiser's step as in `step.py`. No part of it are batches, views, losses, teachers that follow, and weights that a
method multiplies with by itself (the prototypes of SwAV, the last layer of DINO). What a module does beside its layers
is part of it (the warp of a generator).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.harness import take_turns
from glocal.devices import fabric_for
from glocal.engine import TrainingOptions, iterate, set_up
from glocal.finetuning.discriminators import untaught

Times = tuple[float, float]


@dataclass
class Call:
    """One call of a module, to be done again.

    Attributes:
        name: of the module in the learner.
        module: what was called.
        inputs: random ones like those it had; they require gradients where those did.
        gradient: whether gradients were enabled.
        training: its mode.
        taught: whether its weights were to get gradients.
        gradients: random ones for the outputs that gradients came back to, by the output's number.
    """

    name: str
    module: nn.Module
    inputs: list[Any]
    gradient: bool
    training: bool
    taught: bool
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def again(self) -> list[Tensor]:
        """The outputs that gradients come back to."""
        for x in self.inputs:
            if isinstance(x, Tensor):
                x.grad = None
        if self.module.training != self.training:
            self.module.train(self.training)
        fixed = not self.taught and any(p.requires_grad for p in self.module.parameters())
        with torch.set_grad_enabled(self.gradient):
            outputs = listed(untaught(self.module, *self.inputs) if fixed else self.module(*self.inputs))
        return [outputs[number] for number in self.gradients]


class Given(torch.autograd.Function):
    """A loss whose gradients are given: it costs nothing itself."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        """Outputs of any shapes, and as many gradients -> 0."""
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients as they were given."""
        return None, *ctx.gradients


@contextmanager
def watched(learner: nn.Module) -> Iterator[list[Call]]:
    """The calls of the learner's modules within the context, in order; their backward passes belong into it too."""
    names = {id(m): name for name, m in learner.named_modules() if name and any(True for _ in m.parameters())}
    calls: list[Call] = []
    depth = 0

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal depth
        if id(module) in names:
            depth += 1
            if depth == 1:
                taught = any(p.requires_grad for p in module.parameters())
                again = [like(x) for x in inputs]
                name = names[id(module)]
                calls.append(Call(name, module, again, torch.is_grad_enabled(), module.training, taught))

    def end(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        nonlocal depth
        if id(module) in names:
            depth -= 1
            for number, output in enumerate(listed(outputs) if depth == 0 else []):
                if output.requires_grad:
                    output.register_hook(noting(calls[-1], number))  # type: ignore[no-untyped-call]

    handles = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def noting(call: Call, number: int) -> Callable[[Tensor], None]:
    """Notes that a gradient came back to an output, by a random one of its kind."""

    def note(gradient: Tensor) -> None:
        call.gradients[number] = 1e-3 * torch.randn_like(gradient)  # small, so that weights stay finite

    return note


def like(x: Any) -> Any:
    """A random tensor of this one's shape, type, order in memory and need of gradients; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return torch.rand_like(x.detach()).requires_grad_(x.requires_grad)


def listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The tensors a module gave."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def described(calls: Sequence[Call]) -> str:
    """How many images, or rows of a head, went through which module; those with a backward pass first."""
    counts: Counter[tuple[bool, str]] = Counter()
    for call in calls:
        size = " x ".join(map(str, call.inputs[0].shape[2:]))
        name = f"{call.name} at {size}" if call.name.endswith("encoder") else call.name
        counts[bool(call.gradients), name] += len(call.inputs[0])
    merged: Counter[tuple[bool, str, int]] = Counter()  # blocks of one decoder that the same images went through
    for (learns, name), count in counts.items():
        merged[learns, re.sub(r"decoder\.\d+$", "decoder", name), count] += 1
    texts: dict[bool, list[str]] = {True: [], False: []}
    for (learns, name, count), blocks in merged.items():
        texts[learns].append(f"{name} ({blocks} blocks) {count}" if blocks > 1 else f"{name} {count}")
    kinds = {True: "forward and backward", False: "forward alone"}
    return "; ".join(f"{kinds[learns]}: {', '.join(parts)}" for learns, parts in texts.items() if parts)


def stepping(learner: nn.Module, options: TrainingOptions, steps: range) -> Callable[[], Any]:
    """One iteration after the other, as the engine does it; the first is done already.

    Args:
        learner: a stage or a strategy.
        options: of its training.
        steps: the iterations; after the last comes the second again, as a round may begin with the first.
    """
    fabric = fabric_for(torch.device("cpu"), options.precision, in_turns=getattr(learner, "in_turns", False))
    module, optimizer = set_up(fabric, learner, options)
    iterate(fabric, module, optimizer, options, steps[0])
    endless = cycle(steps[1:])
    return lambda: iterate(fabric, module, optimizer, options, next(endless))


def bare(learner: Any, options: TrainingOptions, steps: range) -> tuple[Callable[[], Any], list[Call]]:
    """Iterations of nothing but the calls of networks that the second of `steps` makes, and these calls."""
    step = stepping(learner, options, steps)
    with watched(learner) as calls:
        step()

    def losses(step: int) -> dict[str, Tensor]:
        outputs = [output for call in calls for output in call.again()]
        return {"loss": Given.apply(gradients, *outputs)}  # type: ignore[no-untyped-call]

    gradients = [gradient for call in calls for gradient in call.gradients.values()]
    learner.losses = losses
    return step, calls


def measured(
    make: Callable[[], nn.Module], options: TrainingOptions, steps: range, reference: Callable[[], Any]
) -> tuple[Times, Times, Times, str]:
    """Times in ms of a step, of its networks alone and of the step `reference`, taken in turns; and the passes."""
    alone, calls = bare(make(), options, steps)
    contenders = {"step": stepping(make(), options, steps), "bare": alone, "reference": reference}
    taken = take_turns(contenders, seconds=12)
    step, networks, other = ((low * 1e3, middle * 1e3) for low, middle in taken.values())
    return step, networks, other, described(calls)
