from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import StrategyChecks
from torch import Tensor

from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.finetuning.losses import segmentation_loss
from glocal.finetuning.registry import finetuning_options, strategy_named
from glocal.networks.registry import build
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions


@pytest.mark.parametrize("options", [{}, {"loss": "dice"}])
class TestSupervised(StrategyChecks):
    strategy = "supervised"


def example(classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, classes, 5, 6, generator=rng)
    labels = torch.randint(classes, (3, 5, 6), generator=rng)
    labels[0] = 0  # an image without foreground
    labels[labels == classes - 1] = 0  # a class that is nowhere
    labels[2, :2] = 1
    return logits, labels


def soft_dice(p: Tensor, g: Tensor, smooth: tuple[float, float]) -> float:
    """2 sum(p g) / (sum p + sum g), pixel by pixel; `smooth` is added to numerator and denominator."""
    inside = total = 0.0
    for a, b in zip(p.flatten().tolist(), g.flatten().tolist(), strict=True):
        inside += a * b
        total += a + b
    return (2 * inside + smooth[0]) / (total + smooth[1])


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_dice_loss_is_that_of_chaitanya(classes: int) -> None:
    logits, labels = example(classes)
    probabilities = logits.double().softmax(1)
    values = [
        soft_dice(probabilities[image, k], labels[image] == k, (0.0, 1e-10))
        for image in range(3)
        for k in range(classes)
    ]
    assert segmentation_loss("dice")(logits, labels).item() == pytest.approx(1 - sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_dice_with_cross_entropy_counts_the_foreground_over_the_batch(classes: int) -> None:
    logits, labels = example(classes)
    probabilities = logits.double().softmax(1)
    overlap = [soft_dice(probabilities[:, k], labels == k, (1e-5, 1e-5)) for k in range(1, classes)]
    chosen = probabilities.gather(1, labels[:, None])
    expected = 1 - sum(overlap) / len(overlap) - chosen.log().mean().item()
    assert segmentation_loss("dice+ce")(logits, labels).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["dice", "dice+ce"])
def test_losses_are_lowest_for_the_truth_and_have_gradients(name: Any) -> None:
    logits, labels = example(3)
    truth = 30 * torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    loss = segmentation_loss(name)
    # A class that is not in an image scores 0 in the Dice of Chaitanya et al., so that the loss cannot reach 0.
    present = sum(float((labels[image] == k).any()) for image in range(3) for k in range(3)) / 9
    assert loss(truth, labels).item() == pytest.approx(1 - present if name == "dice" else 0, abs=1e-3)
    half = logits.bfloat16().requires_grad_()
    value = loss(half, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.isfinite().all()
    assert half.grad.abs().sum() > 0


def strategy(store: Store, cheap: dict[str, Any], **settings: Any) -> Any:
    options = finetuning_options({**cheap, "labels": 1, "batch": 4, **settings})
    torch.manual_seed(0)
    pools = Pool(store, ["case1"]), Pool(store, ["case3"])
    return strategy_named("supervised").make(lambda k: build(options.network, 1, 3), *pools, options, Path())


@pytest.mark.parametrize("loss", ["dice", "dice+ce"])
def test_it_overfits_one_volume(store: Store, cheap: dict[str, Any], loss: str) -> None:
    supervised = strategy(store, cheap, loss=loss, batch=12, augmentation="none")
    optimizer = torch.optim.Adam(supervised.parameters(), lr=0.02)
    for step in range(60):
        supervised(step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    images, truth = store.volume("case1"), store.labels_of(store.first[1] + torch.arange(6))
    with torch.no_grad():  # in training mode: the running statistics of batch norm need hundreds of steps
        mask = supervised.network(images).argmax(1)
    dice = [2 * ((mask == k) & (truth == k)).sum() / ((mask == k).sum() + (truth == k).sum()) for k in (1, 2)]
    assert min(dice) > 0.9, dice


def test_all_parts_are_trained_whatever_was_frozen_before(store: Store, cheap: dict[str, Any]) -> None:
    options = finetuning_options({**cheap, "labels": 1})
    network = build(options.network, 1, 3).requires_grad_(False)
    pool = Pool(store, ["case1"])
    supervised = strategy_named("supervised").make(lambda k: network, pool, pool, options, Path()).train()
    supervised(0)["loss"].backward()
    assert all(p.grad is not None for p in supervised.parameters())
    assert all(p.grad.abs().max() > 0 for p in supervised.parameters() if p.ndim > 1 and p.grad is not None)


def test_image_and_labels_move_together(store: Store, cheap: dict[str, Any]) -> None:
    seen: dict[str, Tensor] = {}
    both = ViewOptions(spatial=SpatialOptions(flip=(1.0, 1.0)))
    supervised = strategy(store, cheap, augmentation=both)
    supervised.network.register_forward_hook(lambda module, inputs, output: seen.update(images=inputs[0]))
    supervised.loss = lambda logits, labels: seen.update(labels=labels) or logits.mean()
    supervised(3)
    every = torch.arange(len(store.volume_of))
    images = store.images(every).flip(2, 3)
    for image, label in zip(seen["images"], seen["labels"], strict=True):
        distance = (images - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-3
        number = int(distance.argmin())
        assert store.volumes[int(store.volume_of[number])].case == "case1"
        assert label.equal(store.labels_of(torch.tensor([number])).flip(1, 2)[0])


def test_a_step_depends_on_seed_and_step_alone(store: Store, cheap: dict[str, Any]) -> None:
    losses = [
        [float(strategy(store, {**cheap, "seed": seed})(step)["loss"].detach()) for step in (0, 1, 7)]
        for seed in (3, 3, 4)
    ]
    assert losses[0] == losses[1]
    assert not set(losses[0]) & set(losses[2])
    assert len(set(losses[0])) == 3
