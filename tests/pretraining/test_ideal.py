from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor, nn

from glocal.contrast.losses import contrastive_loss, contrastive_loss_in_chunks
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.pretraining.base import COLLAPSED
from glocal.pretraining.ideal import Encoder, cell_masks, most_similar
from glocal.randomness import generator
from glocal.views.correspondence import matching_cells
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial
from glocal.views.view import draw_view

OPTIONS: dict[str, dict[str, Any]] = {
    "similarity": {},
    "geometry, both ways": {"correspondence": "geometry", "symmetric": True},
    "similarity, both ways, no own cells": {"symmetric": True, "own_cells": False},
    "geometry, no own cells": {"correspondence": "geometry", "own_cells": False},
}
SIZE = (32, 32)
COARSE = {"name": "unet", "widths": [4, 8, 8, 8]}  # maps of 4 x 4 cells of 8 pixels


@pytest.mark.parametrize(
    "options", [{"batch": 8, "outputs": 16, **options} for options in OPTIONS.values()], ids=OPTIONS.keys()
)
class TestIDEAL(MethodChecks):
    method = "ideal"

    def test_it_learns_one_batch(self, settings: dict[str, Any], store: Store) -> None:
        """The places of a volume, seen again and again: both encoders learn to tell them apart."""
        changes = {"momentum": 0.5, "temperature": 0.1, "network": COARSE, "augmentation": "none"}
        stage = made(store, {**settings, **changes}, ("case3",))
        optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for step in range(60):
            loss = stage.losses(step)["loss"]
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.7 * losses[0]

    def test_distributed_it_learns_the_same(
        self, settings: dict[str, Any], store: Store, pair: Any, tmp_path: Path
    ) -> None:
        """At a temperature at which five steps do not enlarge differences of rounding; the keys follow fast."""
        settings = {**settings, "temperature": 1.0, "momentum": 0.5}
        super().test_distributed_it_learns_the_same(settings, store, pair, tmp_path)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        """L_loc cell by cell, and its gradient for the queries; the keys have none."""
        stage = made(store, {**settings, "batch": 3, "network": COARSE})
        o = stage.options
        features, queries, key_features, keys = seen(stage)
        loss = stage.losses(1)["loss"]
        ways = 2 if o.symmetric else 1
        (gradient,) = torch.autograd.grad(loss, queries[0])
        q = queries[0].detach().double().requires_grad_()
        assert q.shape == (ways * 3, 16, 4, 4)
        assert not keys[0].requires_grad
        assert not key_features[0].requires_grad
        draws = [draw_view(o.augmentation, 3, SIZE, generator(o.seed, 1, "view", role)).spatial for role in range(2)]
        terms = []
        for way in range(ways):
            match, found = matching_cells(draws[way], draws[1 - way], SIZE, 8)
            for image in range(3):
                here, there = features[0][way * 3 + image].flatten(1), key_features[0][way * 3 + image].flatten(1)
                own = keys[0][way * 3 + image].double().flatten(1).T  # (16, 16)
                others = [keys[0][way * 3 + k].double().flatten(1).T for k in range(3) if k != image]
                for i in range(16):
                    mate = int(match[image, i])
                    if o.correspondence == "similarity":
                        mate = max(range(16), key=lambda j: float(cosine(here[:, i], there[:, j])))
                    elif not found[image, i]:
                        continue
                    anchor = q[way * 3 + image].flatten(1)[:, i]
                    attraction = (cosine(anchor, own[mate]) / o.temperature).exp()
                    repulsion = sum((cosine(anchor, k) / o.temperature).exp() for other in others for k in other)
                    if o.own_cells:
                        near = [j for j in range(16) if j != mate]
                        repulsion = repulsion + sum((cosine(anchor, own[j]) / o.temperature).exp() for j in near)
                    terms.append(-(attraction / (attraction + repulsion)).log())
        expected = torch.stack(terms).mean()
        assert len(terms) == ways * 3 * 16 or o.correspondence == "geometry"
        assert len(terms) > ways * 3 * 3
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, q)[0], rtol=1e-3, atol=1e-7)

    def test_the_keys_are_those_of_the_other_view(self, settings: dict[str, Any], store: Store) -> None:
        stage = made(store, settings)
        o, key, inputs = stage.options, stage.key, list[Tensor]()
        for network in (stage.network, key[0]):
            network.get_submodule("encoder").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        stage.losses(1)
        images = stage.pool.images(stage.pool.epoch(8, o.seed, 1))
        views = [stage.view(o.augmentation, images, 1, role, 8) for role in range(2)]
        assert not views[0].equal(views[1])
        for found, expected in zip(inputs, (views, views[::-1]), strict=True):
            assert found.equal(torch.cat(expected if o.symmetric else expected[:1]))

    def test_the_keys_follow_from_the_second_step(self, settings: dict[str, Any], store: Store) -> None:
        for momentum in (0.9, 1.0, 0.0):
            stage = made(store, {**settings, "momentum": momentum})
            students = nn.ModuleList([stage.network, stage.head])
            for step in range(3):
                with torch.no_grad():
                    for parameter in students.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                before = [p.clone() for p in stage.key.parameters()]
                stage.losses(step)
                follow = momentum if step else 1.0
                for mine, was, theirs in zip(stage.key.parameters(), before, students.parameters(), strict=True):
                    torch.testing.assert_close(mine, follow * was + (1 - follow) * theirs.detach())

    def test_a_resumed_stage_goes_on_exactly(self, settings: dict[str, Any], store: Store) -> None:
        stage = made(store, settings)
        optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            stage.losses(step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        new = made(store, settings)
        new.load_state_dict(stage.state_dict())
        assert new.losses(2)["loss"].equal(stage.losses(2)["loss"])
        for name, value in stage.state_dict().items():
            assert value.equal(new.state_dict()[name]), name

    def test_views_alike_match_themselves(self, settings: dict[str, Any], store: Store) -> None:
        """At first both encoders are one: without augmentation every cell finds itself, however it looks for it."""
        stage = made(store, {**settings, "augmentation": "none"})
        _, queries, _, keys = seen(stage)
        loss = stage.losses(0)["loss"]
        torch.testing.assert_close(queries[0].detach(), keys[0])
        found = torch.arange(64).expand(8, -1)
        positive, negative = cell_masks(found, torch.ones_like(found, dtype=torch.bool), slice(0, 512), o_own(stage))
        vectors = keys[0][:8].flatten(2).mT.reshape(512, -1)
        expected = contrastive_loss(
            vectors, positive, negative, stage.options.temperature, denominator="one", candidates=vectors
        )
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)

    def test_one_slice_needs_cells_of_its_own_to_repel(self, settings: dict[str, Any], odd: Store) -> None:
        if settings.get("own_cells", True):
            loss = made(odd, {**settings, "batch": 1}, ("odd1",)).losses(0)["loss"]
            loss.backward()
            assert 0 < loss < torch.inf
            return
        for changes, cases in (({"batch": 1}, ("odd7",)), ({}, ("odd1",))):
            with pytest.raises(GlocalError, match=r"one slice without any.*own_cells=true"):
                made(odd, {**settings, **changes}, cases)
        assert 0 < made(odd, {**settings, "batch": 2}, ("odd2",)).losses(0)["loss"] < torch.inf


