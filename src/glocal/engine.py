"""The one training loop: pre-training and fine-tuning give it a learner, it gives them iterations.

A learner is a module whose `forward(step)` returns its losses; everything random in it is a function of the step, so a
run that was killed continues from its last checkpoint bit for bit, with no random state to save.
"""

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from glocal.checkpoints import restore, save, training_state
from glocal.devices import computing, device_named, fabric_for, keep_freed_memory, precision_of
from glocal.distributed import first_decides, rank, with_whole_statistics
from glocal.errors import GlocalError
from glocal.files import write_text
from glocal.options import completed
from glocal.progress import console, progress
from glocal.randomness import seed_of

CHECKPOINT_SECONDS = 30.0
VERSION = 1  # raised by hand when the same learner would end with other weights (see `runs.identity`)


class TrainingOptions(BaseModel):
    """What every training has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, description="every random choice follows from it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto takes bfloat16 where the processor has units for it; a begun training keeps its own"
    )
    threads: int = Field(0, ge=0, description="0 takes what there is; a begun training keeps its own")
    deterministic: bool = Field(False, description="the same result bit for bit on one machine, on a GPU too; slower")
    compile: bool = Field(False, description="torch.compile the network; slower on a CPU, so measure it on your GPU")
    max_iterations: int = Field(1000, ge=1, description="optimiser steps (of each stage)")
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = Field(
        "adamw", description="SGD and LARS (You et al. 2017) have momentum 0.9"
    )
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_iterations: int = Field(30, ge=0, description="the learning rate rises linearly over these")
    schedule: Literal["cosine", "constant", "poly"] = Field(
        "cosine", description="cosine falls to 0; poly as (1 - done)^0.9"
    )
    gradient_clip: float = Field(0.0, ge=0, description="largest norm of all gradients together; 0: no limit")
    log: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        ("tensorboard",), description="beside metrics.jsonl, which is always written"
    )

    @model_validator(mode="before")
    @classmethod
    def _groups(cls, given: Any) -> Any:
        return completed(cls, given)


def learning_rate_factor(options: TrainingOptions, step: int, rounds: Sequence[int] = (0,)) -> float:
    """Factor of the learning rate in iteration `step` (0-based): linear warm-up, then the schedule.

    Args:
        options: of the training.
        step: the iteration.
        rounds: iterations in which both begin anew, in rising order, the first of them 0.
    """
    number = bisect_right(rounds, step)
    end = rounds[number] if number < len(rounds) else options.max_iterations
    step, steps = step - rounds[number - 1], end - rounds[number - 1]
    if step < options.warmup_iterations:
        return (step + 1) / options.warmup_iterations
    if options.schedule == "constant":
        return 1.0
    done = (step - options.warmup_iterations) / max(1, steps - options.warmup_iterations)
    factor: float = (1 - done) ** 0.9 if options.schedule == "poly" else 0.5 * (1 + cos(pi * done))
    return factor


def train(
    learner: nn.Module,
    options: TrainingOptions,
    folder: Path,
    description: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> list[str]:
    """Train `learner` for `options.max_iterations`, writing `metrics.jsonl` and a resumable checkpoint into `folder`.

    Args:
        learner: `forward(step)` returns a dict of scalar tensors; `loss` is minimised, all are logged. An attribute
            `warning()` may return a plain sentence about its state (for example collapse), asked for now and then;
            `steady` maps modules' names to learning rates that are theirs throughout, without warm-up and schedule;
            `rounds` are iterations in which warm-up and schedule begin anew; `in_turns` says that some weights get no
            gradient in some iterations; `idle(step)` returns weights that stay as they are in that iteration.
        evaluate: returns figures to log every `evaluate_every` iterations and after the last.

    Returns:
        Warnings in plain words.

    Raises:
        GlocalError: the loss is not finite, or the folder's checkpoint does not belong to this learner.
    """
    state = training_state(folder)
    with computing(state.get("threads", options.threads or torch.get_num_threads()), options.deterministic):
        return _train(learner, options, folder, state, description, evaluate, evaluate_every)


def _train(
    learner: nn.Module,
    options: TrainingOptions,
    folder: Path,
    state: dict[str, Any],
    description: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    evaluate_every: int,
) -> list[str]:
    begun = time.monotonic() - state.get("seconds", 0.0)
    first = rank() == 0  # only the first of several processes writes
    device, loggers = device_named(options.device), list[Logger]()
    precision = first_decides(lambda: precision_of(device, state.get("precision", options.precision)))
    first_decides(lambda: loggers.extend(_loggers(options, folder)))
    fabric = fabric_for(device, precision, loggers, getattr(learner, "in_turns", False))
    # Several processes wait for each other in here, so that none reads the folder after the first has written to it.
    module, optimizer = set_up(fabric, learner, options)
    if state:
        restore(folder, learner, optimizer)
    log = _Log(folder / "metrics.jsonl", first=state.get("step", 0)) if first else None
    warnings: list[str] = state.get("warnings", [])
    facts = {"precision": precision, "threads": torch.get_num_threads()}
    if first and not state:  # from here on, whatever machine continues
        save(folder, learner, optimizer, {"step": 0, "seconds": 0.0, "warnings": [], **facts})
    saved = time.monotonic()

    with progress() as bar:
        task = bar.add_task(description, total=options.max_iterations, completed=state.get("step", 0), info="")
        for step in range(state.get("step", 0), options.max_iterations):
            losses = iterate(fabric, module, optimizer, options, step)
            done, last = step + 1, step + 1 == options.max_iterations
            bar.advance(task)
            if done % 10 == 0 or last or step == 0:
                figures = {name: float(value.detach()) for name, value in losses.items()}
                if not isfinite(figures["loss"]):
                    raise GlocalError(
                        f"The loss became {figures['loss']} in iteration {done} of {folder}: lower learning_rate "
                        "or set precision=float32, in a new run folder."
                    )
                figures |= {"learning_rate": optimizer.param_groups[0]["lr"]}
                bar.update(task, info=f"loss {figures['loss']:.3f}")
            else:
                figures = {}
            if log is None:
                continue
            if evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0)):
                figures |= evaluate(learner)
            if figures:
                log.write(done, figures)
                fabric.log_dict(figures, step=done)
            if done % 50 == 0 or last:
                new = [warning for warning in _warning_of(learner) if warning not in warnings]
                warnings += new
                for warning in new:
                    console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
            if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                spent = round(saved - begun, 1)
                save(folder, learner, optimizer, {"step": done, "seconds": spent, "warnings": warnings, **facts})
    for logger in fabric.loggers:
        logger.finalize("success")
    return warnings


def set_up(fabric: Fabric, learner: nn.Module, options: TrainingOptions) -> tuple[Any, Any]:
    """Learner and optimiser, ready to iterate on the fabric's device."""
    keep_freed_memory()
    learner = with_whole_statistics(learner, fabric.device)
    learner = learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from its stubs
    module, optimizer = fabric.setup(learner, _optimizer(learner, options))
    if options.optimizer == "sgd":  # fused, it cannot begin with some weights and take up others later
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return module, optimizer


