"""Task-driven data augmentation: generators learn which changes of labelled slices teach most (TDA, Chaitanya 2019).

One generator moves pixels, another adds intensities. They learn beside a segmentation network whose loss they lower
too, while discriminators hold their images to what unlabelled slices look like, and a reward for large changes keeps
them from changing nothing. Then they stand still, and a fresh network learns from what they make of labelled slices.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from glocal.distributed import share, whole
from glocal.finetuning.base import BothBatches, FinetuningOptions, ReferencePreset, Strategy, StrategyEntry
from glocal.finetuning.discriminators import ImageDiscriminator, untaught
from glocal.finetuning.generators import NOISE, Deformation, Intensity
from glocal.finetuning.losses import as_probabilities
from glocal.finetuning.mixup import draw_mixtures, mix
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets
from glocal.randomness import generator
from glocal.views.ranges import moved
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

REFERENCE: dict[str, Any] = {
    "batch": 20,
    "unlabelled_batch": 20,
    "max_iterations": 20_000,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "warmup_iterations": 0,
    "schedule": "constant",
    "loss": "ce",
    "augmentation": ViewOptions(spatial=SpatialOptions(rotation=15, scale=(0.95, 1.05), flip=(0.0, 0.5))).model_dump(),
}


class Options(FinetuningOptions):
    """Weights, noise and shares of the batch are those of the released code."""

    strategy: Literal["task-augmentation"] = "task-augmentation"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": REFERENCE})
    unlabelled_batch: int = Field(10, ge=1, description="unlabelled slices per step, while the generators learn")
    final: float = Field(0.5, gt=0, lt=1, description="share of the training that is left to the final network")
    alone: float = Field(
        0.04, ge=0, lt=1, description="share of the time before, in which a first network learns without generators"
    )
    lambda_dsc: float = Field(1.0, gt=0, description="weight of the segmentation loss, while the generators learn")
    lambda_adv: float = Field(1.0, ge=0, description="weight of deceiving the discriminators")
    lambda_l1: float = Field(1e-3, ge=0, description="reward for large changes: pixels moved, intensities added")
    reach: float = Field(0.25, gt=0, description="no pixel moves further than this share of the image's side")
    width: int = Field(16, ge=1, description="channels of generators and discriminators where they have fewest")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup on top of the final network's batches; 0: none")


class TaskAugmentation(Strategy):
    """A first network and the generators, then the final network, which has waited as it was begun."""

    in_turns = True

    def __init__(self, begin: Callable[[int], SegmentationNetwork], *rest: Any) -> None:
        super().__init__(begin, *rest)
        o: Options = self.options
        self.first = begin(1).requires_grad_(True)
        image = self.labelled.store.images(self.labelled.slices[:1])
        channels, size = image.shape[1], (image.shape[2], image.shape[3])
        generators = Deformation(channels, size, o.width, o.reach), Intensity(channels, size, o.width)
        self.generators = nn.ModuleList(generators)
        self.discriminators = nn.ModuleList(ImageDiscriminator(channels, size, o.width) for _ in generators)
        self.final_from = o.max_iterations - max(1, round(o.final * o.max_iterations))
        self.generators_from = round(o.alone * self.final_from)
        self.rounds = (0, self.final_from)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Those of the network that learns in this iteration, with those of the generators while they learn."""
        if step >= self.final_from:
            return {"loss": self.segmentation(self.network, *self.changed_batch(step))}
        if step < self.generators_from:
            return {"loss": self.segmentation(self.first, *self.labelled_batch(step))}
        return self.generating(step)

    def segmentation(self, network: nn.Module, images: Tensor, targets: Tensor, batch: int) -> Tensor:
        """L_seg of this process's share of a batch."""
        return self.loss(whole(network(images), batch), whole(targets, batch))

    def generating(self, step: int) -> dict[str, Tensor]:
        """L = λ_dsc L_seg + λ_adv L_adv - λ_L1 (mean |flow| + mean |dI|), and L_D for the discriminators.

        One backward pass serves all: a discriminator is deceived with its weights detached, and taught with the
        generated images detached. The first network learns from a batch of which 5 to 14 of 20 slices are as they are,
        the others moved or changed in intensity by turns.
        """
        o: Options = self.options
        both = self.both_batches(step)
        batch, own = both.sizes[0], share(both.sizes[0])
        images, real = both.images[: both.own], both.images[both.own :]
        seen, truth = images, self.one_hot(both.labels[own]).to(images.dtype)
        targets, noise = truth, self.noise(step, batch).to(images)
        plain = shares_of(batch, [(5, 15)], generator(o.seed, step, "plain"))[0]
        rows = torch.arange(batch)[own]
        adversaries, sizes = [], []
        for number, (make, judge) in enumerate(zip(self.generators, self.discriminators, strict=True)):
            made, labels, field = make(images, targets, noise)
            adversaries.append(adversarial(judge, made, real, both))
            sizes.append(whole(field.abs().mean((1, 2, 3)), batch).mean())
            used = (rows >= plain) & (rows % 2 == number)
            seen, truth = where(used, made, seen), where(used, labels, truth)
        l_seg = self.segmentation(self.first, seen, truth, batch)
        l_adv, l_d = torch.stack(adversaries).sum(0)
        loss = o.lambda_dsc * l_seg + o.lambda_adv * l_adv - o.lambda_l1 * (sizes[0] + sizes[1]) + l_d
        return {"loss": loss, "L_seg": l_seg, "L_adv": l_adv, "L_D": l_d, "flow": sizes[0], "dI": sizes[1]}

    def changed_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """This process's share of a batch for the final network.

        Of 20 slices the first 1 to 4 are moved, those up to the 5th to 9th changed in intensity, those up to the 10th
        to 14th both, and the others as they are.

        Returns:
            Images `(b, C, H, W)`, probabilities `(b, K, H, W)`, and the size of the whole batch.
        """
        o: Options = self.options
        images, labels, batch = self.labelled_batch(step)
        own, rows = share(batch), torch.arange(batch)
        ends = shares_of(batch, [(1, 5), (5, 10), (10, 15)], generator(o.seed, step, "changed"))
        moving = (rows < ends[0]) | ((rows >= ends[1]) & (rows < ends[2]))
        adding = (rows >= ends[0]) & (rows < ends[2])
        images, targets = self.changed(images, labels, self.noise(step, batch), moving[own], adding[own])
        if o.mixup:
            first, second, lam = draw_mixtures(batch, o.mixup, generator(o.seed, step, "mixup"))
            images, targets = whole(images, batch), whole(targets, batch)
            images, targets = mix(images, targets, first[own], second[own], lam[own])
        return images, targets, batch

    @torch.no_grad()
    def changed(
        self, images: Tensor, labels: Tensor, noise: Tensor, moving: Tensor, adding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the generators, as they stand, make of slices: `moving` and `adding` `(b,)` say of which.

        The images are moved first, and the intensities are those for the moved image.
        """
        self.generators.eval()
        targets, noise = self.one_hot(labels).to(images.dtype), noise.to(images)
        for make, used in zip(self.generators, (moving, adding), strict=True):
            made, truth, _ = make(images, targets, noise)
            images, targets = where(used, made, images), where(used, truth, targets)
        return images, targets

    def examples(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Four labelled slices, and what the generators make of them."""
        rng = generator(self.options.seed, "examples")
        slices = self.labelled.uniform(4, rng)
        images, labels = self.labelled.images(slices), self.labelled.labels(slices)
        noise, yes = torch.randn(4, NOISE, generator=rng), torch.ones(4, dtype=torch.bool)
        kinds = {"as they are": (~yes, ~yes), "moved": (yes, ~yes), "intensity": (~yes, yes), "both": (yes, yes)}
        made = {title: self.changed(images, labels, noise, *used) for title, used in kinds.items()}
        return {title: (changed[:, 0], targets.argmax(1)) for title, (changed, targets) in made.items()}

    def noise(self, step: int, batch: int) -> Tensor:
        """z ~ N(0, 1) of this process's share of a batch, the same for both generators."""
        return torch.randn(batch, NOISE, generator=generator(self.options.seed, step, "noise"))[share(batch)]

    def one_hot(self, labels: Tensor) -> Tensor:
        """Label maps `(b, H, W)` -> `(b, K, H, W)`."""
        return as_probabilities(labels, len(self.labelled.store.labels))


def adversarial(judge: nn.Module, made: Tensor, real: Tensor, both: BothBatches) -> Tensor:
    """L_adv of generated images and L_D of a discriminator, `(2,)`: binary cross-entropy, real being 1.

    Args:
        judge: the discriminator; it sees both kinds together, so that its batch norms do not tell them apart.
        made: this process's share of the generated images, `(b, C, H, W)`.
        real: its share of the unlabelled ones, `(u, C, H, W)`.
        both: the batches that they are of.
    """
    deceived, _ = both.apart(untaught(judge, torch.cat([made, real])).float())
    fake, genuine = both.apart(judge(torch.cat([made.detach(), real])).float())
    return torch.stack([softplus(-deceived).mean(), softplus(fake).mean() + softplus(-genuine).mean()])


def shares_of(batch: int, ranges: list[tuple[int, int]], rng: torch.Generator) -> list[int]:
    """For each range a whole number from it, the end excluded, of 20 slices; as many of a batch of another size."""
    return [round(batch * int(torch.randint(low, high, (), generator=rng)) / 20) for low, high in ranges]


def where(used: Tensor, made: Tensor, other: Tensor) -> Tensor:
    """Rows `(b, ...)` of `made` where `used` `(b,)` says so, else of `other`."""
    return torch.where(moved(used, made.device)[:, None, None, None], made, other)


TASK_AUGMENTATION = StrategyEntry(
    paper="K. Chaitanya et al.: Semi-supervised and task-driven data augmentation. IPMI 2019.",
    summary="generators learn changes of the labelled slices that help, and a fresh network learns from what they make",
    version=1,
    options=Options,
    make=TaskAugmentation,
    uses_unlabelled=True,
)
