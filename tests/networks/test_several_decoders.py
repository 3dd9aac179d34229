"""A network with several decoders is the single networks it is made of; and the ways to double the size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glocal.data.plan import Plan, PreprocessOptions
from glocal.errors import GlocalError
from glocal.inference import folded
from glocal.model import Header, load_network, save_model, transfer
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import build, network_options
from glocal.networks.several_decoders import SeveralDecoders, SeveralDecodersOptions, with_decoders

BRANCHING: dict[str, dict[str, Any]] = {
    "unet": {"widths": [4, 6, 8]},
    "pcl-unet": {"widths": [4, 6, 8]},
    "attention-unet": {"widths": [4, 6, 8]},
    "resnet50-unet": {"width": 2, "decoder_widths": [8, 7, 6, 5, 4]},
}
UPS = ("nearest", "bilinear", "transposed")
LABELS = {"background": 0, "wall": 1, "blood": 2}

every_network = pytest.mark.parametrize("name", BRANCHING)


def options_of(name: str, **others: Any) -> Any:
    return network_options({"name": name, **BRANCHING[name], **others})


def network(options: Any, seed: int = 0) -> Any:
    """With random weights, and norms that are far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(options, 1, 3)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.ndim == 1:
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return net.eval()


def several(name: str, *decoders: Any, predict: Any = "mean", seed: int = 0) -> SeveralDecoders:
    made: SeveralDecoders = network(with_decoders(options_of(name), decoders, predict), seed)
    return made


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def alone(net: SeveralDecoders, options: Any, number: int) -> SegmentationNetwork:
    """The single network with the weights of decoder `number`."""
    own = f"others.{number - 1}." if number else ""
    weights = {
        key.removeprefix(own): value
        for key, value in net.state_dict().items()
        if key.startswith("encoder.") or (key.startswith(own) and key.startswith("others.") == bool(number))
    }
    single = build(options, 1, 3).eval()
    single.load_state_dict(weights)  # all of them and no others
    return single


@every_network
def test_each_decoder_is_the_single_network_with_its_weights(name: str) -> None:
    net = several(name, *UPS)
    x = images(2, 1, 2 * net.multiple + 1, net.multiple + 3)  # odd: padded within, cropped at the end
    each, own = net.each(x), options_of(name).up
    assert len(each) == 3
    order = [own, *(up for up in UPS if up != own)]
    for number, (logits, up) in enumerate(zip(each, order, strict=True)):
        assert logits.shape == (2, 3, *x.shape[2:])
        assert torch.equal(logits, alone(net, options_of(name, up=up), number)(x)), up
        chosen = several(name, *UPS, predict=up)
        chosen.load_state_dict(net.state_dict())
        assert torch.equal(chosen(x), logits)


