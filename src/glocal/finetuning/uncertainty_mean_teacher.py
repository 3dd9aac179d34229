"""Uncertainty-aware mean teacher: learn from the teacher where it is sure (Yu et al., MICCAI 2019)."""

from math import log
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import whole
from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry, ramp_up
from glocal.finetuning.consistency import Predictor, Statistics, chosen, follow, logits_of, noisy, probabilities
from glocal.finetuning.losses import pixel_mean
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets
from glocal.randomness import seed_of
from glocal.teacher import Teacher
from glocal.uncertainty import Dropout, mean_uncertainty


class Options(SemiSupervisedOptions):
    """The method's constants are those of SSL4MIS (Luo et al., code)."""

    strategy: Literal["uncertainty-mean-teacher"] = "uncertainty-mean-teacher"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "statistics": "own", "classes": "two"}})
    weight: float = Field(0.1, ge=0, description="of what is learnt from unlabelled slices, after the ramp-up")
    momentum: float = Field(0.99, ge=0, le=1, description="alpha of the teacher; in the first steps 1 - 1 / step")
    statistics: Statistics = "copied"
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise that the teacher's images get")
    noise_limit: float = Field(0.2, ge=0, description="largest noise")
    passes: int = Field(8, ge=1, description="T: random predictions of the teacher, from which its uncertainty comes")
    passes_at_once: int = Field(2, ge=1, description="bounds the memory; batch norm sees as many passes together")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="in these passes, of the features that the decoder gets; beside the network's own"
    )
    classes: Literal["all", "two"] = Field(
        "all", description="two: ln 2 and the sum over classes halved, whatever their number, as the code has it"
    )
    predict: Predictor = "student"


class UncertaintyMeanTeacher(Strategy):
    """A mean teacher whose unsure pixels do not count."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.teacher = Teacher(self.network, gathers=self.options.statistics == "own")

    @property
    def predictor(self) -> SegmentationNetwork:
        """Student or teacher."""
        return chosen(self.options.predict, self.network, self.teacher)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = L_sup + w L_c; both sets go through the student together."""
        o: Options = self.options
        follow(self.teacher, self.network, step, o.momentum, o.statistics)
        both = self.both_batches(step)
        logits, answer = both.apart(self.network(both.images))
        supervised = self.loss(logits, both.labels)
        target, nats = self.target(both.images[both.own :], both.sizes[1], step)
        count = 2 if o.classes == "two" else target.shape[1]
        sure = nats < threshold(step, o.max_iterations, count)
        consistency = certain_error(probabilities(answer), target, sure, count)
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency, "sure": sure.float().mean()}

    @torch.no_grad()
    def target(self, images: Tensor, batch: int, step: int) -> tuple[Tensor, Tensor]:
        """What the teacher predicts, and how unsure it is.

        Args:
            images: this process's share, `(u, C, H, W)`.
            batch: U, the size of the whole batch.
            step: the iteration.

        Returns:
            Probabilities of all `(U, K, H, W)`, and the entropy of the mean of T others in nats `(U, H, W)`.
        """
        o: Options = self.options
        network: Any = self.teacher[0]
        rng = torch.Generator(images.device).manual_seed(seed_of(o.seed, step, "noise"))
        target = probabilities(network(noisy(images, batch, o.noise, o.noise_limit, rng)))

        def predict(passes: int) -> Tensor:
            features = network.encode(noisy(images, batch, o.noise, o.noise_limit, rng, passes))
            each = probabilities(logits_of(network, Dropout(o.dropout, batch, rng)(features, passes), images))
            return each.view(passes, -1, *each.shape[1:])

        unsure = mean_uncertainty(predict, o.passes, o.passes_at_once, "mean")
        return whole(target, batch), whole(unsure, batch) * log(target.shape[1])


def threshold(step: int, steps: int, classes: int) -> float:
    """H: entropies below it, in nats, are sure: from about 3/4 of the largest, ln `classes`, at first to all of it."""
    return (0.75 + 0.25 * ramp_up(step, steps)) * log(classes)


def certain_error(student: Tensor, teacher: Tensor, sure: Tensor, classes: int) -> Tensor:
    """L_c: sum over classes of (p_s - p_t)^2 / `classes`, mean over the pixels that are sure; 0 if none is.

    Args:
        student: probabilities `(U, K, H, W)`.
        teacher: the same.
        sure: `(U, H, W)` bool.
        classes: what the sum over classes is divided by.
    """
    error = (student - teacher).square().sum(1)
    return pixel_mean(error, sure.to(error.dtype)) / classes


UNCERTAINTY_MEAN_TEACHER = StrategyEntry(
    paper="L. Yu, S. Wang, X. Li, C.-W. Fu, P.-A. Heng: Uncertainty-aware self-ensembling model for semi-supervised 3D "
    "left atrium segmentation. MICCAI 2019.",
    summary="predict of unlabelled slices what a slow copy of the network is sure of",
    version=3,
    options=Options,
    make=UncertaintyMeanTeacher,
    uses_unlabelled=True,
)
