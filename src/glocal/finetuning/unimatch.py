"""UniMatch: FixMatch with two strong views and one of thinned-out features (Yang et al., CVPR 2023)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import whole
from glocal.finetuning.base import SSL4MIS, Ramp, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.consistency import channel_dropout, confident, logits_of, strong_view
from glocal.finetuning.fixmatch import STRONG, WEAK
from glocal.finetuning.losses import segmentation_loss
from glocal.options import presets
from glocal.randomness import generator
from glocal.views.intensity import IntensityOptions
from glocal.views.ranges import Probability
from glocal.views.view import ViewOptions


class Options(SemiSupervisedOptions):
    """The paper's symbols; their values are those for hearts."""

    strategy: Literal["unimatch"] = "unimatch"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": {**SSL4MIS, "weight": 1.0, "ramp_up": 0.0, "weak": SSL4MIS["augmentation"]}})
    ramp_up: Ramp = 0.0
    threshold: float = Field(0.95, ge=0, le=1, description="tau: pixels of which the network is less sure do not count")
    mu: float = Field(0.5, ge=0, description="weight of the two strong views together")
    lambda_fp: float = Field(0.5, ge=0, description="lambda: weight of the view of thinned-out features")
    dropout: float = Field(0.5, ge=0, lt=1, description="of the channels of all features that the decoder gets")
    weak: ViewOptions = Field(WEAK, description="the view of an unlabelled slice that is labelled by the network")
    strong: IntensityOptions = Field(STRONG, description="changes of its values in each of the strong views")
    cutmix: Probability = Field(0.5, description="of a box of another slice in a strong view")


class UniMatch(Strategy):
    """L = 1/2 [L_sup + w (mu/2 (L_s1 + L_s2) + lambda L_fp)]; the last three are Dice over confident pixels."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.dice = segmentation_loss("ssl4mis-dice")

    def losses(self, step: int) -> dict[str, Tensor]:
        """Two passes of the network, as in the code: labelled slices with weak views, then both strong views."""
        o: Options = self.options
        images, labels, batch = self.labelled_batch(step)
        unlabelled, size = self.unlabelled_batch(step)
        weak = self.view(o.weak, unlabelled, size, step, "weak").image(unlabelled)
        rngs = (generator(o.seed, step, "strong", role) for role in range(2))
        views = [strong_view(weak, o.strong, o.cutmix, size, rng) for rng in rngs]
        logits, weakly, thinned = self._weak(images, weak, size, step)
        pseudo, sure = confident(whole(weakly, size), o.threshold)
        strongly = self.network(torch.cat([view for view, _ in views])).chunk(2)
        supervised = self.loss(whole(logits, batch), whole(labels, batch))
        found = [
            self.dice(whole(answer, size), mixing(pseudo), mixing(sure).float())
            for answer, (_, mixing) in zip(strongly, views, strict=True)
        ]
        strong, features = torch.stack(found).mean(), self.dice(whole(thinned, size), pseudo, sure.float())
        loss = (supervised + self.consistency_weight(step) * (o.mu * strong + o.lambda_fp * features)) / 2
        parts = {"supervised": supervised, "strong": strong, "features": features, "sure": sure.float().mean()}
        return {"loss": loss, **parts}

    def _weak(self, images: Tensor, weak: Tensor, size: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of this process's labelled slices, of its weak views, and of these with channels dropped."""
        o: Options = self.options
        features = self.network.encode(torch.cat([images, weak]))
        rng = generator(o.seed, step, "dropout")
        thin = channel_dropout([feature[len(images) :] for feature in features], o.dropout, size, rng)
        both = [torch.cat(pair) for pair in zip(features, thin, strict=True)]
        logits = logits_of(self.network, both, images)
        return logits[: len(images)], logits[len(images) : -len(weak)], logits[-len(weak) :]


UNIMATCH = StrategyEntry(
    paper="L. Yang, L. Qi, L. Feng, W. Zhang, Y. Shi: Revisiting weak-to-strong consistency in semi-supervised "
    "semantic segmentation. CVPR 2023.",
    summary="FixMatch with two strong views, and one more whose features lose half of their channels",
    version=1,
    options=Options,
    make=UniMatch,
    uses_unlabelled=True,
)
