from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.base import Strategy
from glocal.finetuning.mean_teacher import Options
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{"start": 0.25}])
class TestMeanTeacher(SemiSupervisedChecks):
    strategy = "mean-teacher"


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def made(**options: Any) -> Any:
        settings = {"strategy": "mean-teacher", "labels": 1, "batch": 3, "unlabelled_batch": 4, "start": 0, **options}
        return TestMeanTeacher().make({**cheap, **settings}, store, tmp_path)

    return made


def test_student_and_teacher_are_compared_as_in_the_code(make: Any) -> None:
    learner, seen = make(weight=7.0, ramp_up=0.0), {}
    learner.network.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], student=output))
    learner.teacher[0].register_forward_hook(lambda module, inputs, output: seen.update(y=inputs[0], teacher=output))
    losses = learner(0)
    student, teacher = seen["student"][3:].detach().double(), seen["teacher"].double()
    total = 0.0
    for image in range(4):
        for row in range(32):
            p, q = student[image, :, row].softmax(0), teacher[image, :, row].softmax(0)
            total += sum((a - b) ** 2 for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True))
    assert losses["consistency"].item() == pytest.approx(total / (4 * 3 * 32 * 32), rel=1e-4)
    assert losses["loss"].item() == pytest.approx((losses["supervised"] + 7 * losses["consistency"]).item(), rel=1e-5)
    expected = learner.loss(seen["student"][:3], learner.both_batches(0).labels)
    assert losses["supervised"].item() == pytest.approx(expected.item())
    noise = seen["y"] - seen["x"][3:]
    assert noise.abs().max() == pytest.approx(0.2, abs=1e-6)
    assert (noise.abs() > 0.1999).float().mean() == pytest.approx(0.0455, abs=0.015)
    assert noise.std() == pytest.approx(0.096, abs=0.005)
    assert seen["x"].equal(learner.both_batches(0).images)


def test_no_gradient_goes_through_the_teacher(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(weight=1.0, ramp_up=0.0)
    targets = []
    real = learner.target
    monkeypatch.setattr(learner, "target", lambda *given: targets.append(real(*given)) or targets[-1])
    learner(0)["consistency"].backward()
    assert not targets[0].requires_grad
    assert all(p.grad is None for p in learner.teacher.parameters())


def test_nothing_is_asked_of_the_teacher_before_the_start(make: Any) -> None:
    learner, asked = make(start=0.3, max_iterations=10), []
    learner.teacher[0].register_forward_hook(lambda *_: asked.append(True))
    values = [float(learner(step)["consistency"].detach()) for step in range(5)]
    assert values[:3] == [0, 0, 0]
    assert min(values[3:]) > 0
    assert len(asked) == 2


def change(learner: Strategy, value: float) -> None:
    with torch.no_grad():
        for tensor in [*learner.network.parameters(), *learner.network.buffers()]:
            tensor.fill_(value)


@pytest.mark.parametrize("statistics", ["copied", "own"])
def test_the_teacher_is_the_mean_of_all_first_and_a_slow_copy_later(make: Any, statistics: str) -> None:
    learner, expected = make(statistics=statistics, momentum=0.75, start=1), 0.0
    name = "encoder.0.0.norm.running_mean"
    before = learner.teacher[0].get_buffer(name).clone()
    for step in range(1, 8):
        change(learner, step)  # what the optimiser made of it in the iteration before
        learner(step)
        alpha = min(1 - 1 / step, 0.75)
        expected = alpha * expected + (1 - alpha) * step
        assert float(next(learner.teacher.parameters()).detach().flatten()[0]) == pytest.approx(expected, rel=1e-5)
        if step <= 4:
            assert expected == pytest.approx((step + 1) / 2)
        mean = learner.teacher[0].get_buffer(name)
        assert mean.equal(torch.full_like(mean, step) if statistics == "copied" else before)


@pytest.mark.parametrize("predict", ["student", "teacher"])
def test_who_predicts_is_chosen(make: Any, predict: str) -> None:
    learner = make(predict=predict)
    assert learner.predictor is (learner.network if predict == "student" else learner.teacher[0])
    assert learner.predictor.state_dict().keys() == learner.network.state_dict().keys()


def test_the_reference_is_that_of_ssl4mis() -> None:
    options: Any = finetuning_options({"strategy": "mean-teacher", "preset": "reference", "batch": 8})
    assert (options.optimizer, options.max_iterations, options.statistics) == ("sgd", 30_000, "own")
    assert (options.batch, options.momentum, options.noise, options.noise_limit) == (8, 0.99, 0.1, 0.2)
    assert options.start * options.max_iterations == pytest.approx(1000)
    assert options.model_dump() == Options.model_validate(options.model_dump()).model_dump()
    learner: Any = SimpleNamespace(options=options)
    weights = [Strategy.consistency_weight(learner, step) for step in (0, 1500, 15_000, 30_000)]
    assert weights == pytest.approx([6.738e-4, 1.0971e-3, 2.86505e-2, 0.1], rel=1e-4)


def test_noise_is_of_the_iteration(make: Any) -> None:
    learner = make()
    images = learner.both_batches(0).images[3:]
    targets: list[Tensor] = [learner.target(images, 4, step) for step in (5, 5, 6)]
    assert targets[0].equal(targets[1])
    assert not targets[0].equal(targets[2])
