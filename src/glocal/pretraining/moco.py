"""MoCo v2: a view attracts the other view of its slice among thousands of slices seen before (He et al., CVPR 2020).

The other views, the keys, come from an encoder that follows slowly, and are kept in a queue for the steps to come: so
many slices repel although the batch is small. Version 2 (Chen et al. 2020) has a head of two layers, stronger views and
a cosine schedule.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from glocal.contrast.losses import contrastive_loss, unit
from glocal.contrast.pairs import Masks
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import PooledHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.randomness import generator
from glocal.teacher import Teacher
from glocal.views.view import ViewOptions


class Options(TrainingOptions):
    """Symbols of the paper, defaults of version 2; the queue is shorter, as medical data are smaller."""

    method: Literal["moco"] = "moco"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "sgd"
    learning_rate: float = Field(
        0.03 * 32 / 256, gt=0, description="the paper's 0.03 for 256 slices, in proportion: another batch, another rate"
    )
    weight_decay: float = Field(1e-4, ge=0)
    warmup_iterations: int = Field(0, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=2, description="N: slices per step")
    queue: int = Field(4096, ge=2, description="K: keys that are kept; the oldest of a batch make way for the newest")
    momentum: float = Field(0.999, ge=0, le=1, description="m: how slowly the key encoder follows")
    temperature: float = Field(0.2, gt=0, description="tau")
    outputs: int = Field(128, ge=1, description="width of the embedding")
    repeats: Literal["ignore", "repel"] = Field(
        "ignore", description="older keys of the anchor's own slice; repel as the code, where data are never so few"
    )
    key_statistics: Literal["running", "batch"] = Field(
        "running", description="batch norm of the key encoder; with batch, keys show which batch they are from"
    )
    augmentation: ViewOptions = AUGMENTATION

    _preset = presets({"paper": {"batch": 256, "learning_rate": 0.03, "queue": 65_536}})

    @model_validator(mode="after")
    def _queue_holds_a_batch(self) -> "Options":
        if self.queue < self.batch:
            raise ValueError(f"queue={self.queue} must hold the keys of a batch, and batch={self.batch}")
        return self


def moco_masks(slices: Tensor, queued: Tensor, repeats: Literal["ignore", "repel"] = "ignore") -> Masks:
    """Masks of queries against [keys of the batch, queue]: its own key attracts, the queue repels (Eq. 1).

    Args:
        slices: (N,) which slice each query shows.
        queued: (K,) which slice each key in the queue shows, -1 for none.
        repeats: whether keys in the queue that show the query's own slice repel, or are neither.

    Returns:
        positive and negative, (N, N + K) bool; positive on the CPU, negative where `queued` is.
    """
    own, old = torch.eye(len(slices), dtype=torch.bool), torch.zeros(len(slices), len(queued), dtype=torch.bool)
    repelling = slices.to(queued.device)[:, None] != queued
    repelling = repelling if repeats == "ignore" else torch.ones_like(repelling)
    return torch.cat([own, old], 1), torch.cat([torch.zeros_like(own).to(queued.device), repelling], 1)


class Encoder(Stage):
    """Trains the encoder of the queries; that of the keys and the queue are in the checkpoint only."""

    queue: Tensor
    queued: Tensor

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        if len(pool) < 2:
            raise GlocalError("MoCo tells slices apart, and there is only one here: add volumes, or use simsiam.")
        self.head = PooledHead(network.encoder_channels[-1], options.outputs)
        self.key = Teacher(self.network, self.head)
        chance = torch.randn(options.queue, options.outputs, generator=generator(options.seed, "queue"))
        self.register_buffer("queue", unit(chance))  # as the code begins
        self.register_buffer("queued", torch.full((options.queue,), -1))

    def train(self, mode: bool = True) -> "Encoder":
        """The key encoder computes with running statistics if they are asked for."""
        super().train(mode)
        self.key.train(mode and self.options.key_statistics == "batch")
        return self

    def losses(self, step: int) -> dict[str, Tensor]:
        """InfoNCE, Eq. 1 of the paper; the mean over the queries."""
        o: Options = self.options
        if step:
            self._follow(o.momentum)
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        first, second = (self.view(o.augmentation, images, step, role, len(slices)) for role in range(2))
        queries = whole(self.head(self.network.encode(first)[-1]), len(slices))  # (N, outputs)
        with torch.no_grad():
            keys = unit(whole(self._keys(second), len(slices)))
        candidates = torch.cat([keys, self.queue])  # a copy: the queue may change before backward
        positive, negative = moco_masks(slices.index, self.queued, o.repeats)
        self._enqueue(keys, slices.index, step)
        self.watch(queries)
        loss = contrastive_loss(queries, positive, negative, o.temperature, denominator="one", candidates=candidates)
        return {"loss": loss}

    def _keys(self, images: Tensor) -> Tensor:
        encoder: Any
        encoder, head = self.key
        keys: Tensor = head(encoder.encode(images)[-1])
        return keys

    def _enqueue(self, keys: Tensor, slices: Tensor, step: int) -> None:
        """Put the keys of this step in the places of the oldest."""
        places = (step * len(keys) + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys.to(self.queue)
        self.queued[places] = slices.to(self.queued)

    def _follow(self, momentum: float) -> None:
        """Running statistics follow as slowly as the weights that they belong to (EMAN: Cai et al., CVPR 2021)."""
        before = [buffer.clone() for buffer in self.key.buffers()]
        self.key.follow((self.network, self.head), momentum)
        for buffer, was in zip(self.key.buffers(), before, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(buffer.lerp(was, momentum))


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [("encoder", Encoder)]


MOCO = Method(
    paper="K. He, H. Fan, Y. Wu, S. Xie, R. Girshick: Momentum contrast for unsupervised visual representation "
    "learning. CVPR 2020. X. Chen, H. Fan, R. Girshick, K. He: Improved baselines with momentum contrastive learning. "
    "arXiv:2003.04297, 2020.",
    summary="a slice is told from thousands of slices before it, whose embeddings a slow encoder keeps comparable",
    version=1,
    options=Options,
    stages=_stages,
)
