from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor

from glocal.data.store import Store
from glocal.pretraining.base import Stage
from glocal.pretraining.inpainting import boxes, restoration_error
from glocal.randomness import generator

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {},
    "box": {"over": "box", "side": [0.2, 0.6]},
    "centre": {"place": "centre", "augmentation": {"spatial": {"rotation": 30}, "intensity": {"noise": 0.1}}},
}


@pytest.mark.parametrize("options", [{"batch": 6, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestInpainting(MethodChecks):
    method = "inpainting"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        seen: list[Tensor] = []
        entered: list[Tensor] = []
        stage.network.encoder.register_forward_hook(lambda *call: entered.append(call[1][0]))
        stage.painter.register_forward_hook(lambda *call: seen.append(call[2]))
        loss = stage.losses(1)["loss"]
        slices = stage.pool.uniform(6, generator(settings["seed"], 1, "slices"))
        images = stage.view(stage.options.augmentation, stage.pool.images(slices), 1, 0, 6)
        box = boxes(stage.options.side, stage.options.place, (32, 32), 6, generator(settings["seed"], 1, "boxes"))
        assert entered[0].equal(torch.where(box, 0.0, images))
        assert not entered[0].equal(images)
        restored, terms = seen[0].detach(), []
        for b in range(6):
            inside = [(y, x) for y in range(32) for x in range(32) if box[b, 0, y, x] or stage.options.over == "image"]
            errors = [float(restored[b, 0, y, x] - images[b, 0, y, x]) ** 2 for y, x in inside]
            terms.append(sum(errors) / len(errors))
        assert float(loss.detach()) == pytest.approx(sum(terms) / 6, rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, seen[0])
        weight = box if stage.options.over == "box" else torch.ones_like(box)
        expected = 2 * (seen[0] - images) * weight / weight.sum((1, 2, 3), keepdim=True) / 6
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (20, 41)])
def test_a_box_is_a_share_of_the_side_and_lies_anywhere_within(size: tuple[int, int]) -> None:
    batch = 4000
    inside = boxes((0.3, 0.3), "random", size, batch, generator(0))
    assert inside.shape == (batch, 1, *size)
    for axis, side in ((2, size[0]), (3, size[1])):
        line = inside.any(5 - axis).squeeze(1)  # (batch, side): rows or columns that the box meets
        long = round(0.3 * side)
        assert (line.sum(1) == long).all()
        first = line.int().argmax(1)
        assert all(bool(row[int(k) : int(k) + long].all()) for row, k in zip(line[:50], first[:50], strict=True))
        counts = first.bincount(minlength=side - long + 1)
        assert len(counts) == side - long + 1
        expected = batch / (side - long + 1)
        assert (counts - expected).abs().max() < 5 * expected**0.5  # each place equally likely
    assert (inside.sum((1, 2, 3)) == round(0.3 * size[0]) * round(0.3 * size[1])).all()


def test_sides_are_drawn_between_their_limits() -> None:
    area = boxes((0.25, 0.5), "random", (40, 40), 500, generator(0)).any(3).sum((1, 2))
    assert int(area.min()) == 10
    assert int(area.max()) == 20
    assert boxes((0.01, 0.01), "random", (32, 32), 3, generator(0)).sum() == 3  # a pixel at least
    assert boxes((1.0, 1.0), "random", (32, 20), 3, generator(0)).all()


def test_the_box_in_the_centre_is_alike_from_all_sides() -> None:
    inside = boxes((0.5, 0.5), "centre", (32, 24), 2, generator(0))
    assert inside.equal(inside.flip(2))
    assert inside.equal(inside.flip(3))
    assert (inside.sum((1, 2, 3)) == 16 * 12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_of_each_image_is_its_own(dtype: torch.dtype) -> None:
    images, restored = torch.rand(3, 2, 4, 5, dtype=torch.float64), torch.rand(3, 2, 4, 5).to(dtype)
    where = torch.rand(3, 1, 4, 5) < 0.4
    expected = [
        (restored[b].double() - images[b]).square()[:, where[b, 0]].mean() for b in range(3)
    ]  # over channels and pixels
    torch.testing.assert_close(restoration_error(restored, images, where), torch.stack(expected))
    everywhere = restoration_error(restored, images, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(everywhere, (restored.double() - images).square().mean((1, 2, 3)))
    order = torch.tensor([2, 0, 1])
    again = restoration_error(restored[order], images[order], where[order])
    assert again.equal(restoration_error(restored, images, where)[order])


def test_restoring_what_it_was_costs_nothing() -> None:
    images = torch.rand(2, 1, 6, 6)
    where = boxes((0.5, 0.5), "random", (6, 6), 2, generator(0))
    assert restoration_error(images, images, where).equal(torch.zeros(2))
    other = torch.where(where, images, images + 1)
    assert restoration_error(other, images, where).equal(torch.zeros(2))