def iterate(fabric: Fabric, module: Any, optimizer: Any, options: TrainingOptions, step: int) -> dict[str, Tensor]:
    """One iteration: losses, gradients, new weights."""
    torch.manual_seed(seed_of(options.seed, "engine", step, *[rank()] * (rank() > 0)))  # dropout and the like
    factor = learning_rate_factor(options, step, getattr(module, "rounds", (0,)))
    for group in optimizer.param_groups:
        group["lr"] = group["steady"] or options.learning_rate * factor
    module.train()
    losses: dict[str, Tensor] = module(step)
    fabric.backward(losses["loss"])
    for weight in getattr(module, "idle", lambda step: ())(step):
        weight.grad = None  # only now: DistributedDataParallel waits for every gradient
    if options.gradient_clip:
        # What is not finite shows in the next loss, and is said there.
        fabric.clip_gradients(module, optimizer, max_norm=options.gradient_clip, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def _warning_of(learner: nn.Module) -> list[str]:
    warning = getattr(learner, "warning", lambda: None)()
    return [warning] if warning else []


def _optimizer(learner: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    own: dict[str, float] = getattr(learner, "steady", {})
    steady = {id(p): rate for name, rate in own.items() for p in learner.get_submodule(name).parameters()}
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if steady.get(id(p), 0.0) == rate], "steady": rate}
        for rate in sorted({0.0, *own.values()})  # 0: that of the schedule
    ]
    groups = [group for group in groups if group["params"]]
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "lars":
        from pytorch_optimizer import LARS

        layerwise: torch.optim.Optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=decay)
        return layerwise
    # Fused: one pass over each weight instead of ten.
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=decay, fused=True)


class _Log:
    """`metrics.jsonl`: one line per record; lines after the checkpoint a run continues from are dropped."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["iteration"] <= first]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        # The last line of a killed run may be cut short.
        return [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def write(self, iteration: int, figures: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **figures}) + "\n")


def _loggers(options: TrainingOptions, folder: Path) -> list[Logger]:
    from glocal.loggers import make_logger

    return [make_logger(name, folder) for name in options.log]
