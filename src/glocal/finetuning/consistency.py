"""What strategies share that learn to agree with their own predictions: teachers, noise, confidence, mixed images."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.distributed import share, whole
from glocal.networks.base import SegmentationNetwork
from glocal.teacher import Teacher
from glocal.views.intensity import IntensityOptions, draw_intensity
from glocal.views.ranges import moved, uniform

Statistics = Annotated[
    Literal["copied", "own"],
    Field(description="running statistics of the teacher's batch norm: the student's, or its own"),
]
Predictor = Annotated[Literal["student", "teacher"], Field(description="who is kept and predicts")]


def follow(teacher: Teacher, network: Any, step: int, momentum: float, statistics: Statistics) -> None:
    """Move the teacher towards the network at the beginning of iteration `step`.

    It is the update that ends the iteration before, it = step - 1, with alpha = min(1 - 1 / (it + 1), momentum): the
    true mean of all weights so far until the running one is more correct (Tarvainen & Valpola 2017, code).
    """
    if step:
        teacher.follow([network], min(1 - 1 / step, momentum), statistics == "copied")


def chosen(predict: Predictor, network: SegmentationNetwork, teacher: Teacher) -> SegmentationNetwork:
    """Who predicts: the network itself, or its teacher."""
    slow: Any = teacher[0]
    return network if predict == "student" else slow


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits `(B, K, H, W)`, in float32 or finer."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def confident(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Each pixel's likeliest class, and if it is as likely as the threshold: `(B, K, H, W)` -> each `(B, H, W)`."""
    confidence, labels = probabilities(logits.detach()).max(1)
    return labels, confidence >= threshold


def confident_entropy(logits: Tensor, pseudo: Tensor, sure: Tensor) -> Tensor:
    """Mean over all pixels of the cross-entropy where `sure`, 0 elsewhere: the L_u of FixMatch, the L_cps of CPS.

    Args:
        logits: `(U, K, H, W)`.
        pseudo: label maps `(U, H, W)`.
        sure: `(U, H, W)` bool.
    """
    return (cross_entropy(logits.float(), pseudo, reduction="none") * sure).mean()


def noisy(images: Tensor, batch: int, sigma: float, limit: float, rng: torch.Generator, versions: int = 1) -> Tensor:
    """Images `(b, C, H, W)`, this process's share, with clip(sigma N(0, 1), -limit, limit) added.

    Args:
        images: the share.
        batch: the size of the whole batch.
        sigma: standard deviation of the noise.
        limit: its largest size.
        rng: on the images' device: a CPU would be long in drawing so many numbers.
        versions: of each image.

    Returns:
        `(versions * b, C, H, W)`, version after version.
    """
    shape = (versions, batch, *images.shape[1:])
    noise = torch.randn(shape, generator=rng, device=images.device)[:, share(batch)]
    return (images + noise.mul_(sigma).clamp_(-limit, limit).to(images)).flatten(0, 1)


def channel_dropout(features: list[Tensor], p: float, batch: int, rng: torch.Generator) -> list[Tensor]:
    """Features `(b, c, h, w)`, this process's share of `batch`, whose channels are 0 with probability p."""
    thin = []
    for feature in features:
        kept = (torch.rand(batch, feature.shape[1], 1, 1, generator=rng) >= p)[share(batch)]
        thin.append(feature * moved(kept, feature.device).to(feature.dtype) / (1 - p))
    return thin


def logits_of(network: Any, features: list[Tensor], like: Tensor) -> Tensor:
    """Logits `(B, K, H, W)` from features of `network.encode`, cropped to the size of the images `like`."""
    logits: Tensor = network.head(network.decode(features, network.blocks))
    return logits[..., : like.shape[-2], : like.shape[-1]]


def paste(inside: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where `inside` (B, H, W) is true, else y: label maps `(B, H, W)` or images `(B, C, H, W)`."""
    return torch.where(inside if x.ndim == 3 else inside[:, None], x, y)


def rectangles(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centres lie in rectangles, all `(B,)` as shares of the sides `size` (H, W): `(B, H, W)` bool."""
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    down = (y >= top[:, None]) & (y < (top + height)[:, None])
    right = (x >= left[:, None]) & (x < (left + width)[:, None])
    return down[:, :, None] & right[:, None, :]


@dataclass(frozen=True)
class CutMix:
    """One draw for a batch of B: each image gets a box of another (Yun et al. 2019; French et al. 2020).

    Attributes:
        partner: `(B,)` the other image.
        inside: `(B, H, W)` bool, the box; empty where an image stays as it is.
    """

    partner: Tensor
    inside: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` or maps `(B, H, W)` of the whole batch, with their boxes: same shape."""
        return paste(moved(self.inside, x.device), x[moved(self.partner, x.device)], x)


def draw_cutmix(batch: int, size: tuple[int, int], probability: float, rng: torch.Generator) -> CutMix:
    """Draw boxes for a batch of images of `size` (H, W), each with this probability.

    As UniMatch (code) has them: 0.02 to 0.4 of the area, height to width from 0.3 to 1 / 0.3, anywhere within the
    image. All images get the box from the one as many places further on, so that everyone gives one.
    """
    further = torch.randint(1, max(2, batch), (), generator=rng)
    chances = torch.rand(5, batch, generator=rng)
    area, ratio = uniform(chances[1], (0.02, 0.4)), uniform(chances[2], (0.3, 1 / 0.3))
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    boxes = rectangles(chances[3] * (1 - height), chances[4] * (1 - width), height, width, size)
    return CutMix((torch.arange(batch) + further) % batch, boxes & (chances[0] < probability)[:, None, None])


def strong_view(
    weak: Tensor, options: IntensityOptions, cutmix: float, batch: int, rng: torch.Generator
) -> tuple[Tensor, CutMix]:
    """Weak views, changed in value and mixed with each other.

    Args:
        weak: this process's share of a batch, `(b, C, H, W)`.
        options: how far values may be changed.
        cutmix: the probability of a box.
        batch: the size of the whole batch.
        rng: on the CPU, the same in every process.

    Returns:
        This process's share `(b, C, H, W)`, and how the whole batch was mixed.
    """
    own = share(batch)
    changed = whole(draw_intensity(options, batch, rng)[own].image(weak), batch)
    mixing = draw_cutmix(batch, (weak.shape[-2], weak.shape[-1]), cutmix, rng)
    return mixing(changed)[own], mixing
