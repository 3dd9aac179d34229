"""Cross-consistency: two decoders of one encoder label the unlabelled slices for each other (IDEAL's fine-tuning)."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from glocal.finetuning.base import Ramp, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.cps import cross_pseudo_supervision
from glocal.networks.blocks import Up
from glocal.networks.several_decoders import Decoders, SeveralDecoders, with_decoders
from glocal.options import Preset, presets

# The paper says no more than loss, optimiser and learning rate; iterations are as many as of its pre-training here.
PAPER: dict[str, Any] = {
    "max_iterations": 10_000,
    "optimizer": "adam",
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "warmup_iterations": 0,
    "schedule": "constant",
    "loss": "ce",
}


class Options(SemiSupervisedOptions):
    """Both sets weigh the same from the first iteration, and every arg max is believed."""

    strategy: Literal["cross-consistency"] = "cross-consistency"
    preset: Preset = "adopted"
    _preset = presets({"paper": PAPER})
    ramp_up: Ramp = 0.0
    decoders: Decoders = ("bilinear", "transposed")
    predict: Literal["mean"] | Up = Field("mean", description="the mean of the decoders' probabilities, or one of them")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="of an unlabelled slice only pixels count whose label is at least this sure"
    )

    @model_validator(mode="after")
    def _of_a_network_that_can(self) -> "Options":
        with_decoders(self.network, self.decoders, self.predict)
        return self


class CrossConsistency(Strategy):
    """Each decoder learns the labelled slices, and what the other sees in the unlabelled ones."""

    network: SeveralDecoders

    def losses(self, step: int) -> dict[str, Tensor]:
        """CE(p1, m) + CE(p2, m) of labelled slices, CE(p1, y2) + CE(p2, y1) of unlabelled ones, in one pass."""
        both = self.both_batches(step)
        each = [both.apart(logits) for logits in self.network.each(both.images)]
        supervised = torch.stack([self.loss(known, both.labels) for known, _ in each]).sum()
        consistency = cross_pseudo_supervision([unknown for _, unknown in each], self.options.threshold)
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency}


CROSS_CONSISTENCY = StrategyEntry(
    paper="H. Basak, S. Chattopadhyay, R. Kundu, S. Nag, R. Mallipeddi: IDEAL: Improved dense local contrastive "
    "learning for semi-supervised medical image segmentation. ICASSP 2023.",
    summary="two decoders of one encoder label the unlabelled slices for each other",
    version=1,
    options=Options,
    make=CrossConsistency,
    network=lambda options, network: with_decoders(network, options.decoders, options.predict),
    uses_unlabelled=True,
)
