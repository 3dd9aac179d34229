"""UCTransNet against a slow version: one scale, one head, one image at a time, as the paper and the code have it."""

import math

import pytest
import torch
from torch import Tensor, nn

from glocal.networks.uctransnet import Memory, Scale, Transformer, UCTransNet, UCTransNetOptions

OPTIONS = UCTransNetOptions(widths=(4, 6, 8, 8), depth=3, heads=2, positions=3)
SKIPS, PATCHES = (4, 6, 8), (8, 4, 2)


def network() -> UCTransNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UCTransNet(1, 3, OPTIONS)
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:  # norms, biases and position embeddings
                parameter.data += 0.3 * torch.randn(parameter.shape)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None and module.running_mean is not None:
            module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
            module.running_mean.normal_(generator=torch.Generator().manual_seed(4))
    return net.eval()


def slow_scale(scale: Scale, memory: Memory, own: Tensor, everything: Tensor) -> Tensor:
    """One image: tokens `(n, c)` of one scale and `(n, k)` of all -> `(n, c)`."""
    total, width = everything.shape[1], own.shape[1]
    normed, remembered = scale.norm(own), memory.norm(everything)
    context = torch.zeros_like(own)
    for head in range(scale.heads):
        rows, wide = slice(head * width, (head + 1) * width), slice(head * total, (head + 1) * total)
        query = normed @ scale.query.weight[rows].T
        key, value = remembered @ memory.keys.weight[wide].T, remembered @ memory.values.weight[wide].T
        similarity = query.T @ key / math.sqrt(total)  # (c, k): over channels, not places
        similarity = (similarity - similarity.mean()) / (similarity.var(unbiased=False) + 1e-5).sqrt()
        context += (similarity.softmax(dim=1) @ value.T).T / scale.heads
    attended = own + context @ scale.out.weight.T
    transformed: Tensor = attended + scale.mlp(attended)
    return transformed


def slow_decode(net: UCTransNet, features: list[Tensor]) -> Tensor:
    """One image through transformer and decoder."""
    transformer = net.decoder[0].get_submodule("transformer")
    assert isinstance(transformer, Transformer)
    blocks = dict(zip((2, 1, 0), net.decoder, strict=True))
    tokens = []
    for k, (skip, patch) in enumerate(zip(features[:-1], PATCHES, strict=True)):
        conv = transformer.embed[k]
        embedded = nn.functional.conv2d(skip, conv.get_parameter("weight"), conv.get_parameter("bias"), stride=patch)
        embedded = embedded + transformer.positions[k]  # the images here have as many patches as there are positions
        tokens.append(embedded[0].flatten(1).T)
    for layer in range(OPTIONS.depth):
        memory, everything = transformer.memories[layer], torch.cat(tokens, dim=1)
        assert isinstance(memory, Memory)
        last = layer == OPTIONS.depth - 1
        scales = [blocks[k].get_submodule("scale") if last else transformer.scales[layer][k] for k in range(3)]
        tokens = [slow_scale(scale, memory, own, everything) for scale, own in zip(scales, tokens, strict=True)]
    x = features[-1]
    for k in (2, 1, 0):
        block, skip, patch = blocks[k], features[k], PATCHES[k]
        normed = block.get_submodule("norm")(tokens[k])
        grid = normed.T.reshape(1, SKIPS[k], 3, 3)
        large = grid.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
        skip = skip + block.get_submodule("reconstruct")(large)  # after up-sampling, as the code
        up = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        of_skip, of_map = block.get_submodule("of_skip"), block.get_submodule("of_map")
        weights = torch.sigmoid((of_skip(skip.mean(dim=(2, 3))) + of_map(up.mean(dim=(2, 3)))) / 2)
        x = block.get_submodule("join")(torch.cat([torch.relu(skip * weights[..., None, None]), up], dim=1))
    return x


def test_the_decoder_is_the_paper_s_one_image_at_a_time() -> None:
    net = network()
    images = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast = net.decode(net.encode(images), net.blocks)
        for k in range(2):
            torch.testing.assert_close(
                fast[k : k + 1], slow_decode(net, net.encode(images[k : k + 1])), rtol=1e-4, atol=1e-5
            )


def test_statistics_before_up_sampling_are_those_after_it() -> None:
    """The 1 x 1 convolution and its batch norm run on the patches: in training too, the result is the code's."""
    net = network()
    reconstruct = net.decoder[0].get_submodule("reconstruct").train()
    grid = torch.randn(2, 8, 3, 3)
    after = reconstruct(grid.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    before = nn.functional.interpolate(reconstruct(grid), scale_factor=2)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_every_block_waits_for_all_skips_but_finishes_its_own() -> None:
    net = network()
    features = net.encode(torch.rand(1, 1, 24, 24))
    before = net.decode(features, 1)
    for k in range(3):  # the keys are those of all scales
        changed = [skip + torch.randn_like(skip) if j == k else skip for j, skip in enumerate(features)]
        assert not torch.allclose(net.decode(changed, 1), before)
    nn.init.normal_(net.decoder[1].get_submodule("scale.query").get_parameter("weight"))
    assert torch.equal(net.decode(features, 1), before)
    assert not torch.allclose(net.decode(features, 2), before.new_zeros(1))


def test_position_embeddings_are_resized_for_other_images() -> None:
    net = network()
    transformer = net.decoder[0].get_submodule("transformer")
    small, large, odd = (net.encode(torch.rand(1, 1, *size)) for size in ((24, 24), (48, 48), (16, 40)))
    assert [transformer(features[:-1])[0][0].shape[1] for features in (small, large, odd)] == [9, 36, 10]
    resized = nn.functional.interpolate(transformer.get_parameter("positions.0"), size=(2, 5), mode="bilinear")
    embedded = transformer.get_submodule("embed.0")(odd[0]) + resized
    seen: list[tuple[list[Tensor]]] = []
    transformer.get_submodule("memories.0").register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    transformer(odd[:-1])
    torch.testing.assert_close(seen[0][0][0], embedded.flatten(2).transpose(1, 2))


def test_dropout_falls_in_training_only() -> None:
    net = network().train()
    features = [feature.detach() for feature in net.encode(torch.rand(2, 1, 24, 24))]
    assert not torch.equal(net.decode(features, 3), net.decode(features, 3))
    calm = UCTransNet(1, 3, OPTIONS.model_copy(update={"dropout": 0.0})).train()
    features = [feature.detach() for feature in calm.encode(torch.rand(2, 1, 24, 24))]
    torch.testing.assert_close(calm.decode(features, 3), calm.decode(features, 3))


def test_default_sizes_are_the_published_ones() -> None:
    options = UCTransNetOptions()
    assert (options.widths, options.depth, options.heads) == ((64, 128, 256, 512, 512), 4, 4)
    net = UCTransNet(1, 3, options)
    transformer = net.decoder[0].get_submodule("transformer")
    assert [tuple(conv.weight.shape[2:]) for conv in transformer.get_submodule("embed").children()] == [
        (16, 16),
        (8, 8),
        (4, 4),
        (2, 2),
    ]
    assert transformer.get_submodule("memories.0").get_parameter("keys.weight").shape == (4 * 960, 960)
    assert net.decoder_channels(0) == 512
    assert net.block_channels == (256, 128, 64, 64)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_layer_is_enough(depth: int) -> None:
    net = UCTransNet(1, 3, OPTIONS.model_copy(update={"depth": depth}))
    net(torch.rand(2, 1, 24, 24)).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
