"""How unsure a network is: the entropy of random predictions, and what makes them random (Gal & Ghahramani 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, prod
from typing import Literal

import torch
from torch import Tensor

from glocal.distributed import share


def entropy(prediction: Tensor) -> Tensor:
    """Entropy of predictions (..., C, H, W) as a part of the largest, ln C: (..., H, W) in [0, 1]."""
    nats: Tensor = torch.special.entr(prediction)
    return nats.sum(-3) / log(prediction.shape[-3])


def mean_uncertainty(
    predict: Callable[[int], Tensor], passes: int, at_once: int, kind: Literal["mean", "passes"]
) -> Tensor:
    """U (B, H, W) in [0, 1] of random predictions; `predict(k)` gives k more, (k, B, C, H, W).

    ``mean``: the entropy of the mean prediction (Yu et al. 2019, UA-MT); ``passes``: the mean of the entropies. The
    memory is that of `at_once` predictions.
    """
    total: Tensor | None = None
    for start in range(0, passes, at_once):
        predictions = predict(min(at_once, passes - start))
        part = (predictions if kind == "mean" else entropy(predictions)).sum(0)
        total = part if total is None else total + part
    assert total is not None  # one pass or more
    return entropy(total / passes) if kind == "mean" else total / passes


@dataclass(frozen=True)
class Dropout:
    """Dropout of features with probability p, drawn for the whole batch that they are this process's share of."""

    p: float
    batch: int
    rng: torch.Generator  # on the device of the features: a CPU would be long in drawing so many numbers

    def __call__(self, taps: list[Tensor], versions: int = 1) -> list[Tensor]:
        """Random versions of features, one after the other: (versions * b, c, h, w).

        Args:
            taps: features (b, c, h, w), the same for all versions, or (versions * b, c, h, w), those of each.
            versions: how many.
        """
        own, thin = share(self.batch), []
        for tap in taps:
            shape = (versions, self.batch, *tap.shape[2:], tap.shape[1])  # channels last, as the features in memory
            kept = self._kept(shape)[:, own].movedim(-1, 2).to(tap.dtype)
            each = tap.view(-1, own.stop - own.start, *tap.shape[1:])
            thin.append((each / (1 - self.p) * kept).flatten(0, 1))
        return thin

    def _kept(self, shape: tuple[int, ...]) -> Tensor:
        """Whether each feature is kept, by 16 random bits of its own: on a CPU four times as fast as `bernoulli_`."""
        count = prod(shape)
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=self.rng.device)
        bits.random_(-(2**63), None, generator=self.rng)
        of_all = max(1, round((1 - self.p) * 2**16))
        return (bits.view(torch.int16)[:count] <= of_all - 2**15 - 1).view(shape)
