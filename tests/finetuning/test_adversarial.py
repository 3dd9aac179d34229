import math
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.finetuning.base import ramp_up
from glocal.finetuning.discriminators import MapDiscriminator, quarters, untaught
from glocal.finetuning.registry import finetuning_options

SMALL = {"width": 4, "dropout": 0.0}  # what is dropped depends on the number of processes


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "loss": "ssl4mis", "weight": 1.0, "ramp_up": 0.0}])
class TestAdversarial(SemiSupervisedChecks):
    strategy = "adversarial"


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def make(**options: Any) -> Any:
        small = {"strategy": "adversarial", "labels": 1, "batch": 4, "unlabelled_batch": 3, "max_iterations": 10}
        return TestAdversarial().make({**cheap, **small, **SMALL, **options}, store, tmp_path)

    return make


def entropy(logits: Tensor, target: int) -> float:
    """Mean over rows of -log softmax, one number at a time."""
    terms = [math.log(sum(math.exp(v - row[target]) for v in row)) for row in logits.tolist()]
    return sum(terms) / len(terms)


def test_the_losses_are_those_of_the_two_players(make: Any) -> None:
    learner = make(ramp_up=0.5, weight=0.3)
    seen: list[Tensor] = []
    learner.network.register_forward_hook(lambda *call: seen.append(call[2]))
    losses = {name: float(value.detach()) for name, value in learner(2).items()}
    both, (logits,) = learner.both_batches(2), seen
    said = learner.discriminator(logits.softmax(1), both.images)
    known, unknown = entropy(said[:4], 1), entropy(said[4:], 0)
    assert losses["discriminator"] == pytest.approx((4 * known + 3 * unknown) / 7, rel=1e-5)
    assert losses["deceived"] == pytest.approx(entropy(said[4:], 1), rel=1e-5)
    assert losses["supervised"] == pytest.approx(float(learner.loss(logits[:4], both.labels).detach()), rel=1e-5)
    weight = 0.3 * ramp_up(2, 5)
    assert losses["loss"] == pytest.approx(losses["supervised"] + weight * losses["deceived"] + losses["discriminator"])


def test_neither_player_learns_from_the_other_s_loss(make: Any) -> None:
    learner = make()
    network, discriminator = list(learner.network.parameters()), list(learner.discriminator.parameters())

    def reached(loss: Tensor, weights: list[Tensor]) -> list[bool]:
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return [gradient is not None and bool(gradient.any()) for gradient in found]

    losses = learner(0)
    assert all(reached(losses["discriminator"], discriminator))
    assert not any(reached(losses["discriminator"], network))
    assert sum(reached(losses["deceived"], network)) > len(network) / 2
    assert not any(reached(losses["deceived"], discriminator))


def test_the_discriminator_drops_channels_only_where_it_learns(make: Any) -> None:
    learner, found = make(dropout=0.5), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(learner(0))
    assert found[0]["deceived"] == found[1]["deceived"]
    assert found[0]["discriminator"] != found[1]["discriminator"]


def test_each_player_gets_better_at_its_own_game(make: Any) -> None:
    """The discriminator learns to tell slices apart; then the network alone makes it say `labelled` again."""
    learner = make()
    for player, name, steps in ((learner.discriminator, "discriminator", 60), (learner.network, "deceived", 30)):
        optimizer, values = torch.optim.Adam(player.parameters(), lr=0.01), []
        for _ in range(steps):
            loss = learner(0)[name]
            learner.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        assert values[-1] < 0.6 * values[0], (name, values)


def test_it_has_a_constant_rate_of_its_own(make: Any) -> None:
    assert make().steady == {"discriminator": 1e-4}
    assert make(discriminator_rate=0.003).steady == {"discriminator": 0.003}


def test_the_discriminator_is_that_of_ssl4mis_and_takes_any_size() -> None:
    discriminator = MapDiscriminator(4, 1)
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.ndim > 1]
    assert shapes == [(64, 4, 4, 4), (64, 1, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (2, 2048)]
    small = MapDiscriminator(3, 2, width=2)
    for size in [(16, 16), (17, 40), (96, 51)]:
        assert small(torch.rand(2, 3, *size), torch.rand(2, 2, *size)).shape == (2, 2)
    with pytest.raises(GlocalError, match="15 x 32 pixels are too small"):
        small(torch.rand(2, 3, 15, 32), torch.rand(2, 2, 15, 32))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (7, 9)])
def test_quarters_are_adaptive_pooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = quarters(x), adaptive_avg_pool2d(x, 2)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(pooled.square().sum(), x)[0] for pooled in (ours, theirs)]
    torch.testing.assert_close(*slopes)


def test_what_deceives_a_module_does_not_teach_it() -> None:
    module, x = torch.nn.Linear(2, 1), torch.randn(3, 2, requires_grad=True)
    said = untaught(module, x)
    assert said.equal(module(x))
    of_input, of_weight = torch.autograd.grad(said.sum(), [x, module.weight], allow_unused=True)
    assert of_input.any()
    assert of_weight is None


def test_the_reference_sets_what_is_not_given() -> None:
    options: Any = finetuning_options({"strategy": "adversarial", "preset": "reference", "batch": 6})
    assert (options.batch, options.unlabelled_batch, options.optimizer, options.loss) == (6, 12, "sgd", "ssl4mis")
    again = finetuning_options(options.model_dump())
    assert again.model_dump() == options.model_dump()
