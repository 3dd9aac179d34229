from typing import Any

import pytest
import torch
from method_checks import ALL, ODD, MethodChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.pretraining.base import Stage
from glocal.pretraining.simsiam import negative_cosine


@pytest.mark.parametrize("options", [{"batch": 8, "outputs": 32, "hidden": 8}])
class TestSimSiam(MethodChecks):
    method = "simsiam"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        """The checks set a temperature, and there is none."""
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def lowest(self, stage: Stage) -> float:
        return -1.0

    def test_few_and_odd_volumes_are_learnt_from(self, settings: dict[str, Any], store: Store, odd: Store) -> None:
        """As for all methods, but that the loss is not above 0; the smallest batch is one slice."""
        for data, cases in ((store, ("case2",)), (odd, ("odd7",)), (odd, ODD), (odd, ("odd1",))):
            (stage,) = self.stages(settings, data, cases)
            loss = stage.losses(0)["loss"]
            loss.backward()
            assert -1 <= loss <= 1
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.network.parameters()), cases

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        projected: list[Tensor] = []
        predicted: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: projected.append(call[2]))
        stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, predicted[0])
        p, z = predicted[0].detach().double().requires_grad_(), projected[0].detach().double()
        expected = sum(-cosine(p[k], z[(k + 8) % 16]) / 16 for k in range(16))
        assert isinstance(expected, Tensor)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, p)[0], rtol=1e-4, atol=1e-6)

    def test_it_sees_two_different_views_of_the_same_slices(self, settings: dict[str, Any], store: Store) -> None:
        for changes in ({}, {"augmentation": "none"}):
            (stage,) = self.stages({**settings, **changes}, store)
            seen: list[Tensor] = []
            stage.network.encoder.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
            stage.losses(3)
            images = store.images(stage.pool.epoch(8, settings["seed"], 3).index)
            first, second = seen[0].split(8)
            for one, other, image in zip(first, second, images, strict=True):
                assert one.equal(other) == one.equal(image) == other.equal(image) == bool(changes)

    def test_all_that_the_encoder_learns_comes_through_the_predictor(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        (stage,) = self.stages(settings, store)
        stage.predictor.register_forward_hook(lambda *call: call[2].detach().requires_grad_())
        stage.losses(0)["loss"].backward()
        assert all(parameter.grad is None for parameter in stage.parameters())

    def test_the_predictor_learns_at_a_steady_rate(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        assert stage.steady == {"predictor": stage.options.learning_rate}
        assert stage.get_submodule(*stage.steady) is stage.predictor
        assert all(p.requires_grad for part in (stage.head, stage.predictor) for p in part.parameters())


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return sum(a * b for a, b in zip(p, z, strict=True)) / (p @ p).sqrt() / (z @ z).sqrt()


def test_d_is_minus_the_mean_cosine_and_holds_z_still() -> None:
    torch.manual_seed(0)
    p, z = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = -sum(cosine(a, b) for a, b in zip(p, z.detach(), strict=True)) / 5
    assert isinstance(expected, Tensor)
    loss = negative_cosine(p, z)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected, p)
    loss.backward()
    torch.testing.assert_close(p.grad, gradient)
    assert z.grad is None
    assert float(negative_cosine(p, 3 * p).detach()) == pytest.approx(-1)
    assert float(negative_cosine(p, -p).detach()) == pytest.approx(1)
    order = torch.tensor([2, 0, 1, 4, 3])
    torch.testing.assert_close(negative_cosine(p[order], z[order]), loss)


def test_d_is_finite_for_vectors_of_length_zero_and_in_low_precision() -> None:
    p = torch.zeros(3, 4, requires_grad=True)
    negative_cosine(p, torch.ones(3, 4)).backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()
    torch.manual_seed(0)
    q, z = torch.randn(2, 6, 16)
    low = negative_cosine(q.bfloat16(), z.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, negative_cosine(q, z), rtol=0.02, atol=0.005)
