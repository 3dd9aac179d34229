"""SwAV: from one view of a slice predict which prototypes its other view belongs to (Caron et al., NeurIPS 2020).

A batch is divided evenly among the prototypes, so that nothing has to repel. Its multi-crop, cheap small views beside
the two whole ones, stands here too.
"""

from collections.abc import Iterable
from math import log
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from glocal.contrast.losses import unit
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import NormedHead
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.simclr import AUGMENTATION
from glocal.randomness import generator
from glocal.views.view import ViewOptions, draw_view

# The paper's small batches: 15 of them in the queue; its 1 and 15 of 200 epochs as iterations of 10,000.
PAPER = {"batch": 256, "warmup_iterations": 0, "frozen": 50, "queue": 15 * 256, "queue_from": 750, "local_views": 6}
UNDIVIDED = (
    "All slices belong to all prototypes alike, so that there is nothing to predict and nothing is learnt: lower "
    "epsilon (0.02), or weaken augmentation, above all its changes of intensity, in a new run folder."
)


def windowed(low: float, high: float) -> ViewOptions:
    """SimCLR's views with windows of another size: the range of their sides, the roots of a paper's areas."""
    return AUGMENTATION.model_copy(update={"spatial": AUGMENTATION.spatial.model_copy(update={"crop": (low, high)})})


class Options(TrainingOptions):
    """The authors' code as it is by default, but at its learning rate for 256 slices; the rest for these: `preset`."""

    method: Literal["swav"] = "swav"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "lars"
    learning_rate: float = Field(0.6, gt=0, description="the paper's for 256 slices, not divided")
    weight_decay: float = Field(1e-6, ge=0)
    warmup_iterations: int = Field(300, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=2, description="B: slices per step; each is seen in two views or more")
    prototypes: int = Field(3000, ge=2, description="K; a few hundred are enough for thousands of slices")
    temperature: float = Field(0.1, gt=0, description="tau, of the prediction")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn-Knopp; larger makes assignments softer")
    sinkhorn_iterations: int = Field(3, ge=1)
    frozen: int = Field(313, ge=0, description="the prototypes stay as they are for so many iterations")
    queue: int = Field(0, ge=0, description="embeddings of earlier steps that are assigned with the batch, per view")
    queue_from: int = Field(1000, ge=0, description="iteration in which the queue begins to fill; it counts when full")
    hidden: int = Field(2048, ge=1, description="hidden width of the head")
    outputs: int = Field(128, ge=1, description="width of the embedding")
    augmentation: ViewOptions = windowed(0.37, 1.0)
    local_views: int = Field(0, ge=0, description="small views, from which alone assignments are predicted")
    local_size: float = Field(0.43, gt=0, le=1, description="their sides, relative to the image's")
    local_augmentation: ViewOptions = windowed(0.22, 0.37)

    _preset = presets({"paper": PAPER})


