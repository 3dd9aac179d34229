"""The encoder against MONAI's ResNet-50, weight by weight, and the decoder's three ways up."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from glocal.networks.resnet50_unet import Encoder, ResNet50UNet, ResNet50UNetOptions

SMALL = ResNet50UNetOptions(width=4, decoder_widths=(8, 7, 6, 5, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_encoder_computes_what_monai_s_computes(channels: int) -> None:
    from monai.networks.nets.resnet import ResNet, ResNetBottleneck

    torch.manual_seed(0)
    theirs = ResNet(
        ResNetBottleneck,
        [3, 4, 6, 3],
        [4, 8, 16, 32],
        spatial_dims=2,
        n_input_channels=channels,
        conv1_t_size=7,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=False,
    )
    ours = Encoder(channels, 4)
    state = theirs.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    seen: list[Tensor] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        theirs.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    x = torch.rand(2, channels, 64, 96)
    for _ in range(2):  # in training, and then with the statistics this has left
        seen.clear()
        theirs(x)
        for a, b in zip(ours(x)[1:], seen, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        ours.eval()
        theirs.eval()


def test_number_of_weights_is_that_of_resnet_50() -> None:
    published = 25_557_032 - (2048 * 1000 + 1000)  # without its classifier
    assert sum(p.numel() for p in Encoder(3, 64).parameters()) == published
    assert sum(p.numel() for p in Encoder(1, 64).parameters()) == published - 2 * 64 * 49


def test_the_last_block_has_no_skip_and_the_others_theirs() -> None:
    net = ResNet50UNet(1, 3, SMALL).eval()
    features = net.encode(torch.rand(1, 1, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
    seen: list[Tensor] = []
    for block in net.decoder:
        block.get_submodule("join").register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    net.decode(features, 5)
    assert [x.shape[1] for x in seen] == [128 + 64, 8 + 32, 7 + 16, 6 + 4, 5]
    for x, skip in zip(seen, features[-2::-1], strict=False):
        assert torch.equal(x[:, -skip.shape[1] :], skip)


@pytest.mark.parametrize("up", ["nearest", "bilinear", "transposed"])
def test_decoders_differ_only_in_how_they_double_the_size(up: Literal["nearest", "bilinear", "transposed"]) -> None:
    nearest = ResNet50UNet(1, 3, SMALL)
    net = ResNet50UNet(1, 3, SMALL.model_copy(update={"up": up}))
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 3, 64, 64)
    different = net.state_dict().keys() ^ nearest.state_dict().keys()
    assert different == (
        {f"decoder.{k}.up.{w}" for k in range(5) for w in ("weight", "bias")} if up == "transposed" else set()
    )
    x = torch.rand(1, 128, 2, 2)
    larger = net.decoder[0].get_submodule("up")(x)
    assert larger.shape == (1, 128, 4, 4)
    if up != "transposed":
        assert torch.equal(larger, nn.functional.interpolate(x, scale_factor=2, mode=up))


def test_weights_start_by_fan_out_in_the_encoder_and_by_fan_in_in_the_decoder() -> None:
    net = ResNet50UNet(1, 3, ResNet50UNetOptions(width=16, decoder_widths=(64, 64, 64, 64, 64)))
    for part, fan in ((net.encoder, 0), (net.decoder, 1)):
        for conv in part.modules():
            if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 10_000:
                expected = 2 / (conv.weight.shape[fan] * conv.weight[0, 0].numel())
                assert conv.weight.var().item() == pytest.approx(expected, rel=0.1)
