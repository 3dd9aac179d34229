"""Segmentation losses against slow loops; the default ones are in `test_supervised`."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.finetuning.losses import as_probabilities, pixel_mean, segmentation_loss

NAMES = ["dice", "dice+ce", "ssl4mis"]


def example(classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, label maps and weights in [0, 1], some of them 0."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, classes, 4, 5, generator=rng)
    weight = torch.rand(2, 4, 5, generator=rng)
    return logits, torch.randint(classes, (2, 4, 5), generator=rng), weight * (weight > 0.3)


def test_ssl4mis_has_the_value_of_its_code() -> None:
    b, y, x, k = (torch.arange(n, dtype=torch.float64) + 1 for n in (2, 8, 8, 4))
    phase = 0.7 * b[:, None, None, None] + 0.31 * y[:, None, None] * k + 0.17 * x[:, None] * (k + 1)
    labels = (3 * torch.arange(8)[:, None] + 5 * torch.arange(8)) % 4
    loss = segmentation_loss("ssl4mis")(phase.sin().permute(0, 3, 1, 2), torch.stack([labels, labels.flip(0)]))
    assert loss.item() == pytest.approx((0.6325393250964717 + 1.6086845787756676) / 2, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_targets_may_be_probabilities(name: Any) -> None:
    logits, labels, weight = example()
    loss = segmentation_loss(name)
    for given in (None, weight):
        assert loss(logits, as_probabilities(labels, 3), given).item() == pytest.approx(
            loss(logits, labels, given).item(), rel=1e-6
        )


def test_soft_targets_and_weights_are_those_of_a_slow_loop() -> None:
    logits, _, weight = example()
    target = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    p = logits.double().softmax(1)
    entropy = total = 0.0
    inside, sums = [0.0] * 3, [0.0] * 3
    for image in range(2):
        for row in range(4):
            for column in range(5):
                w = weight[image, row, column].item()
                total += w
                for k in range(3):
                    a, g = p[image, k, row, column].item(), target[image, k, row, column].item()
                    entropy -= w * g * math.log(a)
                    inside[k] += w * a * w * g
                    sums[k] += w * a + w * g
    overlap = [(2 * inside[k] + 1e-5) / (sums[k] + 1e-5) for k in (1, 2)]
    expected = 1 - sum(overlap) / 2 + entropy / total
    assert segmentation_loss("dice+ce")(logits, target, weight).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_without_weight_take_no_part(name: Any) -> None:
    logits, labels, weight = example()
    loss, out = segmentation_loss(name), weight == 0
    assert out.any()
    other = torch.where(out[:, None], -logits, logits)
    assert loss(other, torch.where(out, 0, labels), weight).item() == loss(logits, labels, weight).item()
    logits.requires_grad_()
    loss(logits, labels, weight).backward()
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[out].any()
    assert logits.grad.movedim(1, -1)[~out].any()


@pytest.mark.parametrize("name", NAMES)
def test_no_pixel_at_all_gives_no_gradient(name: Any) -> None:
    logits, labels, weight = example()
    logits.requires_grad_()
    value = segmentation_loss(name)(logits, labels, torch.zeros_like(weight))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_weighted_mean() -> None:
    values, weight = torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[1.0, 0.5, 0.0]]])
    assert pixel_mean(values).item() == pytest.approx(13 / 3)
    assert pixel_mean(values, weight).item() == pytest.approx(2.5 / 1.5)
    assert pixel_mean(values, torch.zeros(1, 1, 3)).item() == 0
