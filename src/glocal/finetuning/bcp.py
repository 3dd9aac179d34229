"""Bidirectional copy-paste: labelled slices are pasted into unlabelled ones and back (Bai et al., CVPR 2023)."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from glocal.distributed import share, whole
from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry, ramp_up
from glocal.finetuning.consistency import Predictor, Statistics, chosen, paste, rectangles
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets
from glocal.randomness import generator
from glocal.teacher import Teacher
from glocal.views.ranges import moved


class Options(SemiSupervisedOptions):
    """The paper's symbols; of the training, a quarter is its first phase, as in the code for hearts."""

    strategy: Literal["bcp"] = "bcp"
    preset: ReferencePreset = "adopted"
    _preset = presets(
        {"reference": {**SSL4MIS, "weight": 0.5, "ramp_up": 0.0, "max_iterations": 40_000, "schedule": "constant"}}
    )
    batch: int = Field(10, ge=2, description="labelled slices per step: one half is pasted, one half gets pasted into")
    unlabelled_batch: int = Field(
        10, ge=2, description="unlabelled slices per step, in two halves like the labelled; the smaller batch decides"
    )
    pretraining: float = Field(
        0.25, ge=0, lt=1, description="share of the training on labelled slices alone, pasted into each other"
    )
    weight: float = Field(0.5, ge=0, description="alpha: of unlabelled pixels; labelled ones have 1")
    ramp_up: float = Field(0.0, ge=0, le=1, description="share of the second phase over which alpha rises to `weight`")
    beta: float = Field(2 / 3, gt=0, le=1, description="sides of the pasted rectangle, as a share of the image's")
    place: Literal["random", "centre"] = Field("random", description="where the rectangle lies")
    largest: bool = Field(True, description="of each class the teacher sees in a slice, only the largest piece counts")
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher")
    statistics: Statistics = "copied"
    predict: Predictor = "student"


class CopyPaste(Strategy):
    """First on labelled slices alone; then a teacher, which begins as what came of that, labels the unlabelled ones."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        o: Options = self.options
        self.teacher = Teacher(self.network, gathers=self.options.statistics == "own")
        self.first = int(o.pretraining * o.max_iterations)
        self.rounds = (0, self.first) if self.first else (0,)

    @property
    def predictor(self) -> SegmentationNetwork:
        """Student or teacher."""
        return chosen(self.options.predict, self.network, self.teacher)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_in + L_out, in the first phase the loss of labelled mixtures."""
        o: Options = self.options
        if step:  # until its first lesson the teacher is the student
            alone = step <= self.first
            self.teacher.follow([self.network], 0.0 if alone else o.momentum, alone or o.statistics == "copied")
        images, labels, batch = self.labelled_batch(step)
        images, labels, n = whole(images, batch), whole(labels, batch), batch // 2
        if step < self.first:
            inside = self.rectangles(n, images, step)
            mixed = paste(inside, images[n : 2 * n], images[:n])
            target = paste(inside, labels[n : 2 * n], labels[:n])
            logits = whole(self.network(mixed[share(n)]), n)
            return {"loss": self.loss(logits, target, inside.float()) + self.loss(logits, target, (~inside).float())}
        others, pseudo = self.taught(step)
        n = min(n, len(others) // 2)
        inside = self.rectangles(n, images, step)
        first, second = slice(n), slice(n, 2 * n)
        inward, outward = paste(inside, images[first], others[first]), paste(inside, others[second], images[second])
        targets = paste(inside, labels[first], pseudo[first]), paste(inside, pseudo[second], labels[second])
        own = share(n)
        logits = whole(self.network(torch.cat([inward[own], outward[own]])), n)
        weight = self.consistency_weight(step)
        into = self.mixed_loss(logits[:n], targets[0], inside, weight)
        out = self.mixed_loss(logits[n:], targets[1], ~inside, weight)
        return {"loss": into + out, "in": into, "out": out}

    @torch.no_grad()
    def taught(self, step: int) -> tuple[Tensor, Tensor]:
        """All unlabelled slices of the step `(U, C, H, W)`, and what the teacher takes them for `(U, H, W)`."""
        o: Options = self.options
        images, batch = self.unlabelled_batch(step)
        images = self.view(o.augmentation, images, batch, step, "unlabelled view").image(images)
        logits = whole(self.teacher[0](images), batch)
        labels = logits.argmax(1)
        return whole(images, batch), largest_pieces(labels, logits.shape[1]) if o.largest else labels

    def consistency_weight(self, step: int) -> float:
        """Weight of unlabelled pixels; it rises from the beginning of the second phase."""
        o: Options = self.options
        return o.weight * ramp_up(step - self.first, o.ramp_up * (o.max_iterations - self.first))

    def rectangles(self, count: int, images: Tensor, step: int) -> Tensor:
        """Where slices are pasted, `(count, H, W)` bool, on the images' device."""
        o: Options = self.options
        rng = generator(o.seed, step, "rectangles")
        place = torch.rand(2, count, generator=rng) if o.place == "random" else torch.full((2, count), 0.5)
        top, left = place * (1 - o.beta)
        side = torch.full((count,), o.beta)
        return moved(rectangles(top, left, side, side, (images.shape[-2], images.shape[-1])), images.device)

    def mixed_loss(self, logits: Tensor, target: Tensor, labelled: Tensor, weight: float) -> Tensor:
        """The loss of labelled pixels and `weight` times that of the others, each over its own part (Eq. 5 and 6)."""
        known = self.loss(logits, target, labelled.float())
        return known + weight * self.loss(logits, target, (~labelled).float())


def largest_pieces(labels: Tensor, classes: int) -> Tensor:
    """Label maps `(B, H, W)` in which each class has but its largest connected piece (of equals the first), else 0.

    Pixels that touch at a corner are connected; slices are not.
    """
    from scipy import ndimage

    maps = one_hot(labels.cpu(), classes).to(torch.uint8).movedim(-1, 1)[:, 1:].flatten(0, 1)  # (B (K - 1), H, W)
    within = np.zeros((3, 3, 3), bool)
    within[1] = True
    pieces, _ = ndimage.label(maps.numpy(), within)
    pieces = pieces.reshape(len(maps), -1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # what is no piece
    largest = np.take_along_axis(pieces, sizes[pieces].argmax(1)[:, None], 1)
    kept = torch.from_numpy((pieces == largest) & (largest > 0)).view(len(labels), -1, *labels.shape[1:]).any(1)
    return labels * moved(kept, labels.device)


BCP = StrategyEntry(
    paper="Y. Bai, D. Chen, Q. Li, W. Shen, Y. Wang: Bidirectional copy-paste for semi-supervised medical image "
    "segmentation. CVPR 2023.",
    summary="paste labelled slices into unlabelled ones and back; a slow copy of the network labels the latter",
    version=2,
    options=Options,
    make=CopyPaste,
    uses_unlabelled=True,
)
