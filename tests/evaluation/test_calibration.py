import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from glocal.evaluation.calibration import calibrated, expected_calibration_error, fit_temperature


def honest(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn with just their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_who_is_too_sure_by_a_factor_has_it_for_temperature(factor: float) -> None:
    logits, labels = honest(40_000, 4)
    found = calibrated(factor * logits, labels)
    assert found.temperature == pytest.approx(factor, rel=0.03)
    assert found.ece[1] < 0.01
    if factor != 1:
        assert found.nll[1] < found.nll[0] - 0.01
        assert found.ece[1] < found.ece[0] / 3


def test_no_other_temperature_is_likelier() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = 3 * torch.randn(500, 3, generator=generator), torch.randint(3, (500,), generator=generator)
    labels[:300] = logits[:300].argmax(1)
    best = fit_temperature(logits, labels)
    grid = torch.linspace(math.log(0.1), math.log(10), 400).exp()
    losses = [float(cross_entropy(logits / t, labels)) for t in grid]
    assert float(cross_entropy(logits / best, labels)) <= min(losses) + 1e-6
    # A constant added to all logits of a pixel says nothing: logarithms of probabilities will do.
    assert fit_temperature(logits.log_softmax(1), labels) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("right", "limit"), [(True, 0.1), (False, 10.0)])
def test_where_no_temperature_is_best_it_stays_finite(right: bool, limit: float) -> None:
    logits = torch.tensor([[2.0, -1.0], [-3.0, 1.0]])
    labels = logits.argmax(1) if right else logits.argmin(1)
    assert fit_temperature(logits, labels) == pytest.approx(limit, rel=1e-3)


def test_the_calibration_error_against_a_loop() -> None:
    logits, labels = honest(300, 3, seed=2)
    probabilities = (3 * logits).softmax(1)
    total = 0.0
    for number in range(10):
        gaps = []
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
            if number / 10 < max(row) <= (number + 1) / 10:
                gaps.append((row.index(max(row)) == label) - max(row))
        total += abs(sum(gaps)) / 300
    assert total > 0.05
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(total, abs=1e-6)


def test_certainty_that_is_always_right_or_always_wrong() -> None:
    certain = torch.eye(3)
    assert expected_calibration_error(certain, torch.arange(3)) == 0
    assert expected_calibration_error(certain, torch.tensor([1, 2, 0])) == 1