class Encoder(Stage):
    """Trains the encoder, the head and the prototypes."""

    queue: Tensor

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        if len(pool) < 2:
            raise GlocalError("SwAV divides slices among prototypes, and there is only one: pre-train on more volumes.")
        self.head = NormedHead(network.encoder_channels[-1], options.hidden, options.outputs)
        self.prototypes = nn.Linear(options.outputs, options.prototypes, bias=False)
        if options.queue:
            self.register_buffer("queue", torch.zeros(2, options.queue, options.outputs))
        self._entropy: Tensor | None = None

    def idle(self, step: int) -> Iterable[nn.Parameter]:
        """The prototypes, for the first iterations."""
        return self.prototypes.parameters() if step < self.options.frozen else ()

    def losses(self, step: int) -> dict[str, Tensor]:
        """Eq. 1 to 5 of the paper; `entropy`, of the assignments, is what the loss cannot fall below."""
        o: Options = self.options
        with torch.no_grad():
            self.prototypes.weight.copy_(unit(self.prototypes.weight))
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        pooled = [pooled_features(self.network, views) for views in multi_crop(self, images, step, len(slices))]
        embeddings = whole(unit(self.head(torch.cat(pooled))), len(slices))
        embeddings = embeddings.view(-1, len(slices), o.outputs)  # (V, B, outputs)
        with torch.autocast(images.device.type, enabled=False):
            scores = embeddings @ self.prototypes.weight.mT  # (V, B, K)
            with torch.no_grad():
                assignments = self._assignments(scores[:2], embeddings[:2], step)
            loss = cross_view_loss(scores, assignments, o.temperature)
        self.watch(embeddings[:2].flatten(0, 1))
        self._entropy = torch.special.entr(assignments).sum(-1).mean()
        return {"loss": loss, "entropy": self._entropy}

    def _assignments(self, scores: Tensor, embeddings: Tensor, step: int) -> Tensor:
        """Those of the batch (2, B, K), divided among the prototypes together with the queue once that is full."""
        o: Options = self.options
        batch = scores.shape[1]
        if o.queue and (step - o.queue_from) * batch >= o.queue:
            scores = torch.cat([scores, self.queue @ self.prototypes.weight.mT], dim=1)
        if o.queue and step >= o.queue_from:
            self.queue.copy_(torch.cat([embeddings, self.queue], dim=1)[:, : o.queue])
        return sinkhorn(scores, o.epsilon, o.sinkhorn_iterations)[:, :batch]

    def warning(self) -> str | None:
        """Collapse, assignments that tell no slices apart, or iterations too few for what is to begin late."""
        undivided = self._entropy is not None and float(self._entropy) > 0.99 * log(self.options.prototypes)
        return super().warning() or (UNDIVIDED if undivided else None) or self._too_late()

    def _too_late(self) -> str | None:
        o: Options = self.options
        if o.frozen >= o.max_iterations:
            return f"frozen={o.frozen} keeps the prototypes at random to the end of {o.max_iterations} iterations."
        if o.queue and o.queue_from + -(-o.queue // min(o.batch, len(self.pool))) >= o.max_iterations:
            return f"The queue of {o.queue} is never full: lower queue or queue_from, or raise max_iterations."
        return None


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Divide samples evenly among prototypes: Q* of Eq. 3 and 5, by Sinkhorn-Knopp in logarithms.

    Args:
        scores: (..., B, K) products of embeddings and prototypes, float32 or finer.
        epsilon: weight of the entropy.
        iterations: of the two normalisations.

    Returns:
        (..., B, K): every sample's assignments sum to 1, every prototype's to about B / K.
    """
    logarithm = scores / epsilon
    for _ in range(iterations):
        logarithm = (logarithm - logarithm.logsumexp(-2, keepdim=True)).log_softmax(-1)
    return logarithm.exp()


def cross_view_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Predict the target of a view from every other view of the slice, by cross-entropy (Eq. 1 and 2; DINO, Eq. 3).

    Args:
        scores: (V, B, K) of the views, the first T of which have a target.
        targets: (T, B, K) probabilities.
        temperature: of the prediction.

    Returns:
        Scalar, the mean over all pairs of target and other view, and over the slices.
    """
    predicted = (scores / temperature).log_softmax(-1)
    pairs = -(targets.flatten(1) @ predicted.flatten(1).mT) / scores.shape[1]  # (T, V)
    other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return (pairs * other).sum() / (len(pairs) * (len(scores) - 1))


def pooled_features(network: SegmentationNetwork, views: Tensor) -> Tensor:
    """Views (N, C, H, W) of any one size -> (N, c, 1, 1), the mean of the bottleneck, so that all sizes join."""
    return network.encode(views)[-1].mean(dim=(-2, -1), keepdim=True)


def multi_crop(stage: Stage, images: Tensor, step: int, batch: int) -> list[Tensor]:
    """Two global views of every image and, if there are any, the local ones (Section 3.3).

    Args:
        stage: its options have `augmentation`, `local_views`, `local_size` and `local_augmentation`.
        images: this process's share (b, C, H, W) of a batch.
        step: the iteration.
        batch: the size of the whole batch.

    Returns:
        (2b, C, H, W), view after view, and with local views (n b, C, h, w).
    """
    o = stage.options
    views = [torch.cat([stage.view(o.augmentation, images, step, role, batch) for role in range(2)])]
    if o.local_views:
        multiple = stage.network.multiple
        height, width = (max(1, round(o.local_size * side / multiple)) * multiple for side in images.shape[-2:])
        draws = [generator(o.seed, step, "view", role) for role in range(2, 2 + o.local_views)]
        small = [small_view(o.local_augmentation, images, (height, width), batch, rng) for rng in draws]
        views.append(torch.cat(small))
    return views


def small_view(options: ViewOptions, images: Tensor, size: tuple[int, int], batch: int, rng: torch.Generator) -> Tensor:
    """One random view of each image (b, C, H, W), of another size: (b, C, *size), with one interpolation.

    The draw is the whole batch's; elastic displacements are in pixels of the image, blur in pixels of the view.
    """
    draw = draw_view(options, batch, (images.shape[-2], images.shape[-1]), rng)[share(batch)]
    grid = draw.spatial.to(images.device).grid(size).to(images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        return draw.intensity.image(grid_sample(images, grid, align_corners=False))


SWAV = Method(
    paper="M. Caron, I. Misra, J. Mairal, P. Goyal, P. Bojanowski, A. Joulin: Unsupervised learning of visual features "
    "by contrasting cluster assignments. NeurIPS 2020.",
    summary="one view predicts which prototypes the other belongs to; slices are divided evenly among them",
    version=2,
    options=Options,
    stages=lambda options: [("encoder", Encoder)],
)
