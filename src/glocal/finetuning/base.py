"""What a fine-tuning strategy is: options, and a step turned into losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.finetuning.losses import LossName, segmentation_loss
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions, TrainedOptions
from glocal.networks.unet import UNetOptions
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import View, ViewOptions, draw_view

T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(min_length=1)]


class FinetuningOptions(TrainingOptions):
    """What every strategy has. Nothing is frozen: all parts of the network are trained."""

    strategy: str = Field("supervised", description="see `glocal methods`")
    network: NetworkOptions = Field(UNetOptions(), description="with pre-trained weights, theirs is taken")
    labels: PositiveInt | Literal["all"] | Several[PositiveInt | Literal["all"]] | Several[str] = Field(
        2,
        description="labelled volumes to train on: a number or `all` (a list of these for several trainings), "
        "or cases by name",
    )
    validation: int = Field(0, ge=0, description="further labelled volumes that only choose the best checkpoint")
    draw: int = Field(0, ge=0, description="which random choice of the labelled volumes")
    batch: int = Field(10, ge=1, description="slices per step")
    loss: LossName = Field(
        "dice+ce", description="dice: as Chaitanya et al., background included; ssl4mis: as Luo et al."
    )
    evaluate_every: int = Field(50, ge=1, description="iterations between looks at the validation volumes")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=30, scale=(0.8, 1.3), shift=0.15, anisotropy=0.1, elastic=2.5, elastic_grid=6),
        intensity=IntensityOptions(brightness=0.2, contrast=0.3, gamma=(0.7, 1.5), noise=0.05),
    )


Ramp = Annotated[float, Field(ge=0, le=1, description="share of the training over which the weight rises to `weight`")]


class SemiSupervisedOptions(FinetuningOptions):
    """What a strategy has that learns from unlabelled slices too."""

    unlabelled_batch: int = Field(10, ge=1, description="unlabelled slices per step, beside those of `batch`")
    weight: float = Field(1.0, ge=0, description="of what is learnt from unlabelled slices, after the ramp-up")
    ramp_up: Ramp = 0.4


ReferencePreset = Annotated[
    Literal["adopted", "reference"],
    Field(
        exclude=True,  # what it sets is kept instead
        description="reference: as the authors' code (of most, SSL4MIS) trains; sets only what is not given itself",
    ),
]

# What SSL4MIS (Luo et al., code) trains with, but for what its strategies differ in: their preset `reference`.
SSL4MIS: dict[str, Any] = {
    "batch": 12,
    "unlabelled_batch": 12,
    "max_iterations": 30_000,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 1e-4,
    "warmup_iterations": 0,
    "schedule": "poly",
    "loss": "ssl4mis",
    "weight": 0.1,
    "ramp_up": 1.0,
    "augmentation": ViewOptions(spatial=SpatialOptions(rotation=20, flip=(0.5, 0.5))).model_dump(),
}


@dataclass(frozen=True)
class BothBatches:
    """Labelled and unlabelled slices, to go through a network together: batch norm then has statistics of both.

    Attributes:
        images: this process's share of both, `(b + u, C, H, W)`, the labelled ones first.
        labels: of all processes, `(B, H, W)`.
        own: b.
        sizes: B and U, of the whole batches.
    """

    images: Tensor
    labels: Tensor
    own: int
    sizes: tuple[int, int]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What came of the images, `(b + u, ...)` -> rows of all processes, `(B, ...)` and `(U, ...)`."""
        return whole(x[: self.own], self.sizes[0]), whole(x[self.own :], self.sizes[1])


