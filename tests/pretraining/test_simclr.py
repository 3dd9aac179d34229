import math
from typing import Any

import pytest
import torch
from method_checks import MethodChecks
from torch import Tensor, nn

from glocal.data.store import Store
from glocal.errors import GlocalError


@pytest.mark.parametrize("options", [{}, {"head_norm": True, "outputs": 16, "temperature": 0.5}], ids=["paper", "code"])
class TestSimCLR(MethodChecks):
    method = "simclr"

    @pytest.fixture
    def settings(self, cheap: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        return {**cheap, "method": self.method, "max_iterations": 2, "batch": 8, **options}

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        seen: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: seen.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, seen[0])
        z = seen[0].detach().double().requires_grad_()
        expected = nt_xent(z, stage.options.temperature)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-6)

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

    def test_it_has_the_value_of_the_reference(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages({**settings, "batch": 6, "temperature": 0.1}, store)
        i, j = torch.arange(1, 13.0, dtype=torch.float64)[:, None], torch.arange(1, 9.0, dtype=torch.float64)
        stage.head = Given(torch.sin(0.37 * i * j + 0.11 * i))
        assert float(stage.losses(0)["loss"]) == pytest.approx(5.504593353720661, rel=1e-9)

    def test_the_smallest_batch_is_two_slices_and_one_is_refused(
        self, settings: dict[str, Any], store: Store, odd: Store
    ) -> None:
        for data, cases in ((store, ("case0",)), (odd, ("odd2",))):
            (stage,) = self.stages({**settings, "batch": 2}, data, cases)
            loss = stage.losses(0)["loss"]
            loss.backward()
            assert 0 < loss < torch.inf
        with pytest.raises(GlocalError, match=r"only one here.*simsiam"):
            self.stages(settings, odd, ("odd1",))

    def test_the_head_is_the_paper_s_or_the_code_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        assert [type(layer).__name__ for layer in stage.head.layers] == (
            ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
            if settings.get("head_norm")
            else ["Linear", "ReLU", "Linear"]
        )
        assert len(stage.head(torch.zeros(2, 8, 1, 1))[0]) == settings.get("outputs", 128)


class Given(nn.Module):
    """A head that gives these embeddings whatever it sees."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == len(self.embeddings)
        return self.embeddings


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Eq. 1 of the paper, pair by pair: rows k and k + N are the views of one slice."""

    def similarity(i: int, j: int) -> Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm()) / temperature

    total, terms = len(z), []
    for i in range(total):
        denominator = sum(similarity(i, k).exp() for k in range(total) if k != i)
        terms.append(-(similarity(i, (i + total // 2) % total).exp() / denominator).log())
    assert not math.isnan(float(terms[0].detach()))
    return torch.stack(terms).mean()
