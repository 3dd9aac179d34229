import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_checks import ALL, MethodChecks
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal import engine
from glocal.data.sampling import Pool, Slices
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.pretraining import pixel_global
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.pixel_global import (
    ONE_LINE,
    Options,
    PixelGlobal,
    another,
    cross_entropy,
    local_terms,
    uncertainty_maps,
)
from glocal.pretraining.pretrain import pretrain
from glocal.teacher import rising
from glocal.uncertainty import entropy
from glocal.views.view import View

WIDTHS = {"outputs": 16, "pixel_outputs": 8, "batch": 6, "passes": 3, "passes_at_once": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "GO": {"variant": "GO"},
    "GP": {"variant": "GP"},
    "GPC": {"variant": "GPC"},
    "full": {},
    "full, both ways, as the paper": {"symmetric": True, "paper_exact": True},
    "full, other choices": {
        **{"uncertainty": "passes", "stabiliser_grad": True, "student_dropout": False, "match": "bilinear"}
    },
}
every_variant = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.mark.parametrize("options", [{**WIDTHS, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestPixelGlobal(MethodChecks):
    method = "pixel-global"

    def lowest(self, stage: Stage) -> float:
        """A student that says what its teacher says is left with the teacher's entropy; the stabiliser may reach 0."""
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(pixel_global, "cross_entropy", lambda target, *_: torch.special.entr(target).sum(1))
            losses = stage.losses(0)
        return float(losses["loss"] if stage.options.variant in ("GO", "GP") else losses["global"])

    def test_distributed_it_learns_the_same(
        self, settings: dict[str, Any], store: Store, pair: Any, tmp_path: Path
    ) -> None:
        """With sharper predictions rounding grows tenfold in five iterations, beyond what is let pass."""
        softer = {**settings, "temperature": 1.0, "teacher_temperature": 0.5}
        super().test_distributed_it_learns_the_same(softer, store, pair, tmp_path)


def made(store: Store, cheap: dict[str, Any], cases: tuple[str, ...] = ALL, **options: Any) -> PixelGlobal:
    settings = {**cheap, **WIDTHS, "method": "pixel-global", "max_iterations": 10, **options}
    (stage,) = TestPixelGlobal().stages(settings, store, cases)
    assert isinstance(stage, PixelGlobal)
    return stage


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# The parts, against loops


def test_cross_entropy_against_a_loop() -> None:
    target, logits = random(2, 5, 3, 4).softmax(1), random(2, 5, 3, 4, seed=1).requires_grad_()
    found = cross_entropy(target, logits, 0.1)
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                scores = [logits[b, c, y, x] / 0.1 for c in range(5)]
                total = sum(score.exp() for score in scores)
                expected[b, y, x] = -sum(target[b, c, y, x] * (scores[c].exp() / total).log() for c in range(5))
    torch.testing.assert_close(found, expected)
    weights = random(2, 3, 4, seed=2)
    slopes = [torch.autograd.grad((loss * weights).sum(), logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)
    flat = cross_entropy(target[:, :, 0, 0], logits[:, :, 0, 0], 0.1)  # that of whole images
    torch.testing.assert_close(flat, expected[:, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_exact_enough_and_finite_in_any_precision(dtype: torch.dtype) -> None:
    target, logits = random(2, 5, 3, 4).softmax(1), random(2, 5, 3, 4, seed=1)
    half = logits.to(dtype).requires_grad_()
    found = cross_entropy(target.float(), half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), cross_entropy(target, half.detach().double()), rtol=1e-5, atol=1e-5)
    steep = cross_entropy(target.float(), half * 1000, 0.01)
    steep.sum().backward()
    assert steep.isfinite().all()
    assert half.grad is not None
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("with_uncertainty", [False, True])
def test_local_terms_against_a_loop(with_context: bool, with_uncertainty: bool) -> None:
    entropies, context = random(2, 3, 4).exp().requires_grad_(), random(2, 3, 4, seed=1).exp().requires_grad_()
    unsure, matched = random(2, 3, 4, seed=2).sigmoid(), random(2, 3, 4, seed=3) > 0
    found = local_terms(entropies, matched, context if with_context else None, unsure if with_uncertainty else None)
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    for place in matched.nonzero().tolist():
        b, y, x = place
        term = entropies[b, y, x]
        if with_context:
            term = term - context[b, y, x] if term > context[b, y, x] else context[b, y, x] - term
        expected[b, y, x] = term * (1 - unsure[b, y, x]) if with_uncertainty else term
    assert 0 < matched.sum() < matched.numel()
    torch.testing.assert_close(found, expected)
    inputs = [entropies, context] if with_context else [entropies]
    for mine, theirs in zip(*(torch.autograd.grad(loss.sum(), inputs) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_unmatched_pixel_cannot_spoil_the_loss() -> None:
    entropies = torch.tensor([[[1.0, math.inf]]]).requires_grad_()
    terms = local_terms(entropies, torch.tensor([[[True, False]]]))
    assert terms.tolist() == [[[1.0, 0.0]]]


def test_another_is_any_other() -> None:
    place = torch.arange(5).repeat(400)
    other = another(place, 5, seeded())
    assert not (other == place).any()
    counts = torch.bincount(5 * place + other, minlength=25).view(5, 5)
    assert counts.diagonal().sum() == 0
    assert counts[~torch.eye(5, dtype=torch.bool)].min() > 50  # a hundred each


# The whole loss, pixel by pixel


class Witness:
    """What student and teacher said in one step of a stage, in the order in which they were asked."""

    def __init__(self, stage: PixelGlobal, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws: list[View] = []
        self.said: dict[str, list[Tensor]] = {}
        draw_view = pixel_global.draw_view
        with monkeypatch.context() as patch:
            patch.setattr(
                pixel_global, "draw_view", lambda *words: self.draws.append(draw_view(*words)) or self.draws[-1]
            )
            hooks = [
                head.register_forward_hook(lambda *call, key=f"{who} {name}": self._hear(key, call[2]))
                for who, heads in (("student", stage.heads), ("teacher", stage._teacher()[1]))
                for name, head in heads.items()
            ]
            self.before = {name: value.clone() for name, value in stage.named_buffers() if "centre" in name}
            self.losses = stage.losses(step)
            for hook in hooks:
                hook.remove()

    def _hear(self, key: str, output: Tensor) -> None:
        self.said.setdefault(key, []).append(output)


def places(first: View, second: View, row: int, side: int) -> dict[tuple[int, int], tuple[float, float]]:
    """For each pixel (y, x) of the first view of image `row`: (y, x) in the second, where both show the image."""

    def affine(view: View) -> tuple[Any, Any]:
        """To source pixels, in float64: v -> a v + c."""
        matrix = view.spatial.matrix[row].double().numpy()
        half, middle = side / 2, (side - 1) / 2
        a = matrix[:, :2]
        return a, half * matrix[:, 2] + middle - a @ np.full(2, middle)

    (a, c), (b, d) = affine(first), affine(second)
    found = {}
    for y in range(side):
        for x in range(side):
            source = a @ np.array([x, y]) + c
            there = np.linalg.solve(b, source - d)
            if all(-0.05 <= value <= side - 0.95 for value in (*source, *there)):
                found[y, x] = float(there[1]), float(there[0])
    return found


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    total = sum(math.exp(score - top) for score in scores)
    return [math.exp(score - top) / total for score in scores]


def slow(target: list[float], scores: list[float]) -> float:
    top = max(scores)
    total = math.log(sum(math.exp(score - top) for score in scores)) + top
    return -sum(p * (score - total) for p, score in zip(target, scores, strict=True))


def expected_losses(stage: PixelGlobal, seen: Witness) -> tuple[float, float]:
    """Global and local loss in Python loops, from what the heads said."""
    o: Any = stage.options
    student, teacher = (1.0, 1.0) if o.paper_exact else (0.1, 0.04)
    centre = {name: value.tolist() for name, value in seen.before.items()}

    def told(scores: Tensor, kind: str) -> list[float]:
        offset = [0.0] * len(scores) if o.paper_exact else centre[f"{kind}_centre"]
        return softmax([(s - m) / teacher for s, m in zip(scores.tolist(), offset, strict=True)])

    def read(maps: list[list[Tensor]], y: float, x: float) -> Tensor:
        """Bilinearly, or the nearest."""
        side = len(maps)
        y, x = (min(max(v, 0.0), side - 1.0) for v in (y, x))
        if o.match == "nearest":
            return maps[round(y)][round(x)]
        top, left = min(int(y), side - 2), min(int(x), side - 2)
        rows = [(1 - (x - left)) * maps[r][left] + (x - left) * maps[r][left + 1] for r in (top, top + 1)]
        return (1 - (y - top)) * rows[0] + (y - top) * rows[1]

    global_losses, local_losses = [], []
    directions = [(0, 1), (1, 0)] if o.symmetric else [(0, 1)]
    images = 1 if o.variant == "GP" else 2
    calls = -(-o.passes // o.passes_at_once) if o.variant == "full" else 0
    for way, (mine, theirs) in enumerate(directions):
        logits, target = (seen.said[f"{who} image"][way].detach().double() for who in ("student", "teacher"))
        terms = [slow(told(t, "image"), (s / student).tolist()) for t, s in zip(target, logits, strict=True)]
        global_losses.append(sum(terms) / len(terms))
        if o.variant == "GO":
            continue
        here = [p.detach().double() for p in seen.said["student pixel"][way * images : (way + 1) * images]]
        start = way * (images + calls)
        there = [p.double() for p in seen.said["teacher pixel"][start : start + images + calls]]
        n, side = len(logits), here[0].shape[-1]
        passes = torch.cat([p.unflatten(0, (-1, n)) for p in there[images:]]) if calls else None
        local: list[float] = []
        for row in range(n):
            grid = range(side)
            said = [
                [[torch.tensor(told(t[row, :, y, x], "pixel")) for x in grid] for y in grid] for t in there[:images]
            ]
            unsure = None
            if passes is not None:
                assert len(passes) == o.passes
                unsure = [[torch.zeros(()) for _ in grid] for _ in grid]
                for y in grid:
                    for x in grid:
                        every = [told(p[row, :, y, x], "pixel") for p in passes]
                        mean = [sum(column) / len(every) for column in zip(*every, strict=True)]
                        spread = [
                            sum(-p * math.log(p) for p in one if p) for one in ([mean], every)[o.uncertainty != "mean"]
                        ]
                        unsure[y][x] = torch.tensor(sum(spread) / len(spread) / math.log(len(mean)))
            for (y, x), (v, u) in places(seen.draws[mine], seen.draws[theirs], row, side).items():
                value = [
                    slow(read(s, v, u).tolist(), (h[row, :, y, x] / student).tolist())
                    for s, h in zip(said, here, strict=True)
                ]
                term = value[0] if images == 1 else abs(value[0] - value[1])
                local.append(term if unsure is None else term * (1 - float(read(unsure, v, u))))
        assert 0.2 * n * side**2 < len(local) < 0.95 * n * side**2
        local_losses.append(sum(local) / len(local))
    return tuple(sum(part) / max(1, len(part)) for part in (global_losses, local_losses))  # type: ignore[return-value]


@every_variant
def test_the_loss_is_the_paper_s(
    options: dict[str, Any], store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(store, cheap, **{"batch": 4, "pixel_outputs": 3, **options})
    for name in ("image_centre", "pixel_centre"):  # a centre that is not 0
        centre = getattr(stage, name)
        centre.copy_(torch.linspace(-0.5, 0.5, len(centre)))
    seen = Witness(stage, 1, monkeypatch)
    expected = expected_losses(stage, seen)
    found = [float(seen.losses[name].detach()) for name in ("global", "local")]
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert float(seen.losses["loss"].detach()) == pytest.approx(sum(found), rel=1e-6)
    assert (found[1] > 0) == (stage.options.variant != "GO")


@every_variant
def test_the_centre_follows_the_teacher_s_outputs(
    options: dict[str, Any], store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(store, cheap, **options)
    with torch.no_grad():  # else batch norm at the end gives means of 0
        for head in stage._teacher()[1].values():
            last = [m for m in head.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)][-1]
            last.bias.copy_(torch.linspace(1, 2, len(last.bias)))
    seen = Witness(stage, 0, monkeypatch)
    for kind, mean in (("image", lambda s: s.mean(0)), ("pixel", lambda s: s.mean((0, 2, 3)))):
        moved = getattr(stage, f"{kind}_centre")
        if options.get("paper_exact") or f"teacher {kind}" not in seen.said:
            assert not moved.any()
        else:
            torch.testing.assert_close(moved, 0.1 * mean(seen.said[f"teacher {kind}"][0]), rtol=1e-4, atol=1e-5)


# What each option does


def test_the_stabiliser_teaches_only_if_it_may(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = {}
    for choice in (False, True):
        stage = made(store, cheap, stabiliser_grad=choice)
        seen = Witness(stage, 0, monkeypatch)
        first, stabiliser = seen.said["student pixel"]
        assert first.requires_grad
        assert stabiliser.requires_grad == choice
        assert not any(said.requires_grad for kind in ("image", "pixel") for said in seen.said[f"teacher {kind}"])
        seen.losses["loss"].backward()
        gradients[choice] = next(p.grad for p in stage.network.decoder.parameters())
        gradients[f"loss {choice}"] = seen.losses["loss"].detach()
        assert all(p.grad is None for p in stage.teacher.parameters())
    assert gradients["loss False"].equal(gradients["loss True"])
    assert not torch.allclose(gradients[False], gradients[True])


def test_the_stabiliser_is_another_slice_seen_in_the_same_way(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(store, cheap)
    drawn: list[Slices] = []
    inputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    asked: list[list[Tensor]] = []
    told: list[list[Tensor]] = []
    images = Pool.images
    monkeypatch.setattr(Pool, "images", lambda pool, slices: drawn.append(slices) or images(pool, slices))
    for who, network in (("student", stage.network), ("teacher", stage._teacher()[0])):
        network.encoder.register_forward_hook(lambda *call, who=who: inputs[who].append(call[1][0]))
    stage._teacher()[0].encoder.register_forward_hook(lambda *call: told.append(call[2]))
    uncertainty = stage.uncertainty
    monkeypatch.setattr(stage, "uncertainty", lambda *words: asked.append(words[0]) or uncertainty(*words))
    seen = Witness(stage, 3, monkeypatch)
    slices, others = drawn
    assert len(slices) == len(others) == 6
    assert not (slices.index == others.index).any()
    assert set(others.volume.tolist()) <= set(stage.pool.volumes.tolist())
    for role, entered in enumerate(inputs.values()):
        for some, view in zip(drawn, entered, strict=True):
            assert view.equal(seen.draws[role].image(images(stage.pool, some)))
    assert asked == [told[0]]  # the passes are those of the slice itself
    assert others.number.equal(store.slice_of[others.index])
    assert not any(stage._others(slices, 4).index.equal(other.index) for other in drawn)


def test_passes_go_through_the_decoder_only(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap, passes=7, passes_at_once=3)
    network = stage._teacher()[0]
    calls: dict[str, list[int]] = {"encoder": [], "decoder": []}
    network.encoder.register_forward_hook(lambda *call: calls["encoder"].append(len(call[1][0])))
    network.decoder[0].register_forward_hook(lambda *call: calls["decoder"].append(len(call[1][0])))
    stage.losses(0)
    assert calls == {"encoder": [6, 6], "decoder": [6, 6, 18, 18, 6]}


def test_the_student_decodes_with_dropout_if_it_shall(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice in (True, False):
        stage = made(store, cheap, variant="GP", student_dropout=choice)
        taps: list[Tensor] = []
        decode = stage.network.decode
        monkeypatch.setattr(stage.network, "decode", lambda t, b, d=decode: taps.extend(t) or d(t, b))  # noqa: B023
        stage.losses(0)
        assert len(taps) == 3
        zeros = [float((tap == 0).float().mean()) for tap in taps]  # behind a ReLU some are 0 anyway
        if choice:
            dropped = zeros
    assert all(a > b + 0.01 for a, b in zip(dropped, zeros, strict=True))


def test_the_teacher_follows_from_the_second_step_on(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap, momentum=0.5)
    before = [p.clone() for p in stage.teacher.parameters()]
    with torch.no_grad():
        for module in (stage.network, stage.heads):
            for p in module.parameters():
                p.add_(1)
    stage.losses(0)
    assert all(p.equal(q) for p, q in zip(stage.teacher.parameters(), before, strict=True))
    stage.losses(3)
    mu = rising(0.5, 2, 10)
    assert 0.5 < mu < 1
    for p, q in zip(stage.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(p, q + 1 - mu)


def test_both_ways_it_does_not_matter_which_view_is_first(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With student_dropout off and no passes nothing else tells the two ways apart."""
    draw_view, swapped = pixel_global.draw_view, []
    for symmetric in (True, False):
        stage = made(store, cheap, variant="GPC", symmetric=symmetric, student_dropout=False)
        straight = stage.losses(0)["loss"].detach()
        stage = made(store, cheap, variant="GPC", symmetric=symmetric, student_dropout=False)
        with monkeypatch.context() as patch:
            roles = iter([1, 0])
            patch.setattr(
                pixel_global,
                "draw_view",
                lambda o, n, size, rng: draw_view(o, n, size, pixel_global.generator(3, 0, "view", next(roles))),  # noqa: B023
            )
            swapped.append((straight, stage.losses(0)["loss"].detach()))
    torch.testing.assert_close(*swapped[0])
    assert not torch.allclose(*swapped[1], rtol=1e-3)


def test_views_without_a_common_pixel_leave_the_global_loss(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(store, cheap)
    matching_grid = pixel_global.matching_grid

    def nowhere(*words: Any) -> tuple[Tensor, Tensor]:
        points, matched = matching_grid(*words)
        return points, torch.zeros_like(matched)

    monkeypatch.setattr(pixel_global, "matching_grid", nowhere)
    losses = stage.losses(0)
    losses["loss"].backward()
    assert losses["local"] == 0
    assert losses["loss"] == losses["global"]
    assert all(p.grad.isfinite().all() for p in stage.parameters() if p.grad is not None)


def test_a_step_is_a_function_of_seed_and_step_alone(store: Store, cheap: dict[str, Any]) -> None:
    losses = []
    for number in range(3):
        torch.manual_seed(number)
        stage = made(store, cheap, seed=3)
        torch.manual_seed(number + 7)  # nothing may come from here
        losses.append([float(stage.losses(step)["loss"].detach()) for step in (0, 1)])
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0] != losses[0][1]


def test_defaults_are_the_paper_s() -> None:
    o = Options()
    assert (o.optimizer, o.learning_rate, o.schedule, o.batch, o.passes) == ("lars", 0.2, "cosine", 8, 20)
    assert o.warmup_iterations / o.max_iterations == 2 / 500
    assert (o.variant, o.momentum, o.dropout, o.symmetric, o.stabiliser_grad) == ("full", 0.996, 0.1, False, False)


# Runs


def run(store: Store, folder: Path, cheap: dict[str, Any], **options: Any) -> Path:
    settings = {**cheap, **WIDTHS, "method": "pixel-global", "max_iterations": 4, **options}
    return pretrain(store, folder, settings, split=Split(0, ALL, (), ()))


def test_a_stopped_run_continues_exactly(
    store: Store, tmp_path: Path, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(run(store, tmp_path / "whole", cheap))
    losses = PixelGlobal.losses

    def stop(stage: PixelGlobal, step: int) -> dict[str, Tensor]:
        if step == 2:
            raise KeyboardInterrupt
        return losses(stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(PixelGlobal, "losses", stop)
        with pytest.raises(KeyboardInterrupt):
            run(store, tmp_path / "stopped", cheap)
    continued = load_file(run(store, tmp_path / "stopped", cheap))
    assert {name.split(".")[0] for name in whole} == {"encoder", "decoder"}
    assert all(value.equal(continued[name]) for name, value in whole.items())
    first, second = (
        load_file(tmp_path / name / "stage-1-network" / "checkpoint.safetensors") for name in ("whole", "stopped")
    )
    assert first.keys() == second.keys()
    assert "learner.pixel_centre" in first
    assert all(value.equal(second[name]) for name, value in first.items())


def test_the_uncertainty_of_a_finished_run(store: Store, tmp_path: Path, cheap: dict[str, Any]) -> None:
    run(store, tmp_path / "run", cheap, passes=5)
    pool = Pool(store, ("case4",))
    slices = pool.epoch(3, 0, 0)
    maps = uncertainty_maps(tmp_path / "run", pool, slices)
    assert maps.shape == (3, 32, 32)
    assert not maps.requires_grad
    assert ((maps >= 0) & (maps <= 1)).all()
    assert maps.std() > 0
    assert maps.equal(uncertainty_maps(tmp_path / "run", pool, slices))

    # The teacher's weights, centre and dropout by hand.
    stage = made(store, cheap, passes=5)
    saved = load_file(tmp_path / "run" / "stage-1-network" / "checkpoint.safetensors")
    state = {name.removeprefix("learner."): value for name, value in saved.items() if name.startswith("learner.")}
    stage.load_state_dict(state)
    network, heads = stage._teacher()
    assert not next(iter(network.parameters())).equal(next(iter(stage.network.parameters())))
    with torch.no_grad():
        taps = network.encode(pool.images(slices))
        dropout = stage._dropout(torch.device("cpu"), 3, "figure")
        predictions = torch.cat(
            [
                ((heads["pixel"](network.decode(dropout(taps, count), 2)) - stage.pixel_centre.view(-1, 1, 1)) / 0.04)
                .softmax(1)
                .unflatten(0, (count, 3))
                for count in (2, 2, 1)
            ]
        )
    torch.testing.assert_close(maps, entropy(predictions.mean(0)))


def test_only_a_run_with_a_teacher_of_pixels_has_uncertainty(
    store: Store, tmp_path: Path, cheap: dict[str, Any], pretrained: Path
) -> None:
    run(store, tmp_path / "run", cheap, variant="GO", max_iterations=1)
    pool = Pool(store, ("case4",))
    for folder in (tmp_path / "run", pretrained):
        with pytest.raises(GlocalError, match="has no teacher of pixels: give a run of pixel-global"):
            uncertainty_maps(folder, pool, pool.epoch(2, 0, 0))


def test_images_are_cut_from_the_padded_map(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Pool.images
    monkeypatch.setattr(Pool, "images", lambda pool, slices: images(pool, slices)[..., :30, :29])
    stage = made(store, cheap)
    seen = Witness(stage, 0, monkeypatch)
    assert seen.said["student pixel"][0].shape == (6, 8, 30, 29)
    seen.losses["loss"].backward()
    assert seen.losses["loss"].isfinite()


def test_two_slices_are_the_least(store: Store, odd: Store, cheap: dict[str, Any]) -> None:
    losses = made(odd, cheap, ("odd2",)).losses(0)
    losses["loss"].backward()
    assert losses["local"] > 0
    with pytest.raises(GlocalError, match="there is only one: add volumes"):
        made(odd, cheap, ("odd1",))
    with pytest.raises(GlocalError, match=r"pretrain\.batch=1 does not fit"):
        made(store, cheap, batch=1)


@pytest.mark.parametrize("kind", ["image", "pixel"])
def test_collapse_is_said(kind: str, store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap)
    stage.losses(0)
    assert stage.warning() is None
    with torch.no_grad():
        last = [m for m in stage.heads[kind].modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)][-1]
        last.weight.zero_()
    stage.losses(0)
    assert stage.warning() == COLLAPSED


def test_outputs_that_all_say_the_same_are_said(store: Store, cheap: dict[str, Any]) -> None:
    """Batch norm lets one image differ from all others, in all outputs alike."""
    stage = made(store, cheap)
    stage.losses(0)
    assert stage.warning() is None
    with torch.no_grad():
        first = stage.heads["image"].get_submodule("layers.3").get_parameter("weight")  # (outputs, hidden)
        first.copy_(first[:1] * (1 - 2 * (torch.arange(len(first)) % 2))[:, None])
    stage.losses(0)
    assert stage.warning() == ONE_LINE


def test_a_teacher_that_is_not_sharper_is_named(store: Store, cheap: dict[str, Any]) -> None:
    assert "teacher_temperature=0.1 below temperature=0.1" in str(made(store, cheap, teacher_temperature=0.1).warning())
    assert made(store, cheap, teacher_temperature=0.1, paper_exact=True).warning() is None


@pytest.mark.parametrize("exact", [False, True])
def test_predictions_cannot_shrink_but_as_the_paper_has_it(exact: bool, store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap, paper_exact=exact)
    before = {name: value.clone() for name, value in stage.heads.named_parameters()}
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
    stage.losses(0)["loss"].backward()
    optimizer.step()
    same = [name for name, value in stage.heads.named_parameters() if value.equal(before[name])]
    assert same == ([] if exact else ["image.layers.4.weight", "pixel.1.weight"])
