"""The one training loop: pre-training and fine-tuning give it a learner, it gives them iterations.

A learner is a module whose `forward(step)` returns its losses; everything random in it is a function of the step, so a
run that was killed continues from its last checkpoint bit for bit, with no random state to save.
"""

import ctypes
import json
import logging
import time
from collections.abc import Callable
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glocal.errors import GlocalError
from glocal.files import replacing, write_text
from glocal.progress import console, progress
from glocal.randomness import seed_of
from glocal.runs import held

CHECKPOINT_SECONDS = 30.0
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision at every start


class TrainingOptions(BaseModel):
    """What every training has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, description="every random choice follows from it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto takes bfloat16 where the processor has units for it; a begun training keeps its own"
    )
    threads: int = Field(0, ge=0, description="0 takes what there is; a begun training keeps its own")
    max_iterations: int = Field(1000, ge=1, description="optimiser steps (of each stage)")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="SGD has momentum 0.9")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_iterations: int = Field(30, ge=0, description="the learning rate rises linearly over these")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine falls to 0")
    log: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        ("tensorboard",), description="beside metrics.jsonl, which is always written"
    )


def learning_rate_factor(options: TrainingOptions, step: int) -> float:
    """Factor of the learning rate in iteration `step` (0-based): linear warm-up, then the schedule."""
    if step < options.warmup_iterations:
        return (step + 1) / options.warmup_iterations
    if options.schedule == "constant":
        return 1.0
    remaining = max(1, options.max_iterations - options.warmup_iterations)
    return 0.5 * (1 + cos(pi * (step - options.warmup_iterations) / remaining))


def device_named(name: str) -> torch.device:
    """The device `name` says; `auto` is the first GPU if there is one.

    Raises:
        GlocalError: unknown or absent device.
    """
    try:
        device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    except RuntimeError as error:
        raise GlocalError(f"device={name} is not known: use auto, cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise GlocalError(f"device={name} is not supported: use auto, cpu, cuda or cuda:0.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GlocalError(f"device={name} was asked for, but this machine has {torch.cuda.device_count()} GPUs.")
    return device


def fabric_for(device: torch.device, precision: str, loggers: list[Logger] | None = None) -> Fabric:
    """Device and precision, as Lightning Fabric wants them."""
    return Fabric(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        precision="bf16-mixed" if precision_of(device, precision) == "bfloat16" else "32-true",
        loggers=loggers or [],
    )


def precision_of(device: torch.device, precision: str) -> str:
    """`precision`, where `auto` takes bfloat16 if the device has units for it."""
    if precision == "auto":
        return "bfloat16" if _has_bfloat16_units(device) else "float32"
    return precision


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
            `warning()` may return a plain sentence about its state (for example collapse), asked for now and then.
        evaluate: returns figures to log every `evaluate_every` iterations and after the last.

    Returns:
        Warnings in plain words.

    Raises:
        GlocalError: the loss is not finite, the folder's checkpoint does not belong to this learner, or another process
            works in the folder.
    """
    with held(folder):
        return _train(learner, options, folder, description, evaluate, evaluate_every)


def _train(
    learner: nn.Module,
    options: TrainingOptions,
    folder: Path,
    description: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    evaluate_every: int,
) -> list[str]:
    checkpoint = folder / "checkpoint.safetensors"
    state = _read_state(checkpoint)
    fabric = fabric_for(
        device_named(options.device), state.get("precision", options.precision), _loggers(options, folder)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(state.get("threads", options.threads or threads))
    _keep_freed_memory()
    learner = learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from its stubs
    optimizer = _optimizer(learner, options)
    module, optimizer = fabric.setup(learner, optimizer)
    if state:
        _restore(checkpoint, learner, optimizer)
    log = _Log(folder / "metrics.jsonl", first=state.get("step", 0))
    warnings: list[str] = state.get("warnings", [])
    facts = {
        "precision": precision_of(fabric.device, state.get("precision", options.precision)),
        "threads": torch.get_num_threads(),
    }
    if not state:  # from here on, whatever machine continues
        _save(checkpoint, learner, optimizer, {"step": 0, "warnings": [], **facts})
    saved = time.monotonic()

    with progress() as bar:
        task = bar.add_task(description, total=options.max_iterations, completed=state.get("step", 0), info="")
        for step in range(state.get("step", 0), options.max_iterations):
            torch.manual_seed(seed_of(options.seed, "engine", step))  # dropout and the like
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(options, step)
            module.train()
            losses: dict[str, Tensor] = module(step)
            fabric.backward(losses["loss"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done, last = step + 1, step + 1 == options.max_iterations
            bar.advance(task)
            if done % 10 == 0 or last or step == 0:
                figures = {name: float(value.detach()) for name, value in losses.items()}
                if not isfinite(figures["loss"]):
                    raise GlocalError(
                        f"The loss became {figures['loss']} in iteration {done} of {folder}: lower learning_rate "
                        "or set precision=float32, in a new run folder."
                    )
                log.write(done, {**figures, "learning_rate": optimizer.param_groups[0]["lr"]})
                fabric.log_dict(figures, step=done)
                bar.update(task, info=f"loss {figures['loss']:.3f}")
            if evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0)):
                figures = evaluate(learner)
                log.write(done, figures)
                fabric.log_dict(figures, step=done)
            if done % 50 == 0 or last:
                new = [warning for warning in _warning_of(learner) if warning not in warnings]
                warnings += new
                for warning in new:
                    console.print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
            if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                log.flush()
                _save(checkpoint, learner, optimizer, {"step": done, "warnings": warnings, **facts})
                saved = time.monotonic()
    for logger in fabric.loggers:
        logger.finalize("success")
    torch.set_num_threads(threads)
    return warnings


def _keep_freed_memory() -> None:
    """Let glibc reuse the large blocks of one step in the next, instead of handing them back and faulting them in."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def training_state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint in `folder` says: `step`, `precision`, `threads`, `warnings`; empty if there is none."""
    return _read_state(folder / "checkpoint.safetensors")


def _warning_of(learner: nn.Module) -> list[str]:
    warning = getattr(learner, "warning", lambda: None)()
    return [warning] if warning else []


def _optimizer(learner: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay)


def _save(path: Path, learner: nn.Module, optimizer: Any, facts: dict[str, Any]) -> None:
    """Weights and optimiser state in one file without pickle: tensors by name, everything else in the header."""
    tensors = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items() if value is not None}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata={"glocal": json.dumps(facts)})


def _read_state(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["glocal"])
            return facts
    except Exception as error:
        raise GlocalError(f"{path} is damaged: delete it, and the training of this stage begins anew.") from error


def _restore(path: Path, learner: nn.Module, optimizer: Any) -> None:
    tensors = load_file(str(path))
    weights = {name.removeprefix("learner."): value for name, value in tensors.items() if name.startswith("learner.")}
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise GlocalError(f"{path} belongs to another network: choose another run folder.") from error
    content = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            content["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(content)


class _Log:
    """`metrics.jsonl`: one line per record; lines after the checkpoint a run continues from are dropped."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["iteration"] <= first]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        # The last line of a killed run may be cut short.
        return [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def write(self, iteration: int, figures: dict[str, float]) -> None:
        self._file.write(json.dumps({"iteration": iteration, **figures}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()


def _loggers(options: TrainingOptions, folder: Path) -> list[Logger]:
    from glocal.loggers import make_logger

    return [make_logger(name, folder) for name in options.log]
