import math
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ALL, MethodChecks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from glocal import engine
from glocal.contrast.pairs import positional
from glocal.data.sampling import Pool, Slices
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.engine import train
from glocal.errors import GlocalError
from glocal.networks.registry import build
from glocal.pretraining.base import Stage
from glocal.pretraining.jcl import Encoder, Joint, Options, masks_of, supcon
from glocal.pretraining.jcl_branches import distance, feature_error, reduced
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import method_named, pretraining_options
from glocal.runs import manifest_of
from pair import DoublePool

WIDTHS = {"outputs": 16, "batch": 8}
DEEP = {"stages": 2, "downsampled": False, "network": {"name": "nnunet-plain", "widths": [4, 8, 8, 8]}}
OPTIONS: dict[str, dict[str, Any]] = {
    # Wider than the other networks here: a map of four channels without a projector has vectors of next to no length,
    # whose directions, and so their gradients, hang on rounding.
    "macl": {"network": {"name": "unet", "widths": [12, 8, 8]}},
    "jcl": {"preset": "jcl", "blocks": 1, "temperature": 0.2},
    "no blocks": {"blocks": 0, "position": "centre", "threshold": 0.3},
    "independent, MSE": {"connection": "independent", "dense": "mse", "scale": "none", "batch": 7},
    "ema, BYOL": {"connection": "ema", "dense": "byol", "momentum": 0.9, "dominant_pixel_projector": True},
    "two stages": {"stages": 2, "blocks": 1, "fixed": {"intensity": {"contrast": 0.5}, "spatial": {"rotation": 20}}},
    "two stages, both views full size": {"stages": 2, "downsampled": False, "lambda2": 0},
    "decoder and ER": {"lambda2": 0, "lambda3": 2, "batch": 7},
    "decoder only": {"lambda2": 0, "lambda3": 0},
}


@pytest.mark.parametrize("options", [{**WIDTHS, **options} for options in OPTIONS.values()], ids=OPTIONS.keys())
class TestJCL(MethodChecks):
    method = "jcl"

    def lowest(self, stage: Stage) -> float:
        """Positives stand in the denominators of the contrastive losses: k equal ones and nothing else give ln k."""
        o: Options = stage.options
        positive = attracting(o, stage.pool.epoch(o.batch, o.seed, 0))
        weight = o.lambda1 + (o.lambda2 if o.dense == "supcon" else 0) if isinstance(stage, Joint) else 1.0
        return float(positive.sum(1).log().mean()) * weight * factor(o)

    def test_losses_and_gradients_are_the_paper_s(self, settings: dict[str, Any], store: Store) -> None:
        for stage in in_double({**settings, "batch": 6}, store):
            stage.losses(0)  # so that the slow copy of the encoder is one
            weights = [p for p in stage.parameters() if p.requires_grad]
            slices = stage.pool.epoch(6, settings["seed"], 1)
            fast = stage.losses(1)
            ours = torch.autograd.grad(fast["loss"], weights)
            slow = slow_losses(stage, slices, 1)
            assert fast.keys() == slow.keys()
            for name, value in slow.items():
                torch.testing.assert_close(fast[name], value, rtol=1e-9, atol=1e-12)
            for mine, theirs in zip(ours, torch.autograd.grad(slow["loss"], weights), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)

    def test_few_slices_are_learnt_from(self, settings: dict[str, Any], store: Store) -> None:
        for batch in (2, 3):
            for stage in self.stages({**settings, "batch": batch}, store):
                loss = stage.losses(0)["loss"]
                loss.backward()
                assert loss > 0
                assert loss.isfinite()


def in_double(settings: dict[str, Any], store: Store) -> list[Any]:
    options: Any = pretraining_options({**settings, "method": "jcl"})
    stages = []
    for _, make in method_named("jcl").stages(options):
        torch.manual_seed(0)
        stages.append(make(build(options.network, 1, 3), DoublePool(store, ALL), options).double().train())
    return stages


def joint(store: Store, cheap: dict[str, Any], **options: Any) -> Any:
    return in_double({**cheap, **WIDTHS, **options}, store)[-1]


def factor(o: Options) -> float:
    return o.temperature / 0.07 if o.scale == "supcon" else 1.0


# The paper, slowly


