"""MC-Net: decoders of one encoder shall agree with each other's sharpened probabilities (Wu Y. et al., MICCAI 2021)."""

from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import probabilities
from glocal.networks.blocks import Up
from glocal.networks.several_decoders import Decoders, SeveralDecoders, with_decoders
from glocal.options import presets


class Options(SemiSupervisedOptions):
    """The paper's two decoders; MC-Net+ has the third, `decoders=[bilinear, transposed, nearest]`."""

    strategy: Literal["mc-net"] = "mc-net"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "loss": "ssl4mis-dice", "predict": "bilinear"}})
    weight: float = Field(0.1, ge=0, description="of the decoders' agreement, after the ramp-up")
    decoders: Decoders = ("bilinear", "transposed")
    predict: Literal["mean"] | Up = Field("mean", description="the mean of the decoders' probabilities, or one of them")
    temperature: float = Field(
        0.1, ge=0.02, le=1, description="T of the sharpening; 1 leaves probabilities as they are"
    )
    sharp_grad: bool = Field(
        True, description="the sharpened side learns too, as in the released code; false: it is a fixed target"
    )

    @model_validator(mode="after")
    def _of_a_network_that_can(self) -> "Options":
        with_decoders(self.network, self.decoders, self.predict)
        return self


class MCNet(Strategy):
    """Every decoder learns the labelled slices; on all slices each is drawn to what the others are sure of."""

    network: SeveralDecoders

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = sum of the decoders' segmentation losses + w L_mc; both sets go through the network together."""
        o: Options = self.options
        both = self.both_batches(step)
        each = [both.apart(logits) for logits in self.network.each(both.images)]
        supervised = torch.stack([self.loss(known, both.labels) for known, _ in each]).sum()
        consistency = mutual_consistency([torch.cat(parts) for parts in each], o.temperature, o.sharp_grad)
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency}


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)) of every class probability by itself: same shape."""
    yes, no = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return yes / (yes + no)


def mutual_consistency(each: Sequence[Tensor], temperature: float, sharp_grad: bool = True) -> Tensor:
    """L_mc: sum over all i != j of mean (p_i - sharp(p_j))^2 over images, classes and pixels.

    Args:
        each: logits `(B, K, H, W)` of each decoder.
        temperature: T.
        sharp_grad: whether the gradient also comes by way of sharp(p_j).
    """
    soft = [probabilities(logits) for logits in each]
    sharp = [sharpened(p if sharp_grad else p.detach(), temperature) for p in soft]
    pairs = permutations(range(len(each)), 2)
    return torch.stack([(soft[i] - sharp[j]).square().mean() for i, j in pairs]).sum()


MC_NET = StrategyEntry(
    paper="Y. Wu, M. Xu, Z. Ge, J. Cai, L. Zhang: Semi-supervised left atrium segmentation with mutual consistency "
    "training. MICCAI 2021.",
    summary="decoders of one encoder agree with each other's sharpened probabilities",
    version=1,
    options=Options,
    make=MCNet,
    network=lambda options, network: with_decoders(network, options.decoders, options.predict),
    uses_unlabelled=True,
)
