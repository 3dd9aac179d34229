"""Several predictions as one: models, decoders, moved views of a slice and dropout passes, averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from glocal.errors import GlocalError
from glocal.files import digest
from glocal.model import Header, load_network
from glocal.networks.several_decoders import SeveralDecoders
from glocal.randomness import seed_of
from glocal.runs import flatten
from glocal.views.moves import Move, moves
from glocal.views.spatial import SpatialOptions, centres

_MARGIN = 0.2  # of half a side: what a network says so near to the border of a moved view counts less


class Ensemble(nn.Module):
    """A network whose logits are the logarithm of the mean of many probabilities: so it predicts like any other.

    Every network counts the same. Where a moved view does not show a place of the slice, the others alone count there,
    and towards its border, beyond which a network sees nothing, it counts less and less.
    """

    def __init__(self, networks: Sequence[nn.Module], views: Sequence[Sequence[Move]], passes: int = 0) -> None:
        """Average over all combinations.

        Args:
            networks: give logits; in evaluation mode.
            views: of each network, see `moves`.
            passes: predictions with random dropout, in place of one without; 0 leaves dropout out.
        """
        super().__init__()
        self.networks, self.views, self.passes = nn.ModuleList(networks), views, passes
        for module in self.modules():
            if _drops(module):
                module.train(passes > 0)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, K, H, W)`."""
        return torch.stack([self._mean(images, number) for number in range(len(self.networks))]).mean(0).log()

    def _mean(self, images: Tensor, number: int) -> Tensor:
        """Probabilities `(B, K, H, W)` by one of the networks."""
        network, total = self.networks[number], images.new_zeros(())
        for k, view in enumerate(self.views[number]):
            move = view.of(len(images))
            moved = move.there.image(images)
            for at in range(max(1, self.passes)):
                if self.passes:  # a function of which prediction this is, so that it is the same again
                    found = _with_dropout(network, moved, seed_of(0, "dropout", number, k, at))
                else:
                    found = network(moved)
                found = found.float().softmax(1)
                counts = torch.ones_like(found[:, :1]) if move.there.still else _fading(found)
                total = total + move.back.image(torch.cat([found * counts, counts], dim=1))
        return total[:, :-1] / total[:, -1:]  # what comes from beyond a view is 0 in both


def _fading(like: Tensor) -> Tensor:
    """1, and towards the borders down to 0: `(B, 1, H, W)`."""
    down, right = (((1 - centres(side, like.device).abs()) / _MARGIN).clamp(max=1) for side in like.shape[-2:])
    return torch.minimum(down[:, None], right).expand(len(like), 1, -1, -1)