def made(store: Store, settings: dict[str, Any], cases: tuple[str, ...] = ALL) -> Encoder:
    checks = MethodChecks()
    checks.method = "ideal"
    (stage,) = checks.stages({"method": "ideal", "batch": 8, "outputs": 16, **settings}, store, cases)
    assert isinstance(stage, Encoder)
    return stage


def o_own(stage: Encoder) -> bool:
    own: bool = stage.options.own_cells
    return own


def seen(stage: Encoder) -> tuple[list[Tensor], ...]:
    """Filled by the next step: features and queries, features and maps of the keys."""
    lists: tuple[list[Tensor], ...] = ([], [], [], [])
    key: Any = stage.key
    for head, (inputs, outputs) in ((stage.head, lists[:2]), (key[1], lists[2:])):

        def keep(_: Any, args: Any, out: Tensor, i: list[Tensor] = inputs, o: list[Tensor] = outputs) -> None:
            i.append(args[0].detach())
            o.append(out)

        head.register_forward_hook(keep)
    return lists


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return p @ z / (p @ p).sqrt() / (z @ z).sqrt()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masks_cell_by_cell() -> None:
    match = torch.randint(4, (2, 3, 4), generator=seeded(0))  # two ways, three slices of four cells
    found = torch.rand(2, 3, 4, generator=seeded(1)) < 0.7
    for own_cells in (True, False):
        for rows in (slice(0, 12), slice(3, 9), slice(11, 12)):
            positive, negative = cell_masks(match, found, rows, own_cells)
            assert positive.shape == (2, rows.stop - rows.start, 12)
            negative = negative.expand_as(positive)
            for way in range(2):
                for n, i in enumerate(range(rows.start, rows.stop)):
                    for j in range(12):
                        mate = i // 4 == j // 4 and int(match[way, i // 4, i % 4]) == j % 4
                        attracts = mate and bool(found[way, i // 4, i % 4])
                        repels = (not attracts) if own_cells else i // 4 != j // 4
                        assert bool(positive[way, n, j]) == attracts
                        assert bool(negative[way, n, j]) == repels


def test_the_chunks_change_nothing_and_cells_without_match_take_no_part() -> None:
    match = torch.randint(6, (2, 3, 6), generator=seeded(0))
    found = torch.rand(2, 3, 6, generator=seeded(1)) < 0.5
    anchors, keys = (
        torch.randn(2, 18, 5, generator=seeded(seed), dtype=torch.float64, requires_grad=True) for seed in (2, 3)
    )

    def loss(at_once: int, found: Tensor = found) -> Tensor:
        return contrastive_loss_in_chunks(
            anchors,
            lambda rows: cell_masks(match, found, rows, True),
            0.2,
            denominator="one",
            candidates=keys,
            anchors_at_once=at_once,
        )

    whole = contrastive_loss(
        anchors, *cell_masks(match, found, slice(0, 18), True), 0.2, denominator="one", candidates=keys
    )
    (expected,) = torch.autograd.grad(whole, anchors)
    assert not expected[~found.flatten(1)].any()
    assert expected[found.flatten(1)].any(-1).all()
    for at_once in (1, 7, 18, 100):
        torch.testing.assert_close(loss(at_once), whole)
        torch.testing.assert_close(torch.autograd.grad(loss(at_once), anchors)[0], expected)
    none = loss(7, torch.zeros_like(found))
    (gradient,) = torch.autograd.grad(none, anchors)
    assert none == 0
    assert not gradient.any()


def test_the_order_of_the_slices_does_not_matter() -> None:
    match, order = torch.randint(4, (1, 3, 4), generator=seeded(0)), torch.tensor([2, 0, 1])
    q, k = (torch.randn(1, 3, 4, 5, generator=seeded(seed)) for seed in (2, 3))
    for own_cells in (True, False):
        losses = []
        for rows in (torch.arange(3), order):
            masks = cell_masks(match[:, rows], torch.ones_like(match, dtype=torch.bool), slice(0, 12), own_cells)
            vectors = (x[:, rows].flatten(1, 2) for x in (q, k))
            losses.append(contrastive_loss(next(vectors), *masks, 0.2, denominator="one", candidates=next(vectors)))
        torch.testing.assert_close(*losses)


def test_most_similar_against_a_loop() -> None:
    query, key = (torch.randn(3, 6, 4, 5, generator=seeded(seed)) for seed in (0, 1))
    key[0] = query[0].flip(2) * torch.rand(4, 5, generator=seeded(2)).add(0.5)  # the same directions, mirrored
    match = most_similar(query, key)
    assert match.shape == (3, 20)
    assert match[0].equal(torch.arange(20).view(4, 5).flip(1).flatten())
    for image in range(3):
        here, there = query[image].flatten(1), key[image].flatten(1)
        for i in range(20):
            assert int(match[image, i]) == max(range(20), key=lambda j: float(cosine(here[:, i], there[:, j])))
    alike = query + 30, key + 30  # all cosines above 0.99: the same to bfloat16
    found = most_similar(*alike)
    assert len(found.unique()) > 5
    with torch.autocast("cpu", torch.bfloat16):
        assert most_similar(*alike).equal(found)
    assert most_similar(torch.zeros(1, 6, 4, 5), key[:1]).equal(torch.zeros(1, 20, dtype=torch.long))


def test_both_ways_are_the_mean_of_one_way_and_of_the_other(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the loss; batch norm without statistics of the batch, for they differ."""
    for correspondence in ("similarity", "geometry"):
        losses = {}
        for name, swapped, symmetric in (("one", False, False), ("other", True, False), ("both", False, True)):
            stage = made(store, {**cheap, "correspondence": correspondence, "symmetric": symmetric}).eval()
            with pytest.MonkeyPatch.context() as patch:
                if swapped:
                    patch.setattr(
                        "glocal.pretraining.ideal.generator",
                        lambda seed, step, what, role: generator(seed, step, what, 1 - role),
                    )
                losses[name] = stage.losses(0)["loss"].detach()
        assert losses["one"] != losses["other"]
        if correspondence == "similarity":  # by geometry, the ways have more and fewer matches
            torch.testing.assert_close(losses["both"], (losses["one"] + losses["other"]) / 2)
        else:
            low, high = sorted((losses["one"], losses["other"]))
            assert low < losses["both"] < high


def test_the_options_do_what_they_say(store: Store, cheap: dict[str, Any]) -> None:
    base = made(store, cheap).losses(0)["loss"].detach()
    fewer = made(store, {**cheap, "own_cells": False}).losses(0)["loss"].detach()
    assert fewer < base  # the same positives among fewer cells
    assert made(store, {**cheap, "temperature": 0.1}).losses(0)["loss"] != base
    assert made(store, {**cheap, "correspondence": "geometry"}).losses(0)["loss"] != base
    assert made(store, {**cheap, "outputs": 7}).head[2].out_channels == 7  # type: ignore[union-attr]


def test_the_default_head_has_as_many_channels_as_the_encoder_and_no_batch_norm(
    store: Store, cheap: dict[str, Any]
) -> None:
    stage = made(store, cheap)
    shapes = {name: tuple(value.shape) for name, value in stage.head.state_dict().items()}
    assert shapes == {"0.weight": (8, 8, 1, 1), "0.bias": (8,), "2.weight": (16, 8, 1, 1), "2.bias": (16,)}


def test_views_that_share_nothing_leave_no_loss_and_no_gradient(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By geometry alone; features always find something alike."""
    stage = made(store, {**cheap, "correspondence": "geometry"})
    far = torch.tensor([[1.0, 0, 8], [0, 1, 0]])

    def drawn(options: SpatialOptions, batch: int, size: tuple[int, int], rng: torch.Generator) -> Spatial:
        draw_spatial(options, batch, size, rng)
        return Spatial(far.repeat(batch, 1, 1))

    monkeypatch.setattr("glocal.views.view.draw_spatial", drawn)
    loss = stage.losses(0)["loss"]
    loss.backward()
    assert loss == 0
    for parameter in stage.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_collapse_is_noticed(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap)
    stage.losses(0)
    assert stage.warning() is None
    with torch.no_grad():
        for parameter in stage.head.parameters():
            parameter.zero_()
        stage.head[2].bias.fill_(1)  # type: ignore[operator, union-attr]
    stage.losses(0)
    assert stage.warning() == COLLAPSED


def test_images_that_fill_no_whole_number_of_cells(store: Store, cheap: dict[str, Any]) -> None:
    """Cells in the padding match nothing, see the tests of `matching_cells`; here, that the maps are as large."""
    stage = made(store, {**cheap, "network": COARSE, "correspondence": "geometry", "batch": 4})
    images = stage.pool.images
    stage.pool.images = lambda slices: images(slices)[..., :27, :21]  # type: ignore[method-assign]
    loss = stage.losses(0)["loss"]
    loss.backward()
    assert 0 < loss < torch.inf
