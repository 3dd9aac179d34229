"""FixMatch: what is confident of a weakly changed slice is learnt of the strongly changed one (Sohn et al. 2020)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import whole
from glocal.finetuning.base import SSL4MIS, Ramp, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import confident, confident_entropy, strong_view
from glocal.options import presets
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.ranges import Probability
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

WEAK = ViewOptions(
    spatial=SpatialOptions(rotation=20, scale=(0.9, 1.1), shift=0.05),
    intensity=IntensityOptions(brightness=0.05, contrast=0.1),
)
STRONG = IntensityOptions(brightness=0.3, contrast=0.5, gamma=(0.5, 2.0), blur=2.0, probability=0.8)


class Options(SemiSupervisedOptions):
    """Threshold and weight are the paper's, CutMix that of UniMatch (Yang et al. 2023)."""

    strategy: Literal["fixmatch"] = "fixmatch"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "weight": 1.0, "ramp_up": 0.0, "weak": SSL4MIS["augmentation"]}})
    ramp_up: Ramp = 0.0
    threshold: float = Field(0.95, ge=0, le=1, description="tau: pixels of which the network is less sure do not count")
    weak: ViewOptions = Field(WEAK, description="the view of an unlabelled slice that is labelled by the network")
    strong: IntensityOptions = Field(STRONG, description="changes of its values in the view that is learnt from")
    cutmix: Probability = Field(0.5, description="of a box of another slice in the view that is learnt from")


class FixMatch(Strategy):
    """L = L_sup + w L_u."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Weak views are only predicted; labelled slices and strong views go through the network together."""
        o: Options = self.options
        images, labels, batch = self.labelled_batch(step)
        unlabelled, size = self.unlabelled_batch(step)
        weak = self.view(o.weak, unlabelled, size, step, "weak").image(unlabelled)
        strong, mixing = strong_view(weak, o.strong, o.cutmix, size, generator(o.seed, step, "strong"))
        with torch.no_grad():
            pseudo, sure = confident(whole(self.network(weak), size), o.threshold)
        logits = self.network(torch.cat([images, strong]))
        supervised = self.loss(whole(logits[: len(images)], batch), whole(labels, batch))
        consistency = confident_entropy(whole(logits[len(images) :], size), mixing(pseudo), mixing(sure))
        loss = supervised + self.consistency_weight(step) * consistency
        return {"loss": loss, "supervised": supervised, "consistency": consistency, "sure": sure.float().mean()}


FIXMATCH = StrategyEntry(
    paper="K. Sohn, D. Berthelot, C.-L. Li, Z. Zhang, N. Carlini, E. D. Cubuk, A. Kurakin, H. Zhang, C. Raffel: "
    "FixMatch: simplifying semi-supervised learning with consistency and confidence. NeurIPS 2020.",
    summary="learn of strongly changed unlabelled slices what the network is sure of when they are hardly changed",
    version=1,
    options=Options,
    make=FixMatch,
    uses_unlabelled=True,
)
