"""Segmentation losses, from MONAI, with the settings of the papers."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy


def segmentation_loss(name: Literal["dice", "dice+ce"]) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of logits `(B, K, H, W)` and labels `(B, H, W)`.

    `dice`: 1 - mean over images and classes, background included, of 2 sum(pg) / (sum(p) + sum(g) + 1e-10)
    (Chaitanya et al. 2020, code). `dice+ce`: cross-entropy plus soft Dice of the foreground classes over the batch,
    so that slices without a class do not count against it.
    """
    from monai.losses import DiceLoss  # slow to import, and pre-training does without

    common = {"softmax": True, "to_onehot_y": True}
    every = DiceLoss(include_background=True, smooth_nr=0.0, smooth_dr=1e-10, **common)
    foreground = DiceLoss(include_background=False, batch=True, **common)

    def dice(logits: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = every(logits.float(), labels[:, None])
        return value

    def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
        # The mean of cross_entropy itself has no deterministic form on a GPU.
        value: Tensor = foreground(logits.float(), labels[:, None])
        return value + cross_entropy(logits.float(), labels, reduction="none").mean()

    return dice if name == "dice" else dice_ce
