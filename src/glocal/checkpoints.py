"""A training half-way: weights, optimiser and a few facts in one safetensors file, so that it continues exactly."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from glocal.errors import GlocalError
from glocal.files import replacing


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of the training in `folder`."""
    return folder / "checkpoint.safetensors"


def save(folder: Path, learner: nn.Module, optimizer: Any, facts: dict[str, Any]) -> None:
    """Write the checkpoint: tensors by name, everything else in the header."""
    tensors = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items() if value is not None}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(checkpoint_in(folder)) as temporary:
        save_file(tensors, str(temporary), metadata={"glocal": json.dumps(facts)})


def training_state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint in `folder` says: `step`, `seconds`, `precision`, `threads`, `warnings`. Empty: none.

    Raises:
        GlocalError: the file is damaged.
    """
    path = checkpoint_in(folder)
    if not path.exists():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["glocal"])
            return facts
    except Exception as error:
        raise GlocalError(f"{path} is damaged: delete it, and the training of this stage begins anew.") from error


def seconds_spent(run: Path) -> float:
    """Seconds of training, of all stages and starts of a run, up to the checkpoints in its folders.

    Raises:
        GlocalError: one of them is damaged.
    """
    return sum(float(training_state(path.parent).get("seconds", 0)) for path in run.rglob(checkpoint_in(run).name))


def restore(folder: Path, learner: nn.Module, optimizer: Any) -> None:
    """Put learner and optimiser into the state of the checkpoint.

    Raises:
        GlocalError: it is of another network.
    """
    tensors = load_file(str(checkpoint_in(folder)))
    weights = {name.removeprefix("learner."): value for name, value in tensors.items() if name.startswith("learner.")}
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise GlocalError(f"{checkpoint_in(folder)} belongs to another network: choose another run folder.") from error
    content = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            like = parameters[int(index)]
            # A fused optimiser walks through memory, so that its state must lie there as the weights do.
            kept = torch.empty_like(like, device="cpu").copy_(value) if value.shape == like.shape else value
            content["state"].setdefault(int(index), {})[key] = kept
    optimizer.load_state_dict(content)
