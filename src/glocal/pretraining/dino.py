"""DINO: self-distillation without labels (Caron et al., ICCV 2021).

A student predicts, from every view of a slice, what a slow copy of itself says of another view. The copy's outputs are
centred, so that no output wins always, and sharpened, so that they do not become equal.
"""

from collections.abc import Iterable
from math import log
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.contrast.losses import unit
from glocal.data.sampling import Pool
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.swav import cross_view_loss, multi_crop, pooled_features, windowed
from glocal.teacher import Teacher, rising
from glocal.views.view import ViewOptions

# The paper's batch, with the rate in proportion, and 1 and 10 of its 300 epochs as iterations of 10,000.
PAPER = {
    "batch": 1024,
    "learning_rate": 5e-4 * 1024 / 256,
    "warmup_iterations": 333,
    "frozen": 33,
    "outputs": 65_536,
    "augmentation": windowed(0.63, 1.0).model_dump(),
    "local_views": 10,
}
SAME = (
    "To the end the teacher has said nearly the same of every slice, so that little was learnt: set head_norm=true, a "
    "larger batch, another learning_rate, or a weaker augmentation, in a new run folder."
)


class Options(TrainingOptions):
    """The paper's symbols, its 300 epochs as 10,000 iterations; with `preset` all but its rising weight decay."""

    method: Literal["dino"] = "dino"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.04, ge=0)
    warmup_iterations: int = Field(300, ge=0)
    max_iterations: int = Field(10_000, ge=1)
    gradient_clip: float = Field(3.0, ge=0)
    batch: int = Field(32, ge=2, description="B: slices per step; each is seen in two views or more")
    momentum: float = Field(0.996, ge=0, le=1, description="lambda of the teacher; rises to 1 along a cosine")
    temperature: float = Field(0.1, gt=0, description="tau_s, of the student")
    teacher_temperature: float = Field(0.07, gt=0, description="tau_t, of the teacher, after its warm-up")
    teacher_temperature_start: float = Field(0.04, gt=0, description="tau_t in the first iteration")
    teacher_warmup: int = Field(1000, ge=0, description="tau_t rises linearly over so many iterations")
    centring: float = Field(0.9, ge=0, le=1, description="m: momentum of the centre; at 1 there is no centring")
    frozen: int = Field(100, ge=0, description="the last layer stays as it is for so many iterations")
    hidden: int = Field(2048, ge=1, description="width of the head's two hidden layers")
    head_norm: bool = Field(False, description="batch norm in the head; with few slices it keeps them from one point")
    bottleneck: int = Field(256, ge=1, description="width of the embedding before the last layer")
    outputs: int = Field(1024, ge=2, description="K; 65,536 for the million images of the paper")
    augmentation: ViewOptions = windowed(0.37, 1.0)
    local_views: int = Field(0, ge=0, description="small views, which the student alone sees")
    local_size: float = Field(0.43, gt=0, le=1, description="their sides, relative to the image's")
    local_augmentation: ViewOptions = windowed(0.22, 0.63)

    _preset = presets({"paper": PAPER})


class Head(nn.Sequential):
    """Three linear layers with GELU between them (Section 3.1 and appendix C), and batch norm if it is asked for."""

    def __init__(self, channels: int, hidden: int, outputs: int, norm: bool = False) -> None:
        first, second, third = layers = (
            nn.Linear(channels, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, outputs),
        )
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        norms = [nn.BatchNorm1d(hidden) if norm else nn.Identity() for _ in range(2)]
        super().__init__(nn.Flatten(), first, norms[0], nn.GELU(), second, norms[1], nn.GELU(), third)


class Encoder(Stage):
    """Trains the encoder as the student; network, head and last layer have their copies in the teacher."""

    centre: Tensor

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        self.head = Head(network.encoder_channels[-1], options.hidden, options.bottleneck, options.head_norm)
        self.last = nn.Linear(options.bottleneck, options.outputs, bias=False)
        self.teacher = Teacher(network, self.head, self.last)
        self.register_buffer("centre", torch.zeros(options.outputs))
        self._last_entropy: Tensor | None = None

    def idle(self, step: int) -> Iterable[nn.Parameter]:
        """The last layer, for the first iterations."""
        return self.last.parameters() if step < self.options.frozen else ()

    def losses(self, step: int) -> dict[str, Tensor]:
        """Algorithm 1 and Eq. 3 of the paper; `entropy` of the teacher near ln K or 0 is a collapse."""
        o: Options = self.options
        if step:
            momentum = rising(o.momentum, step - 1, o.max_iterations)
            self.teacher.follow((self.network, self.head, self.last), momentum)
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        crops = multi_crop(self, images, step, len(slices))
        pooled = torch.cat([pooled_features(self.network, views) for views in crops])
        embeddings = whole(unit(self.head(pooled)), len(slices))
        embeddings = embeddings.view(-1, len(slices), o.bottleneck)  # (V, B, bottleneck)
        targets = self._targets(crops[0], len(slices), step)
        with torch.autocast(images.device.type, enabled=False):
            loss = cross_view_loss(embeddings @ unit(self.last.weight).mT, targets, o.temperature)
        self.watch(embeddings[:2].flatten(0, 1))
        entropy = torch.special.entr(targets).sum(-1).mean()
        self._last_entropy = entropy if step + 1 == o.max_iterations else None
        return {"loss": loss, "entropy": entropy}

    @torch.no_grad()
    def _targets(self, views: Tensor, batch: int, step: int) -> Tensor:
        """What the teacher says of the global views, (2, B, K) probabilities; then the centre moves (Eq. 4)."""
        o: Options = self.options
        network: Any
        last: Any
        network, head, last = self.teacher
        embeddings = whole(unit(head(pooled_features(network, views))), batch)
        with torch.autocast(views.device.type, enabled=False):
            scores = embeddings @ unit(last.weight).mT
            targets: Tensor = ((scores - self.centre) / self._teacher_temperature(step)).softmax(-1)
        self.centre.lerp_(scores.mean(0), 1 - o.centring)  # in place: DistributedDataParallel knows it by its memory
        return targets.view(2, batch, o.outputs)

    def _teacher_temperature(self, step: int) -> float:
        """From the first to the last value over the warm-up, in equal steps."""
        o: Options = self.options
        done = min(1.0, step / o.teacher_warmup) if o.teacher_warmup else 1.0
        return o.teacher_temperature_start + done * (o.teacher_temperature - o.teacher_temperature_start)

    def warning(self) -> str | None:
        """Collapse, also that to one answer for all, temperatures that let it happen, or a last layer never trained."""
        same = self._last_entropy is not None and float(self._last_entropy) > 0.999 * log(self.options.outputs)
        return super().warning() or self._pointless() or (SAME if same else None)

    def _pointless(self) -> str | None:
        o: Options = self.options
        if o.frozen >= o.max_iterations:
            return f"frozen={o.frozen} keeps the last layer at random to the end of {o.max_iterations} iterations."
        if max(o.teacher_temperature, o.teacher_temperature_start) >= o.temperature:
            return (
                "The teacher is not sharper than the student, so that all outputs tend to become equal: set "
                "teacher_temperature and teacher_temperature_start below temperature."
            )
        return None


DINO = Method(
    paper="M. Caron, H. Touvron, I. Misra, H. Jégou, J. Mairal, P. Bojanowski, A. Joulin: Emerging properties in "
    "self-supervised vision transformers. ICCV 2021.",
    summary="a student predicts from each view what its slow copy, centred and sharpened, says of another view",
    version=2,
    options=Options,
    stages=lambda options: [("encoder", Encoder)],
)
