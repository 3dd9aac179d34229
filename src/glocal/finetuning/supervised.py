"""Supervised fine-tuning on the labelled slices with full augmentation: the baseline of all papers."""

from torch import Tensor

from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.finetuning.base import FinetuningOptions, Strategy, StrategyEntry
from glocal.finetuning.losses import segmentation_loss
from glocal.networks.base import SegmentationNetwork
from glocal.randomness import generator
from glocal.views.view import draw_view


class Supervised(Strategy):
    """Slices uniformly with replacement, one view each, image and label moved together."""

    def __init__(
        self, network: SegmentationNetwork, labelled: Pool, unlabelled: Pool, options: FinetuningOptions
    ) -> None:
        super().__init__(network, labelled, unlabelled, options)
        self.loss = segmentation_loss(options.loss)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Segmentation loss of one batch."""
        o: FinetuningOptions = self.options
        slices = self.labelled.uniform(o.batch, generator(o.seed, step, "slices"))
        batch, own = len(slices), slices[share(len(slices))]
        images, labels = self.labelled.images(own), self.labelled.labels(own)
        size = (images.shape[-2], images.shape[-1])
        view = draw_view(o.augmentation, batch, size, generator(o.seed, step, "view"))[share(batch)]
        logits = self.network(view.image(images))
        return {"loss": self.loss(whole(logits, batch), whole(view.labels(labels), batch))}


SUPERVISED = StrategyEntry(
    paper="K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features for "
    "medical image segmentation with limited annotations. NeurIPS 2020 (its baseline).",
    summary="train on the labelled volumes with full augmentation",
    version=1,
    options=FinetuningOptions,
    make=Supervised,
)
