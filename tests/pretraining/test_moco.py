from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import MethodChecks
from torch import Tensor

from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.pretraining.base import Stage
from glocal.pretraining.moco import moco_masks
from glocal.pretraining.pretrain import pretrain

OPTIONS = {
    "default": {},
    "repeats repel, statistics of the batch": {"repeats": "repel", "key_statistics": "batch"},
    "no multiple of the batch": {"queue": 13, "temperature": 0.1},
}


@pytest.mark.parametrize(
    "options", [{"batch": 8, "queue": 16, "outputs": 16, **options} for options in OPTIONS.values()], ids=OPTIONS.keys()
)
class TestMoCo(MethodChecks):
    method = "moco"

    def test_it_learns_one_batch(self, settings: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """With keys and queue that stay: those of an untrained encoder are too much alike to be told apart."""
        (stage,) = self.stages(settings, store)
        stage._keys = lambda images: torch.eye(len(images), 16)
        stage._enqueue = lambda *arguments: None
        monkeypatch.setattr(self, "stages", lambda *arguments: [stage])
        super().test_it_learns_one_batch(settings, store)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        stage.losses(0)
        queue, queued = stage.queue.double().clone(), stage.queued.clone()
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        stage.head.register_forward_hook(lambda *call: queries.append(call[2]))
        stage.key[1].register_forward_hook(lambda *call: keys.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, queries[0])
        q, k = queries[0].detach().double().requires_grad_(), keys[0].double()
        assert not k.requires_grad
        slices, terms = stage.pool.epoch(8, settings["seed"], 1).index, []
        tau = settings.get("temperature", 0.2)
        for i in range(8):
            attraction = (cosine(q[i], k[i]) / tau).exp()
            repulsion = sum(
                (cosine(q[i], queue[j]) / tau).exp()
                for j in range(len(queue))
                if queued[j] != slices[i] or settings.get("repeats") == "repel"
            )
            terms.append(-(attraction / (attraction + repulsion)).log())
        expected = torch.stack(terms).mean()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, q)[0], rtol=1e-4, atol=1e-6)

    def test_it_sees_two_different_views_of_the_same_slices(self, settings: dict[str, Any], store: Store) -> None:
        for changes in ({}, {"augmentation": "none"}):
            (stage,) = self.stages({**settings, **changes}, store)
            seen: list[Tensor] = []
            for encoder in (stage.network.encoder, stage.key[0].encoder):
                encoder.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
            stage.losses(3)
            images = store.images(stage.pool.epoch(8, settings["seed"], 3).index)
            first, second = seen
            for one, other, image in zip(first, second, images, strict=True):
                assert one.equal(other) == one.equal(image) == other.equal(image) == bool(changes)

    def test_the_queue_holds_the_last_keys(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        size, first = len(stage.queue), stage.queue.clone()
        torch.testing.assert_close(first.norm(dim=1), torch.ones(size))
        assert first.unique(dim=0).shape == first.shape
        assert (stage.queued == -1).all()
        keys: list[Tensor] = []
        stage.key[1].register_forward_hook(lambda *call: keys.extend(call[2] / call[2].norm(dim=1, keepdim=True)))
        shown: list[int] = []
        for step in range(5):
            stage.losses(step)
            shown += stage.pool.epoch(8, settings["seed"], step).index.tolist()
            assert len(shown) == len(keys) == 8 * (step + 1)
            for place in range(size):
                latest = max((k for k in range(len(keys)) if k % size == place), default=None)
                assert int(stage.queued[place]) == (-1 if latest is None else shown[latest])
                torch.testing.assert_close(stage.queue[place], first[place] if latest is None else keys[latest])

    def test_the_encoder_of_the_keys_follows_from_the_second_step(self, settings: dict[str, Any], store: Store) -> None:
        for momentum in (0.9, 1.0, 0.0):
            (stage,) = self.stages({**settings, "momentum": momentum}, store)
            for step in range(3):
                with torch.no_grad():
                    for parameter in stage.head.parameters():
                        parameter.add_(torch.randn_like(parameter))
                before = [p.clone() for p in stage.key[1].parameters()]
                stage.losses(step)
                follow = momentum if step else 1.0
                for mine, was, theirs in zip(stage.key[1].parameters(), before, stage.head.parameters(), strict=True):
                    torch.testing.assert_close(mine, follow * was + (1 - follow) * theirs.detach())

    def test_running_statistics_follow_as_slowly(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages({**settings, "momentum": 0.9, "key_statistics": "running"}, store)
        for step in range(3):
            before = dict(stage.key[0].state_dict())
            before = {name: value.clone() for name, value in before.items() if "running" in name}
            theirs = {name: value.clone() for name, value in stage.network.state_dict().items()}
            stage.losses(step)
            assert before
            for name, was in before.items():
                expected = 0.9 * was + 0.1 * theirs[name] if step else was
                torch.testing.assert_close(stage.key[0].state_dict()[name], expected)
        assert any(not was.equal(stage.key[0].state_dict()[name]) for name, was in before.items())

    def test_keys_show_their_batch_only_with_statistics_of_the_batch(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        (stage,) = self.stages(settings, store)
        images = stage.pool.images(stage.pool.epoch(8, 0, 0))
        with torch.no_grad():
            together, apart = stage._keys(images)[:4], stage._keys(images[:4])
        alike = torch.allclose(together, apart, rtol=1e-4, atol=1e-5)
        assert alike == (settings.get("key_statistics") != "batch")

    def test_a_resumed_stage_goes_on_exactly(self, settings: dict[str, Any], store: Store) -> None:
        (stage,) = self.stages(settings, store)
        optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            stage.losses(step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        (new,) = self.stages(settings, store)
        new.load_state_dict(stage.state_dict())
        assert new.losses(3)["loss"].equal(stage.losses(3)["loss"])
        for name, value in stage.state_dict().items():
            assert value.equal(new.state_dict()[name]), name

    def test_one_slice_is_refused_and_two_are_enough(self, settings: dict[str, Any], odd: Store) -> None:
        (stage,) = self.stages({**settings, "batch": 2, "queue": 2}, odd, ("odd2",))
        for step in range(3):
            loss = stage.losses(step)["loss"]
            loss.backward()
            assert 0 < loss < torch.inf
        with pytest.raises(GlocalError, match=r"only one here.*simsiam"):
            self.stages(settings, odd, ("odd1",))


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return p @ z / (p @ p).sqrt() / (z @ z).sqrt()


def test_masks_pair_by_pair() -> None:
    slices, queued = torch.tensor([4, 2, 9]), torch.tensor([2, -1, 4, 4, 7])
    for repeats in ("ignore", "repel"):
        positive, negative = moco_masks(slices, queued, repeats)
        for i in range(3):
            for j in range(3):
                assert bool(positive[i, j]) == (i == j)
                assert not negative[i, j]
            for j in range(5):
                assert not positive[i, 3 + j]
                assert bool(negative[i, 3 + j]) == (repeats == "repel" or slices[i] != queued[j])


def test_a_queue_that_holds_no_batch_is_refused(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    settings = {**cheap, "method": "moco", "batch": 8, "queue": 7}
    with pytest.raises(GlocalError, match=r"queue=7 must hold the keys of a batch, and batch=8"):
        pretrain(store, tmp_path / "run", settings, split=Split(0, ("case0",), (), ()))


def test_a_pool_smaller_than_the_batch_fills_the_queue_all_the_same(odd: Store, cheap: dict[str, Any]) -> None:
    checks = MethodChecks()
    checks.method = "moco"
    settings = {**cheap, "method": "moco", "batch": 8, "queue": 16, "outputs": 16}
    stage: Stage
    (stage,) = checks.stages(settings, odd, ("odd7",))
    for step in range(3):
        stage.losses(step)
    assert sorted(stage.queued[:7].tolist()) != [-1] * 7
    assert (stage.queued >= 0).all()
    assert 0 < stage.losses(3)["loss"] < torch.inf
