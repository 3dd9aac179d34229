from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import SemiSupervisedChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.finetuning.ict import halves_mixed
from glocal.finetuning.mixup import draw_mixtures
from glocal.randomness import generator


@pytest.mark.parametrize("options", [{"predict": "teacher", "momentum": 0.0}, {"statistics": "own"}])
class TestICT(SemiSupervisedChecks):
    strategy = "ict"


def test_the_loss_is_the_paper_s(store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    settings = {"strategy": "ict", "labels": 1, "batch": 3, "unlabelled_batch": 5, "weight": 7.0, "ramp_up": 0.0}
    learner: Any = TestICT().make({**cheap, **settings}, store, tmp_path)
    seen: dict[str, Tensor] = {}
    learner.network.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], student=output))
    learner.teacher[0].register_forward_hook(lambda module, inputs, output: seen.update(u=inputs[0], teacher=output))
    losses = learner(2)
    both = learner.both_batches(2)
    lam = draw_mixtures(2, 0.2, generator(3, 2, "mixtures"))[2]
    assert seen["u"].equal(both.images[3:])
    assert len(seen["x"]) == 3 + 2
    assert seen["x"][:3].equal(both.images[:3])
    terms = []
    for pair in range(2):
        share = float(lam[pair])
        mixture = (1 - share) * both.images[3 + pair] + share * both.images[5 + pair]
        torch.testing.assert_close(seen["x"][3 + pair], mixture)
        told = [seen["teacher"][k].softmax(0) for k in (pair, pair + 2)]
        answer = seen["student"][3 + pair].detach().softmax(0)
        each = zip(answer.flatten().tolist(), *(p.flatten().tolist() for p in told), strict=True)
        terms += [(a - (1 - share) * b - share * c) ** 2 for a, b, c in each]
    assert losses["consistency"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert len(terms) == 2 * 3 * 32 * 32
    assert losses["loss"].item() == pytest.approx((losses["supervised"] + 7 * losses["consistency"]).item(), rel=1e-5)
    losses["consistency"].backward()
    assert all(p.grad is None for p in learner.teacher.parameters())


def test_halves_are_mixed_and_what_is_over_left_out() -> None:
    x = torch.arange(5.0).view(5, 1, 1, 1)
    mixed = halves_mixed(x, torch.tensor([0.25, 1.0], dtype=torch.float64))
    assert mixed.flatten().tolist() == [0.5, 3.0]
