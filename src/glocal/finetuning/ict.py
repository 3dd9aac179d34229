"""Interpolation consistency: of a mixture, predict the mixture of predictions (Verma et al., IJCAI 2019)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import share, whole
from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import Predictor, Statistics, chosen, follow, probabilities
from glocal.finetuning.mixup import draw_mixtures
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets
from glocal.randomness import generator
from glocal.teacher import Teacher
from glocal.views.ranges import moved


class Options(SemiSupervisedOptions):
    """The method's constants are those of SSL4MIS (Luo et al., code)."""

    strategy: Literal["ict"] = "ict"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "statistics": "own"}})
    unlabelled_batch: int = Field(10, ge=2, description="unlabelled slices per step, of which every two are mixed")
    weight: float = Field(0.1, ge=0, description="of what is learnt from unlabelled slices, after the ramp-up")
    alpha: float = Field(0.2, gt=0, description="small: most mixtures are nearly one of their two slices; 1: any share")
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher; in the first steps 1 - 1 / step")
    statistics: Statistics = "copied"
    predict: Predictor = "student"


class InterpolationConsistency(Strategy):
    """L = L_sup + w mean (f(Mix(u0, u1)) - Mix(f'(u0), f'(u1)))^2, f' a slow copy of the network f."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.teacher = Teacher(self.network, gathers=self.options.statistics == "own")

    @property
    def predictor(self) -> SegmentationNetwork:
        """Student or teacher."""
        return chosen(self.options.predict, self.network, self.teacher)

    def losses(self, step: int) -> dict[str, Tensor]:
        """The first half of the unlabelled slices is mixed with the second; the labelled go through with them."""
        o: Options = self.options
        follow(self.teacher, self.network, step, o.momentum, o.statistics)
        both = self.both_batches(step)
        unlabelled, size = both.images[both.own :], both.sizes[1]
        pairs = size // 2
        lam = draw_mixtures(pairs, o.alpha, generator(o.seed, step, "mixtures"))[2]
        with torch.no_grad():
            target = halves_mixed(probabilities(whole(self.teacher[0](unlabelled), size)), lam)
        mixtures = halves_mixed(whole(unlabelled, size), lam)[share(pairs)]
        logits = self.network(torch.cat([both.images[: both.own], mixtures]))
        supervised = self.loss(whole(logits[: both.own], both.sizes[0]), both.labels)
        answer = probabilities(whole(logits[both.own :], pairs))
        consistency = (answer - target).square().mean()
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency}


def halves_mixed(x: Tensor, lam: Tensor) -> Tensor:
    """(1 - lambda) x_i + lambda x_{i + n}: images or probabilities `(2n, C, H, W)`, or one more, -> `(n, C, H, W)`."""
    n = len(lam)
    part = moved(lam, x.device).to(x.dtype).view(-1, 1, 1, 1)
    return (1 - part) * x[:n] + part * x[n : 2 * n]


ICT = StrategyEntry(
    paper="V. Verma, A. Lamb, J. Kannala, Y. Bengio, D. Lopez-Paz: Interpolation consistency training for "
    "semi-supervised learning. IJCAI 2019.",
    summary="predict of two mixed unlabelled slices the mixture of what a slow copy predicts of them",
    version=2,
    options=Options,
    make=InterpolationConsistency,
    uses_unlabelled=True,
)
