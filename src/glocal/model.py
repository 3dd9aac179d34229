"""The model file: weights, and in its header all that prediction and an auditor need. No pickle is ever loaded."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glocal.data.plan import Plan
from glocal.errors import GlocalError
from glocal.files import replacing
from glocal.networks.registry import NETWORKS, TrainedOptions, build
from glocal.networks.several_decoders import SeveralDecodersOptions


class Header(BaseModel):
    """What a model file says about itself."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["pretrained", "segmentation"]
    network: TrainedOptions
    channels: int
    labels: dict[str, int]
    plan: Plan
    provenance: dict[str, Any]  # method or strategy, options, subjects seen, labelled cases, papers, versions

    @property
    def papers(self) -> list[str]:
        """What to cite: the papers of the network, and of the strategy and the pre-training that trained it."""
        trained = self.provenance.get("papers") or [self.provenance["paper"]]
        network = self.network.of if isinstance(self.network, SeveralDecodersOptions) else self.network
        return list(dict.fromkeys([NETWORKS[network.name].paper, *trained]))


@dataclass(frozen=True)
class Transfer:
    """Which weights of a network came from a pre-trained model and which did not."""

    transferred: tuple[str, ...]
    fresh: tuple[str, ...]  # in the network, not in the file: random
    unused: tuple[str, ...]  # in the file, not in the network
    mismatched: tuple[str, ...]  # in both, of other shape: random

    def sentence(self) -> str:
        """The report in one sentence."""
        parts = f"{len(self.transferred)} weights were transferred, {len(self.fresh)} start at random"
        if self.mismatched:
            parts += f", {len(self.mismatched)} do not fit and start at random ({', '.join(self.mismatched[:3])} ...)"
        if self.unused:
            parts += f", {len(self.unused)} of the file are not used ({', '.join(self.unused[:3])} ...)"
        return parts + "."

    def as_dict(self) -> dict[str, list[str]]:
        """Every weight by name, for `transfer.json`."""
        names = ("transferred", "fresh", "unused", "mismatched")
        return {name: list(getattr(self, name)) for name in names}


def save_model(path: Path, weights: Mapping[str, Tensor], header: Header) -> None:
    """Write a model file, atomically."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata={"glocal": header.model_dump_json()})


def add_provenance(path: Path, **facts: Any) -> None:
    """Write further facts into the provenance of a model file, atomically; its weights stay as they are."""
    header = read_header(path)
    provenance = {**header.provenance, **facts}
    save_model(path, load_file(str(path)), header.model_copy(update={"provenance": provenance}))


def find_model(path: Path) -> Path:
    """The model file that `path` names: itself, or the one of a run folder.

    Raises:
        GlocalError: there is none, or there are several.
    """
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if not path.exists():
        raise GlocalError(f"{path} does not exist: give a model.safetensors file or a finished run folder.")
    found = sorted(path.glob("finetune/**/model.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(file) for file in found[:3])
        raise GlocalError(f"{path} holds {len(found)} models: name one of them, for example {listed}.")
    raise GlocalError(f"{path} holds no model.safetensors: is the run finished?")


def read_header(path: Path) -> Header:
    """The header of a model file.

    Raises:
        GlocalError: not a model file of glocal, or damaged.
        PermissionError: it may not be read.
    """
    with suppress(FileNotFoundError), open(path, "rb"):  # what may not be read, safetensors takes for absent
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            return Header.model_validate(json.loads(file.metadata()["glocal"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise GlocalError(f"{path} is not a model file of glocal, or it is damaged: copy it again.") from error


def digest_of_weights(path: Path) -> str:
    """SHA-256 of a model file's weights and their names alone: equal for trainings that were done twice alike."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(str(path)).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def transfer(network: nn.Module, path: Path) -> Transfer:
    """Copy into `network` every weight that the model file holds and that fits, and report all others.

    Batch-norm statistics are weights and are copied too.
    """
    weights, own = load_file(str(path)), network.state_dict()
    fits = {name for name in weights.keys() & own.keys() if weights[name].shape == own[name].shape}
    network.load_state_dict({name: weights[name] for name in fits}, strict=False)
    return Transfer(
        transferred=tuple(sorted(fits)),
        fresh=tuple(sorted(own.keys() - weights.keys())),
        unused=tuple(sorted(weights.keys() - own.keys())),
        mismatched=tuple(sorted((weights.keys() & own.keys()) - fits)),
    )


def load_network(path: Path) -> tuple[nn.Module, Header]:
    """The network of a segmentation model, in evaluation mode, and the header.

    Raises:
        GlocalError: the file holds pre-trained parts only, or is damaged.
    """
    header = read_header(path)
    if header.kind != "segmentation":
        raise GlocalError(f"{path} is a pre-trained model without segmentation head: fine-tune it first.")
    network = build(header.network, header.channels, len(header.labels))
    try:
        network.load_state_dict(load_file(str(path)))
    except (RuntimeError, SafetensorError) as error:
        raise GlocalError(f"{path} does not hold the weights its header promises: copy it again.") from error
    return network.eval(), header
