"""The gates of Attention U-Net, one pixel at a time, and that it is the U-Net otherwise."""

import math

import torch
from torch import Tensor, nn

from glocal.networks.attention_unet import AttentionUNet, AttentionUNetOptions, Gate
from glocal.networks.unet import UNet, UNetOptions


def test_a_gate_is_the_paper_s_at_every_place() -> None:
    torch.manual_seed(0)
    gate = Gate(4)
    assert gate.weight.in_channels == 2  # half of the skip's
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    x, g = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    out = gate(x, g)
    wx, wg = gate.skip.weight[:, :, 0, 0].tolist(), gate.gating.weight[:, :, 0, 0].tolist()
    bg, psi, bpsi = gate.gating.bias.tolist(), gate.weight.weight[0, :, 0, 0].tolist(), gate.weight.bias.item()
    for b in range(2):
        for row in range(3):
            for column in range(5):
                xs, gs = x[b, :, row, column].tolist(), g[b, :, row, column].tolist()
                q = bpsi
                for k in range(2):
                    inner = bg[k] + sum(wx[k][c] * xs[c] + wg[k][c] * gs[c] for c in range(4))
                    q += psi[k] * max(inner, 0.0)
                alpha = 1 / (1 + math.exp(-q))
                torch.testing.assert_close(out[b, :, row, column], torch.tensor([alpha * value for value in xs]))


def gates(net: nn.Module, bias: float) -> None:
    for module in net.modules():
        if isinstance(module, Gate):
            nn.init.zeros_(module.weight.weight)
            nn.init.constant_(module.weight.bias, bias)


def test_with_open_gates_it_is_the_unet_and_with_closed_ones_deaf_to_skips() -> None:
    widths = (4, 6, 8)
    net = AttentionUNet(1, 3, AttentionUNetOptions(widths=widths)).eval()
    unet = UNet(1, 3, UNetOptions(widths=widths)).eval()
    unet.encoder.load_state_dict(net.encoder.state_dict())
    block = {name.removeprefix("block."): value for name, value in net.decoder[0].state_dict().items()}
    unet.decoder[0].load_state_dict({name: value for name, value in block.items() if not name.startswith("gate")})
    x = torch.rand(2, 1, 16, 16)
    features = net.encode(x)
    gates(net, 30.0)
    torch.testing.assert_close(net.decode(features, 1), unet.decode(unet.encode(x), 1))
    gates(net, -100.0)
    others = [torch.randn_like(skip) for skip in features[:-1]]
    torch.testing.assert_close(net.decode(features, 2), net.decode([*others, features[-1]], 2))


def test_the_map_that_gates_is_the_one_from_below() -> None:
    net = AttentionUNet(1, 3, AttentionUNetOptions(widths=(4, 6, 8))).eval()
    seen: list[tuple[Tensor, ...]] = []
    net.decoder[0].get_submodule("gate").register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    features = net.encode(torch.rand(1, 1, 16, 16))
    net.decode(features, 1)
    assert torch.equal(seen[0][0], features[1])
    assert torch.equal(seen[0][1], net.decoder[0].get_submodule("block.up")(features[2]))


def test_default_widths_are_the_published_ones() -> None:
    assert AttentionUNetOptions().widths == (64, 128, 256, 512, 1024)
