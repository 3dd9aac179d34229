from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from torch import Tensor, nn

from glocal.data.store import Store
from glocal.pretraining.base import COLLAPSED, Stage
from glocal.pretraining.pgl import Encoder, consistency
from glocal.randomness import generator
from glocal.teacher import rising
from glocal.views.correspondence import overlap_grid
from glocal.views.spatial import Spatial, SpatialOptions, draw_spatial
from glocal.views.view import ViewOptions, draw_view

SIZE = (32, 32)
APART = ViewOptions(spatial=SpatialOptions(crop=(0.4, 0.4), rotation=40))  # often with little overlap
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "little overlap": {"augmentation": APART.model_dump()},
}


@pytest.mark.parametrize(
    "options", [{"batch": 8, "outputs": 16, **options} for options in OPTIONS.values()], ids=OPTIONS.keys()
)
class TestPGL(MethodChecks):
    method = "pgl"

    def stages(self, settings: dict[str, Any], store: Store, cases: tuple[str, ...] = ALL) -> list[Stage]:
        """The checks set a temperature, and there is none."""
        return super().stages({k: v for k, v in settings.items() if k != "temperature"}, store, cases)

    def test_the_loss_is_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        """Place by place, read from the two maps by hand; and its gradient for the online network alone."""
        stage = made(store, settings)
        predicted: list[Tensor] = []
        projected: list[Tensor] = []
        target: Any = stage.target
        stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2]))
        target[1].register_forward_hook(lambda *call: projected.append(call[2]))
        loss = stage.losses(1)["loss"]
        (gradient,) = torch.autograd.grad(loss, predicted[0])
        q, z = predicted[0].detach().double().requires_grad_(), projected[0].double()
        assert not projected[0].requires_grad
        assert q.shape == z.shape == (16, 16, 8, 8)
        o = stage.options
        draws = [draw_view(o.augmentation, 8, SIZE, generator(o.seed, 1, "view", role)).spatial for role in range(2)]
        *points, shown = overlap_grid(*draws, SIZE, 4)
        terms = []
        for image in range(8):
            for place in range(64):
                if shown[image, place]:
                    for view in range(2):
                        mine = bilinear(q[view * 8 + image], points[view][image, place])
                        theirs = bilinear(z[(1 - view) * 8 + image], points[1 - view][image, place])
                        terms.append(2 - 2 * cosine(mine, theirs))
        expected = torch.stack(terms).mean()
        assert 100 < len(terms) < 2 * 8 * 64
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, q)[0], rtol=1e-3, atol=1e-6)

    def test_the_target_follows_ever_more_slowly_from_the_second_step(
        self, settings: dict[str, Any], store: Store
    ) -> None:
        stage = made(store, {**settings, "max_iterations": 10, "momentum": 0.9})
        online = [p for module in (stage.network, stage.projector) for p in module.parameters()]
        for step in range(4):
            with torch.no_grad():
                for parameter in online:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            before = [p.clone() for p in stage.target.parameters()]
            stage.losses(step)
            momentum = 1.0 if step == 0 else rising(0.9, step - 1, 10)
            for mine, was, theirs in zip(stage.target.parameters(), before, online, strict=True):
                torch.testing.assert_close(mine, momentum * was + (1 - momentum) * theirs.detach())

    def test_a_resumed_stage_goes_on_exactly(self, settings: dict[str, Any], store: Store) -> None:
        stage = made(store, {**settings, "max_iterations": 10})
        optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            stage.losses(step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        new = made(store, {**settings, "max_iterations": 10})
        new.load_state_dict(stage.state_dict())
        assert new.losses(2)["loss"].equal(stage.losses(2)["loss"])
        for name, value in stage.state_dict().items():
            assert value.equal(new.state_dict()[name]), name

    def test_one_slice_is_enough(self, settings: dict[str, Any], odd: Store) -> None:
        for cases in (("odd1",), ("odd2",)):
            stage = made(odd, {**settings, "batch": 1, "augmentation": "none"}, cases)
            loss = stage.losses(0)["loss"]
            loss.backward()
            assert 0 < loss <= 4


def made(store: Store, settings: dict[str, Any], cases: tuple[str, ...] = ALL) -> Encoder:
    settings = {"method": "pgl", "batch": 8, "outputs": 16, "max_iterations": 2, **settings}
    (stage,) = TestPGL().stages(settings, store, cases)
    assert isinstance(stage, Encoder)
    return stage


def bilinear(image: Tensor, point: Tensor) -> Tensor:
    """A map (C, h, w) at one point (x, y) in cells, by hand; beyond the outermost centres what lies there."""
    x, y = (min(max(float(v), 0.0), side - 1) for v, side in zip(point, (image.shape[2], image.shape[1]), strict=True))
    left, top = min(int(x), image.shape[2] - 2), min(int(y), image.shape[1] - 2)
    a, b = x - left, y - top
    upper = (1 - a) * image[:, top, left] + a * image[:, top, left + 1]
    lower = (1 - a) * image[:, top + 1, left] + a * image[:, top + 1, left + 1]
    return (1 - b) * upper + b * lower


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return p @ z / (p @ p).sqrt() / (z @ z).sqrt()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_consistency_against_a_loop() -> None:
    q, z = (torch.randn(3, 5, 7, generator=seeded(seed), dtype=torch.float64, requires_grad=True) for seed in range(2))
    shown = torch.rand(3, 7, generator=seeded(2)) < 0.6
    shown[1] = False  # a sample without overlap
    terms = [2 - 2 * cosine(q[i, :, p], z[i, :, p]) for i in range(3) for p in range(7) if shown[i, p]]
    expected = sum(terms) / len(terms)
    loss = consistency(q, z.detach(), shown)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, q)[0])
    assert not gradient[1].any()
    assert float(consistency(q, 3 * q, shown).detach()) == pytest.approx(0, abs=1e-12)
    assert float(consistency(q, -q, shown).detach()) == pytest.approx(4)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(consistency(q[order], z[order], shown[order]), loss)
    torch.testing.assert_close(consistency(z, q, shown), loss)
    narrow = consistency(q.bfloat16(), z.bfloat16(), shown)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), loss, rtol=0.02, atol=0.02)


