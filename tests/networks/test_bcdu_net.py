"""BCDU-Net: its ConvLSTM against a loop over time, its dense bottleneck, its dropout."""

import pytest
import torch
from torch import Tensor, nn

from glocal.networks.bcdu_net import BCDUNet, BCDUNetOptions, ConvLSTM, Encoder, RecurrentBlock

SMALL = BCDUNetOptions(widths=(4, 6, 8), dropout=0.0)


def lstm(module: ConvLSTM, maps: list[Tensor]) -> Tensor:
    """Shi et al. 2015, Eq. 3 without peepholes, for any number of maps; gates are i, f, c, o, as Keras orders them."""
    width = module.recurrent.in_channels
    hidden = cell = torch.zeros(maps[0].shape[0], width, *maps[0].shape[2:])

    def gate(number: int, x: Tensor) -> Tensor:
        rows = slice(number * width, (number + 1) * width)
        assert module.input.bias is not None
        from_input = nn.functional.conv2d(x, module.input.weight[rows], module.input.bias[rows], padding=1)
        return from_input + nn.functional.conv2d(hidden, module.recurrent.weight[rows], padding=1)

    for x in maps:
        i, f, c, o = (gate(number, x) for number in range(4))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden


def test_the_lstm_is_that_of_a_loop_over_time() -> None:
    torch.manual_seed(0)
    module = ConvLSTM(5, 3)
    first, second = torch.randn(2, 2, 5, 6, 7)
    torch.testing.assert_close(module(first, second), lstm(module, [first, second]))
    assert not torch.allclose(module(first, second), module(second, first), atol=1e-3)


def test_skip_and_up_sampled_map_pass_in_both_orders() -> None:
    torch.manual_seed(0)
    block = RecurrentBlock(8, 6).eval()
    seen: list[Tensor] = []
    block.join.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    coarse, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 6, 8, 8)
    assert block(coarse, skip).shape == (2, 6, 8, 8)
    up = block.up(coarse)
    both = torch.cat([lstm(block.forwards, [skip, up]), lstm(block.backwards, [up, skip])], dim=1)
    assert both.shape[1] == 6  # each direction is half as wide
    torch.testing.assert_close(seen[0], torch.tanh(block.merge(both)))


@pytest.mark.parametrize("dense", [1, 2, 3])
def test_each_pair_of_the_bottleneck_sees_all_before_it(dense: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder(1, (4, 6, 8), dense, dropout=0.0).eval()
    assert [pair[0].conv.in_channels for pair in encoder.dense] == [6, 8, 16][:dense]
    x = torch.rand(1, 1, 16, 16)
    fine, skip, bottleneck = encoder(x)
    outputs: list[Tensor] = []
    for pair in encoder.dense:
        outputs.append(pair(torch.cat(outputs, 1) if outputs else nn.functional.max_pool2d(skip, 2)))
    assert torch.equal(bottleneck, outputs[-1])
    assert fine.shape == (1, 4, 16, 16)


def test_dropout_falls_on_the_coarsest_skip_and_the_bottleneck_in_training_only() -> None:
    net = BCDUNet(1, 3, BCDUNetOptions(widths=(4, 6, 8), dropout=0.5))
    x = torch.rand(2, 1, 32, 32)
    first, second = net.encode(x), net.encode(x)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, False]
    net.eval()
    assert all(torch.equal(a, b) for a, b in zip(net.encode(x), net.encode(x), strict=True))
    calm = BCDUNet(1, 3, SMALL).train()
    assert all(torch.equal(a, b) for a, b in zip(calm.encode(x), calm.encode(x), strict=True))


def test_the_level_whose_skip_is_dropped_is_pooled_whole() -> None:
    """As the code, where dropout comes after the third level and beside its pooling."""
    encoder = Encoder(1, (4, 6, 8), dense=1, dropout=0.5)
    seen: list[Tensor] = []
    encoder.dense[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    x = torch.rand(1, 1, 16, 16)
    encoder(x)
    encoder(x)
    assert torch.equal(seen[0], seen[1])


def test_weights_and_biases_start_as_keras_draws_them() -> None:
    net = BCDUNet(1, 3, BCDUNetOptions(widths=(32, 64, 128)))
    for module in net.modules():
        if isinstance(module, ConvLSTM):
            assert module.input.bias is not None
            width = len(module.input.bias) // 4
            expected = torch.cat([torch.zeros(width), torch.ones(width), torch.zeros(2 * width)])
            assert torch.equal(module.input.bias, expected)
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.var().item() == pytest.approx(2 / module.weight[0].numel(), rel=0.1)


def test_default_widths_and_depth_are_the_published_ones() -> None:
    assert (BCDUNetOptions().widths, BCDUNetOptions().dense) == ((64, 128, 256, 512), 3)
