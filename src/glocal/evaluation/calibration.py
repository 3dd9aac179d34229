"""Whether probabilities mean what they say: temperature scaling, expected calibration error (Guo et al., ICML 2017)."""

from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_LIMITS = (0.1, 10.0)  # beyond, the pixels that it is fitted on are too few to say
_HALVINGS = 40


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it changed on the pixels that it was fitted on: (before, after)."""

    temperature: float
    nll: tuple[float, float]
    ece: tuple[float, float]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.1, 10] for which softmax(logits / T) has the least mean negative log-likelihood (Eq. 9).

    The likelihood is concave in 1 / T, so its slope, the mean of z_y - E_p[z], has one zero.

    Args:
        logits: `(N, K)`, up to a constant each; logarithms of probabilities are logits.
        labels: `(N,)`, integer.
    """
    right = logits.gather(1, labels[:, None])[:, 0].mean(dtype=torch.float64)
    low, high = (log(limit) for limit in _LIMITS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = ((logits / exp(middle)).softmax(1) * logits).sum(1).mean(dtype=torch.float64)
        low, high = (middle, high) if expected > right else (low, middle)  # too sure: warmer
    return exp((low + high) / 2)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between how sure a prediction is and how often it is right, over equal bins of sureness (Eq. 3).

    Args:
        probabilities: `(N, K)`.
        labels: `(N,)`, integer.
        bins: of the largest probability, in (0, 1].
    """
    sure, predicted = probabilities.double().max(1)
    which = (sure * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, (predicted == labels).double() - sure)
    return float(gaps.abs().sum() / len(labels))


def calibrated(logits: Tensor, labels: Tensor) -> Calibration:
    """Fit a temperature on logits `(N, K)` and labels `(N,)`, and say what it changed on them."""
    temperature = fit_temperature(logits, labels)
    after = logits / temperature
    return Calibration(
        temperature,
        nll=(float(cross_entropy(logits, labels)), float(cross_entropy(after, labels))),
        ece=tuple(expected_calibration_error(z.softmax(1), labels) for z in (logits, after)),  # type: ignore[arg-type]
    )
