from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.registry import finetuning_options


@pytest.mark.parametrize("options", [{"threshold": 0.5}])
class TestUniMatch(SemiSupervisedChecks):
    strategy = "unimatch"


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def made(**options: Any) -> Any:
        settings = {"strategy": "unimatch", "labels": 1, "batch": 3, "unlabelled_batch": 4, **options}
        return TestUniMatch().make({**cheap, **settings}, store, tmp_path)

    return made


def dice(p: Tensor, truth: Tensor, sure: Tensor) -> float:
    """1 - mean over classes of (2 sum(pg) + 1e-5) / (sum(p^2) + sum(g^2) + 1e-5), over confident pixels."""
    values = []
    for k in range(p.shape[1]):
        chosen, g = p[:, k][sure], (truth[sure] == k).double()
        sums = float((chosen * g).sum()), float((chosen**2).sum()), float(g.sum())
        values.append((2 * sums[0] + 1e-5) / (sums[1] + sums[2] + 1e-5))
    return 1 - sum(values) / len(values)


def test_the_loss_is_the_paper_s(make: Any) -> None:
    learner, heads, inputs = make(threshold=0.6, mu=0.3, lambda_fp=0.7, weight=2.0, cutmix=0.0), [], []
    learner.network.head.register_forward_hook(lambda module, given, output: heads.append(output))
    learner.network.encoder.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    losses = {name: float(value.detach()) for name, value in learner(1).items()}
    images, labels, _ = learner.labelled_batch(1)
    assert [len(x) for x in inputs] == [3 + 4, 4 + 4]
    assert [len(x) for x in heads] == [3 + 4 + 4, 4 + 4]
    assert inputs[0][:3].equal(images)
    assert not inputs[1][:4].equal(inputs[1][4:])
    supervised, weak, thinned = heads[0].detach().double().split([3, 4, 4])
    first, second = heads[1].detach().double().chunk(2)
    confidence, pseudo = weak.softmax(1).max(1)
    sure = confidence >= 0.6
    assert 0 < sure.double().mean() < 1
    strong = [dice(view.softmax(1), pseudo, sure) for view in (first, second)]
    features = dice(thinned.softmax(1), pseudo, sure)
    assert losses["supervised"] == pytest.approx(float(learner.loss(supervised, labels)), rel=1e-4)
    assert losses["strong"] == pytest.approx(sum(strong) / 2, rel=1e-4)
    assert losses["features"] == pytest.approx(features, rel=1e-4)
    unlabelled = 0.15 * strong[0] + 0.15 * strong[1] + 0.7 * features
    assert losses["loss"] == pytest.approx((losses["supervised"] + 2 * unlabelled) / 2, rel=1e-4)
    assert not weak.allclose(thinned)


def test_each_strong_view_has_its_boxes_and_its_labels(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, heads, inputs, asked = make(threshold=0.6, cutmix=1.0, strong="none"), [], [], []
    learner.network.head.register_forward_hook(lambda module, given, output: heads.append(output))
    learner.network.encoder.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    monkeypatch.setattr(learner, "dice", lambda logits, *given: asked.append(given) or logits.mean())
    learner(1)
    weak, confidence_and_labels = inputs[0][3:], heads[0][3:7].softmax(1).max(1)
    confidence, pseudo = confidence_and_labels
    different = 0
    for view, (labels, sure) in zip(inputs[1].chunk(2), asked[:2], strict=True):
        for k in range(4):
            mixed = view[k, 0] != weak[k, 0]
            (other,) = [j for j in range(4) if j != k and view[k, 0][mixed].equal(weak[j, 0][mixed])]
            assert labels[k][mixed].equal(pseudo[other][mixed])
            assert sure[k][mixed].equal((confidence[other][mixed] >= 0.6).float())
            different += int(not labels[k].equal(pseudo[k]))
    assert different
    assert not inputs[1][:4].equal(inputs[1][4:])
    assert asked[2][0].equal(pseudo)


def test_without_dropout_the_features_are_those_of_the_weak_view(make: Any) -> None:
    learner, heads = make(dropout=0.0), []
    learner.network.head.register_forward_hook(lambda module, given, output: heads.append(output))
    losses = learner(1)
    torch.testing.assert_close(heads[0][3:7], heads[0][7:])
    losses["features"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in learner.network.encoder.parameters())


def test_the_reference_is_that_for_hearts() -> None:
    options: Any = finetuning_options({"strategy": "unimatch", "preset": "reference"})
    assert (options.weight, options.ramp_up, options.threshold, options.loss) == (1, 0, 0.95, "ssl4mis")
    assert (options.mu, options.lambda_fp, options.dropout, options.cutmix) == (0.5, 0.5, 0.5, 0.5)
