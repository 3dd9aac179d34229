from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import StrategyChecks
from torch import Tensor
from torch.nn.functional import one_hot

from glocal.data.store import Store
from glocal.distributed import share
from glocal.finetuning import mixup
from glocal.finetuning.mixup import draw_mixtures, mix
from glocal.randomness import generator


@pytest.mark.parametrize("options", [{}, {"loss": "dice", "alpha": 1.0}])
class TestMixup(StrategyChecks):
    strategy = "mixup"
    enough = 0.8  # what it trains on is blurred


@pytest.fixture
def learner(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    checks = TestMixup()
    return checks.make({**cheap, "strategy": "mixup", "labels": 1, "batch": 6, "alpha": 1.0}, store, tmp_path)


def test_mixtures_are_the_paper_s() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 3, 4, 5, generator=rng, dtype=torch.float64)
    first, second, lam = torch.tensor([2, 0, 1, 1]), torch.tensor([0, 0, 2, 0]), torch.tensor([0.3, 0.8, 1.0, 0.0])
    mixed = mix(images, targets, first, second, lam.double())
    for x, y in zip((images, targets), mixed, strict=True):
        for row, (i, j, part) in enumerate(zip(first.tolist(), second.tolist(), lam.double().tolist(), strict=True)):
            for place in [(0, 0, 0), (1, 3, 4), (0, 2, 1)]:
                expected = part * x[i][place].item() + (1 - part) * x[j][place].item()
                assert y[row][place].item() == pytest.approx(expected, rel=1e-12)
    mixed[0].sum().backward()
    assert images.grad is not None
    # Item 0: as second of the first mixture, twice of the second, as second of the fourth.
    assert images.grad[:, 0, 0, 0].tolist() == pytest.approx([0.7 + 0.8 + 0.2 + 1.0, 1.0, 0.3], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 5.0])
def test_lambda_has_the_distribution_beta(alpha: float) -> None:
    first, second, lam = draw_mixtures(200_000, alpha, torch.Generator().manual_seed(1))
    assert lam.isfinite().all()
    assert 0 <= lam.min() <= lam.max() <= 1
    assert lam.mean().item() == pytest.approx(0.5, abs=0.005)
    assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.002)
    fourth = (alpha + 3) * (alpha + 2) * (alpha + 1) / ((2 * alpha + 3) * (2 * alpha + 2) * (2 * alpha + 1)) / 2
    assert lam.pow(4).mean().item() == pytest.approx(fourth, abs=0.005)
    assert (torch.stack([first, second, lam]).corrcoef() - torch.eye(3)).abs().max() < 0.02  # independent


def test_it_is_supervised_fine_tuning_where_nothing_is_mixed(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = torch.arange(6), torch.zeros(6, dtype=torch.long), torch.ones(6)
    monkeypatch.setattr(mixup, "draw_mixtures", lambda *_: alone)
    images, targets, batch = learner.mixed_batch(5)
    unmixed, labels, size = learner.labelled_batch(5)
    assert batch == size == 6
    torch.testing.assert_close(images, unmixed, rtol=0, atol=1e-6)
    assert targets.equal(one_hot(labels, 3).movedim(-1, 1).float())


def test_image_and_target_are_mixed_alike_from_the_whole_batch(learner: Any) -> None:
    images, labels, _ = learner.labelled_batch(2)
    mixed, targets, _ = learner.mixed_batch(2)
    first, second, lam = draw_mixtures(6, 1.0, generator(3, 2, "mixup"))
    for row in range(6):
        i, j, part = int(first[row]), int(second[row]), float(lam[row])
        torch.testing.assert_close(mixed[row], part * images[i] + (1 - part) * images[j], rtol=0, atol=1e-5)
        for k in range(3):
            expected = part * (labels[i] == k).float() + (1 - part) * (labels[j] == k).float()
            torch.testing.assert_close(targets[row, k], expected, rtol=0, atol=1e-6)
    assert ((targets > 0.01) & (targets < 0.99)).any()
    torch.testing.assert_close(targets.sum(1), torch.ones(6, 32, 32))


def test_every_process_makes_its_own_mixtures_of_the_whole_batch(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, targets, _ = learner.mixed_batch(4)
    parts: list[tuple[Tensor, Tensor, int]] = []
    for rows in (slice(0, 2), slice(2, 6)):
        monkeypatch.setattr(mixup, "share", lambda batch, rows=rows: rows)
        parts.append(learner.mixed_batch(4))
    assert share(6) == slice(0, 6)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole)
    assert torch.cat([part[1] for part in parts]).equal(targets)


def test_soft_targets_reach_the_loss(learner: Any) -> None:
    seen: dict[str, Tensor] = {}
    learner.loss = lambda logits, target: seen.update(target=target) or logits.mean()
    learner(2)
    assert seen["target"].shape == (6, 3, 32, 32)
    assert ((seen["target"] > 0.01) & (seen["target"] < 0.99)).any()
