import math
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_checks import StrategyChecks
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from glocal.data.store import Store
from glocal.finetuning.discriminators import ImageDiscriminator
from glocal.finetuning.generators import NOISE, Deformation, FieldNetwork, Intensity, warp
from glocal.finetuning.losses import as_probabilities
from glocal.finetuning.mixup import draw_mixtures, mix
from glocal.finetuning.registry import finetuning_options
from glocal.randomness import generator

SMALL = {"width": 2, "alone": 0.34}  # of six steps one alone, two with the generators, three of the final network


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "mixup": 1.0, "loss": "ce"}])
class TestTaskAugmentation(StrategyChecks):
    strategy = "task-augmentation"
    steps = 6
    enough = 0.75  # half of the steps are those of the generators


@pytest.fixture
def make(store: Store, cheap: dict[str, Any], tmp_path: Path) -> Any:
    def make(**options: Any) -> Any:
        small = {"strategy": "task-augmentation", "labels": 1, "batch": 4, "unlabelled_batch": 3, "max_iterations": 6}
        return TestTaskAugmentation().make({**cheap, **small, **SMALL, **options}, store, tmp_path)

    return make


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, NOISE, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_warp_is_bilinear_and_has_its_gradient() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=rng())
    flow = (3 * torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=rng(1))).requires_grad_()
    seen = warp(x, flow)
    for b, i, j in [(b, i, j) for b in range(2) for i in range(4) for j in range(5)]:
        across, down = j + flow[b, 0, i, j].item(), i + flow[b, 1, i, j].item()
        expected = [
            sum(
                max(0, 1 - abs(across - column)) * max(0, 1 - abs(down - row)) * x[b, c, row, column].item()
                for row in range(4)
                for column in range(5)
            )
            for c in range(3)
        ]
        assert seen[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-12)
    places = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(4), indexing="xy"), -1)
    grid = (2 * (places + flow.permute(0, 2, 3, 1)) + 1) / torch.tensor([5, 4]) - 1
    theirs = grid_sample(x, grid, align_corners=False)
    slopes = [torch.autograd.grad(y.square().sum(), flow, retain_graph=True)[0] for y in (seen, theirs)]
    torch.testing.assert_close(*slopes)
    assert warp(x, torch.zeros_like(flow)).equal(x)


@pytest.mark.parametrize("size", [(32, 32), (33, 70)])
def test_generators_and_discriminators_take_any_size(size: tuple[int, int]) -> None:
    images = torch.rand(3, 2, *size)
    targets = as_probabilities(torch.randint(3, (3, *size)), 3)
    for make in (Deformation(2, size, 2, reach=0.1), Intensity(2, size, 2)):
        made, truth, field = make(images, targets, noise(3))
        assert made.shape == images.shape
        assert field.shape == images.shape
        torch.testing.assert_close(truth.sum(1), torch.ones(3, *size))
        assert truth.min() > -1e-6
    assert ImageDiscriminator(2, size, width=2)(images).shape == (3,)


def test_widths_are_the_authors_at_their_image_size() -> None:
    field = FieldNetwork(1, (224, 224), 16, nn.Conv2d(16, 2, 3, padding=1))
    shapes = [tuple(p.shape) for p in field.parameters() if p.ndim > 1]
    assert shapes[0] == (7 * 7 * 128, 100)
    up = [(128, 128, 2, 2), (64, 128, 2, 2), (32, 64, 2, 2), (16, 32, 2, 2), (16, 16, 2, 2)]
    assert shapes[1:] == [*up, (16, 1, 3, 3), (16, 16, 3, 3), (16, 32, 3, 3), (16, 16, 3, 3), (2, 16, 3, 3)]
    shapes = [tuple(p.shape) for p in ImageDiscriminator(1, (224, 224)).parameters() if p.ndim > 1]
    assert shapes[:5] == [(16, 1, 5, 5), (32, 16, 5, 5), (64, 32, 5, 5), (128, 64, 5, 5), (128, 128, 5, 5)]
    assert shapes[5:] == [(128, 7 * 7 * 128), (128, 128), (1, 128)]


