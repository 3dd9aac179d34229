import math
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.registry import finetuning_options
from glocal.finetuning.uncertainty_mean_teacher import certain_error, threshold


@pytest.mark.parametrize(
    "options", [{"passes": 3}, {"passes": 3, "statistics": "own", "predict": "teacher", "momentum": 0.0}]
)
class TestUncertaintyMeanTeacher(SemiSupervisedChecks):
    strategy = "uncertainty-mean-teacher"


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def made(**options: Any) -> Any:
        settings = {"strategy": "uncertainty-mean-teacher", "labels": 1, "batch": 3, "unlabelled_batch": 2, **options}
        return TestUncertaintyMeanTeacher().make({**cheap, **settings}, store, tmp_path)

    return made


def test_the_threshold_is_that_of_ssl4mis() -> None:
    values = [threshold(step, 30_000, 2) for step in (0, 1500, 15_000, 30_000)]
    assert values == pytest.approx([0.521028, 0.521762, 0.569508, 0.693147], abs=1e-6)
    assert threshold(30_000, 30_000, 4) == pytest.approx(math.log(4))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_error_of_certain_pixels_against_a_loop(classes: int) -> None:
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 3, 5, generator=rng, dtype=torch.float64).softmax(1).requires_grad_()
    teacher = torch.randn(2, 4, 3, 5, generator=rng, dtype=torch.float64).softmax(1)
    sure = torch.rand(2, 3, 5, generator=rng) < 0.4
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, y, x in sure.nonzero().tolist():
        count += 1
        for c in range(4):
            total = total + (student[b, c, y, x] - teacher[b, c, y, x]) ** 2
    expected = total / (classes * count)
    found = certain_error(student, teacher, sure, classes)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)
    nothing = certain_error(student, teacher, torch.zeros_like(sure), classes)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, student)[0].abs().max() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_uncertainty_is_that_of_the_mean_of_noisy_passes(make: Any, dropout: float) -> None:
    learner = make(passes=5, passes_at_once=2, dropout=dropout)
    images, answers, seen = learner.both_batches(0).images[3:], [], []
    teacher = learner.teacher[0]
    teacher.head.register_forward_hook(lambda module, inputs, output: answers.append(output))
    teacher.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    target, nats = learner.target(images, 2, 0)
    assert [len(answer) for answer in answers] == [2, 4, 4, 2]
    torch.testing.assert_close(target, answers[0].softmax(1))
    passes = torch.cat([answer.softmax(1) for answer in answers[1:]]).view(5, 2, 3, 32, 32)
    for b, y, x in [(0, 3, 7), (1, 16, 16), (1, 31, 0)]:
        mean = [sum(float(passes[t, b, c, y, x]) for t in range(5)) / 5 for c in range(3)]
        assert float(nats[b, y, x]) == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-4)
    noise = torch.cat(seen).view(6, 2, 1, 32, 32) - images
    assert noise.abs().max() <= 0.2 + 1e-6
    assert len({float(each.sum()) for each in noise.flatten(0, 1)}) == 12  # no noise twice


def test_dropout_is_for_the_random_passes(make: Any) -> None:
    plain, dropped = (make(dropout=p, noise=0.0, passes=2) for p in (0.0, 0.5))
    images: Tensor = plain.both_batches(0).images[3:]
    assert plain.target(images, 2, 0)[0].equal(dropped.target(images, 2, 0)[0])
    assert not plain.target(images, 2, 0)[1].allclose(dropped.target(images, 2, 0)[1])


@pytest.mark.parametrize(("classes", "count"), [("all", 3), ("two", 2)])
def test_unsure_pixels_do_not_count(make: Any, monkeypatch: pytest.MonkeyPatch, classes: str, count: int) -> None:
    learner = make(classes=classes, weight=2.0, ramp_up=0.0, max_iterations=10)
    limit = threshold(4, 10, count)
    target = torch.full((2, 3, 32, 32), 1 / 3)
    nats = torch.full((2, 32, 32), limit + 1e-4)
    nats[:, 3, 4] = limit - 1e-4
    monkeypatch.setattr(learner, "target", lambda *_: (target, nats))
    outputs: list[Tensor] = []
    learner.network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    losses = learner(4)
    error = (outputs[0][3:, :, 3, 4].detach().softmax(1) - 1 / 3).square().sum(1).mean() / count
    assert losses["consistency"].item() == pytest.approx(float(error), rel=1e-4)
    assert losses["loss"].item() == pytest.approx((losses["supervised"] + 2 * error).item(), rel=1e-5)
    assert float(losses["sure"]) == pytest.approx(1 / 1024)


def test_the_reference_has_the_code_s_factors() -> None:
    options: Any = finetuning_options({"strategy": "uncertainty-mean-teacher", "preset": "reference"})
    assert (options.passes, options.classes, options.statistics, options.dropout) == (8, "two", "own", 0.1)