def attracting(o: Options, slices: Slices) -> Tensor:
    """Who attracts whom among the N slices of the one and the N of the other branch, pair by pair."""
    n, offset = len(slices), 1.0 if o.position == "pcl" else 0.5
    place = [(i + offset) / count for i, count in zip(slices.number.tolist(), slices.count.tolist(), strict=True)] * 2
    near = [[i % n == j % n or abs(place[i] - place[j]) < o.threshold for j in range(2 * n)] for i in range(2 * n)]
    return torch.tensor([[i != j and near[i][j] for j in range(2 * n)] for i in range(2 * n)])


def slow_supcon(z: Tensor, positive: Tensor, o: Options) -> Tensor:
    z, terms = nn.functional.normalize(z, dim=1), []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        denominator = torch.stack([(z[i] @ z[k] / o.temperature).exp() for k in others]).sum()
        mine = [j for j in others if positive[i, j]]
        terms.append(-torch.stack([((z[i] @ z[j] / o.temperature).exp() / denominator).log() for j in mine]).mean())
    return torch.stack(terms).mean() * factor(o)


def slow_distance(a: Tensor, d: Tensor, form: str) -> Tensor:
    terms = []
    for slice_a, slice_d in zip(a, d, strict=True):
        for y in range(a.shape[2]):
            for x in range(a.shape[3]):
                first, second = slice_a[:, y, x], slice_d[:, y, x]
                if form == "byol":
                    first, second = first / first.norm(), second / second.norm()
                terms += [(p - q) ** 2 for p, q in zip(first, second, strict=True)]
    return torch.stack(terms).mean()


def slow_feature_error(full: Tensor, small: Tensor) -> Tensor:
    """Bilinear with the corners kept, from the four neighbours of each place; the mean where there is one."""
    for axis in (2, 3):
        if small.shape[axis] == 1:
            full = torch.stack(full.unbind(axis)).sum(0).unsqueeze(axis) / full.shape[axis]
    sides, terms = list(zip(full.shape[2:], small.shape[2:], strict=True)), []
    for y in range(small.shape[2]):
        for x in range(small.shape[3]):
            places = [k * (many - 1) / max(few - 1, 1) for k, (many, few) in zip((y, x), sides, strict=True)]
            (top, left), (down, right) = [int(place) for place in places], [place % 1 for place in places]
            bottom, beside = min(top + 1, sides[0][0] - 1), min(left + 1, sides[1][0] - 1)
            value = (1 - down) * ((1 - right) * full[..., top, left] + right * full[..., top, beside])
            value = value + down * ((1 - right) * full[..., bottom, left] + right * full[..., bottom, beside])
            terms.append((value - small[..., y, x]).abs())
    return torch.stack(terms).mean()


def slow_losses(stage: Any, slices: Slices, step: int) -> dict[str, Tensor]:
    """One encoder and decoder, group by group and slice by slice where batch norm allows it."""
    o, n, network, images = stage.options, len(slices), stage.network, stage.pool.images(slices)
    positive, scale = attracting(o, slices), 0.5**stage.options.blocks

    def smaller(x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)

    if isinstance(stage, Encoder):
        views = [stage.view(o.variable, images, step, role, n) for role in (0, 1)]
        if o.blocks and o.downsampled:
            z = torch.cat([stage.instance(network.encode(v)[-1]) for v in (views[0], smaller(views[1]))])
        else:
            z = stage.instance(network.encode(torch.cat(views))[-1])
        return {"loss": slow_supcon(z, positive, o)}
    x_a, x_d = stage.views(images, step, n)
    auxiliary = stage.other[0] if len(stage.other) else network
    full, features = auxiliary.encode(x_a)[-1], network.encode(smaller(x_d))
    late = network.decode(features, o.blocks)
    assert late.shape[-2:] == full.shape[-2:]
    of_slices = slice(0, n) if o.view_groups == 1 else slice(len(x_a) - n, len(x_a))
    z = torch.cat([stage.auxiliary_instance(full[of_slices]), stage.dominant_instance(late[of_slices])])
    found = {"L_g": slow_supcon(z, positive, o)}
    loss = o.lambda1 * found["L_g"]
    if o.lambda2:
        a, d = stage.auxiliary_pixel(full[:n]), late[:n]
        if o.dominant_pixel_projector:
            d = stage.dominant_pixel(d)
        if o.dense == "supcon":
            places = [(y, x) for y in range(a.shape[2]) for x in range(a.shape[3])]
            terms = [slow_supcon(torch.cat([a[..., y, x], d[..., y, x]]), positive, o) for y, x in places]
            found["L_d"] = torch.stack(terms).mean()
        else:
            found["L_d"] = slow_distance(a, d, o.dense)
        loss = loss + o.lambda2 * found["L_d"]
    if o.lambda3 and o.stages == 1:
        found["L_ER"] = slow_feature_error(full[:n], features[-1][:n])
        loss = loss + o.lambda3 * found["L_ER"]
    return {"loss": loss, **found}