@every_network
def test_what_is_predicted_is_the_mean_of_probabilities(name: str) -> None:
    net = several(name, "bilinear", "transposed")
    x = images(2, 1, 2 * net.multiple, net.multiple)
    mean = (net.each(x)[0].double().softmax(1) + net.each(x)[1].double().softmax(1)) / 2
    torch.testing.assert_close(net(x).double().softmax(1), mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mean, net.each(x)[0].double().softmax(1), atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.float32


def test_one_predicting_decoder_costs_no_other() -> None:
    net = several("unet", "bilinear", "transposed", predict="transposed")
    net.head.register_forward_hook(lambda *_: pytest.fail("the other decoder was computed"))
    net(images(2, 1, 8, 8))


def test_weights_are_found_by_the_names_of_their_parts() -> None:
    net = several("unet", "nearest", "bilinear", "transposed")
    single = build(options_of("unet"), 1, 3)
    keys = set(net.state_dict())
    assert {key.split(".")[0] for key in keys} == {"encoder", "decoder", "head", "others"}
    assert {key for key in keys if not key.startswith("others.")} == set(single.state_dict())
    assert {".".join(key.split(".")[:3]) for key in keys if key.startswith("others.")} == {
        f"others.{k}.{part}" for k in range(2) for part in ("decoder", "head")
    }


def test_decoders_begin_differently() -> None:
    net = several("unet", "nearest", "bilinear")
    other = dict(net.others[0].named_parameters())
    first = {name: p for name, p in net.named_parameters() if name.startswith(("decoder", "head")) and p.ndim > 1}
    assert first
    assert not any(torch.equal(p, other[name]) for name, p in first.items())


@every_network
def test_the_gradient_reaches_all_decoders_and_the_encoder_once(name: str) -> None:
    net = several(name, "bilinear", "transposed").train()
    passes: list[Any] = []
    net.encoder.register_forward_hook(lambda *_: passes.append(1))
    torch.stack([part.square().mean() for part in net.each(images(2, 1, 64, 64))]).sum().backward()
    assert len(passes) == 1
    assert [key for key, p in net.named_parameters() if p.ndim > 1 and (p.grad is None or not p.grad.any())] == []


@pytest.mark.parametrize(
    ("name", "before", "decoders", "unlike"),
    [
        ("unet", {}, ("bilinear", "transposed"), ""),  # as many weights: fits
        ("unet", {"up": "bilinear"}, ("nearest", "bilinear"), ""),
        ("pcl-unet", {}, ("bilinear", "transposed"), ""),  # the transposed one comes first
        ("attention-unet", {"up": "transposed"}, ("bilinear", "transposed"), ""),
        ("resnet50-unet", {}, ("bilinear", "transposed"), ""),
        ("unet", {}, ("transposed", "bilinear"), "up"),
        ("pcl-unet", {}, ("bilinear", "nearest"), "up"),
    ],
)
def test_a_pre_trained_encoder_and_decoder_reach_the_first(
    name: str, before: dict[str, Any], decoders: Any, unlike: str, tmp_path: Path
) -> None:
    options = options_of(name, **before)
    trained = network(options, seed=1)
    weights = {
        key: value
        for key, value in trained.state_dict().items()
        if key.startswith(("encoder.", "decoder.0.", "decoder.1."))
    }
    plan = Plan(options=PreprocessOptions(size=(32, 32)), channels=1, labels=LABELS, slice_axis="z", axes=None)
    header = Header(kind="pretrained", network=options, channels=1, labels=LABELS, plan=plan, provenance={})
    save_model(tmp_path / "model.safetensors", weights, header)
    net, untouched = (network(with_decoders(options, decoders)) for _ in range(2))
    report = transfer(net, tmp_path / "model.safetensors")
    lost = {key for key in weights if unlike and f".{unlike}." in key}
    assert bool(lost) == bool(unlike)
    assert set(report.transferred) == set(weights) - lost
    assert set(report.unused) | set(report.mismatched) == lost
    state, fresh = net.state_dict(), untouched.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in report.transferred)
    assert all(torch.equal(state[key], fresh[key]) for key in state if key.startswith(("others.", "head.")))


