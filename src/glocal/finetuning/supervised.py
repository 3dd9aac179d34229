"""Supervised fine-tuning on the labelled slices with full augmentation: the baseline of all papers."""

from torch import Tensor

from glocal.distributed import whole
from glocal.finetuning.base import FinetuningOptions, Strategy, StrategyEntry


class Supervised(Strategy):
    """The segmentation loss of labelled slices, and nothing else."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Segmentation loss of one batch."""
        images, labels, batch = self.labelled_batch(step)
        return {"loss": self.loss(whole(self.network(images), batch), whole(labels, batch))}


SUPERVISED = StrategyEntry(
    paper="K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features for "
    "medical image segmentation with limited annotations. NeurIPS 2020.",
    summary="train on the labelled volumes with full augmentation",
    version=1,
    options=FinetuningOptions,
    make=Supervised,
)