def counted(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def golden_maps(slices: int = 4, side: int = 4, channels: int = 8) -> tuple[Tensor, Tensor]:
    b, k = counted(slices)[:, None, None, None], counted(channels)[:, None, None]
    a = torch.sin(0.7 * b + 0.31 * counted(side)[:, None] * k + 0.17 * counted(side) * (k + 1))
    return a, 0.5 * a + 0.5 * a.flip(0)


def golden_masks() -> tuple[Tensor, Tensor]:
    position = torch.tensor([0.1, 0.15, 0.6, 0.9], dtype=torch.float64).repeat(2)
    return positional(torch.arange(4).repeat(2), position, 0.1)


def dense(a: Tensor, d: Tensor, masks: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    return supcon(torch.cat([a, d]).flatten(2).permute(2, 0, 1), masks, Options(**options))


def test_the_dense_loss_is_the_released_code_s() -> None:
    a, d = golden_maps()
    assert dense(a, d, golden_masks()).item() == pytest.approx(4.269831829258608, rel=1e-9)
    assert dense(a, d, golden_masks(), scale="none").item() == pytest.approx(2.9888822804810258, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_the_dense_loss_is_precise(dtype: torch.dtype, temperature: float) -> None:
    a, d = (x.to(dtype).requires_grad_() for x in golden_maps())
    loss = dense(a, d, golden_masks(), temperature=temperature)
    exact = dense(a.double(), d.double(), golden_masks(), temperature=temperature)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    loss.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_order_of_slices_branches_and_locations_does_not_matter() -> None:
    (a, d), (positive, negative) = golden_maps(), golden_masks()
    order, both = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1, 6, 4, 7, 5])
    plain = dense(a, d, (positive, negative))
    permuted = dense(a[order], d[order], (positive[both][:, both], negative[both][:, both]))
    torch.testing.assert_close(plain, permuted)
    torch.testing.assert_close(plain, dense(d, a, (positive, negative)))
    places = torch.randperm(16)
    moved = [x.flatten(2)[..., places].view_as(x) for x in (a, d)]
    torch.testing.assert_close(plain, dense(moved[0], moved[1], (positive, negative)))
    # Locations are not compared with each other: moved in one branch only, they are other pairs.
    assert dense(moved[0], d, (positive, negative)) != plain


@pytest.mark.parametrize("form", ["mse", "byol"])
def test_the_other_dense_forms(form: str) -> None:
    a, d = (x.requires_grad_() for x in golden_maps(3, 2, 5))
    fast, slow = distance(a, d, form == "byol").mean(), slow_distance(a, d, form)
    torch.testing.assert_close(fast, slow)
    for mine, theirs in zip(torch.autograd.grad(fast, (a, d)), torch.autograd.grad(slow, (a, d)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not distance(a, a, form == "byol").any()
    torch.testing.assert_close(
        distance(3 * a, 3 * d, form == "byol"), distance(a, d, form == "byol") * (9, 1)[form == "byol"]
    )
    low = distance(a.bfloat16(), d.bfloat16(), form == "byol")
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.mean().double(), slow, rtol=0.02, atol=0)


@pytest.mark.parametrize("size", [(8, 8, 2, 2), (4, 12, 2, 3), (3, 5, 1, 2), (6, 6, 2, 1)])
def test_the_feature_error(size: tuple[int, int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(2, 3, *size[:2], generator=generator, dtype=torch.float64, requires_grad=True)
    small = torch.randn(2, 3, *size[2:], generator=generator, dtype=torch.float64, requires_grad=True)
    fast, slow = feature_error(full, small).mean(), slow_feature_error(full, small)
    torch.testing.assert_close(fast, slow)
    found = zip(torch.autograd.grad(fast, (full, small)), torch.autograd.grad(slow, (full, small)), strict=True)
    for mine, theirs in found:
        torch.testing.assert_close(mine, theirs)
    assert feature_error(full.bfloat16(), small.bfloat16()).dtype == torch.float32


# Sizes


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(96, 96), (256, 192), (70, 33)])
def test_the_reduced_image_shows_what_the_maps_show(blocks: int, size: tuple[int, int]) -> None:
    ramps = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij"))[None]
    small = reduced(ramps, blocks, 16)
    step = 2**blocks
    assert all(
        side % 16 == 0 and side * step - have < 16 * step for have, side in zip(size, small.shape[2:], strict=True)
    )
    if all(side % (16 * step) == 0 for side in size):
        assert small.equal(interpolate(ramps, scale_factor=1 / step, mode="bilinear", align_corners=True))
    for axis, side in enumerate(size):
        seen = small[0, axis, :, 0] if axis == 0 else small[0, axis, 0]
        inside = -(-side // step)
        centre = (torch.arange(float(inside)) + 0.5) * step - 0.5
        assert (seen[:inside] - centre).abs().max() <= step / 2  # within its own cell
        assert (seen[inside + 1 :] == side - 1).all()  # and the last column beyond


class Sized(Pool):
    """Noise of any size instead of the store's images."""

    size = (96, 96)

    def images(self, slices: Slices) -> Tensor:
        return torch.randn(len(slices), 1, *self.size, generator=torch.Generator().manual_seed(0))


def shapes(
    store: Store, cheap: dict[str, Any], size: tuple[int, int], widths: list[int], **options: Any
) -> dict[str, Any]:
    """What enters the encoder and leaves it and the projectors, by name."""
    o: Any = pretraining_options({**cheap, "method": "jcl", "network": {"widths": widths}, "batch": 2, **options})
    pool = Sized(store, ALL)
    pool.size = size
    stage: Any = Joint(build(o.network, 1, 3), pool, o).train()
    found: dict[str, Any] = {"inputs": [], "features": []}
    stage.network.encoder.register_forward_hook(lambda *call: found["inputs"].append(tuple(call[1][0].shape)))
    stage.network.encoder.register_forward_hook(lambda *call: found["features"].append(tuple(call[2][-1].shape)))
    for name in ("auxiliary_pixel", "dominant_pixel", "auxiliary_instance", "dominant_instance"):
        getattr(stage, name).register_forward_hook(lambda *call, name=name: found.update({name: tuple(call[2].shape)}))
    with torch.no_grad():
        assert stage.losses(0)["loss"].isfinite()
    return found


@pytest.mark.parametrize("projector", [False, True])
def test_shapes_are_the_papers(projector: bool, store: Store, cheap: dict[str, Any]) -> None:
    widths = [32, 64, 128, 256, 512]
    found = shapes(store, cheap, (256, 256), widths, view_groups=1, dominant_pixel_projector=projector)
    assert found["inputs"] == [(2, 1, 256, 256), (2, 1, 64, 64)]
    assert found["features"] == [(2, 512, 16, 16), (2, 512, 4, 4)]
    assert found["auxiliary_pixel"] == found["dominant_pixel"] == (2, 128, 16, 16)
    assert found["auxiliary_instance"] == found["dominant_instance"] == (2, 128)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(96, 96), (90, 50)])
def test_any_number_of_blocks_and_any_size(
    blocks: int, size: tuple[int, int], store: Store, cheap: dict[str, Any]
) -> None:
    found = shapes(store, cheap, size, [2, 3, 4, 5, 6], blocks=blocks)
    height, width = (-(-side // 16) for side in size)
    assert found["features"][0] == (4, 6, height, width)  # full size: only what the network itself needs
    assert found["inputs"][1][2:] == tuple(-(-side // (16 * 2**blocks)) * 16 for side in size)
    # Without a projector of its own, the dominant map says how wide the auxiliary one is.
    assert found["auxiliary_pixel"] == found["dominant_pixel"] == (2, (5, 4, 3, 2)[blocks - 1], height, width)
    assert found["auxiliary_instance"] == found["dominant_instance"] == (2, 128)


# Options


def test_positions_say_who_attracts() -> None:
    slices = Slices(torch.arange(3), torch.arange(3), torch.tensor([0, 0, 4]), torch.tensor([4, 5, 5]))
    for options, near in (
        ({"threshold": 0.04}, False),  # 1/4 and 1/5
        ({"threshold": 0.06}, True),
        ({"threshold": 0.04, "position": "centre"}, True),  # 1/8 and 1/10
        ({"threshold": 0.02, "position": "centre"}, False),
    ):
        positive, negative = masks_of(slices, Options(**options))  # type: ignore[arg-type]
        own = torch.eye(3, dtype=torch.bool)
        own[0, 1] = own[1, 0] = near
        assert positive.equal(own.repeat(2, 2) & ~torch.eye(6, dtype=torch.bool))
        assert negative.equal(~own.repeat(2, 2))


def test_without_blocks_it_is_pcl(store: Store, cheap: dict[str, Any]) -> None:
    common = {**cheap, "batch": 16, "outputs": 8}
    (stage,) = TestJCL().stages({**common, "method": "jcl", "blocks": 0}, store)
    pcl: Any = pretraining_options({**common, "method": "pcl"})
    other = method_named("pcl").stages(pcl)[0][1](stage.network, stage.pool, pcl)
    weights = zip(stage.instance.parameters(), other.head.parameters(), strict=True)  # type: ignore[union-attr]
    for mine, theirs in weights:
        theirs.data.copy_(mine)
    losses = stage.losses(2), other.losses(2)
    assert losses[0].keys() == {"loss"}
    torch.testing.assert_close(losses[0]["loss"], losses[1]["loss"], rtol=1e-6, atol=1e-6)


def test_each_weight_weighs_its_loss(store: Store, cheap: dict[str, Any]) -> None:
    parts = joint(store, cheap).losses(0)
    torch.testing.assert_close(parts["loss"], parts["L_g"] + 0.5 * parts["L_d"] + parts["L_ER"])
    again = joint(store, cheap, lambda1=3, lambda2=5, lambda3=7).losses(0)
    torch.testing.assert_close(again["loss"], 3 * parts["L_g"] + 5 * parts["L_d"] + 7 * parts["L_ER"])
    for options, names in (
        ({"lambda2": 0, "lambda3": 0}, {"loss", "L_g"}),
        ({"lambda2": 0}, {"loss", "L_g", "L_ER"}),
        ({"lambda3": 0}, {"loss", "L_g", "L_d"}),
    ):
        assert joint(store, cheap, **options).losses(0).keys() == names


def test_who_sees_what(store: Store, cheap: dict[str, Any]) -> None:
    def seen(**options: Any) -> tuple[Tensor, list[Tensor]]:
        stage = joint(store, cheap, **options)
        images = stage.pool.images(stage.pool.epoch(8, 3, 0))
        return images, stage.views(images, 0, 8)

    images, (x_a, x_d) = seen()
    assert len(x_a) == len(x_d) == 16
    assert x_a[:8].equal(images)  # the fixed group is the slices themselves
    assert x_d[:8].equal(images)
    assert not x_a[8:].equal(images)
    assert not x_a[8:].equal(x_d[8:])

    moved = {"spatial": {"rotation": 90}}
    images, (x_a, x_d) = seen(fixed=moved)
    assert x_a[:8].equal(x_d[:8])
    assert not x_a[:8].equal(images)
    images, (x_a, x_d) = seen(fixed={"intensity": {"contrast": 0.5}})
    assert not x_a[:8].equal(x_d[:8])
    for first, second in zip(x_a[:8].flatten(1), x_d[:8].flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([first, second]))[0, 1] == pytest.approx(1)  # the same place, other values

    images, (x_a, x_d) = seen(preset="jcl")
    assert len(x_a) == 8
    assert x_a.equal(x_d)
    assert not x_a.equal(images)
    images, (x_a, x_d) = seen(lambda2=0, lambda3=0)  # nothing asks for the fixed group
    assert len(x_a) == 8
    assert not x_a.equal(x_d)
    images, (x_a, x_d) = seen(stages=2, lambda2=0)  # and no L_ER in the second stage
    assert len(x_a) == 8


def test_views_are_a_function_of_seed_and_step(store: Store, cheap: dict[str, Any]) -> None:
    def seen(seed: int, step: int, **options: Any) -> Tensor:
        stage = joint(store, {**cheap, "seed": seed}, **options)
        return torch.cat(stage.views(stage.pool.images(stage.pool.epoch(8, 0, 0)), step, 8))

    for options in ({"preset": "jcl"}, {"lambda2": 0, "lambda3": 0}):
        assert seen(1, 2, **options).equal(seen(1, 2, **options))
        assert not seen(1, 2, **options).equal(seen(1, 3, **options))
        assert not seen(1, 2, **options).equal(seen(2, 2, **options))


def test_each_loss_has_its_group(store: Store, cheap: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = joint(store, cheap)
    before, views = stage.losses(0), Joint.views
    batch = slice(0, 8)

    def other_slices(stage: Any, *arguments: Any) -> list[Tensor]:
        """The same slices for batch norm; which of them show a group is turned."""
        return [torch.cat([x[batch].roll(1, 0), x[8:]]) for x in views(stage, *arguments)]

    monkeypatch.setattr(Joint, "views", other_slices)
    after = stage.losses(0)
    torch.testing.assert_close(after["L_g"], before["L_g"])
    torch.testing.assert_close(after["L_ER"], before["L_ER"])  # a mean over the slices
    assert not torch.isclose(after["L_d"], before["L_d"])  # another slice's positions


def test_connections(store: Store, cheap: dict[str, Any]) -> None:
    found = {}
    for connection in ("shared", "independent", "ema"):
        stage = joint(store, cheap, connection=connection)
        inputs: list[Tensor] = []
        stage.auxiliary_instance.register_forward_hook(lambda *call, inputs=inputs: inputs.append(call[1][0]))
        found[connection] = stage.losses(0)
        assert inputs[0].requires_grad == (connection != "ema")
        found[connection]["loss"].backward()
        trained = {
            name.split(".")[2] for name, p in stage.named_parameters() if name.startswith("other") and p.requires_grad
        }
        assert trained == ({"encoder"} if connection == "independent" else set())
        gradient = stage.network.encoder[0][0].conv.weight.grad
        assert gradient is not None
        if connection == "independent":
            other = stage.other[0].encoder[0][0].conv.weight
            assert not other.equal(stage.network.encoder[0][0].conv.weight)  # another beginning
            assert other.grad.abs().max() > 0
    # The slow copy begins as the encoder: the losses are the same, not the gradients.
    for name, value in found["shared"].items():
        torch.testing.assert_close(found["ema"][name], value)
        assert not torch.isclose(found["independent"][name], value)


def test_the_slow_copy_follows_from_the_second_step_on(store: Store, cheap: dict[str, Any]) -> None:
    stage = joint(store, cheap, connection="ema", momentum=0.75)
    mine, theirs = stage.other[0].encoder[0][0].conv.weight, stage.network.encoder[0][0].conv.weight
    start = mine.clone()
    with torch.no_grad():
        theirs.add_(1)
    stage.losses(0)
    assert mine.equal(start)
    stage.losses(1)
    torch.testing.assert_close(mine, start + 0.25)


@pytest.mark.parametrize("connection", ["ema", "independent"])
def test_a_killed_run_continues_exactly(
    connection: str, store: Store, cheap: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
    losses = Joint.losses

    def killed(stage: Any, step: int) -> dict[str, Tensor]:
        if step == 3:
            raise KeyboardInterrupt
        return losses(stage, step)

    for name in ("whole", "killed"):
        stage = joint(store, cheap, connection=connection, momentum=0.5, max_iterations=5, learning_rate=0.1)
        (tmp_path / name).mkdir()
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(Joint, "losses", killed)
                with pytest.raises(KeyboardInterrupt):
                    train(stage, stage.options, tmp_path / name, "test")
            stage = joint(store, cheap, connection=connection, momentum=0.5, max_iterations=5, learning_rate=0.1)
        train(stage, stage.options, tmp_path / name, "test")
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert any("other.0.encoder" in key for key in one)
    for key, value in one.items():
        assert value.equal(two[key]), key


def test_two_stages(store: Store, cheap: dict[str, Any]) -> None:
    for options, sides in (({}, [32, 8]), ({"downsampled": False}, [32])):
        first, second = in_double({**cheap, **WIDTHS, "stages": 2, **options}, store)
        assert isinstance(first, Encoder)
        assert isinstance(second, Joint)
        assert (first.trained, second.trained) == (("encoder",), ("decoder.0", "decoder.1"))
        inputs: list[int] = []
        first.network.encoder.register_forward_hook(lambda *call, inputs=inputs: inputs.append(call[1][0].shape[-1]))
        first.losses(0)
        assert inputs == sides
        assert second.losses(0).keys() == {"loss", "L_g", "L_d"}
        assert not any(p.requires_grad for p in second.network.encoder.parameters())
        assert not second.network.encoder.training
        assert second.network.decoder[0].training
    (one,) = in_double({**cheap, **WIDTHS, "blocks": 1}, store)
    assert one.trained == ("encoder", "decoder.0")


def test_a_preset_sets_what_is_not_given() -> None:
    macl, jcl = Options(), Options(preset="jcl")
    assert (macl.view_groups, macl.dominant_pixel_projector, macl.fixed.spatial.rotation) == (2, False, 0)
    assert (jcl.view_groups, jcl.dominant_pixel_projector, jcl.fixed.spatial.rotation) == (1, True, 180)
    assert jcl.fixed.spatial.elastic == 0
    assert Options(preset="macl") == macl
    # What is given wins, also a part of what the preset sets.
    given: Any = pretraining_options(
        {"method": "jcl", "preset": "jcl", "dominant_pixel_projector": False, "fixed": {"spatial": {"shift": 0.3}}}
    )
    assert (given.dominant_pixel_projector, given.view_groups) == (False, 1)
    assert (given.fixed.spatial.shift, given.fixed.spatial.rotation) == (0.3, 180)
    assert Options(preset="jcl", fixed=macl.fixed).fixed == macl.fixed


@pytest.mark.parametrize(
    ("options", "cases", "sentence"),
    [
        ({"blocks": 3}, ALL, "has 2 decoder blocks, 3 were asked for"),
        ({"blocks": 0, "stages": 2}, ALL, "nothing to train in a second stage: set stages=1"),
        ({"blocks": 0, "connection": "ema"}, ALL, "connection=ema needs the two branches in one stage"),
        ({"stages": 2, "connection": "independent"}, ALL, "connection=independent needs the two branches"),
        ({"lambda1": 0}, ALL, "pretrain.lambda1=0 does not fit: it must be above 0"),
        (DEEP, ALL, "Images of 8 x 8 pixels leave instance normalisation a single value"),  # in its second stage
        ({}, ("odd1",), "every volume here is a single slice: use gcl, strategy=random"),
        ({"blocks": 0}, ("odd1",), "every volume here is a single slice"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_anything_is_written(
    options: dict[str, Any],
    cases: tuple[str, ...],
    sentence: str,
    store: Store,
    odd: Store,
    tmp_path: Path,
    cheap: dict[str, Any],
) -> None:
    settings = {**cheap, **WIDTHS, "method": "jcl", "max_iterations": 1, **options}
    with pytest.raises(GlocalError, match=sentence):
        pretrain(store if cases == ALL else odd, tmp_path / "run", settings, split=Split(0, cases, (), ()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "kind"), [({"blocks": 0}, Encoder), ({"stages": 2}, Encoder), ({}, Joint)])
def test_the_weight_of_whole_slices_counts_in_every_stage(
    options: dict[str, Any], kind: type, store: Store, cheap: dict[str, Any]
) -> None:
    losses = []
    for weight in (1, 3):
        stage = in_double({**cheap, **WIDTHS, "lambda1": weight, "lambda2": 0, "lambda3": 0, **options}, store)[0]
        assert isinstance(stage, kind)
        losses.append(stage.losses(0)["loss"])
    torch.testing.assert_close(losses[1], 3 * losses[0])


@pytest.mark.parametrize("stages", [1, 2])
def test_a_threshold_that_hangs_on_rounding_is_named(
    stages: int, store: Store, tmp_path: Path, cheap: dict[str, Any]
) -> None:
    settings = {**cheap, **WIDTHS, "method": "jcl", "max_iterations": 1, "stages": stages}
    for threshold, count in ((0.11, 0), (0.2, stages)):  # volumes of five slices
        run = tmp_path / str(threshold)
        pretrain(store, run, {**settings, "threshold": threshold}, split=Split(0, ALL, (), ()))
        warnings = manifest_of(run)["warnings"]
        assert len(warnings) == count
        assert all("threshold=0.2 is a multiple of 1/n for volumes of 5 slices" in warning for warning in warnings)


def test_equal_features_give_the_logarithm_of_all_others() -> None:
    """The sign of collapse: ln(2N - 1), as PCL's."""
    loss = dense(torch.ones(4, 8, 3, 3), torch.ones(4, 8, 3, 3), golden_masks(), scale="none")
    assert float(loss) == pytest.approx(math.log(7), rel=1e-6)