@pytest.mark.parametrize("predict", ["mean", "transposed"])
@every_network
def test_a_model_file_holds_all_decoders(name: str, predict: Any, tmp_path: Path) -> None:
    options = with_decoders(options_of(name), ("bilinear", "transposed"), predict)
    net, path = network(options), tmp_path / "model.safetensors"
    plan = Plan(options=PreprocessOptions(size=(32, 32)), channels=1, labels=LABELS, slice_axis="z", axes=None)
    header = Header(kind="segmentation", network=options, channels=1, labels=LABELS, plan=plan, provenance={})
    save_model(path, net.state_dict(), header)
    loaded, read = load_network(path)
    assert read.network == options
    x = images(2, 1, 67, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


@pytest.mark.parametrize("predict", ["mean", "transposed"])
@every_network
def test_folding_for_prediction_changes_nothing_but_rounding(name: str, predict: Any) -> None:
    net = several(name, "bilinear", "transposed", predict=predict)
    fast, x = folded(net), images(2, 1, 64, 64)
    with torch.no_grad():
        assert float((fast(x) - net(x)).abs().max()) < 1e-5 * float(net(x).abs().max())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


def test_what_is_compiled_holds_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    net = several("pcl-unet", "nearest", "bilinear", "transposed")
    net.compile_parts()
    inside = {id(p) for part in compiled for p in part.parameters()}
    assert {id(p) for p in net.parameters()} == inside


def test_images_that_do_not_fit_are_explained() -> None:
    net = several("unet", "bilinear", "transposed")
    with pytest.raises(GlocalError, match=r"images of 1 channel\(s\)"):
        net(images(2, 2, 16, 16))
    with pytest.raises(GlocalError, match="too small"):
        net(images(2, 1, 3, 16))


@pytest.mark.parametrize("name", ["uctransnet", "bcdu-net", "nnunet-plain", "nnunet-residual"])
def test_networks_with_one_way_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(GlocalError, match=f"^{name} cannot.*: choose one of {', '.join(BRANCHING)}.$"):
        with_decoders(network_options({"name": name}), ("bilinear", "transposed"))


def test_a_decoder_that_is_not_there_cannot_predict() -> None:
    with pytest.raises(GlocalError, match="predict=nearest is none of the decoders: choose mean, bilinear or transp"):
        with_decoders(options_of("unet"), ("bilinear", "transposed"), "nearest")
    of = {"name": "unet"}
    given: dict[str, Any] = {"of": of, "decoders": ["bilinear", "transposed"]}
    assert SeveralDecodersOptions.model_validate({**given, "predict": 1}).predict == 1
    with pytest.raises(GlocalError, match="There are 2 decoders, numbered from 0: predict=2 is none of them"):
        SeveralDecodersOptions.model_validate({**given, "predict": 2})
    with pytest.raises(ValueError, match="predict"):
        SeveralDecodersOptions.model_validate({**given, "predict": -1})
    with pytest.raises(ValueError, match="decoders"):
        SeveralDecodersOptions.model_validate({**given, "decoders": ["bilinear"]})


def test_the_network_s_own_way_comes_first_and_is_predicted_by_name() -> None:
    for up, order in (
        ("nearest", ["bilinear", "transposed"]),
        ("transposed", ["transposed", "bilinear"]),
        ("bilinear", ["bilinear", "transposed"]),
    ):
        made = with_decoders(options_of("unet", up=up), ("bilinear", "transposed"), "transposed")
        assert list(made.decoders) == order
        assert made.predict == order.index("transposed")
    assert with_decoders(options_of("unet"), ("bilinear", "transposed")).predict == "mean"


@pytest.mark.parametrize("up", UPS)
@every_network
def test_every_way_to_double_the_size_gives_maps_of_the_same_shape(name: str, up: str) -> None:
    net = network(options_of(name, up=up))
    x = images(2, 1, 2 * net.multiple, net.multiple)
    features = net.encode(x)
    for blocks in range(1, net.blocks + 1):
        tap = net.decode(features, blocks)
        assert tap.shape == (2, net.decoder_channels(blocks), 2 * 2**blocks, 2**blocks)
    assert net(x).shape == (2, 3, *x.shape[2:])
    kinds = {type(module) for module in net.decoder.modules()}
    modes = {module.mode for module in net.decoder.modules() if isinstance(module, nn.Upsample)}
    assert (nn.ConvTranspose2d in kinds) == (up == "transposed")
    assert modes == ({up} - {"transposed"})


@pytest.mark.parametrize(
    ("name", "up"), [("unet", "nearest"), ("pcl-unet", "transposed"), ("attention-unet", "nearest")]
)
def test_without_the_option_networks_are_as_they_were(name: str, up: str) -> None:
    plain, named = network(options_of(name)), network(options_of(name, up=up))
    x = images(2, 1, 16, 16)
    assert torch.equal(plain(x), named(x))
    for other in set(UPS) - {up}:
        assert not torch.equal(network(options_of(name, up=other))(x), plain(x))


@pytest.mark.parametrize("name", ["unet", "attention-unet"])
def test_interpolations_have_the_same_weights(name: str) -> None:
    nearest, bilinear = (network(options_of(name, up=up)) for up in ("nearest", "bilinear"))
    bilinear.load_state_dict(nearest.state_dict())
    x = images(2, 1, 16, 16)
    assert not torch.equal(nearest(x), bilinear(x))
    flat = torch.full((2, 1, 16, 16), 0.5)
    centre = (..., slice(6, 10), slice(6, 10))
    maps = [net.decoder[0].get_submodule("up" if name == "unet" else "block.up")[0] for net in (nearest, bilinear)]
    assert torch.equal(maps[0](flat)[centre], maps[1](flat)[centre])  # what does not vary is interpolated alike


def test_an_interpolation_is_followed_by_what_changes_the_channels() -> None:
    block = network(options_of("pcl-unet", up="bilinear")).decoder[0]
    conv = block.up[1]
    assert (conv.kernel_size, conv.in_channels, conv.out_channels) == ((1, 1), 8, 6)
    x = images(1, 8, 3, 4)
    up = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(block.up(x), conv(up))
    block = network(options_of("unet", up="transposed")).decoder[0]
    assert isinstance(block.up, nn.ConvTranspose2d)
    assert (block.up.in_channels, block.up.out_channels, block.up.stride) == (8, 6, (2, 2))


@every_network
def test_an_unknown_way_is_refused(name: str) -> None:
    with pytest.raises(
        GlocalError, match=r"network\.up=cubic does not fit: it must be 'nearest', 'bilinear' or 'trans"
    ):
        options_of(name, up="cubic")
