"""SimCLR: the two views of a slice attract each other, all other slices repel (Chen et al., ICML 2020)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import g_random
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import NormedHead, PooledHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, merged, presets
from glocal.pretraining.base import Method, Stage
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

# SimCLR's views as far as images without colour have them, windows as in MoCo v2 and SimSiam: areas of 0.2 to 1.
AUGMENTATION = ViewOptions(
    spatial=SpatialOptions(crop=(0.45, 1.0), anisotropy=0.33, flip=(0.0, 0.5)),
    intensity=IntensityOptions(brightness=0.4, contrast=0.4, blur=1.5, probability=0.8),
)

# The smallest batch of the paper and its linear rule, 0.3 x batch / 256; windows of 8 % of the area or more.
PAPER = {
    "batch": 256,
    "learning_rate": 0.3,
    "augmentation": merged(AUGMENTATION.model_dump(), {"spatial": {"crop": (0.28, 1.0)}}),
}


class Options(TrainingOptions):
    """The paper's symbols and defaults; its learning rate for small batches (appendix B.1)."""

    method: Literal["simclr"] = "simclr"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "lars"
    learning_rate: float = Field(
        0.075 * 32**0.5, gt=0, description="the paper's 0.075 times the root of the batch; another batch, another rate"
    )
    weight_decay: float = Field(1e-6, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=2, description="N: slices per step; each is seen in two views")
    temperature: float = Field(0.1, gt=0, description="tau")
    outputs: int = Field(128, ge=1, description="width of the embedding")
    head_norm: bool = Field(False, description="batch norm in the head, as the code; the paper has none")
    augmentation: ViewOptions = AUGMENTATION

    _preset = presets({"paper": PAPER})


class Encoder(Stage):
    """Trains the encoder; its head g is dropped afterwards."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        if len(pool) < 2:
            raise GlocalError("SimCLR tells slices apart, and there is only one here: add volumes, or use simsiam.")
        channels = network.encoder_channels[-1]
        self.head = (
            NormedHead(channels, channels, options.outputs, normed=True)
            if options.head_norm
            else PooledHead(channels, options.outputs)
        )

    def losses(self, step: int) -> dict[str, Tensor]:
        """NT-Xent, Eq. 1 of the paper."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        views = [self.view(o.augmentation, images, step, role, len(slices)) for role in range(2)]
        embeddings = whole(self.head(self.network.encode(torch.cat(views))[-1]), len(slices))  # (2N, outputs)
        positive, negative = g_random(torch.arange(len(slices)).repeat(2))
        self.watch(embeddings)
        return {"loss": contrastive_loss(embeddings, positive, negative, o.temperature, denominator="all")}


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


SIMCLR = Method(
    paper="T. Chen, S. Kornblith, M. Norouzi, G. Hinton: A simple framework for contrastive learning of visual "
    "representations. ICML 2020.",
    summary="the two views of a slice attract each other, all other slices repel",
    version=1,
    options=Options,
    stages=_stages,
)
