"""Cross pseudo supervision: two networks that began differently label the unlabelled slices for each other."""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import confident, confident_entropy
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets


class Options(SemiSupervisedOptions):
    """The weight is that of SSL4MIS (Luo et al., code)."""

    strategy: Literal["cps"] = "cps"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": SSL4MIS})
    weight: float = Field(0.1, ge=0, description="of what is learnt from unlabelled slices, after the ramp-up")


class CrossPseudoSupervision(Strategy):
    """Both networks learn the labelled slices, and what the other sees in the unlabelled ones; the first predicts."""

    def __init__(self, begin: Callable[[int], SegmentationNetwork], *rest: Any) -> None:
        super().__init__(begin, *rest)
        self.other = begin(1).requires_grad_(True)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = L_s + w L_cps; both sets go through each network together."""
        both = self.both_batches(step)
        each = [both.apart(network(both.images)) for network in (self.network, self.other)]
        supervised = torch.stack([self.loss(known, both.labels) for known, _ in each]).sum()
        pseudo = cross_pseudo_supervision([unknown for _, unknown in each])
        loss = supervised + self.consistency_weight(step) * pseudo
        return {"loss": loss, "supervised": supervised, "pseudo": pseudo}


def cross_pseudo_supervision(each: Sequence[Tensor], threshold: float = 0.0) -> Tensor:
    """L_cps: sum over all i != j of the mean over pixels of CE(p_i, y_j) with y_j = arg max p_j.

    Args:
        each: logits `(B, K, H, W)` of each network or decoder.
        threshold: pixels with max p_j below it count 0; the mean is over all pixels all the same.

    Returns:
        A scalar; no gradient comes by way of y_j.
    """
    losses = [confident_entropy(logits, *confident(other, threshold)) for logits, other in permutations(each, 2)]
    return torch.stack(losses).sum()


CPS = StrategyEntry(
    paper="X. Chen, Y. Yuan, G. Zeng, J. Wang: Semi-supervised semantic segmentation with cross pseudo supervision. "
    "CVPR 2021.",
    summary="two networks label the unlabelled slices for each other",
    version=1,
    options=Options,
    make=CrossPseudoSupervision,
    uses_unlabelled=True,
)
