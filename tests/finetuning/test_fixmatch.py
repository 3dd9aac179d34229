from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.consistency import confident_entropy
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{"threshold": 0.5}])
class TestFixMatch(SemiSupervisedChecks):
    strategy = "fixmatch"


def test_the_loss_against_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=rng).requires_grad_()
    pseudo, sure = torch.randint(3, (2, 4, 5), generator=rng), torch.rand(2, 4, 5, generator=rng) < 0.3
    expected = torch.zeros(())
    for b, y, x in sure.nonzero().tolist():
        expected = expected - logits[b, :, y, x].log_softmax(0)[pseudo[b, y, x]]
    expected = expected / (2 * 4 * 5)
    found = confident_entropy(logits, pseudo, sure)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def made(**options: Any) -> Any:
        settings = {"strategy": "fixmatch", "labels": 1, "batch": 3, "unlabelled_batch": 4, **options}
        return TestFixMatch().make({**cheap, **settings}, store, tmp_path)

    return made


def calls_of(learner: Any) -> list[tuple[Tensor, Tensor]]:
    calls: list[tuple[Tensor, Tensor]] = []
    learner.network.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    return calls


def test_what_is_sure_of_the_weak_view_is_learnt_of_the_strong_one(make: Any) -> None:
    learner = make(threshold=0.6, cutmix=0.0, weight=3.0)
    calls = calls_of(learner)
    losses = learner(1)
    (weak, told), (seen, answers) = calls
    assert not told.requires_grad
    assert seen[:3].equal(learner.labelled_batch(1)[0])
    confidence, pseudo = told.softmax(1).max(1)
    assert 0 < (confidence >= 0.6).float().mean() < 1
    entropies = -answers[3:].log_softmax(1).gather(1, pseudo[:, None])[:, 0]
    expected = (entropies * (confidence >= 0.6)).sum().item() / (4 * 32 * 32)
    assert losses["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert losses["loss"].item() == pytest.approx((losses["supervised"] + 3 * losses["consistency"]).item(), rel=1e-5)
    assert float(losses["sure"]) == pytest.approx(float((confidence >= 0.6).float().mean()))
    for view, image in zip(seen[3:], weak, strict=True):  # changed in value, not moved
        assert not view.equal(image)
        assert torch.stack([view.flatten(), image.flatten()]).corrcoef()[0, 1] > 0.7


def test_pseudo_labels_and_images_are_mixed_alike(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(threshold=0.6, cutmix=1.0, strong="none")
    found: list[Tensor] = []
    monkeypatch.setattr(
        "glocal.finetuning.fixmatch.confident_entropy", lambda logits, *given: found.extend(given) or logits.mean()
    )
    calls = calls_of(learner)
    learner(1)
    (weak, told), (seen, _) = calls
    confidence, pseudo = told.softmax(1).max(1)
    boxes = 0
    for k in range(4):
        mixed = seen[3 + k, 0] != weak[k, 0]
        (partner,) = [other for other in range(4) if other != k and seen[3 + k, 0][mixed].equal(weak[other, 0][mixed])]
        assert found[0][k][mixed].equal(pseudo[partner][mixed])
        assert found[1][k][mixed].equal(confidence[partner][mixed] >= 0.6)
        outside = torch.ones(32, 32, dtype=torch.bool)
        rows, columns = mixed.nonzero().unbind(1)
        outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        assert found[0][k][outside].equal(pseudo[k][outside])
        boxes += int((found[0][k] != pseudo[k]).any())
    assert boxes


def test_weak_views_are_moved(make: Any) -> None:
    learners = make(weak="none"), make()
    still, moved = (calls_of(learner) for learner in learners)
    for learner in learners:
        learner(0)
    assert still[0][0].equal(learners[0].unlabelled_batch(0)[0])
    assert not moved[0][0].equal(still[0][0])


def test_the_reference_has_no_ramp_up() -> None:
    options: Any = finetuning_options({"strategy": "fixmatch", "preset": "reference"})
    assert (options.weight, options.ramp_up, options.threshold, options.loss) == (1, 0, 0.95, "ssl4mis")
    assert options.weak.spatial.flip == (0.5, 0.5)