class Strategy(nn.Module):
    """A strategy knows how to begin a network, the labelled slices, the unlabelled ones and its options.

    Args:
        begin: `begin(k)` makes a network as it is to be begun with: pre-trained parts, where there are any, are the
            same for every k, random weights differ. The strategy trains `begin(0)`, and may ask for others.
        labelled: slices of the labelled volumes of this draw.
        unlabelled: slices of the other volumes that may be trained on; their labels, where there are any, are never
            looked at.
        options: the strategy's own.
        folder: of the run, for what it keeps beside its weights.

    Attributes:
        network: what is trained; `network(images)` gives logits.
        steady: names of modules with a learning rate of their own, see `engine.train`.
        rounds: iterations in which warm-up and schedule begin anew, see `engine.train`.
        in_turns: some weights get no gradient in some iterations.
    """

    steady: Mapping[str, float] = MappingProxyType({})
    rounds: tuple[int, ...] = (0,)
    in_turns: bool = False

    def __init__(
        self, begin: Callable[[int], SegmentationNetwork], labelled: Pool, unlabelled: Pool, options: Any, folder: Path
    ) -> None:
        super().__init__()
        self.network = begin(0).requires_grad_(True)
        self.labelled, self.unlabelled, self.options, self.folder = labelled, unlabelled, options, folder
        self.loss = segmentation_loss(options.loss)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Losses of iteration `step`; `loss` is minimised, the others are only logged."""
        raise NotImplementedError

    def forward(self, step: int) -> dict[str, Tensor]:
        """The same as `losses`: what the engine calls."""
        return self.losses(step)

    @property
    def predictor(self) -> SegmentationNetwork:
        """What predicts, and is kept: the network itself, unless a strategy says otherwise."""
        return self.network

    def examples(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Pictures for the report, asked for when all is trained: by title images `(n, H, W)` and their label maps."""
        return {}

    def labelled_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """This process's share of a batch of labelled slices, image and label moved together.

        Slices come uniformly with replacement, each in one view.

        Returns:
            Images `(b, C, H, W)`, label maps `(b, H, W)`, and the size of the whole batch.
        """
        o: FinetuningOptions = self.options
        slices = self.labelled.uniform(o.batch, generator(o.seed, step, "slices"))
        own, batch = slices[share(len(slices))], len(slices)
        images, labels = self.labelled.images(own), self.labelled.labels(own)
        view = self.view(o.augmentation, images, batch, step, "view")
        return view.image(images), view.labels(labels), batch

    def unlabelled_batch(self, step: int) -> tuple[Tensor, int]:
        """This process's share of a batch of unlabelled slices, as they are, uniformly with replacement.

        Returns:
            Images `(b, C, H, W)`, and the size of the whole batch.
        """
        o: SemiSupervisedOptions = self.options
        slices = self.unlabelled.uniform(o.unlabelled_batch, generator(o.seed, step, "unlabelled slices"))
        return self.unlabelled.images(slices[share(len(slices))]), len(slices)

    def both_batches(self, step: int) -> BothBatches:
        """The labelled batch, and the unlabelled one in one view with the same augmentation."""
        images, labels, batch = self.labelled_batch(step)
        others, size = self.unlabelled_batch(step)
        view = self.view(self.options.augmentation, others, size, step, "unlabelled view")
        both = torch.cat([images, view.image(others)])
        return BothBatches(both, whole(labels, batch), len(images), (batch, size))

    def view(self, options: ViewOptions, images: Tensor, batch: int, step: int, *role: str | int) -> View:
        """This process's share of a random view of a batch.

        Args:
            options: how far images may be changed.
            images: the share itself, `(b, C, H, W)`, for its size.
            batch: the size of the whole batch.
            step: the iteration.
            role: which of the views of this iteration; each is drawn for itself.
        """
        size = (images.shape[-2], images.shape[-1])
        return draw_view(options, batch, size, generator(self.options.seed, step, *role))[share(batch)]

    def consistency_weight(self, step: int) -> float:
        """Weight of what is learnt from unlabelled slices in iteration `step`."""
        o: SemiSupervisedOptions = self.options
        return o.weight * ramp_up(step, o.ramp_up * o.max_iterations)


def ramp_up(step: float, steps: float) -> float:
    """exp(-5 (1 - step / steps)^2), and 1 from `steps` on (Laine & Aila, ICLR 2017)."""
    return exp(-5 * (1 - min(1.0, step / steps)) ** 2) if steps > 0 else 1.0


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy by name; `version` is raised by hand whenever its results change (see `runs.identity`).

    `network(options, network)` says of which network the strategy trains and predicts where `network` was asked for.
    A strategy that `uses_unlabelled` slices is given those of the volumes it has no labels of.
    """

    paper: str
    summary: str
    version: int
    options: type[FinetuningOptions]
    make: type[Strategy]
    network: Callable[[Any, TrainedOptions], TrainedOptions] = lambda options, network: network
    uses_unlabelled: bool = False
