from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.pretraining.base import Stage
from glocal.pretraining.byol import prediction_error
from glocal.teacher import rising


@pytest.mark.parametrize("options", [{"batch": 8, "hidden": 32, "outputs": 16}])
class TestBYOL(MethodChecks):
    method = "byol"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        """The checks set a temperature, and there is none."""
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        predicted: list[Tensor] = []
        targets: list[Tensor] = []
        stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2]))
        stage.target[1].register_forward_hook(lambda *call: targets.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, predicted[0])
        q, z = predicted[0].detach().double().requires_grad_(), targets[0].double()
        assert not z.requires_grad
        expected = torch.zeros((), dtype=torch.float64)
        for k in range(16):  # each of the two views of eight slices predicts the other
            one, other = q[k] / q[k].norm(), z[(k + 8) % 16] / z[(k + 8) % 16].norm()
            expected = expected + ((one - other) ** 2).sum() / 8
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, q)[0], rtol=1e-4, atol=1e-6)

    def test_it_sees_two_different_views_of_the_same_slices(self, settings: dict[str, Any], store: Store) -> None:
        for changes in ({}, {"augmentation": "none"}):
            (stage,) = self.stages({**settings, **changes}, store)
            seen: list[Tensor] = []
            for encoder in (stage.network.encoder, stage.target[0].encoder):
                encoder.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
            stage.losses(3)
            images = store.images(stage.pool.epoch(8, settings["seed"], 3).index)
            assert seen[0].equal(seen[1])  # network and target are shown the same
            first, second = seen[0].split(8)
            for one, other, image in zip(first, second, images, strict=True):
                assert one.equal(other) == one.equal(image) == other.equal(image) == bool(changes)

    def test_the_target_sees_the_same_views_and_computes_with_statistics_of_the_batch(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        (stage,) = self.stages(settings, store)
        projected: list[Tensor] = []
        for head in (stage.head, stage.target[1]):
            head.register_forward_hook(lambda *call: projected.append(call[2].detach()))
        stage.losses(0)
        torch.testing.assert_close(projected[0], projected[1])  # before the first update they are the same network

    def test_the_target_follows_ever_more_slowly_from_the_second_step(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        (stage,) = self.stages({**settings, "max_iterations": 10, "momentum": 0.9}, store)
        online = [p for module in (stage.network, stage.head) for p in module.parameters()]
        for step in range(4):
            with torch.no_grad():
                for parameter in online:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            before = [p.clone() for p in stage.target.parameters()]
            stage.losses(step)
            momentum = 1.0 if step == 0 else rising(0.9, step - 1, 10)
            assert step != 1 or momentum == pytest.approx(0.9)
            assert step < 2 or rising(0.9, step - 2, 10) < momentum < 1
            for mine, was, theirs in zip(stage.target.parameters(), before, online, strict=True):
                torch.testing.assert_close(mine, momentum * was + (1 - momentum) * theirs.detach())

    def test_a_resumed_stage_goes_on_exactly(self, settings: dict[str, Any], store: Store) -> None:
        assert_resumes(self, settings, store)

    def test_one_slice_is_enough(self, settings: dict[str, Any], odd: Store) -> None:
        for cases in (("odd1",), ("odd2",)):
            (stage,) = self.stages({**settings, "batch": 1}, odd, cases)
            loss = stage.losses(0)["loss"]
            loss.backward()
            assert 0 < loss <= 8


def assert_resumes(checks: MethodChecks, settings: dict[str, Any], store: Store) -> None:
    """A new stage with the state of one that was killed after two steps computes the third alike."""
    (stage,) = checks.stages({**settings, "max_iterations": 10}, store)
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        stage.losses(step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    (new,) = checks.stages({**settings, "max_iterations": 10}, store)
    new.load_state_dict(stage.state_dict())
    assert new.losses(2)["loss"].equal(stage.losses(2)["loss"])
    for name, value in stage.state_dict().items():
        assert value.equal(new.state_dict()[name]), name


def test_the_error_is_the_squared_distance_of_unit_vectors() -> None:
    torch.manual_seed(0)
    q, z = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.zeros((), dtype=torch.float64)
    for a, b in zip(q, z.detach(), strict=True):
        expected = expected + sum((x / a.norm() - y / b.norm()) ** 2 for x, y in zip(a, b, strict=True)) / 5
    loss = prediction_error(q, z)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected, q)
    loss.backward()
    torch.testing.assert_close(q.grad, gradient)
    assert z.grad is None
    assert float(prediction_error(q, 2 * q).detach()) == pytest.approx(0, abs=1e-12)
    assert float(prediction_error(q, -q).detach()) == pytest.approx(4)
    order = torch.tensor([2, 0, 1, 4, 3])
    torch.testing.assert_close(prediction_error(q[order], z[order]), loss)
    torch.testing.assert_close(prediction_error(q.bfloat16(), z.bfloat16()), loss.float(), rtol=0.02, atol=0.02)
