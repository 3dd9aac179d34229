"""Adversarial training: a segmentation of unlabelled slices shall look like one of labelled ones (DAN, Zhang 2017)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.distributed import whole
from glocal.finetuning.base import SSL4MIS, ReferencePreset, SemiSupervisedOptions, Strategy, StrategyEntry
from glocal.finetuning.discriminators import MapDiscriminator, untaught
from glocal.networks.base import SegmentationNetwork
from glocal.options import presets

REFERENCE: dict[str, Any] = {**SSL4MIS, "discriminator_rate": 0.01}


class Options(SemiSupervisedOptions):
    """Weight and discriminator are those of SSL4MIS (Luo et al., code)."""

    strategy: Literal["adversarial"] = "adversarial"
    preset: ReferencePreset = "adopted"
    _preset = presets({"reference": REFERENCE})
    weight: float = Field(0.1, ge=0, description="of deceiving the discriminator, after the ramp-up")
    discriminator_rate: float = Field(
        1e-4, gt=0, description="learning rate of the discriminator, constant; SGD needs a larger one"
    )
    width: int = Field(
        64, ge=1, description="channels of the discriminator's first layer; it ends with 8 times as many"
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="in the discriminator, while it learns")


class Adversarial(Strategy):
    """The discriminator sees map and image, and says 1 for labelled slices and 0 for unlabelled ones."""

    def __init__(self, begin: Callable[[int], SegmentationNetwork], *rest: Any) -> None:
        super().__init__(begin, *rest)
        o: Options = self.options
        classes = len(self.labelled.store.labels)
        self.discriminator = MapDiscriminator(classes, self.network.in_channels, o.width, o.dropout)
        self.steady = {"discriminator": o.discriminator_rate}

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = L_s + w CE(D(unlabelled), 1) for the network, and CE(D(all), labelled or not) for the discriminator.

        One backward pass serves both: D is deceived with its weights detached, and taught with the maps detached.
        """
        both = self.both_batches(step)
        images, own, (labelled, unlabelled) = both.images, both.own, both.sizes
        logits = self.network(images)
        supervised = self.loss(both.apart(logits)[0], both.labels)
        maps = logits.softmax(1, dtype=images.dtype)
        self.discriminator.eval()  # no dropout where it only judges
        judged = whole(untaught(self.discriminator, maps[own:], images[own:]), unlabelled)
        deceived = cross_entropy(judged.float(), torch.ones_like(judged[:, 0], dtype=torch.long))
        self.discriminator.train()
        judged = torch.cat(both.apart(self.discriminator(maps.detach(), images)))
        truth = (torch.arange(labelled + unlabelled, device=judged.device) < labelled).long()
        taught = cross_entropy(judged.float(), truth)
        loss = supervised + self.consistency_weight(step) * deceived + taught
        return {"loss": loss, "supervised": supervised, "deceived": deceived, "discriminator": taught}


ADVERSARIAL = StrategyEntry(
    paper="Y. Zhang et al.: Deep adversarial networks for biomedical image segmentation utilizing unannotated images. "
    "MICCAI 2017.",
    summary="segmentations of unlabelled slices deceive a discriminator that tells them from those of labelled ones",
    version=1,
    options=Options,
    make=Adversarial,
    uses_unlabelled=True,
)
