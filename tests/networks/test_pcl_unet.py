"""PCL's U-Net against METHODS 1.3: weights, layers and how they start."""

import pytest
import torch
from torch import Tensor, nn

from glocal.networks.heads import PooledHead
from glocal.networks.pcl_unet import PCLUNet, PCLUNetOptions


def millions(*modules: nn.Module) -> float:
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize(("base", "encoder", "whole"), [(32, 5.24, 7.76), (48, 11.59, 17.46)])
def test_number_of_weights_is_that_of_the_released_code(base: int, encoder: float, whole: float) -> None:
    net = PCLUNet(1, 4, PCLUNetOptions(widths=tuple(base * 2**k for k in range(5))))
    assert millions(net.encoder, PooledHead(16 * base, outputs=512)) == encoder
    assert millions(net) == whole


def test_number_of_weights_with_jcl_s_heads_is_that_of_the_released_code() -> None:
    """METHODS 1.4: two instance projectors and the auxiliary pixel projector, on top of the whole U-Net."""

    def instance(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128))

    def pixel(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 128, 3), nn.BatchNorm2d(128))

    assert millions(PCLUNet(1, 8, PCLUNetOptions()), instance(512), instance(128), pixel(512), pixel(128)) == 8.62


def test_the_center_alone_has_no_batch_norm_unless_asked_for() -> None:
    small = (4, 6, 8)
    for asked in (False, True):
        net = PCLUNet(1, 3, PCLUNetOptions(widths=small, center_norm=asked))
        *levels, center = net.encoder.children()
        for level in [*levels, *net.decoder]:
            assert sum(isinstance(m, nn.BatchNorm2d) for m in level.modules()) == 2
            assert {m.negative_slope for m in level.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
        assert sum(isinstance(m, nn.BatchNorm2d) for m in center.modules()) == (2 if asked else 0)
        assert sum(isinstance(m, nn.ReLU) for m in center.modules()) == 2
        assert not any(isinstance(m, nn.LeakyReLU) for m in center.modules())
        assert net.bottleneck_norm == ("batch" if asked else "none")


def test_weights_start_for_leaky_relu_and_biases_at_zero() -> None:
    net = PCLUNet(1, 3, PCLUNetOptions(widths=(16, 64, 128)))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            assert conv.bias is None or not conv.bias.any()
            if conv.weight.numel() > 10_000:
                expected = 2 / 1.0001 / conv.weight[0].numel()
                assert conv.weight.var().item() == pytest.approx(expected, rel=0.1)
    assert isinstance(net.head, nn.Conv2d)
    assert net.head.bias is None
    assert net.head.kernel_size == (1, 1)


def test_a_decoder_block_joins_the_up_sampled_map_before_the_skip() -> None:
    net = PCLUNet(1, 3, PCLUNetOptions(widths=(4, 6, 8))).eval()
    block = net.decoder[0]
    seen: list[Tensor] = []
    block.get_submodule("join").register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    coarse, skip = torch.rand(1, 8, 4, 4), torch.rand(1, 6, 8, 8)
    block(coarse, skip)
    up = block.get_submodule("up")
    assert torch.equal(seen[0], torch.cat([up(coarse), skip], dim=1))
    weight, bias = up.get_parameter("weight"), up.get_parameter("bias")
    for row, column in ((0, 0), (3, 5), (7, 2)):  # stride 2, so each pixel comes from one
        one = coarse[0, :, row // 2, column // 2] @ weight[:, :, row % 2, column % 2] + bias
        torch.testing.assert_close(seen[0][0, :6, row, column], one)