def test_without_any_overlap_loss_and_gradient_are_zero() -> None:
    q = torch.randn(3, 5, 7, generator=seeded(0), requires_grad=True)
    with torch.no_grad():
        q[0, :, 0] = 0  # a vector without direction
    loss = consistency(q, torch.randn(3, 5, 7, generator=seeded(1)), torch.zeros(3, 7, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert q.grad is not None
    assert not q.grad.any()
    assert q.grad.isfinite().all()


def drawn_apart(monkeypatch: pytest.MonkeyPatch, shifts: list[float]) -> None:
    """Slice k of every batch is shifted by shifts[k] half images, in the first view to the left, in the second not."""
    calls = [0]

    def drawn(options: SpatialOptions, batch: int, size: tuple[int, int], rng: torch.Generator) -> Spatial:
        spatial = draw_spatial(SpatialOptions(), batch, size, rng)
        matrix = spatial.matrix.clone()
        if calls[0] % 2 == 0:
            matrix[:, 0, 2] = torch.tensor(shifts)
        calls[0] += 1
        return Spatial(matrix)

    monkeypatch.setattr("glocal.views.view.draw_spatial", drawn)


def test_a_step_whose_views_share_nothing_teaches_nothing(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = made(store, cheap)
    drawn_apart(monkeypatch, [3.0] * 8)
    loss = stage.losses(0)["loss"]
    loss.backward()
    assert loss == 0
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name  # DistributedDataParallel waits for all
            assert not parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name


def test_slices_with_less_than_a_cell_of_overlap_are_skipped(
    store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image of 32 pixels, cells of 4: 0.4 of a pixel is 0.8 of a cell, for it is 8 cells high; 0.6 is 1.2."""
    predicted: list[Tensor] = []
    stage = made(store, cheap)
    stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2]))
    shifts = [0.5, 3.0, (32 - 0.4) / 16, (32 - 0.6) / 16, 0.0, 1.0, -0.5, -(32 - 0.4) / 16]
    drawn_apart(monkeypatch, shifts)
    loss = stage.losses(0)["loss"]
    (gradient,) = torch.autograd.grad(loss, predicted[0])
    learnt = gradient.flatten(1).any(1).view(2, 8)
    assert learnt.tolist() == [[True, False, False, True, True, True, True, False]] * 2


def test_without_augmentation_both_networks_see_the_same(store: Store, cheap: dict[str, Any]) -> None:
    """The projections are equal before the first update, and the loss is that of predictor and projector there."""
    stage = made(store, {**cheap, "augmentation": "none"})
    projected: list[Tensor] = []
    predicted: list[Tensor] = []
    target: Any = stage.target
    for head in (stage.projector, target[1]):
        head.register_forward_hook(lambda *call: projected.append(call[2].detach()))
    stage.predictor.register_forward_hook(lambda *call: predicted.append(call[2].detach()))
    loss = stage.losses(0)["loss"]
    torch.testing.assert_close(projected[0], projected[1])
    q, z = (maps.flatten(2) for maps in (predicted[0], projected[1]))
    cosines = nn.functional.cosine_similarity(q, z, dim=1)
    torch.testing.assert_close(loss.detach(), (2 - 2 * cosines).mean(), rtol=1e-4, atol=1e-5)


def means(x: Tensor) -> list[Tensor]:
    """Features of images without left and right in them: means of cells of 4 x 4 pixels."""
    height = torch.linspace(0, 1, x.shape[2])[:, None]
    return [nn.functional.avg_pool2d(torch.cat([x, x.square(), x * height], 1), 4)]


def test_a_flip_is_undone(store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features that turn with the image, those of a view and of its mirror image agree place by place."""
    stage = made(store, {**cheap, "augmentation": "none"})
    for module in (stage.network, stage.target[0]):
        monkeypatch.setattr(module, "encode", means)
    for name in ("projector", "predictor"):
        monkeypatch.setattr(stage, name, nn.Identity())
    monkeypatch.setattr(stage, "target", nn.ModuleList([stage.target[0], nn.Identity()]))
    sides = iter([-1.0, 1.0, -1.0, 1.0])

    def mirrored(options: SpatialOptions, batch: int, size: tuple[int, int], rng: torch.Generator) -> Spatial:
        return Spatial(torch.tensor([[next(sides), 0, 0], [0, 1, 0]]).repeat(batch, 1, 1))

    monkeypatch.setattr("glocal.views.view.draw_spatial", mirrored)
    assert float(stage.losses(0)["loss"]) == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(
        "glocal.pretraining.pgl.overlap_grid",
        lambda *layout: overlap_grid(Spatial.identity(8), Spatial.identity(8), *layout[2:]),
    )
    assert float(stage.losses(0)["loss"]) > 0.01  # not undone


def test_the_heads_are_as_wide_as_they_are_told(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, {**cheap, "outputs": 6})
    shapes = [tuple(p.shape) for head in (stage.projector, stage.predictor) for p in head.parameters() if p.ndim == 4]
    assert shapes == [(8, 8, 1, 1), (6, 8, 1, 1), (6, 6, 1, 1), (6, 6, 1, 1)]
    names = {name.split(".")[0] for name, p in stage.named_parameters() if p.requires_grad}
    assert names == {"network", "projector", "predictor"}


def test_collapse_is_noticed(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, cheap)
    stage.losses(0)
    assert stage.warning() is None
    with torch.no_grad():  # batch norm gives the same everywhere
        stage.predictor.layers[1].weight.zero_()  # type: ignore[union-attr, operator]
        stage.predictor.layers[1].bias.fill_(1)  # type: ignore[union-attr, operator]
    stage.losses(0)
    assert stage.warning() == COLLAPSED


def test_images_that_fill_no_whole_number_of_cells(store: Store, cheap: dict[str, Any]) -> None:
    stage = made(store, {**cheap, "batch": 4})
    images = stage.pool.images
    stage.pool.images = lambda slices: images(slices)[..., :27, :21]  # type: ignore[method-assign]
    loss = stage.losses(0)["loss"]
    loss.backward()
    assert 0 < loss < 4
