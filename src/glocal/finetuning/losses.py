"""Segmentation losses: MONAI's Dice with the settings of the papers, for targets and weights of any kind."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

LossName = Literal["dice", "ce", "dice+ce", "ssl4mis", "ssl4mis-dice"]
SegmentationLoss = Callable[..., Tensor]


def segmentation_loss(name: LossName) -> SegmentationLoss:
    """A loss of logits `(B, K, H, W)`, targets and, if given, weights.

    Targets are label maps `(B, H, W)`, or probabilities `(B, K, H, W)` as mixup has them. Weights `(B, H, W)` of 1 and
    0 say which pixels take part; cross-entropy takes any between, too.

    `dice`: 1 - mean over images and classes, background included, of 2 sum(pg) / (sum(p) + sum(g) + 1e-10)
    (Chaitanya et al. 2020, code). `ce`: cross-entropy. `dice+ce`: cross-entropy plus soft Dice of the foreground
    classes over the batch, so that slices without a class do not count against it. `ssl4mis-dice`: 1 - mean over
    classes, background included, of (2 sum(pg) + 1e-5) / (sum(p^2) + sum(g^2) + 1e-5) with sums over the batch.
    `ssl4mis`: half of that and of cross-entropy (Luo et al., SSL4MIS, code).
    """
    from monai.losses import DiceLoss  # slow to import, and pre-training does without

    squared = DiceLoss(include_background=True, batch=True, squared_pred=True)
    dice = {
        "dice": DiceLoss(include_background=True, smooth_nr=0.0, smooth_dr=1e-10),
        "dice+ce": DiceLoss(include_background=False, batch=True),
        "ssl4mis": squared,
        "ssl4mis-dice": squared,
    }

    def loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        if name == "ce":
            return _entropy(_fine(logits), target, weight)
        probabilities = _fine(logits).softmax(1)
        overlap: Tensor = dice[name](*_weighted(probabilities, as_probabilities(target, logits.shape[1]), weight))
        if name in ("dice", "ssl4mis-dice"):
            return overlap
        both = overlap + _entropy(_fine(logits), target, weight)
        return both / 2 if name == "ssl4mis" else both

    return loss


def _fine(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_probabilities(target: Tensor, classes: int) -> Tensor:
    """Label maps `(B, H, W)` -> one-hot float `(B, K, H, W)`; probabilities `(B, K, H, W)` are left as they are."""
    return target if target.ndim == 4 else one_hot(target, classes).permute(0, 3, 1, 2).float().contiguous()


def pixel_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of `(B, H, W)` over pixels, each as its weight `(B, H, W)` says; 0 where all weights are 0."""
    # Sums and not the mean of cross_entropy, which has no deterministic form on a GPU.
    return values.mean() if weight is None else (values * weight).sum() / weight.sum().clamp(min=1e-8)


def _entropy(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    target = target if target.ndim == 3 else target.to(logits.dtype)
    return pixel_mean(cross_entropy(logits, target, reduction="none"), weight)


def _weighted(predicted: Tensor, truth: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return (predicted, truth) if weight is None else (predicted * weight[:, None], truth * weight[:, None])