def test_labels_are_moved_as_the_image_is_and_no_further_than_allowed() -> None:
    labels = torch.zeros(2, 32, 40, dtype=torch.long)
    labels[:, 8:20, 10:30] = 1
    targets = as_probabilities(labels, 2)
    deformation = Deformation(1, (32, 40), 2, reach=0.1)
    weight, bias = (deformation.field.get_parameter(f"join.2.{name}") for name in ("weight", "bias"))
    nn.init.constant_(bias, 1e6)  # as far as it can
    made, truth, flow = deformation(targets[:, 1:], targets, noise(2))
    assert made.equal(truth[:, 1:])
    torch.testing.assert_close(flow, torch.tensor([4.0, 3.2]).view(1, 2, 1, 1).expand_as(flow))
    torch.testing.assert_close(made[:, 0, 5:16, 6:25], torch.ones(2, 11, 19))  # 4 to the left, 3.2 upwards
    assert truth[:, 0, :, -4:].eq(1).all()  # what comes from outside is background
    nn.init.zeros_(weight)
    nn.init.constant_(bias, 0.3)
    assert deformation(targets[:, 1:], targets, noise(2))[2].mean().item() == pytest.approx(0.3, abs=2e-3)


def test_intensities_are_added_and_bounded_and_labels_stay() -> None:
    images, targets = torch.rand(2, 1, 32, 32), as_probabilities(torch.randint(3, (2, 32, 32)), 3)
    intensity = Intensity(1, (32, 32), 2)
    made, truth, added = intensity(images, targets, noise(2))
    assert truth is targets
    assert made.equal(images + added)
    assert 0 < added.abs().max() < 1
    assert not intensity(images, targets, noise(2, seed=1))[2].equal(added)


def means(logits: Tensor, real: bool) -> float:
    """Mean of -log sigmoid (real) or -log (1 - sigmoid), one number at a time."""
    chances = [1 / (1 + math.exp(-value)) for value in logits.tolist()]
    return -sum(math.log(chance if real else 1 - chance) for chance in chances) / len(chances)


def test_the_objective_is_the_paper_s(make: Any) -> None:
    learner = make(lambda_dsc=0.7, lambda_adv=0.6, lambda_l1=0.5, batch=20)
    taught: list[tuple[Tensor, Tensor]] = []
    learner.first.register_forward_hook(lambda module, inputs, logits: taught.append((inputs[0], logits)))
    losses = {name: float(value.detach()) for name, value in learner(1).items()}
    both, z = learner.both_batches(1), learner.noise(1, 20)
    images, real, targets = both.images[:20], both.images[20:], learner.one_hot(both.labels)
    made = [generate(images, targets, z) for generate in learner.generators]
    said = [judge(torch.cat([x, real])) for judge, (x, _, _) in zip(learner.discriminators, made, strict=True)]
    sizes = [field.abs().mean().item() for _, _, field in made]
    assert [losses["flow"], losses["dI"]] == pytest.approx(sizes, rel=1e-5)
    assert losses["L_adv"] == pytest.approx(sum(means(s[:20], True) for s in said), rel=1e-4)
    assert losses["L_D"] == pytest.approx(sum(means(s[:20], False) + means(s[20:], True) for s in said), rel=1e-4)
    expected = 0.7 * losses["L_seg"] + 0.6 * losses["L_adv"] - 0.5 * sum(sizes) + losses["L_D"]
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)

    ((seen, logits),) = taught
    plain = next(row for row in range(20) if not seen[row].equal(images[row]))
    assert 5 <= plain < 15
    truth = targets.clone()
    for row in range(plain, 20):
        kind = row % 2
        assert seen[row].equal(made[kind][0][row])
        truth[row] = made[kind][1][row]
    assert losses["L_seg"] == pytest.approx(learner.loss(logits, truth).item(), rel=1e-5)


def test_each_loss_teaches_whom_it_is_meant_for(make: Any) -> None:
    learner = make(batch=8)
    losses = learner(1)
    players = {name: list(getattr(learner, name).parameters()) for name in ("first", "generators", "discriminators")}
    players["network"] = list(learner.network.parameters())

    def taught(loss: Tensor) -> set[str]:
        found = {}
        for name, weights in players.items():
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            found[name] = any(g is not None and bool(g.any()) for g in gradients)
        return {name for name, reached in found.items() if reached}

    assert taught(losses["L_seg"]) == {"first", "generators"}
    assert taught(losses["L_adv"]) == {"generators"}
    assert taught(losses["L_D"]) == {"discriminators"}
    assert taught(losses["flow"]) == taught(losses["dI"]) == {"generators"}
    assert taught(learner(0)["loss"]) == {"first"}
    assert taught(learner(3)["loss"]) == {"network"}


