from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.finetuning.losses import segmentation_loss
from glocal.finetuning.mc_net import mutual_consistency, sharpened
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{}])
class TestMCNet(SemiSupervisedChecks):
    strategy = "mc-net"

    @pytest.mark.parametrize("decoders", [["bilinear", "transposed"], ["bilinear", "transposed", "nearest"]])
    def test_the_loss_is_the_sum_over_decoders_and_their_pairs(
        self, settings: dict[str, Any], store: Store, tmp_path: Path, decoders: list[str]
    ) -> None:
        asked = {"weight": 0.7, "ramp_up": 0.0, "temperature": 0.5, "decoders": decoders}
        learner: Any = self.make({**settings, **asked}, store, tmp_path)
        both = learner.both_batches(0)
        each = learner.network.each(both.images)
        assert len(each) == len(decoders)
        supervised = sum(float(learner.loss(logits[:4], both.labels).detach()) for logits in each)
        consistency = float(slow(each, 0.5))  # of labelled and unlabelled slices
        losses = {name: float(value.detach()) for name, value in learner(0).items()}
        assert losses["supervised"] == pytest.approx(supervised, rel=1e-5)
        assert losses["consistency"] == pytest.approx(consistency, rel=1e-4)
        assert losses["loss"] == pytest.approx(supervised + 0.7 * consistency, rel=1e-5)

    def test_the_option_fixes_the_target(self, settings: dict[str, Any], store: Store, tmp_path: Path) -> None:
        gradients = []
        for sharp_grad in (True, False):
            asked = {"ramp_up": 0.0, "sharp_grad": sharp_grad}
            learner: Any = self.make({**settings, **asked}, store, tmp_path)
            learner(0)["consistency"].backward()
            gradients.append(learner.network.head[2].weight.grad)
        assert not torch.allclose(gradients[0], gradients[1], rtol=0.01)


def slow(each: list[Tensor], temperature: float) -> float:
    """Number by number: (p_i - sharp(p_j))^2, mean over all, summed over i != j."""
    total = 0.0
    soft = [logits.detach().double().softmax(1).flatten().tolist() for logits in each]
    for i, mine in enumerate(soft):
        for j, other in enumerate(soft):
            if i != j:
                terms = []
                for p, q in zip(mine, other, strict=True):
                    sharp = q ** (1 / temperature) / (q ** (1 / temperature) + (1 - q) ** (1 / temperature))
                    terms.append((p - sharp) ** 2)
                total += sum(terms) / len(terms)
    return total


def examples(count: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [2 * torch.randn(2, 3, 3, 4, generator=rng, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3])
def test_the_consistency_is_that_of_a_loop(count: int, temperature: float) -> None:
    each = examples(count)
    for sharp_grad in (True, False):
        value = float(mutual_consistency(each, temperature, sharp_grad))
        assert value == pytest.approx(slow(each, temperature), rel=1e-9)


def test_its_gradient_is_that_of_small_changes() -> None:
    each = [logits.requires_grad_() for logits in examples(2)]
    mutual_consistency(each, 0.5).backward()
    for number in (0, 1):
        for place in ((0, 0, 0, 0), (1, 2, 1, 3), (0, 1, 2, 2)):
            values = []
            for change in (1e-5, -1e-5):
                moved = [logits.detach().clone() for logits in each]
                moved[number][place] += change
                values.append(slow(moved, 0.5))
            gradient = each[number].grad
            assert gradient is not None
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_a_fixed_target_gives_its_decoder_no_gradient() -> None:
    """With `sharp_grad=False` each learns as if sharp(p_j) were data, else it learns by being the target too."""
    gradients = []
    for sharp_grad in (True, False):
        each = [logits.requires_grad_() for logits in examples(2)]
        mutual_consistency(each, 0.5, sharp_grad).backward()
        gradients.append(each[0].grad)
    first, second = examples(2)
    first.requires_grad_()
    target = sharpened(second.softmax(1), 0.5)
    (first.softmax(1) - target).square().mean().backward()
    torch.testing.assert_close(gradients[1], first.grad)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


def test_sharpening_moves_away_from_one_half_and_stays_finite() -> None:
    p = torch.tensor([0.0, 1e-30, 0.2, 0.5, 0.6, 1 - 1e-7, 1.0], requires_grad=True)
    for temperature in (0.02, 0.1, 1.0):
        p.grad = None
        sharp = sharpened(p, temperature)
        sharp.sum().backward()
        assert sharp.isfinite().all()
        assert p.grad is not None
        assert p.grad.isfinite().all()
    torch.testing.assert_close(sharpened(p, 1.0), p)
    expected = 0.6**10 / (0.6**10 + 0.4**10)
    assert float(sharpened(p.detach(), 0.1)[4]) == pytest.approx(expected, rel=1e-5)
    assert sharpened(p, 0.1)[[0, 3, 6]].tolist() == pytest.approx([0, 0.5, 1])


def test_the_dice_of_the_reference_is_that_of_its_code() -> None:
    """Logits f[b, y, x, k] = sin(.7 (b + 1) + .31 (y + 1) (k + 1) + .17 (x + 1) (k + 2)); METHODS, golden values."""
    b, k, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 4, 8, 8)), indexing="ij")
    logits = torch.sin(0.7 * (b + 1) + 0.31 * (y + 1) * (k + 1) + 0.17 * (x + 1) * (k + 2))
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    label = (3 * rows + 5 * columns) % 4
    labels = torch.stack([label, label.flip(0)])
    assert float(segmentation_loss("ssl4mis-dice")(logits, labels)) == pytest.approx(0.6325393250964717, rel=1e-5)
    both = (0.6325393250964717 + 1.6086845787756676) / 2
    assert float(segmentation_loss("ssl4mis")(logits, labels)) == pytest.approx(both, rel=1e-5)


def test_the_reference_preset_is_the_released_code_below_what_is_given() -> None:
    options: Any = finetuning_options({"strategy": "mc-net", "preset": "reference", "max_iterations": 600})
    assert (options.loss, options.predict, options.optimizer) == ("ssl4mis-dice", "bilinear", "sgd")
    assert (options.max_iterations, options.batch, options.unlabelled_batch) == (600, 12, 12)
    assert (options.weight, options.ramp_up) == (0.1, 1.0)
    assert finetuning_options({"strategy": "mc-net"}).loss == "dice+ce"


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    with pytest.raises(GlocalError, match="bcdu-net cannot have decoders"):
        finetuning_options({"strategy": "mc-net", "network": {"name": "bcdu-net"}})
    with pytest.raises(GlocalError, match="temperature=0 does not fit"):
        finetuning_options({"strategy": "mc-net", "temperature": 0})
