import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.engine import learning_rate_factor
from glocal.finetuning.bcp import largest_pieces
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{"pretraining": 0.5, "batch": 6, "unlabelled_batch": 6}])
class TestBCP(SemiSupervisedChecks):
    strategy = "bcp"


def test_the_largest_pieces_against_a_loop() -> None:
    labels = torch.randint(4, (5, 12, 14), generator=torch.Generator().manual_seed(0))
    labels[1] = 0
    labels[2][labels[2] == 3] = 0
    found = largest_pieces(labels, 4)
    for image in range(5):
        expected = np.zeros((12, 14), int)
        for k in (1, 2, 3):
            pieces, count = ndimage.label((labels[image] == k).numpy(), np.ones((3, 3)))
            if count:
                sizes = [(pieces == number).sum() for number in range(1, count + 1)]
                expected[pieces == 1 + int(np.argmax(sizes))] = k
        assert found[image].numpy().tolist() == expected.tolist()
    assert not found.equal(labels)


def test_pieces_touch_at_corners_but_not_across_slices() -> None:
    labels = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 1]]])
    assert largest_pieces(labels, 2).tolist() == [labels[0].tolist(), [[0, 0, 0], [0, 0, 0], [1, 0, 0]]]


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def made(**options: Any) -> Any:
        settings = {"strategy": "bcp", "labels": 1, "batch": 4, "unlabelled_batch": 5, "max_iterations": 8, **options}
        return TestBCP().make({**cheap, **settings}, store, tmp_path)

    return made


def watched(learner: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    learner.network.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], logits=output))
    return seen


def test_labelled_slices_are_pasted_into_each_other_first(make: Any) -> None:
    learner = make()
    seen = watched(learner)
    loss = learner(1)["loss"]
    images, labels, _ = learner.labelled_batch(1)
    inside = learner.rectangles(2, images, 1)
    total = 0.0
    for k in range(2):
        assert seen["x"][k].equal(torch.where(inside[k], images[2 + k], images[k]))
    for part, source in ((inside, labels[2:]), (~inside, labels[:2])):
        total += float(learner.loss(seen["logits"], source, part.float()).detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


def test_then_labelled_and_unlabelled_slices_into_each_other(make: Any) -> None:
    learner = make(weight=0.3)
    seen = watched(learner)
    told: list[Tensor] = []
    learner.teacher[0].register_forward_hook(lambda module, inputs, output: told.append(output))
    losses = {name: float(value.detach()) for name, value in learner(4).items()}
    images, labels, _ = learner.labelled_batch(4)
    others, _ = learner.taught(4)
    pseudo = largest_pieces(told[0].argmax(1), 3)
    inside = learner.rectangles(2, images, 4)
    expected = []
    for k in range(2):
        assert seen["x"][k].equal(torch.where(inside[k], images[k], others[k]))
        assert seen["x"][2 + k].equal(torch.where(inside[k], others[2 + k], images[2 + k]))
    inward, outward = seen["logits"].chunk(2)
    for logits, known, unknown, part in (
        (inward, labels[:2], pseudo[:2], inside),
        (outward, labels[2:], pseudo[2:4], ~inside),
    ):
        labelled = float(learner.loss(logits, known, part.float()))
        expected.append(labelled + 0.3 * float(learner.loss(logits, unknown, (~part).float())))
    assert [losses["in"], losses["out"]] == pytest.approx(expected, rel=1e-5)
    assert losses["loss"] == pytest.approx(sum(expected), rel=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in learner.teacher.parameters())


def test_the_smaller_batch_decides_how_many_are_mixed(make: Any) -> None:
    learner = make(batch=6, unlabelled_batch=3)
    seen = watched(learner)
    assert learner(4)["loss"].isfinite()
    assert len(seen["x"]) == 2  # one each way; four labelled slices and an unlabelled one are left over
    images, others, inside = learner.labelled_batch(4)[0], learner.taught(4)[0], learner.rectangles(1, seen["x"], 4)
    assert seen["x"][0].equal(torch.where(inside[0], images[0], others[0]))
    assert seen["x"][1].equal(torch.where(inside[0], others[1], images[1]))


@pytest.mark.parametrize("largest", [True, False])
def test_the_teacher_s_largest_pieces_are_believed(make: Any, largest: bool) -> None:
    learner, told = make(largest=largest), []
    learner.teacher[0].register_forward_hook(lambda module, inputs, output: told.append(output.argmax(1)))
    pseudo = learner.taught(4)[1]
    assert pseudo.equal(largest_pieces(told[0], 3) if largest else told[0])
    assert pseudo.equal(told[0]) != largest


@pytest.mark.parametrize("place", ["random", "centre"])
def test_rectangles(make: Any, place: str) -> None:
    learner = make(place=place)
    inside = learner.rectangles(200, torch.zeros(1, 1, 30, 60), 0)
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    assert (height * width).equal(inside.sum((1, 2)))
    assert (height - 20).abs().max() <= 1
    assert (width - 40).abs().max() <= 1
    first = inside.any(2).int().argmax(1)
    if place == "centre":
        assert first.unique().tolist() == [5]
    else:
        assert first.min() == 0
        assert first.max() == 10
        assert not inside[0].equal(inside[1])


def test_the_teacher_begins_as_what_came_of_the_first_phase(make: Any) -> None:
    learner = make(momentum=0.75)
    assert learner.first == 2
    values = []
    for step in range(5):
        with torch.no_grad():
            for p in learner.network.parameters():
                p.fill_(step)
        learner(step)
        values.append(float(next(learner.teacher.parameters()).flatten()[0]))
    assert values[1:] == pytest.approx([1, 2, 0.75 * 2 + 0.25 * 3, 0.75 * 2.25 + 0.25 * 4])


@pytest.mark.parametrize("statistics", ["copied", "own"])
def test_until_then_it_has_the_network_s_statistics(make: Any, statistics: str) -> None:
    learner = make(statistics=statistics)
    name = "encoder.0.0.norm.running_mean"
    for step in range(learner.first + 1):
        mean = learner.network.get_buffer(name).clone()
        learner(step)
    own = learner.teacher[0].get_buffer(name)
    assert mean.equal(own) == (statistics == "copied")  # in the last step it was shown slices
    assert not torch.allclose(own, torch.zeros_like(own))
    learner(step + 1)
    assert learner.teacher[0].get_buffer(name).equal(mean) is False


def test_the_weight_rises_from_the_second_phase_on(make: Any) -> None:
    learner = make(max_iterations=40, ramp_up=0.5, weight=0.3)
    assert learner.first == 10
    values = [learner.consistency_weight(step) for step in range(10, 40)]
    assert values[0] == pytest.approx(0.3 * math.exp(-5))
    assert values[15:] == [0.3] * 15
    assert values[:15] == sorted(values[:15])


def test_each_phase_has_a_schedule_of_its_own(make: Any) -> None:
    learner = make(max_iterations=40, warmup_iterations=2)
    assert learner.rounds == (0, 10)
    factors = [learning_rate_factor(learner.options, step, learner.rounds) for step in range(40)]
    assert factors[:2] == factors[10:12] == [0.5, 1.0]
    assert factors[9] < 0.1
    assert make(pretraining=0.0).rounds == (0,)


def test_the_reference_is_that_for_hearts() -> None:
    options: Any = finetuning_options({"strategy": "bcp", "preset": "reference"})
    assert options.pretraining * options.max_iterations == 10_000
    assert (options.weight, options.ramp_up, options.schedule, options.loss) == (0.5, 0, "constant", "ssl4mis")
    assert options.beta == pytest.approx(2 / 3)