class Marks(nn.Module):
    """A generator whose images say that it was there, and whose labels do too if it moves."""

    def __init__(self, mark: float, moves: bool):
        super().__init__()
        self.mark, self.moves = mark, moves

    def forward(self, images: Tensor, targets: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images + self.mark, targets + 5 * self.moves, images


def test_the_final_batch_holds_all_kinds_in_the_authors_shares(make: Any) -> None:
    learner = make(batch=20, augmentation="none")
    plain = [learner.labelled_batch(step)[:2] for step in range(200)]
    learner.generators = nn.ModuleList([Marks(10, True), Marks(100, False)])
    ends = set()
    for step in range(200):
        images, targets, batch = learner.changed_batch(step)
        marks = (images - plain[step][0]).mean((1, 2, 3)).round().int().tolist()
        counts = [marks.count(mark) for mark in (10, 100, 110, 0)]
        assert marks == [10] * counts[0] + [100] * counts[1] + [110] * counts[2] + [0] * counts[3]
        moved = torch.tensor([mark in (10, 110) for mark in marks]).view(-1, 1, 1, 1)
        assert targets.equal(learner.one_hot(plain[step][1]) + 5 * moved)
        ends.add((counts[0], sum(counts[:2]), sum(counts[:3])))
        assert batch == 20
    for place, values in enumerate([range(1, 5), range(5, 10), range(10, 15)]):
        assert {end[place] for end in ends} == set(values)


def test_mixup_mixes_what_the_generators_made(make: Any) -> None:
    images, targets, _ = make(batch=6).changed_batch(4)
    expected = mix(images, targets, *draw_mixtures(6, 0.5, generator(3, 4, "mixup")))
    mixed = make(batch=6, mixup=0.5).changed_batch(4)
    assert mixed[0].equal(expected[0])
    assert mixed[1].equal(expected[1])
    assert not mixed[0].equal(images)


def state_of(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def test_each_stage_leaves_the_others_networks_as_they_were(make: Any) -> None:
    """The final network waits as it was begun, batch norm included; then the generators stand still."""
    learner = make()
    begun, first = state_of(learner.network), state_of(learner.first)
    assert learner.predictor is learner.network
    assert not all(a.equal(b) for a, b in zip(begun, first, strict=True))
    assert learner.rounds == (0, 3)
    optimizer, kept = torch.optim.AdamW(learner.parameters(), lr=0.01), {}
    for step in range(6):
        if step == 3:
            assert all(a.equal(b) for a, b in zip(begun, state_of(learner.network), strict=True))
            kept = {name: state_of(getattr(learner, name)) for name in ("first", "generators", "discriminators")}
        learner.train()
        learner(step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, before in kept.items():
        assert all(a.equal(b) for a, b in zip(before, state_of(getattr(learner, name)), strict=True)), name


def test_unlabelled_slices_are_learnt_from_while_the_generators_learn(store: Store, make: Any) -> None:
    learner, other = make(), make()
    other.unlabelled = type(other.unlabelled)(store, ["case4"])
    losses = [(a["L_D"], a["L_seg"]) for a in (learner(1), other(1))]
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]


def test_examples_show_what_the_generators_make(make: Any) -> None:
    shown = make().examples()
    assert list(shown) == ["as they are", "moved", "intensity", "both"]
    assert all(images.shape == labels.shape == (4, 32, 32) for images, labels in shown.values())
    images, labels = shown["as they are"]
    assert shown["intensity"][1].equal(labels)
    assert shown["moved"][1].equal(shown["both"][1])
    assert not any(shown[title][0].equal(images) for title in ("moved", "intensity", "both"))
    again = make().examples()
    assert all(again[title][0].equal(shown[title][0]) for title in shown)


def test_the_reference_sets_what_is_not_given() -> None:
    options: Any = finetuning_options({"strategy": "task-augmentation", "preset": "reference", "batch": 6})
    assert (options.batch, options.unlabelled_batch, options.optimizer, options.loss) == (6, 20, "adam", "ce")
    again = finetuning_options(options.model_dump())
    assert again.model_dump() == options.model_dump()
