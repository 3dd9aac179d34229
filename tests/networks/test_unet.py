"""The U-Net against the channel table of METHODS 1.1, its taps, and the projection heads."""

import pytest
import torch
from torch import nn

from glocal.errors import GlocalError
from glocal.networks.heads import DenseHead, GlobalHead, PooledHead
from glocal.networks.registry import NETWORKS, build
from glocal.networks.unet import UNet, UNetOptions, convolution

SMALL = UNetOptions(widths=(4, 6, 8))


def network(options: UNetOptions = SMALL, classes: int = 3, channels: int = 1) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(channels, classes, options)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("widths", "decoder"),
    [
        ((16, 32, 64, 128, 128, 128), [128, 128, 128, 64, 32, 16]),
        ((16, 32, 64, 128, 128), [128, 128, 64, 32, 16]),
    ],
)
def test_taps_have_the_channels_and_sides_of_the_paper(widths, decoder):
    net = network(UNetOptions(widths=widths)).eval()
    features = net.encode(images(1, 1, 64, 96))
    assert [tuple(f.shape[1:]) for f in features] == [(w, 64 >> k, 96 >> k) for k, w in enumerate(widths)]
    assert net.encoder_channels == widths
    assert net.blocks == len(widths) - 1
    for blocks, channels in enumerate(decoder):
        level = net.blocks - blocks
        assert net.decode(features, blocks).shape == (1, channels, 64 >> level, 96 >> level)
        assert net.decoder_channels(blocks) == channels


def test_number_of_weights_follows_from_the_layers():
    def layer(inputs, outputs, kernel=3):  # weights, bias, batch norm's scale and shift
        return inputs * outputs * kernel**2 + 3 * outputs

    w = (16, 32, 64, 128, 128, 128)
    encoder = sum(layer(i, o) + layer(o, o) for i, o in zip((1, *w), w, strict=False))
    decoder = sum(
        layer(i, o, 2) + layer(2 * o, o) + (layer(o, o) if o > 16 else 0) for i, o in zip(w[1:], w[:-1], strict=True)
    )
    head = 2 * layer(16, 16) + 16 * 4 * 9
    net = network(UNetOptions(), classes=4)
    for part, expected in ((net.encoder, encoder), (net.decoder, decoder), (net.head, head)):
        assert sum(p.numel() for p in part.parameters()) == expected
    assert sum(p.numel() for p in net.parameters()) == encoder + decoder + head


def test_parts_are_found_by_name_in_the_state():
    net = network()
    assert {key.split(".")[0] for key in net.state_dict()} == {"encoder", "decoder", "head"}
    assert {key.split(".")[1] for key in net.state_dict() if key.startswith("decoder.")} == {"0", "1"}


def test_weights_start_with_variance_two_over_fan_in_and_biases_at_zero():
    net = network(UNetOptions(widths=(16, 64, 128)))
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        assert conv.bias is None or not conv.bias.any()
        if conv.weight.numel() > 10_000:
            assert conv.weight.var().item() == pytest.approx(2 / conv.weight[0].numel(), rel=0.1)


def test_batch_norm_is_tensorflows():
    norms = [m for m in network().modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_convolution_starts_and_computes_as_monais(kernel):
    from monai.networks.blocks import Convolution

    def seeded(make):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    ours = seeded(lambda: convolution(3, 5, kernel))
    theirs = seeded(
        lambda: Convolution(
            2,
            3,
            5,
            kernel_size=kernel,
            adn_ordering="NA",
            act="RELU",
            norm=("BATCH", {"eps": 1e-3, "momentum": 0.01}),
            padding=(kernel - 1) // 2,
        )
    )
    x = images(2, 3, 6, 7) - 0.5
    padded = nn.functional.pad(x, (0, 1, 0, 1)) if kernel == 2 else x
    for _ in range(2):  # training, with statistics of the batch and then with those it kept
        torch.testing.assert_close(ours(x), theirs(padded), rtol=0, atol=0)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        ours.eval()
        theirs.eval()


def test_even_kernel_pads_right_and_bottom_only():
    layer = convolution(1, 1, kernel=2).eval()
    conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    out = layer(torch.ones(1, 1, 3, 3))[0, 0] * (1 + 1e-3) ** 0.5
    torch.testing.assert_close(out, torch.tensor([[4.0, 4, 2], [4, 4, 2], [2, 2, 1]]))


def test_decoder_block_joins_up_sampled_map_before_skip():
    block = network().eval().decoder[0]
    first = next(m for m in block.join.modules() if isinstance(m, nn.Conv2d))
    coarse, skip = images(1, 8, 4, 4), images(1, 6, 8, 8)
    with torch.no_grad():
        first.weight[:, 6:] = 0  # deaf to the skip
    assert torch.equal(block(coarse, skip), block(coarse, skip + 1))
    assert not torch.equal(block(coarse, skip), block(coarse + 1, skip))


def test_segment_is_encode_then_decode_then_head():
    net = network().eval()
    x = images(2, 1, 16, 24)
    expected = net.head(net.decode(net.encode(x), net.blocks))
    assert expected.shape == (2, 3, 16, 24)
    assert torch.equal(net.segment(x), expected)
    assert torch.equal(net(x), expected)


def test_odd_sizes_give_logits_of_their_own_size_and_taps_of_the_padded_one():
    net = network().eval()
    x = images(1, 1, 18, 23)
    assert net(x).shape == (1, 3, 18, 23)
    assert [tuple(f.shape[2:]) for f in net.encode(x)] == [(20, 24), (10, 12), (5, 6)]
    padded = nn.functional.pad(x, (0, 1, 0, 2), mode="replicate")
    assert torch.equal(net(x), net(padded)[..., :18, :23])


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_gradient_reaches_the_encoder_and_the_asked_blocks_only(blocks):
    net = network()
    net.decode(net.encode(images(2, 1, 16, 16)), blocks).square().mean().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())
    for k, block in enumerate(net.decoder):
        assert all((p.grad is not None) == (k < blocks) for p in block.parameters())
    assert all(p.grad is None for p in net.head.parameters())


