import math
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.cps import cross_pseudo_supervision
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{"weight": 1.0}])
class TestCPS(SemiSupervisedChecks):
    strategy = "cps"

    def test_the_loss_is_the_sum_of_both_networks_losses(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        learner: Any = self.make({**settings, "weight": 0.3, "ramp_up": 0.5}, store, tmp_path)
        both = learner.both_batches(1)
        first, second = learner.network(both.images), learner.other(both.images)
        supervised = learner.loss(first[:4], both.labels) + learner.loss(second[:4], both.labels)
        pseudo = slow([first[4:], second[4:]])
        losses = {name: float(value.detach()) for name, value in learner(1).items()}
        assert losses["supervised"] == pytest.approx(float(supervised.detach()), rel=1e-5)
        assert losses["pseudo"] == pytest.approx(float(pseudo), rel=1e-5)
        weight = 0.3 * math.exp(-5 * (1 - 1 / 2) ** 2)  # iteration 1 of the 2 of the ramp-up
        assert losses["loss"] == pytest.approx(float(supervised.detach()) + weight * float(pseudo), rel=1e-5)

    def test_the_networks_begin_differently_and_the_first_predicts(
        self, settings: dict[str, Any], store: Store, tmp_path: Path
    ) -> None:
        learner: Any = self.make(settings, store, tmp_path)
        pairs = zip(learner.network.parameters(), learner.other.parameters(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)
        assert learner.predictor is learner.network
        assert not {id(p) for p in learner.network.parameters()} & {id(p) for p in learner.other.parameters()}


def slow(each: list[Tensor], threshold: float = 0.0) -> float:
    """Pixel by pixel: -log p_i[arg max p_j] where max p_j reaches the threshold; mean of all, summed over i != j."""
    total = 0.0
    soft = [logits.detach().double().softmax(1).movedim(1, -1).flatten(0, 2).tolist() for logits in each]
    for i, mine in enumerate(soft):
        for j, other in enumerate(soft):
            if i != j:
                terms = [
                    -math.log(p[max(range(len(q)), key=q.__getitem__)]) if max(q) >= threshold else 0.0
                    for p, q in zip(mine, other, strict=True)
                ]
                total += sum(terms) / len(terms)
    return total


def examples(count: int, classes: int = 3) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [2 * torch.randn(2, classes, 4, 5, generator=rng, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_the_pseudo_loss_is_that_of_a_loop(count: int, threshold: float) -> None:
    each = examples(count)
    assert float(cross_pseudo_supervision(each, threshold)) == pytest.approx(slow(each, threshold), rel=1e-5)
    assert slow(each, 0.7) < 0.9 * slow(each)  # the threshold matters here


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_its_gradient_is_that_of_cross_entropy_with_fixed_labels(threshold: float) -> None:
    """Of each pixel (p - y) / n, if the other is sure: nothing comes from being the one who labels."""
    each = [logits.requires_grad_() for logits in examples(2)]
    cross_pseudo_supervision(each, threshold).backward()
    for mine, other in ((each[0], each[1]), (each[1], each[0])):
        p, q = mine.detach().softmax(1), other.detach().softmax(1)
        assert mine.grad is not None
        for b in range(2):
            for y in range(4):
                for x in range(5):
                    label, sure = int(q[b, :, y, x].argmax()), float(q[b, :, y, x].max()) >= threshold
                    for k in range(3):
                        expected = sure * (float(p[b, k, y, x]) - (k == label)) / 40
                        assert float(mine.grad[b, k, y, x]) == pytest.approx(expected, abs=1e-7)


def test_nobody_sure_is_no_loss() -> None:
    each = [torch.zeros(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    loss = cross_pseudo_supervision(each, 0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(logits.grad is not None and not logits.grad.any() for logits in each)


def test_the_reference_preset_is_ssl4mis_below_what_is_given() -> None:
    options: Any = finetuning_options({"strategy": "cps", "preset": "reference", "batch": 8})
    assert (options.batch, options.unlabelled_batch, options.max_iterations) == (8, 12, 30_000)
    assert (options.optimizer, options.learning_rate, options.weight_decay) == ("sgd", 0.01, 1e-4)
    assert (options.schedule, options.warmup_iterations, options.loss) == ("poly", 0, "ssl4mis")
    assert (options.weight, options.ramp_up) == (0.1, 1.0)
    assert options.augmentation.spatial.flip == (0.5, 0.5)
    assert not options.augmentation.intensity.brightness
    again = finetuning_options({**options.model_dump(mode="json"), "strategy": "cps"})
    assert again.model_dump() == options.model_dump()
