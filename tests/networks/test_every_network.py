"""What every network must do, whatever it is made of."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from glocal import distributed
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import read_json
from glocal.finetuning.finetune import finetune
from glocal.inference import folded
from glocal.model import load_network, read_header
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NETWORKS, NetworkOptions, build, network_named, network_options
from glocal.networks.unet import UNetOptions
from glocal.pretraining.pretrain import pretrain

TINY: dict[str, dict[str, Any]] = {
    "unet": {"widths": [4, 6, 8]},
    "pcl-unet": {"widths": [4, 6, 8]},
    "attention-unet": {"widths": [4, 6, 8]},
    "uctransnet": {"widths": [4, 6, 8], "depth": 2, "heads": 2, "positions": 3},
    "bcdu-net": {"widths": [4, 6, 8], "dense": 2, "dropout": 0.1},
    "resnet50-unet": {"width": 4, "decoder_widths": [8, 7, 6, 5, 4]},
    "nnunet-plain": {"widths": [4, 6, 8]},
    "nnunet-residual": {"widths": [4, 6, 8], "depths": [1, 2]},
}
SPLIT = Split(0, ("case0", "case1", "case2", "case3"), ("case4",), ("case5",))
# Images of the tests' data have 32 pixels: the regions of L^R need a map of 8.
BLOCKS = {"resnet50-unet": 3}

every_network = pytest.mark.parametrize("name", TINY)


def network(name: str, channels: int = 1, classes: int = 3, seed: int = 0) -> SegmentationNetwork:
    options: Any = network_options({"name": name, **TINY[name]})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(options, channels, classes)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def unsettled(net: SegmentationNetwork) -> SegmentationNetwork:
    """With norms, statistics and biases that are far from where they start."""
    generator = torch.Generator().manual_seed(2)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.ndim == 1:
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return net


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_all_networks_are_here() -> None:
    assert TINY.keys() == NETWORKS.keys()
    assert all(entry.paper and entry.summary and entry.version for entry in NETWORKS.values())


@every_network
@pytest.mark.parametrize("channels", [1, 3])
def test_taps_have_the_channels_and_sides_they_say(name: str, channels: int) -> None:
    net = network(name, channels).eval()
    side = net.multiple
    features = net.encode(images(2, channels, 2 * side, 3 * side))
    assert tuple(f.shape[1] for f in features) == net.encoder_channels
    assert features[-1].shape[2:] == (2, 3)
    assert all(fine.shape[-1] == 2 * coarse.shape[-1] for fine, coarse in pairwise(features))
    assert 2**net.blocks == side
    for blocks in range(net.blocks + 1):
        tap = net.decode(features, blocks)
        assert tap.shape == (2, net.decoder_channels(blocks), 2 * 2**blocks, 3 * 2**blocks)
    assert torch.equal(net.decode(features, 0), features[-1])


@every_network
def test_odd_sizes_give_logits_of_their_own_size_and_taps_of_the_padded_one(name: str) -> None:
    net = unsettled(network(name)).eval()
    side = net.multiple
    x = images(2, 1, side + 2, 2 * side - 1)
    padded = nn.functional.pad(x, (0, 1, 0, side - 2), mode="replicate")
    assert net(x).shape == (2, 3, side + 2, 2 * side - 1)
    assert net.encode(x)[-1].shape[2:] == (2, 2)
    assert torch.equal(net(x), net(padded)[..., : side + 2, : 2 * side - 1])


@every_network
def test_segment_is_encode_then_decode_then_head(name: str) -> None:
    net = unsettled(network(name)).eval()
    x = images(2, 1, 64, 64)
    features = net.encode(x)
    kept = [feature.clone() for feature in features]
    expected = net.head(net.decode(features, net.blocks))
    assert torch.equal(net.segment(x), expected)
    assert torch.equal(net(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))  # no block writes into what others read


@every_network
def test_parts_are_found_by_name_in_the_state(name: str) -> None:
    net = network(name)
    keys = net.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"encoder", "decoder", "head"}
    assert {key.split(".")[1] for key in keys if key.startswith("decoder.")} == {str(k) for k in range(net.blocks)}


@every_network
def test_weights_follow_from_the_seed(name: str) -> None:
    first, same, other = (network(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(value.equal(same[key]) for key, value in first.items())
    drawn = [key for key, value in first.items() if value.ndim > 1 and value.any()]
    assert not any(first[key].equal(other[key]) for key in drawn)


@every_network
def test_gradient_reaches_the_encoder_and_the_asked_blocks_only(name: str) -> None:
    """Several processes could not train together if a part that is trained had weights without gradient."""
    for blocks in range(network(name).blocks + 1):
        net = unsettled(network(name))
        net.decode(net.encode(images(2, 1, 64, 64)), blocks).square().mean().backward()
        parts = ("encoder", *(f"decoder.{k}" for k in range(blocks)))
        for key, parameter in net.named_parameters():
            assert (parameter.grad is not None) == key.startswith(tuple(f"{part}." for part in parts)), (blocks, key)


@every_network
def test_gradient_of_logits_moves_every_weight(name: str) -> None:
    net = unsettled(network(name))
    net(images(2, 1, 64, 64)).square().mean().backward()
    weights = {key: p for key, p in net.named_parameters() if p.ndim > 1}
    assert [key for key, p in weights.items() if p.grad is None or not p.grad.any()] == []


@every_network
def test_it_learns_one_batch_by_heart(name: str) -> None:
    net = network(name)
    torch.manual_seed(0)  # dropout
    x = images(2, 1, 64, 64)
    x = nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    labels = (x[:, 0] > 0.5).long() + (x[:, 0] > 0.55)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-3:]) / 3 < 0.6 * losses[0]


@every_network
def test_evaluation_does_not_depend_on_the_rest_of_the_batch_or_the_call(name: str) -> None:
    net = unsettled(network(name)).eval()
    x = images(3, 1, 64, 64)
    assert torch.equal(net(x), net(x))
    assert distance(net(x[1:2]), net(x)[1:2]) < 1e-5


@every_network
def test_bfloat16_is_close_to_float32(name: str) -> None:
    net = unsettled(network(name))
    x = images(2, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        net(x).float().square().mean().backward()
        low = net.eval()(x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert low.dtype == torch.bfloat16
    high = net(x)
    assert (low.float() - high).square().mean() < 0.02 * high.var()


@every_network
def test_channels_last_computes_the_same(name: str) -> None:
    net = unsettled(network(name)).eval()
    x = images(2, 1, 64, 64)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    assert distance(net(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


@every_network
def test_what_is_compiled_holds_all_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    net = network(name)
    net.compile_parts()
    assert all(part in compiled for part in (net.encoder, *net.decoder, net.head))
    running: list[nn.Module] = []
    outside: list[nn.Module] = []
    for module in net.modules():
        if module in compiled:
            module.register_forward_pre_hook(lambda module, _: running.append(module))
            module.register_forward_hook(lambda *_: running.clear())
        elif next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, _: None if running else outside.append(module))
    net(images(2, 1, 64, 64))
    assert outside == []  # what is called by itself runs uncompiled


@every_network
def test_folding_for_prediction_changes_nothing_but_rounding(name: str) -> None:
    net = unsettled(network(name)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fast, x = folded(net), images(2, 1, 64, 64)
    with torch.no_grad():
        assert distance(fast(x), net(x)) < 1e-5
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    norms = [kind for kind in map(type, net.modules()) if kind is nn.BatchNorm2d]
    left = [kind for kind in map(type, fast.modules()) if kind is nn.BatchNorm2d]
    # After a transposed convolution there is nothing to fold into; instance norm is computed from every image.
    assert len(left) == (2 if name == "bcdu-net" else 0)
    assert bool(norms) == (not name.startswith("nnunet"))


@every_network
def test_statistics_can_be_those_of_all_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, shared = network(name), network(name)
    x = images(2, 1, 64, 64)
    with monkeypatch.context() as two:
        two.setattr(distributed, "world_size", lambda: 2)
        distributed.with_whole_statistics(shared, torch.device("cpu"))
    outputs = []
    for net in (plain, shared):
        torch.manual_seed(0)  # dropout
        outputs.append(net(x))
    assert distance(outputs[1], outputs[0]) < 1e-4
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, shared.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)
    on_gpus = nn.SyncBatchNorm.convert_sync_batchnorm(network(name))
    assert on_gpus.state_dict().keys() == plain.state_dict().keys()
    assert not any(type(module) is nn.BatchNorm2d for module in on_gpus.modules())


@every_network
def test_images_that_do_not_fit_are_explained(name: str) -> None:
    net = network(name)
    side = net.multiple
    with pytest.raises(GlocalError, match=r"images of 1 channel\(s\), these have 2"):
        net.encode(torch.zeros(1, 2, 64, 64))
    with pytest.raises(GlocalError, match=f"{side - 1} x 64 pixels are too small"):
        net.encode(torch.zeros(1, 1, side - 1, 64))
    if net.bottleneck_norm == "none":
        net.encode(torch.zeros(1, 1, side, side))
    else:
        with pytest.raises(GlocalError, match=f"{side} x {side} pixels leaves? {net.bottleneck_norm} normalisation"):
            net.encode(torch.zeros(1, 1, side, side))
    if net.bottleneck_norm == "batch":
        net.encode(torch.zeros(2, 1, side, side))
        net.eval().encode(torch.zeros(1, 1, side, side))
    if net.bottleneck_norm == "instance":
        with pytest.raises(GlocalError, match="instance normalisation"):
            net.eval().encode(torch.zeros(2, 1, side, side))
    for blocks in (-1, net.blocks + 1):
        with pytest.raises(GlocalError, match=f"{net.blocks} decoder blocks"):
            net.decoder_channels(blocks)
        with pytest.raises(GlocalError, match=f"{net.blocks} decoder blocks"):
            net.decode(net.encode(torch.zeros(2, 1, 64, 64)), blocks)


@every_network
@pytest.mark.parametrize("method", ["pcl", "gcl"])
def test_it_is_pre_trained_then_fine_tuned(
    name: str, method: str, store: Store, cheap: dict[str, Any], tmp_path: Path
) -> None:
    common = {key: value for key, value in cheap.items() if key != "network"} | {"max_iterations": 2}
    settings = {**common, "network": {"name": name, **TINY[name]}}
    blocks = BLOCKS.get(name, 1)
    gcl = {"volumes": 2, "hidden": 16, "outputs": 8, "local_batch": 3, "blocks": blocks}
    pretraining = {"pcl": {"batch": 4, "outputs": 8}, "gcl": gcl}[method]
    file = pretrain(store, tmp_path / "before", {**settings, "method": method, **pretraining}, split=SPLIT)
    trained = ["encoder", *(f"decoder.{k}" for k in range(blocks))][: None if method == "gcl" else 1]
    assert read_header(file).provenance["parts"] == trained
    tuned = finetune(
        store,
        tmp_path / "after",
        {**common, "batch": 4, "labels": 2},
        tmp_path / "before",
        split=SPLIT,
    )
    report = read_json(tmp_path / "after" / "transfer.json")
    assert report["transferred"] == sorted(
        key for key in network(name).state_dict() if key.startswith(tuple(f"{part}." for part in trained))
    )
    assert not report["unused"]
    assert not report["mismatched"]
    net, header = load_network(tuned)
    assert header.network.name == name
    assert net(images(1, 1, 64, 64)).shape == (1, 3, 64, 64)


class Holder(BaseModel):
    network: NetworkOptions = UNetOptions()


@every_network
def test_options_are_told_apart_by_name_and_survive_json(name: str) -> None:
    held = Holder.model_validate({"network": {"name": name, **TINY[name]}})
    assert type(held.network) is network_named(name).options
    assert held == Holder.model_validate_json(held.model_dump_json())
    assert held.network == network_options({"name": name, **TINY[name]})
    assert network_named(name).options() == network_options({"name": name})
    with pytest.raises(ValidationError, match="frozen"):
        held.network.name = "unet"


def test_options_without_a_name_are_a_unet_s() -> None:
    assert Holder.model_validate({"network": {"widths": [4, 8]}}).network == UNetOptions(widths=(4, 8))
    assert Holder.model_validate({"network": {}}) == Holder() == Holder(network=UNetOptions())
    assert network_options({}) == UNetOptions()
    with pytest.raises(GlocalError, match="There is no network 'unnet': did you mean 'unet'"):
        network_options({"name": "unnet"})
    with pytest.raises(GlocalError, match=r"network\.depth is not a setting"):
        network_options({"depth": 3})