def test_gradient_of_logits_moves_every_part():
    net = network()
    net(images(2, 1, 16, 16)).square().mean().backward()
    weights = {name: p for name, p in net.named_parameters() if p.ndim == 4}
    assert [name for name, p in weights.items() if p.grad is None or not p.grad.any()] == []


def test_batch_of_one_trains():
    net = network()
    net(images(1, 1, 8, 8)).mean().backward()
    assert net.encoder[0][0].conv.weight.grad is not None


def test_evaluation_does_not_depend_on_the_rest_of_the_batch_or_the_call():
    net = network().eval()
    x = images(3, 1, 16, 16)
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 2, 16, 16), "1 channel"), ((1, 1, 3, 16), "3 x 16"), ((1, 1, 4, 4), "batch normalisation")],
)
def test_images_that_do_not_fit_are_explained(shape, words):
    with pytest.raises(GlocalError, match=words):
        network().encode(torch.zeros(shape))


@pytest.mark.parametrize("blocks", [-1, 3])
def test_number_of_blocks_is_checked(blocks):
    net = network()
    with pytest.raises(GlocalError, match="2 decoder blocks"):
        net.decoder_channels(blocks)


def test_registry_builds_what_the_options_name():
    net = build(UNetOptions(widths=(4, 8)), in_channels=2, classes=5)
    assert net(images(2, 2, 8, 8)).shape == (2, 5, 8, 8)
    assert all(entry.paper for entry in NETWORKS.values())


@pytest.mark.parametrize("wrong", [{"width": (4, 8)}, {"widths": (4,)}, {"widths": (4, 0)}, {"name": "unnet"}])
def test_options_refuse_what_is_no_unet(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UNetOptions.model_validate(wrong)


def test_global_head_is_two_layers_without_bias():
    head = GlobalHead(8 * 2 * 3, hidden=10, outputs=7)
    x = images(2, 8, 2, 3)
    first, second = (m.weight for m in head.modules() if isinstance(m, nn.Linear))
    assert sum(p.numel() for p in head.parameters()) == 48 * 10 + 10 * 7
    torch.testing.assert_close(head(x), (x.flatten(1) @ first.T).relu() @ second.T)


def test_pooled_head_takes_any_size_and_sees_the_mean_only():
    head = PooledHead(6, outputs=5)
    x = images(2, 6, 4, 4)
    assert head(x).shape == (2, 5)
    torch.testing.assert_close(head(x), head(x.mean(dim=(2, 3), keepdim=True).expand(2, 6, 3, 7)))
    assert sum(p.numel() for p in head.parameters()) == 6 * 6 + 6 + 6 * 5 + 5


def test_dense_head_treats_each_location_alone():
    head = DenseHead(4).eval()
    x = images(1, 4, 5, 5)
    assert head(x).shape == (1, 4, 5, 5)
    torch.testing.assert_close(head(x)[..., 2:3, 3:4], head(x[..., 2:3, 3:4]))
    assert DenseHead(4, outputs=9)(x).shape == (1, 9, 5, 5)
    assert not any(m.bias is not None for m in head.modules() if isinstance(m, nn.Conv2d))
