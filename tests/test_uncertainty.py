import math

import pytest
import torch
from torch import Tensor

from glocal.uncertainty import Dropout, entropy, mean_uncertainty


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_entropy_lies_between_certainty_and_knowing_nothing() -> None:
    certain, nothing = torch.zeros(4, 1, 1), torch.full((4, 1, 1), 0.25)
    certain[2] = 1
    assert entropy(torch.stack([certain, nothing])).flatten().tolist() == pytest.approx([0, 1])
    predictions = random(2, 3, 7, 2, 2).softmax(2)
    found = entropy(predictions)
    assert found.shape == (2, 3, 2, 2)
    expected = -sum(p * math.log(p) for p in predictions[1, 2, :, 0, 1].tolist()) / math.log(7)
    assert float(found[1, 2, 0, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
def test_uncertainty_against_a_loop_whatever_goes_at_once(at_once: int) -> None:
    predictions = random(5, 2, 4, 3, 3).mul(3).softmax(2)
    asked: list[int] = []

    def predict(count: int) -> Tensor:
        asked.append(count)
        return predictions[sum(asked) - count : sum(asked)]

    found = mean_uncertainty(predict, 5, at_once, "mean")
    assert sum(asked) == 5
    assert max(asked) == min(at_once, 5)
    asked.clear()
    each = mean_uncertainty(predict, 5, at_once, "passes")
    for b in range(2):
        for y in range(3):
            for x in range(3):
                mean = [sum(float(predictions[k, b, c, y, x]) for k in range(5)) / 5 for c in range(4)]
                assert float(found[b, y, x]) == pytest.approx(-sum(p * math.log(p) for p in mean) / math.log(4))
                single = [
                    -sum(p * math.log(p) for p in predictions[k, b, :, y, x].tolist()) / math.log(4) for k in range(5)
                ]
                assert float(each[b, y, x]) == pytest.approx(sum(single) / 5)
    assert (found > each).all()  # what the passes disagree about comes on top
    assert (found <= 1).all()


def test_dropout_drops_and_keeps_the_mean() -> None:
    taps = [torch.ones(4, 3, 16, 16), 2 * torch.ones(4, 5, 8, 8).to(memory_format=torch.channels_last)]
    thin = Dropout(0.1, 4, seeded())(taps, 6)
    assert [tuple(tap.shape) for tap in thin] == [(24, 3, 16, 16), (24, 5, 8, 8)]
    for tap, whole in zip(thin, (1.0, 2.0), strict=True):
        assert tap.unique().tolist() == pytest.approx([0, whole / 0.9])
        assert float((tap == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
        versions = tap.unflatten(0, (6, 4))
        assert not any(versions[0].equal(other) for other in versions[1:])
        assert not any(versions[0, 0].equal(other) for other in versions[0, 1:])
    again = Dropout(0.1, 4, seeded())(taps, 6)
    assert all(tap.equal(other) for tap, other in zip(thin, again, strict=True))


def test_dropout_repeats_the_batch_version_after_version() -> None:
    tap = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 2, 8, 8)
    (thin,) = Dropout(0.5, 4, seeded())([tap], 2)
    assert thin.flatten(1).amax(1).tolist() == [2, 4, 6, 8] * 2


@pytest.mark.parametrize(("p", "dropped"), [(0.0, 0.0), (0.999999, 1.0), (0.25, 0.25)])
def test_dropout_of_any_probability(p: float, dropped: float) -> None:
    (thin,) = Dropout(p, 3, seeded())([torch.ones(3, 1, 33, 101)])  # no multiple of four numbers
    assert float((thin == 0).double().mean()) == pytest.approx(dropped, abs=0.01)
    if p < 0.9:
        assert float(thin.mean()) == pytest.approx(1, abs=0.02)
        neighbours = (thin.flatten() == 0).unfold(0, 2, 1).all(1).double().mean()
        assert float(neighbours) == pytest.approx(dropped**2, abs=0.01)  # each for itself


def test_dropout_of_what_differs_already() -> None:
    tap = torch.arange(1.0, 7).view(6, 1, 1, 1).expand(6, 2, 8, 8)
    (thin,) = Dropout(0.5, 3, seeded())([tap], 2)
    assert thin.flatten(1).amax(1).tolist() == [2, 4, 6, 8, 10, 12]
    assert float((thin == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
