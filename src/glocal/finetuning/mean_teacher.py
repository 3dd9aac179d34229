"""Mean teacher: the network agrees with a slow copy of itself that sees a noisy image (Tarvainen & Valpola 2017)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import whole
from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import Predictor, Statistics, chosen, follow, noisy, probabilities
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets
from glocal.randomness import seed_of
from glocal.teacher import Teacher


class Options(SemiSupervisedOptions):
    """The method's constants are those of SSL4MIS (Luo et al., code)."""

    strategy: Literal["mean-teacher"] = "mean-teacher"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "statistics": "own"}})
    weight: float = Field(0.1, ge=0, description="of what is learnt from unlabelled slices, after the ramp-up")
    start: float = Field(1 / 30, ge=0, le=1, description="share of the training before the teacher is listened to")
    momentum: float = Field(0.99, ge=0, le=1, description="alpha of the teacher; in the first steps 1 - 1 / step")
    statistics: Statistics = "copied"
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise that the teacher's images get")
    noise_limit: float = Field(0.2, ge=0, description="largest noise")
    predict: Predictor = "student"


class MeanTeacher(Strategy):
    """L = L_sup + w mean (p_s - p_t)^2, with a slow copy of the network as teacher of unlabelled slices."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.teacher = Teacher(self.network, gathers=self.options.statistics == "own")

    @property
    def predictor(self) -> SegmentationNetwork:
        """Student or teacher."""
        return chosen(self.options.predict, self.network, self.teacher)

    def losses(self, step: int) -> dict[str, Tensor]:
        """The student sees the unlabelled slices as the labelled ones, the teacher with noise."""
        o: Options = self.options
        follow(self.teacher, self.network, step, o.momentum, o.statistics)
        both = self.both_batches(step)
        logits, answer = both.apart(self.network(both.images))
        supervised = self.loss(logits, both.labels)
        consistency = torch.zeros_like(supervised)
        if step >= o.start * o.max_iterations:
            target = self.target(both.images[both.own :], both.sizes[1], step)
            consistency = (probabilities(answer) - target).square().mean()
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency}

    @torch.no_grad()
    def target(self, images: Tensor, batch: int, step: int) -> Tensor:
        """What the teacher predicts: this process's share `(u, C, H, W)` -> probabilities of all, `(U, K, H, W)`."""
        o: Options = self.options
        rng = torch.Generator(images.device).manual_seed(seed_of(o.seed, step, "noise"))
        return probabilities(whole(self.teacher[0](noisy(images, batch, o.noise, o.noise_limit, rng)), batch))


MEAN_TEACHER = StrategyEntry(
    paper="A. Tarvainen, H. Valpola: Mean teachers are better role models: weight-averaged consistency targets improve "
    "semi-supervised deep learning results. NeurIPS 2017.",
    summary="predict of unlabelled slices what a slow copy of the network predicts of them with noise",
    version=2,
    options=Options,
    make=MeanTeacher,
    uses_unlabelled=True,
)
