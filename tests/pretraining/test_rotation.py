import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor

from glocal.data.split import Split
from glocal.data.store import Store
from glocal.pretraining.base import Stage
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.rotation import square, turned
from glocal.runs import manifest_of

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented": {"augmentation": {"spatial": {"flip": [0.0, 0.5]}, "intensity": {"brightness": 0.3}}},
}


@pytest.mark.parametrize("options", [{"batch": 5, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestRotation(MethodChecks):
    method = "rotation"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        seen: list[Tensor] = []
        entered: list[Tensor] = []
        stage.network.encoder.register_forward_hook(lambda *call: entered.append(call[1][0]))
        stage.classifier.register_forward_hook(lambda *call: seen.append(call[2]))
        losses = stage.losses(1)
        assert len(entered[0]) == len(seen[0]) == 20
        terms, right = [], 0
        for row, image in enumerate(entered[0]):
            turn = row // 5  # five slices, then the same five turned
            assert image.equal(entered[0][row % 5].rot90(turn, (1, 2)))
            scores = seen[0][row].double().tolist()
            terms.append(-math.log(math.exp(scores[turn]) / sum(map(math.exp, scores))))
            right += scores[turn] == max(scores)
        assert float(losses["loss"].detach()) == pytest.approx(sum(terms) / 20, rel=1e-5)
        assert float(losses["accuracy"]) == pytest.approx(right / 20)
        # And its gradient: (softmax - one-hot) / 4B.
        (gradient,) = torch.autograd.grad(losses["loss"], seen[0])
        expected = seen[0].detach().softmax(1)
        expected[torch.arange(20), torch.arange(4).repeat_interleave(5)] -= 1
        torch.testing.assert_close(gradient, expected / 20, rtol=1e-4, atol=1e-6)


def test_a_slice_is_turned_anticlockwise_pixel_by_pixel() -> None:
    images = torch.rand(2, 3, 5, 5)
    four = turned(images).view(4, 2, 3, 5, 5)
    assert four[0].equal(images)
    for y in range(5):
        for x in range(5):
            # A quarter to the left takes the last column to the first row.
            assert four[1, :, :, y, x].equal(images[:, :, x, 4 - y])
            assert four[2, :, :, y, x].equal(images[:, :, 4 - y, 4 - x])
            assert four[3, :, :, y, x].equal(images[:, :, 4 - x, y])


@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (7, 7)])
def test_of_other_slices_the_central_square_is_turned(height: int, width: int) -> None:
    images = torch.rand(2, 1, height, width)
    cut = square(images)
    assert cut.shape == (2, 1, min(height, width), min(height, width))
    if height == width:
        assert cut.equal(images)
    elif height < width:
        assert cut.equal(images[..., 2:8])
    else:
        assert cut.equal(images[:, :, 2:8])


@pytest.mark.parametrize(
    ("spatial", "named"),
    [
        ({"rotation": 15, "flip": [0.5, 0.0]}, []),
        ({"rotation": 45}, ["rotation=45"]),
        ({"flip": [0.5, 0.1]}, ["half a turn"]),
    ],
)
def test_views_that_are_turned_already_are_named(
    spatial: dict[str, Any], named: list[str], store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    settings = {**cheap, "method": "rotation", "max_iterations": 1, "batch": 1, "augmentation": {"spatial": spatial}}
    pretrain(store, tmp_path, settings, split=Split(0, ALL, (), ()))
    warnings = manifest_of(tmp_path)["warnings"]
    assert len(warnings) == len(named)
    assert all(name in warning for name, warning in zip(named, warnings, strict=True))
