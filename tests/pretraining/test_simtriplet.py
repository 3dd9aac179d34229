from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, ODD, MethodChecks
from torch import Tensor

from glocal.data.split import Split
from glocal.data.store import Store
from glocal.pretraining.base import Stage
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.simtriplet import ALONE, triplet_loss
from glocal.randomness import generator
from glocal.runs import manifest_of

WIDTHS = {"batch": 8, "outputs": 32, "hidden": 8}


@pytest.mark.parametrize("options", [WIDTHS])
class TestSimTriplet(MethodChecks):
    method = "simtriplet"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        """The checks set a temperature, and there is none."""
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def lowest(self, stage: Stage) -> float:
        return -2.0

    def test_few_and_odd_volumes_are_learnt_from(self, settings: dict[str, Any], store: Store, odd: Store) -> None:
        """As for all methods, but that the loss is not above 0; the smallest batch is one slice."""
        for data, cases in ((store, ("case2",)), (odd, ("odd7",)), (odd, ODD), (odd, ("odd1",))):
            (stage,) = self.stages(settings, data, cases)
            loss = stage.losses(0)["loss"]
            loss.backward()
            assert -2 <= loss <= 2
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.network.parameters()), cases

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        projected: list[Tensor] = []
        predicted: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: projected.append(call[2]))
        stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, predicted[0])
        p, z = predicted[0].detach().double().requires_grad_(), projected[0].detach()
        expected = slow_loss(p.split(8), z.double().split(8))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, p)[0], rtol=1e-4, atol=1e-6)

    def test_the_three_inputs_are_two_views_of_a_slice_and_one_of_its_neighbour(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        (plain,) = self.stages({**settings, "augmentation": "none"}, store)
        (moved,) = self.stages(settings, store)
        for step in (0, 3):
            slices = plain.pool.epoch(8, settings["seed"], step)
            beside = plain.pool.neighbours(slices, generator(settings["seed"], step, "neighbours"))
            x1, x2, x3 = inputs(plain, step).split(8)
            assert x1.equal(store.images(slices.index))
            assert x3.equal(x1)
            assert x2.equal(store.images(beside.index))
            assert ((beside.number - slices.number).abs() == 1).all()
            assert (beside.volume == slices.volume).all()
            x1, _, x3 = inputs(moved, step).split(8)
            assert not any(one.equal(other) for one, other in zip(x1, x3, strict=True))

    def test_the_predictor_learns_at_a_steady_rate(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        assert stage.steady == {"predictor": stage.options.learning_rate}
        assert stage.get_submodule(*stage.steady) is stage.predictor
        assert all(p.requires_grad for part in (stage.head, stage.predictor) for p in part.parameters())


def inputs(stage: Stage, step: int) -> Tensor:
    """What goes through the network in a step."""
    seen: list[Tensor] = []
    hook = stage.network.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    stage.losses(step)
    hook.remove()
    return seen[0]


def slow_loss(p: Any, z: Any) -> Tensor:
    """Pair by pair: (p1, z2), (p2, z1), (p1, z3) and (p3, z1), a half each, the mean over the batch."""
    terms = []
    for first, second in ((0, 1), (1, 0), (0, 2), (2, 0)):
        for a, b in zip(p[first], z[second].detach(), strict=True):
            terms.append(-(a @ b) / (a @ a).sqrt() / (b @ b).sqrt() / 2)
    return sum(terms, torch.zeros(())) / len(p[0])


def vectors(a: float) -> Tensor:
    i, j = torch.arange(1, 6, dtype=torch.float64)[:, None], torch.arange(1, 9, dtype=torch.float64)
    return torch.sin(a * i * j + 0.11 * i)


def test_it_has_the_value_of_the_reference_and_the_gradient_of_the_loop() -> None:
    p, z = ([vectors(a).requires_grad_() for a in row] for row in ((0.31, 0.33, 0.37), (0.41, 0.43, 0.47)))
    loss, expected = triplet_loss(p, z), slow_loss(p, z)
    assert float(loss.detach()) == pytest.approx(-0.6701733651763415, rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, p), torch.autograd.grad(expected, p))
    assert all(one is None for one in torch.autograd.grad(triplet_loss(p, z), z, allow_unused=True))


def test_neighbour_and_second_view_count_alike_and_are_never_compared() -> None:
    p, z = ([vectors(a) for a in row] for row in ((0.31, 0.33, 0.37), (0.41, 0.43, 0.47)))
    swapped = triplet_loss([p[0], p[2], p[1]], [z[0], z[2], z[1]])
    torch.testing.assert_close(swapped, triplet_loss(p, z))
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(triplet_loss([x[order] for x in p], [x[order] for x in z]), triplet_loss(p, z))
    assert float(triplet_loss(p[:1] * 3, p[:1] * 3)) == pytest.approx(-2)
    away = triplet_loss([p[0], p[0], p[0]], [p[0], -p[0], -p[0]])  # p1 from z2 and z3, but p2 and p3 to z1
    assert float(away) == pytest.approx(0)


def test_it_is_the_same_in_low_precision() -> None:
    p, z = ([vectors(a).float() for a in row] for row in ((0.31, 0.33, 0.37), (0.41, 0.43, 0.47)))
    low = triplet_loss([x.bfloat16() for x in p], [x.bfloat16() for x in z])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, triplet_loss(p, z), rtol=0.02, atol=0.005)
    assert float(triplet_loss(p, z)) == pytest.approx(-0.6701733651763415, rel=1e-5)


@pytest.mark.parametrize(("cases", "warnings"), [(("odd1",), [ALONE]), (("odd1", "odd2"), [])])
def test_volumes_of_one_slice_have_no_neighbours(
    odd: Store, tmp_path: Path, cheap: dict[str, Any], cases: tuple[str, ...], warnings: list[str]
) -> None:
    settings = {**cheap, **WIDTHS, "method": "simtriplet", "max_iterations": 1}
    pretrain(odd, tmp_path / "run", settings, split=Split(0, cases, (), ()))
    assert manifest_of(tmp_path / "run")["warnings"] == warnings
