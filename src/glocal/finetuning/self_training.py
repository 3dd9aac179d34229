"""Self-training: the network labels the unlabelled volumes, and learns from these labels too (Bai et al. 2017)."""

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from glocal.data.sampling import Pool
from glocal.distributed import first_decides, share, whole
from glocal.ensemble import Ensemble
from glocal.errors import GlocalError
from glocal.finetuning.base import SemiSupervisedOptions, Strategy, StrategyEntry, ramp_up
from glocal.finetuning.pseudo_labels import IGNORED, PseudoLabels
from glocal.inference import folded
from glocal.networks.base import SegmentationNetwork
from glocal.randomness import generator
from glocal.views.moves import moves, refuse_still


class Options(SemiSupervisedOptions):
    """`max_iterations` are those of the labelled-only beginning and of all rounds, which share the rest equally."""

    strategy: Literal["self-training"] = "self-training"
    rounds: int = Field(3, ge=1, description="how often the unlabelled volumes are labelled and learnt from")
    first: float = Field(0.4, gt=0, lt=1, description="share of the training that comes before, on labels alone")
    retrain: Literal["reached", "beginning"] = Field(
        "reached", description="a round begins with the weights reached, or with those of the very beginning again"
    )
    confidence: float = Field(
        0.0, ge=0, le=1, description="pixels are ignored whose most probable class is less probable; 0: none is"
    )
    class_balanced: float = Field(
        0.0,
        ge=0,
        le=1,
        description="yet this share of the pixels of each class is kept, the most confident ones, so that "
        "`confidence` does not starve rare classes",
    )
    tta: bool = Field(
        False, description="a pseudo-label is the mean of moved views of its slice, as in `glocal predict --tta`"
    )
    ramp_up: float = Field(0.0, ge=0, le=1, description="share of each round over which the weight rises to `weight`")
    masks: bool = Field(True, description="at the end, write the last pseudo-labels as masks, to look at in a viewer")

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> "Options":
        if self.tta:
            refuse_still(self.augmentation.spatial, "tta=true")
        if self.class_balanced and not self.confidence:
            raise GlocalError(
                f"class_balanced={self.class_balanced} keeps pixels that `confidence` would leave out, but "
                "confidence=0 leaves out none: give confidence, too; with confidence=1 class_balanced alone decides."
            )
        return self


class SelfTraining(Strategy):
    """Training on the labelled slices, then rounds: label all unlabelled slices, and train on both.

    Pseudo-labels are hard, made in evaluation mode with the weights that the round before ended with, and moved with
    their image's view. Each round has its own warm-up and schedule.
    """

    def __init__(
        self, begin: Callable[[int], SegmentationNetwork], labelled: Pool, unlabelled: Pool, options: Any, folder: Path
    ) -> None:
        super().__init__(begin, labelled, unlabelled, options, folder)
        self.rounds = begins_of(options)
        self.pseudo = PseudoLabels(unlabelled, folder / "pseudo-labels")
        self.current: tuple[int, NDArray[np.uint8]] | None = None  # the round that was read last, and its labels
        again = options.retrain == "beginning"
        self.initial = {name: value.clone() for name, value in self.network.state_dict().items()} if again else None

    def losses(self, step: int) -> dict[str, Tensor]:
        """L_labelled, and in the rounds L_labelled + weight L_pseudo-labelled, from one forward pass of both."""
        number = self.round_of(step)
        if number and step == self.rounds[number]:
            # Always anew: a file that is there was left by an attempt that the weights may not be of.
            first_decides(lambda: self.label(number))
            if self.initial is not None:
                self.network.load_state_dict(self.initial)
        images, labels, batch = self.labelled_batch(step)
        if not number:
            return {"loss": self.loss(whole(self.network(images), batch), whole(labels, batch))}
        others, pseudo, count = self.pseudo_labelled_batch(step)
        logits = self.network(torch.cat([images, others]))
        supervised = self.loss(whole(logits[: len(images)], batch), whole(labels, batch))
        target = whole(pseudo, count)
        known = target != IGNORED
        learnt = self.loss(whole(logits[len(images) :], count), target.where(known, 0), known.float())
        loss = supervised + self.consistency_weight(step) * learnt
        return {"loss": loss, "supervised": supervised, "pseudo-labelled": learnt}

    def label(self, number: int) -> None:
        """Label all unlabelled slices for round `number`."""
        o: Options = self.options
        network = folded(self.network)
        if o.tta:
            network = Ensemble([network], [moves(o.augmentation.spatial, self.unlabelled.store.plan.options.size)])
        self.pseudo.write(number, network, o.confidence, o.class_balanced)

    def pseudo_labelled_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """This process's share of a batch of pseudo-labelled slices, drawn and moved as the labelled ones are.

        Returns:
            Images `(b, C, H, W)`, label maps `(b, H, W)` with ignored pixels, and the size of the whole batch.
        """
        o: Options = self.options
        number = self.round_of(step)
        if self.current is None or self.current[0] != number:
            self.current = number, self.pseudo.read(number)
        slices = self.unlabelled.uniform(o.unlabelled_batch, generator(o.seed, step, "unlabelled slices"))
        own = slices[share(len(slices))]
        images = self.unlabelled.images(own)
        rows = torch.searchsorted(self.pseudo.slices.index, own.index)
        labels = torch.from_numpy(self.current[1][rows.numpy()]).to(images.device).long()
        view = self.view(o.augmentation, images, len(slices), step, "unlabelled view")
        return view.image(images), view.labels(labels), len(slices)

    def consistency_weight(self, step: int) -> float:
        """Weight of the pseudo-labelled slices; it rises anew in each round."""
        o: Options = self.options
        number = self.round_of(step)
        begun, end = (*self.rounds, o.max_iterations)[number : number + 2]
        return o.weight * ramp_up(step - begun, o.ramp_up * (end - begun))

    def round_of(self, step: int) -> int:
        """The round that iteration `step` is in, from 1; 0 is training on the labelled slices alone."""
        return bisect_right(self.rounds, step) - 1

    def examples(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Some slices with their pseudo-labels of each round; the masks of the last are then written, too."""
        o: Options = self.options
        numbers = range(1, len(self.rounds))
        if o.masks and numbers:
            self.pseudo.write_masks(numbers[-1])
        slices = self.pseudo.slices
        rows = torch.linspace(0, len(slices) - 1, min(6, len(slices))).long()
        images = self.unlabelled.images(slices[rows])[:, 0]
        return {
            f"Pseudo-labels of round {number}": (images, torch.from_numpy(self.pseudo.read(number)[rows.numpy()]))
            for number in numbers
        }


def begins_of(options: Options) -> tuple[int, ...]:
    """The iterations in which the labelled-only part, 0, and the rounds begin.

    Each has at least one iteration; a training that is too short for that has fewer rounds.
    """
    end = options.max_iterations
    first = max(1, min(end - 1, round(options.first * end)))
    begins = {first + (end - first) * number // options.rounds for number in range(options.rounds)}
    return 0, *sorted(begins - {end})


SELF_TRAINING = StrategyEntry(
    paper="W. Bai et al.: Semi-supervised learning for network-based cardiac MR image segmentation. MICCAI 2017.",
    summary="label the unlabelled volumes with the network itself, train on both, repeat",
    version=2,  # 2: pseudo-labels in the precision that is trained in
    options=Options,
    make=SelfTraining,
    uses_unlabelled=True,
)
