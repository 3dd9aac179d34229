"""nnU-Net's networks: names, shapes, starting weights; benchmarks/nnunet_equality.py compares outputs."""

import pytest
import torch
from torch import Tensor, nn

from glocal.networks.nnunet import (
    NNUNet,
    PlainOptions,
    ResidualBlock,
    ResidualOptions,
    to_dynamic_network_architectures,
)

PLAIN = PlainOptions(widths=(4, 6, 8))
RESIDUAL = ResidualOptions(widths=(4, 6, 6), depths=(1, 2))


def theirs(options: PlainOptions | ResidualOptions) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = NNUNet(2, 3, options).state_dict()
    return state, to_dynamic_network_architectures(state)


@pytest.mark.parametrize("options", [PLAIN, RESIDUAL])
def test_every_weight_has_its_places_and_coarser_logits_are_zero(options: PlainOptions | ResidualOptions) -> None:
    ours, found = theirs(options)
    used = {value.data_ptr() for value in found.values()}
    assert all(value.data_ptr() in used for value in ours.values())
    new = {name for name, value in found.items() if value.data_ptr() not in {v.data_ptr() for v in ours.values()}}
    assert new == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    assert found["decoder.seg_layers.0.weight"].shape == (3, 6, 1, 1)
    assert not any(found[name].any() for name in new)
    assert found["decoder.seg_layers.1.weight"].equal(ours["head.weight"])
    for name, value in found.items():  # convolutions and norms have two names, those of the encoder four
        if ".conv." in name:
            assert found[name.replace(".conv.", ".all_modules.0.")] is value
        if ".norm." in name:
            assert found[name.replace(".norm.", ".all_modules.1.")] is value
        if name.startswith("encoder."):
            assert found[f"decoder.{name}"] is value


def test_plain_weights_go_where_the_package_has_them() -> None:
    ours, found = theirs(PLAIN)
    places = {
        "encoder.0.0.conv.weight": "encoder.stages.0.0.convs.0.conv.weight",
        "encoder.2.1.norm.bias": "encoder.stages.2.0.convs.1.norm.bias",
        "decoder.1.up.weight": "decoder.transpconvs.1.weight",
        "decoder.0.join.1.conv.bias": "decoder.stages.0.convs.1.conv.bias",
        "head.bias": "decoder.seg_layers.1.bias",
    }
    assert all(found[there] is ours[here] for here, there in places.items())
    # As many names as PlainConvUNet(n_stages=3, n_conv_per_stage=2, n_conv_per_stage_decoder=2) has.
    assert len(found) == 6 * 4 * 4 + 4 * 4 * 2 + 2 * 2 + 2 * 2


def test_residual_weights_go_where_the_package_has_them() -> None:
    ours, found = theirs(RESIDUAL)
    places = {
        "encoder.stem.conv.weight": "encoder.stem.convs.0.conv.weight",
        "encoder.levels.0.0.conv1.conv.weight": "encoder.stages.0.blocks.0.conv1.conv.weight",
        "encoder.levels.1.0.project.conv.weight": "encoder.stages.1.blocks.0.skip.1.conv.weight",
        "encoder.levels.2.1.conv2.norm.weight": "encoder.stages.2.blocks.1.conv2.norm.weight",
        "decoder.0.join.0.norm.weight": "decoder.stages.0.convs.0.norm.weight",
    }
    assert all(found[there] is ours[here] for here, there in places.items())
    assert "encoder.levels.1.0.project.conv.bias" not in ours  # as the package
    assert not any("levels.2.0.project" in name for name in ours)  # as wide as the level before: pooled only


def test_levels_have_stride_two_and_depths_repeat() -> None:
    net = NNUNet(1, 3, ResidualOptions(widths=(4, 4, 4, 4, 4), depths=(1, 3, 2)))
    levels = list(net.encoder.get_submodule("levels").children())
    assert [len(list(level.children())) for level in levels] == [1, 3, 2, 2, 2]
    strides = [
        [block.conv1.get_submodule("conv").stride for block in level.children() if isinstance(block, ResidualBlock)]
        for level in levels
    ]
    assert [of_level[0] for of_level in strides] == [(1, 1), (2, 2), (2, 2), (2, 2), (2, 2)]
    assert {stride for of_level in strides for stride in of_level[1:]} == {(1, 1)}


def test_a_residual_block_passes_what_it_gets_at_first() -> None:
    net = NNUNet(1, 3, RESIDUAL)
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(blocks[-1](x), nn.functional.leaky_relu(x, 0.01))
    pooled = blocks[-2]  # stride 2, no projection
    torch.testing.assert_close(pooled(x), nn.functional.leaky_relu(nn.functional.avg_pool2d(x, 2), 0.01))


def test_norms_are_of_one_image_and_start_for_leaky_relu() -> None:
    net = NNUNet(1, 3, PlainOptions(widths=(32, 64)))
    norms = [module for module in net.modules() if isinstance(module, nn.InstanceNorm2d)]
    assert norms
    assert {(norm.eps, norm.affine, norm.track_running_stats) for norm in norms} == {(1e-5, True, False)}
    x = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(net.train()(x)[:1], net.eval()(x[:1]), rtol=1e-4, atol=1e-5)
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 10_000:
            assert conv.weight.var().item() == pytest.approx(2 / 1.0001 / conv.weight[0].numel(), rel=0.1)


def test_levels_and_blocks_have_as_many_convolutions_as_asked_for() -> None:
    network = NNUNet(1, 2, PlainOptions(widths=(4, 6), convolutions=3, decoder_convolutions=4))
    assert [sum(isinstance(m, nn.Conv2d) for m in level.modules()) for level in network.encoder] == [3, 3]
    assert [sum(isinstance(m, nn.Conv2d) for m in block.join.modules()) for block in network.decoder] == [4]
    residual = NNUNet(1, 2, ResidualOptions(widths=(4, 6), decoder_convolutions=2))
    assert [sum(isinstance(m, nn.Conv2d) for m in block.join.modules()) for block in residual.decoder] == [2]
