import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks, Trainer
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.networks.registry import build
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import pretraining_options
from glocal.pretraining.swav import UNDIVIDED, Encoder, cross_view_loss, sinkhorn, small_view
from glocal.randomness import generator
from glocal.runs import manifest_of
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

SMALL = {"hidden": 32, "outputs": 16, "prototypes": 12, "batch": 8}
OPTIONS = {
    "two views, frozen at first": {"frozen": 1},
    "two views, queue": {"frozen": 0, "queue": 12, "queue_from": 0, "sinkhorn_iterations": 1},
    "local views": {"frozen": 2, "local_views": 2, "batch": 2, "prototypes": 300, "epsilon": 0.03},
}


@pytest.mark.parametrize("options", [{**SMALL, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestSwAV(MethodChecks):
    method = "swav"

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages({**settings, "queue_from": 1}, store)
        o, seen = stage.options, list[Tensor]()
        stage.head.register_forward_hook(lambda *call: seen.append(unit(call[2])))
        queues: list[list[Tensor]] = [[], []]  # of the two views, the newest first
        used = []
        for step in range(5):
            losses, entropy = stage.losses(step), 0.0
            views = seen[-1].view(-1, o.batch, 16)
            prototypes = unit(stage.prototypes.weight)
            expected = 0.0
            for view in (0, 1):
                full = o.queue > 0 and len(queues[view]) >= o.queue
                samples = [*views[view], *(queues[view][: o.queue] if full else [])]
                q = slow_sinkhorn(torch.stack(samples) @ prototypes.T, o.epsilon, o.sinkhorn_iterations)[: o.batch]
                others = [other for other in range(len(views)) if other != view]
                expected += sum(cross_entropy(q, views[v] @ prototypes.T, 0.1) for v in others) / len(others) / 2
                entropy -= sum(p * math.log(p) for row in q for p in row if p > 0) / len(q) / 2
                queues[view] = [*views[view], *queues[view]] if step >= 1 else []
                used.append(full)
            assert losses["loss"].item() == pytest.approx(float(expected), rel=1e-4)
            assert losses["entropy"].item() == pytest.approx(entropy, rel=1e-4)
        assert len(views) == 2 + o.local_views
        assert used == ([False] * 6 + [True] * 4 if o.queue else [False] * 10)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.detach().double(), dim=-1)


def slow_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """Assignments of each sample, from the paper: Q, (K, B), with rows summing to 1/K and columns to 1/B."""
    samples, prototypes = scores.shape
    q = [[math.exp(scores[b, k] / epsilon) for b in range(samples)] for k in range(prototypes)]
    for _ in range(iterations):
        for k in range(prototypes):
            total = sum(q[k])
            q[k] = [value / total / prototypes for value in q[k]]
        for b in range(samples):
            total = sum(q[k][b] for k in range(prototypes))
            for k in range(prototypes):
                q[k][b] /= total * samples
    return [[q[k][b] * samples for k in range(prototypes)] for b in range(samples)]


def cross_entropy(targets: Any, scores: Tensor, temperature: float) -> Any:
    """Eq. 2 of the paper, the mean over the slices; differentiable."""
    terms = []
    for target, row in zip(targets, scores, strict=True):
        total = sum((score / temperature).exp() for score in row)
        terms.append(-sum(float(p) * (s / temperature - total.log()) for p, s in zip(target, row, strict=True)))
    return sum(terms) / len(terms)


def cosines(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("samples", "prototypes"), [(7, 4), (3, 9), (1, 5), (2, 2)])
def test_sinkhorn_is_the_paper_s(samples: int, prototypes: int, iterations: int) -> None:
    scores = cosines(2, samples, prototypes)
    expected = [slow_sinkhorn(each, 0.05, iterations) for each in scores]
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(scores.float(), 0.05, iterations), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_sinkhorn_divides_the_samples_evenly_and_in_no_order() -> None:
    scores = cosines(12, 6) + torch.arange(6) / 10  # the last prototype is everyone's favourite
    assignments = sinkhorn(scores, 0.3, 200)
    torch.testing.assert_close(assignments.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(assignments.sum(0), torch.full((6,), 2.0, dtype=torch.float64))
    rows, columns = torch.randperm(12), torch.randperm(6)
    shuffled = sinkhorn(scores[rows][:, columns], 0.05, 3)
    torch.testing.assert_close(shuffled, sinkhorn(scores, 0.05, 3)[rows][:, columns])


def test_sinkhorn_stays_finite_where_exponentials_do_not() -> None:
    for epsilon in (1e-2, 1e-4):
        assignments = sinkhorn(cosines(9, 30).float(), epsilon, 3)
        assert assignments.isfinite().all()
        torch.testing.assert_close(assignments.sum(1), torch.ones(9))


@pytest.mark.parametrize("views", [2, 5])
def test_the_loss_is_a_slow_loop_s(views: int) -> None:
    scores, targets = cosines(views, 3, 4).requires_grad_(), cosines(2, 3, 4).mul(3).softmax(-1)
    pairs = [(target, view) for target in range(2) for view in range(views) if view != target]
    slow = sum(cross_entropy(targets[target], scores[view], 0.2) for target, view in pairs) / len(pairs)
    loss = cross_view_loss(scores, targets, 0.2)
    torch.testing.assert_close(loss, slow)
    (gradient,), (expected,) = (torch.autograd.grad(value, scores) for value in (loss, slow))
    torch.testing.assert_close(gradient, expected)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(cross_view_loss(scores[:, order], targets[:, order], 0.2), loss)
    if views == 2:
        torch.testing.assert_close(cross_view_loss(scores.flip(0), targets.flip(0), 0.2), loss)


def stage_of(
    store: Store, cheap: dict[str, Any], cases: tuple[str, ...] = ALL, weights: int = 0, **options: Any
) -> Stage:
    settings: Any = pretraining_options({**cheap, **SMALL, "method": "swav", **options})
    torch.manual_seed(weights)
    return Encoder(build(settings.network, 1, 3), Pool(store, cases), settings).train()


@pytest.mark.parametrize("frozen", [0, 2])
def test_prototypes_are_frozen_at_first_and_of_length_one(store: Store, cheap: dict[str, Any], frozen: int) -> None:
    stage = stage_of(store, cheap, frozen=frozen)
    used = [unit(stage.prototypes.weight).float()]
    stage.network.encoder.register_forward_hook(lambda *_: used.append(stage.prototypes.weight.detach().clone()))
    Trainer(stage)(0, 5)
    for weight in used:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(used[1 + frozen], used[0])  # no step before this one has moved them
    assert not used[2 + frozen].allclose(used[0], atol=1e-3)


def test_a_run_that_was_stopped_continues_exactly(store: Store, cheap: dict[str, Any]) -> None:
    for cut in (1, 3):
        options = {"frozen": 2, "queue": 12, "queue_from": 0, "local_views": 1}
        whole, first = (stage_of(store, cheap, **options) for _ in range(2))
        second = stage_of(store, cheap, weights=1, **options)  # it must not matter what it began with
        trainers = [Trainer(stage) for stage in (whole, first, second)]
        trainers[0](0, 5)
        trainers[1](0, cut)
        second.load_state_dict(first.state_dict())
        trainers[2].optimizer.load_state_dict(trainers[1].optimizer.state_dict())
        trainers[2](cut, 5)
        assert all(value.equal(second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_queue_keeps_the_newest_of_each_view(store: Store, cheap: dict[str, Any]) -> None:
    stage, seen = stage_of(store, cheap, queue=12, queue_from=1), list[Tensor]()
    stage.head.register_forward_hook(lambda *call: seen.append(unit(call[2]).float().view(2, 8, 16)))
    stage.losses(0)
    assert not stage.queue.any()
    for step in (1, 2):
        stage.losses(step)
    torch.testing.assert_close(stage.queue, torch.cat([seen[2], seen[1][:, :4]], dim=1))


def test_assignments_are_of_the_batch_and_in_full_precision(store: Store, cheap: dict[str, Any]) -> None:
    for options in ({}, {"epsilon": 0.01, "temperature": 0.01}):
        exact = stage_of(store, cheap, **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage_of(store, cheap, **options).losses(0)["loss"]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.losses(0)["loss"].item(), rel=0.1)


def test_local_views_are_small_and_only_predict(store: Store, cheap: dict[str, Any]) -> None:
    seen: list[tuple[int, ...]] = []
    for size, side in ((0.43, 12), (0.01, 4), (1.0, 32)):
        stage = stage_of(store, cheap, local_views=3, local_size=size)
        stage.network.encoder.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
        stage.losses(0)
        assert seen[-2:] == [(16, 1, 32, 32), (24, 1, side, side)]
    stage_of(store, cheap).losses(0)
    assert len(seen) == 6


def test_every_view_is_drawn_for_itself(store: Store, cheap: dict[str, Any]) -> None:
    same, seen = ViewOptions(spatial=SpatialOptions(crop=(0.5, 0.9))), list[Tensor]()
    stage = stage_of(store, cheap, local_views=2, local_size=1.0, augmentation=same, local_augmentation=same)
    stage.network.encoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    stage.losses(0)
    views = torch.cat(seen).unflatten(0, (4, 8))
    assert not any(views[i].allclose(views[j]) for i in range(4) for j in range(i))


def test_a_small_view_is_the_view_at_another_size() -> None:
    images = torch.rand(3, 2, 16, 24, dtype=torch.float64)
    half = small_view(ViewOptions(), images, (8, 12), 3, generator(0))
    torch.testing.assert_close(half, nn.functional.avg_pool2d(images, 2), rtol=1e-5, atol=1e-5)
    mirror = ViewOptions(spatial=SpatialOptions(flip=(0.0, 1.0)), intensity=IntensityOptions(clip=(0.2, 0.6)))
    torch.testing.assert_close(
        small_view(mirror, images, (8, 12), 3, generator(0)), half.flip(-1).clamp(0.2, 0.6), rtol=1e-5, atol=1e-5
    )
    window = ViewOptions(spatial=SpatialOptions(crop=(0.3, 0.5)))
    first, again, other = (small_view(window, images, (8, 12), 3, generator(seed)) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.allclose(other)


def test_one_slice_cannot_be_divided(odd: Store, cheap: dict[str, Any]) -> None:
    with pytest.raises(GlocalError, match=r"only one: .*more volumes"):
        stage_of(odd, cheap, ("odd1",))


def warnings_of(store: Store, folder: Path, cheap: dict[str, Any], **options: Any) -> list[str]:
    settings = {**cheap, **SMALL, "method": "swav", "max_iterations": 4, "frozen": 3, "log": [], **options}
    pretrain(store, folder, settings, split=Split(0, ALL, (), ()))
    warnings: list[str] = manifest_of(folder)["warnings"]
    return warnings


def test_what_comes_too_late_is_said(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    assert warnings_of(store, tmp_path / "none", cheap, queue=8, queue_from=2) == []
    (frozen,) = warnings_of(store, tmp_path / "frozen", cheap, frozen=4)
    assert "frozen=4" in frozen
    (queue,) = warnings_of(store, tmp_path / "queue", cheap, queue=9, queue_from=2)
    assert "never full" in queue


def test_collapse_is_said(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, frozen=0)
    stage.losses(0)
    assert stage.warning() is None
    last = stage.head.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
    stage.losses(0)
    assert stage.warning() == COLLAPSED


def test_assignments_that_tell_nothing_apart_are_said(store: Store, cheap: dict[str, Any]) -> None:
    stage = stage_of(store, cheap, frozen=0)
    with torch.no_grad():
        stage.prototypes.weight.copy_(stage.prototypes.weight[:1].expand(12, -1))  # embeddings have not collapsed
    stage.losses(0)
    assert stage.warning() == UNDIVIDED


def test_the_preset_of_the_paper() -> None:
    adopted, paper = (pretraining_options({"method": "swav", "preset": name}) for name in ("adopted", "paper"))
    promised = {"batch", "warmup_iterations", "frozen", "queue", "queue_from", "local_views"}
    assert {name for name, value in adopted if value != getattr(paper, name)} == promised | {"preset"}
