import math

import pytest
import torch

from glocal.contrast.collapse import effective_rank, is_collapsed


def spread(cosine: float, n: int = 10) -> torch.Tensor:
    """n vectors whose pairwise cosine is the same everywhere."""
    return math.sqrt(1 - cosine) * torch.eye(n, n + 1) + math.sqrt(cosine) * torch.eye(n + 1)[-1]


@pytest.mark.parametrize(("cosine", "collapsed"), [(1.0, True), (0.99995, True), (0.9998, False), (0.5, False)])
def test_the_mean_cosine_decides(cosine: float, collapsed: bool) -> None:
    z = spread(cosine) * torch.arange(1, 11)[:, None]  # lengths do not matter
    assert bool(is_collapsed(z)) is collapsed


def test_the_value_compared_is_the_mean_cosine_of_all_pairs() -> None:
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(z[:, None], z, dim=-1)
    mean = (cosine.sum() - 7).item() / 42
    assert bool(is_collapsed(z, 1 - mean + 1e-9))
    assert not bool(is_collapsed(z, 1 - mean - 1e-9))


def test_dead_features_are_collapsed_and_one_image_is_not() -> None:
    assert bool(is_collapsed(torch.zeros(4, 3)))
    assert not bool(is_collapsed(torch.ones(1, 3)))


def test_low_precision_features() -> None:
    assert bool(is_collapsed(torch.ones(4, 3, dtype=torch.bfloat16)))
    assert not bool(is_collapsed(torch.eye(4, dtype=torch.bfloat16)))


def test_the_effective_rank_counts_directions() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh(x.T @ x)
    assert float(effective_rank(x + 3)) == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-4)
    line = torch.linspace(-1, 2, 8)[:, None] * torch.tensor([1.0, -1.0, 1.0])
    assert float(effective_rank(line)) == pytest.approx(1, rel=1e-5)
    assert float(effective_rank(torch.eye(5))) == pytest.approx(4, rel=1e-5)
    assert float(effective_rank(torch.ones(4, 3))) == 0
