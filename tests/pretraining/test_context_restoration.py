from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor

from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.pretraining.base import Stage
from glocal.pretraining.context_restoration import rearranged, swaps
from glocal.pretraining.pretrain import pretrain
from glocal.randomness import generator

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large patches": {"patch": 8, "pairs": 3, "augmentation": {"intensity": {"brightness": 0.2}}},
}


@pytest.mark.parametrize("options", [{"batch": 6, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestContextRestoration(MethodChecks):
    method = "context-restoration"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        seen: list[Tensor] = []
        entered: list[Tensor] = []
        stage.network.encoder.register_forward_hook(lambda *call: entered.append(call[1][0]))
        stage.painter.register_forward_hook(lambda *call: seen.append(call[2]))
        loss = stage.losses(1)["loss"]
        o, seed = stage.options, settings["seed"]
        slices = stage.pool.uniform(6, generator(seed, 1, "slices"))
        images = stage.view(o.augmentation, stage.pool.images(slices), 1, 0, 6)
        places = swaps((32, 32), 6, o.pairs, o.patch, o.tries, generator(seed, 1, "swaps"))
        assert entered[0].equal(rearranged(images, *places))
        assert all(not moved.equal(image) for moved, image in zip(entered[0], images, strict=True))
        restored = seen[0].detach()
        total = sum(
            float(restored[b, 0, y, x] - images[b, 0, y, x]) ** 2
            for b in range(6)
            for y in range(32)
            for x in range(32)
        )
        assert float(loss.detach()) == pytest.approx(total / (6 * 32 * 32), rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, seen[0])
        torch.testing.assert_close(gradient, 2 * (seen[0] - images).detach() / (6 * 32 * 32), rtol=1e-4, atol=1e-7)


def slowly(image: Tensor, corners: list[Any], pairs: int, patch: int) -> Tensor:
    """The paper's and its code's way: one try after the other, both patches from the image as it was."""
    result, done = image.clone(), 0
    for (top, left), (other_top, other_left) in corners:
        if abs(top - other_top) < patch and abs(left - other_left) < patch:
            continue
        first, second = ((slice(y, y + patch), slice(x, x + patch)) for y, x in ((top, left), (other_top, other_left)))
        result[first], result[second] = image[second], image[first]
        done += 1
        if done == pairs:
            break
    return result


@pytest.mark.parametrize(
    ("size", "pairs", "patch", "tries"),
    [((32, 32), 10, 5, 100), ((12, 30), 10, 5, 100), ((14, 11), 10, 5, 6), ((9, 9), 3, 1, 5), ((10, 5), 4, 5, 9)],
)
def test_patches_change_places_as_in_a_loop(size: tuple[int, int], pairs: int, patch: int, tries: int) -> None:
    batch = 30
    free = torch.tensor([side - patch + 1 for side in size])
    corners = (torch.rand(batch, tries, 2, 2, generator=generator(5), dtype=torch.float64) * free).long()
    images = torch.rand(batch, 2, *size, generator=generator(6))
    result = rearranged(images, *swaps(size, batch, pairs, patch, tries, generator(5)))
    expected = [
        torch.stack([slowly(channel, corners[b].tolist(), pairs, patch) for channel in images[b]]) for b in range(batch)
    ]
    assert result.equal(torch.stack(expected))


def pixels(size: tuple[int, int], batch: int, *how: Any) -> Tensor:
    """Where every pixel comes from, (B, H * W)."""
    own = torch.arange(size[0] * size[1]).view(1, 1, *size).expand(batch, -1, -1, -1)
    return rearranged(own, *swaps(size, batch, *how, generator(0))).flatten(1)


def test_patches_lie_anywhere_and_are_ten_pairs() -> None:
    own = torch.arange(60 * 50)
    moved = (pixels((60, 50), 400, 10, 5, 100) != own).float().mean(0).view(60, 50)
    assert (moved > 0).all()  # the corners too
    share = 10 * 2 * 25 / (60 * 50)
    assert 0.7 * share < moved.mean() < share
    few = pixels((60, 50), 400, 1, 5, 100)
    assert ((few != own).sum(1) == 2 * 25).all()
    # One pair changes places and nothing else: twice is as it was.
    assert few.gather(1, few).equal(own.expand(400, -1))
    # Where pairs meet, what is later is seen and something is lost.
    assert any(len(set(row.tolist())) < len(row) for row in pixels((12, 12), 20, 10, 5, 100))


def test_channels_move_together_and_images_by_themselves() -> None:
    images = torch.rand(3, 1, 16, 16).repeat(1, 2, 1, 1) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    here, there = swaps((16, 16), 3, 5, 5, 50, generator(1))
    result = rearranged(images, here, there)
    assert (2 * result[:, 0]).equal(result[:, 1])
    assert len({tuple(row.tolist()) for row in here}) == 3
    for b in range(3):
        assert set(result[b, 0].flatten().tolist()) <= set(images[b, 0].flatten().tolist())
        assert rearranged(images[b : b + 1], here[b : b + 1], there[b : b + 1]).equal(result[b : b + 1])


def test_patches_that_do_not_fit_are_refused(store: Store, cheap: dict[str, Any], tmp_path: Any) -> None:
    settings = {**cheap, "method": "context-restoration", "max_iterations": 1, "patch": 17}
    with pytest.raises(GlocalError, match=r"17 x 17 pixels do not fit beside each other into slices of 32 x 32"):
        pretrain(store, tmp_path / "run", settings, split=Split(0, ALL, (), ()))
    assert not (tmp_path / "run").exists()
    assert pretrain(
        store, tmp_path / "run", {**settings, "patch": 16, "batch": 2}, split=Split(0, ALL, (), ())
    ).exists()