def _with_dropout(network: nn.Module, images: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        torch.manual_seed(seed)
        logits: Tensor = network(images)
        return logits


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0


@dataclass(frozen=True)
class Variation:
    """What is averaged over: the views of each network, decoders, dropout passes.

    `options` are those that masks depend on.
    """

    views: tuple[tuple[Move, ...], ...]
    decoders: tuple[int, ...]
    passes: int
    options: dict[str, Any]

    @property
    def several(self) -> bool:
        """Whether there is more to average than what a network does itself."""
        return len(self.views) > 1 or len(self.views[0]) > 1 or self.passes > 0

    def sentence(self, uncertainty: bool) -> str:
        """What a prediction is, and its uncertainty, in words."""
        sizes = {
            "models": (len(self.views),),
            "moved views of each slice": tuple(map(len, self.views)),
            "decoders": self.decoders,
            "passes with random dropout": (self.passes,),
        }
        over = [f"{' and '.join(map(str, dict.fromkeys(n)))} {what}" for what, n in sizes.items() if max(n) > 1]
        text = f"Every prediction is the mean of {' × '.join(over)}." if over else "Every prediction is a single one."
        if not uncertainty:
            return text
        text += " The uncertainty is the entropy of its probabilities, from 0 (sure) to 1 (all structures alike)"
        if over:
            return f"{text}: it is high where single predictions are unsure, and where they contradict each other."
        return (
            f"{text}: where the network itself is unsure. Errors that it is sure of show only where several "
            "predictions contradict each other: ask for these by --tta, --with or --passes."
        )


@dataclass(frozen=True)
class Models:
    """Models that predict together, and what their files say; the first one's plan is the plan of all."""

    files: tuple[Path, ...]
    networks: tuple[nn.Module, ...]
    headers: tuple[Header, ...]

    @staticmethod
    def load(files: Sequence[Path]) -> "Models":
        """Read model files.

        Raises:
            GlocalError: a file is damaged or named twice, or one needs other images or gives other structures.
        """
        networks, headers = zip(*map(load_network, files), strict=True)
        for k, (file, header) in enumerate(zip(files, headers, strict=True)):
            if digest(file) in map(digest, files[:k]):
                raise GlocalError(f"{file} holds the same model as another one that is named: name each model once.")
            if difference := _difference(headers[0], header):
                raise GlocalError(
                    f"{file} cannot predict together with {files[0]}, because they differ in {difference}: name models "
                    "that were trained on the same dataset with the same preprocessing."
                )
        return Models(tuple(files), networks, headers)

    @property
    def temperature(self) -> float | None:
        """By which probabilities are to be softened, the geometric mean; None if a model was never calibrated."""
        fitted: list[Any] = [header.provenance.get("temperature") for header in self.headers]
        return exp(fmean(map(log, fitted))) if all(fitted) else None

    @property
    def papers(self) -> list[str]:
        """What to cite for what they predict."""
        return list(dict.fromkeys(paper for header in self.headers for paper in header.papers))

    def sentence(self, several: bool) -> str:
        """Whether probabilities are calibrated, in words; `several` of them may be averaged."""
        if self.temperature is None:
            return (
                "Probabilities are uncalibrated, because no validation volume was kept in the fine-tuning "
                "(validation=1, in a run finetune.validation=1): uncertainty compares cases with each other, it is no "
                "chance of an error."
            )
        volumes = [header.provenance["calibration"]["volumes"] for header in self.headers]
        return (
            f"Probabilities are calibrated by a temperature of {self.temperature:.2f}, fitted on "
            f"{' and '.join(map(str, volumes))} validation volume{'s' * (volumes != [1])}"
            f"{': to single predictions, and a mean of several is softer already' * several}."
        )

    def variation(self, tta: bool, passes: int, every_decoder: bool) -> Variation:
        """What to average over; with `every_decoder` networks predict by the mean of their decoders from now on.

        Raises:
            GlocalError: views or passes that would all be the same.
        """
        options: dict[str, Any] = {"tta": tta, "passes": passes}
        if passes < 0:
            raise GlocalError(f"--passes={passes} is less than none: give the number of predictions with dropout.")
        for file, network, header in zip(self.files, self.networks, self.headers, strict=True):
            if passes and not any(map(_drops, network.modules())):
                raise GlocalError(
                    f"The network of {file} ({header.network.name}) has no dropout, so all passes would be the same: "
                    "leave --passes out; --tta and --with vary predictions of every network."
                )
            if every_decoder and isinstance(network, SeveralDecoders) and network.predict != "mean":
                network.predict, options["decoders"] = "mean", "mean"
        views = tuple(
            tuple(_views(*known)) if tta else (Move.by(torch.eye(3)),)
            for known in zip(self.files, self.headers, strict=True)
        )
        decoders = tuple(
            len(n.branches) if isinstance(n, SeveralDecoders) and n.predict == "mean" else 1 for n in self.networks
        )
        return Variation(views, decoders, passes, options)


def _views(file: Path, header: Header) -> list[Move]:
    augmentation = header.provenance.get("finetuning", {}).get("augmentation", {}).get("spatial", {})
    found = moves(SpatialOptions.model_validate(augmentation), header.plan.options.size)
    if len(found) == 1:
        raise GlocalError(
            f"{file} was trained on slices that were never turned, zoomed, shifted or mirrored (windows, stretching "
            "and elastic changes do not count), so it knows no moved ones: leave --tta out."
        )
    return found


def _difference(first: Header, other: Header) -> str:
    """What two models differ in that predict together, in words; empty if in nothing that matters."""
    if first.channels != other.channels:
        return f"their channels ({first.channels} and {other.channels})"
    if first.labels != other.labels:
        return f"their structures ({', '.join(first.labels)}; {', '.join(other.labels)})"
    a, b = (flatten(header.plan.model_dump(mode="json", exclude={"warnings"})) for header in (first, other))
    keys = [key for key in a if a[key] != b.get(key)] + [key for key in b if key not in a]
    return f"how they prepare images ({keys[0]}: {a.get(keys[0])} and {b.get(keys[0])})" if keys else ""


def softened(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities `(m, K, ...)` as of logits divided by a temperature: p^(1/T), and the sum over K is 1 again.

    Their order stays, so that masks do not depend on it.
    """
    powers = probabilities.clamp_min(0).pow(1 / temperature)  # interpolation may round below 0
    return powers / powers.sum(1, keepdim=True)
