"""UCTransNet (Wang H. et al., AAAI 2022): the skips of a U-Net pass a transformer over channels."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import Pooled, Widths, layer, layers


class UCTransNetOptions(BaseModel):
    """Options of UCTransNet; widths are those of the skips, then of the bottleneck."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["uctransnet"] = "uctransnet"
    widths: Widths = (64, 128, 256, 512, 512)
    depth: int = Field(4, ge=1, description="layers of the transformer")
    heads: int = Field(4, ge=1)
    positions: int = Field(
        14,
        ge=1,
        description="side of the grid of position embeddings, resized to the bottleneck's; 14 is for 224 pixels",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="of tokens and of attention")


def patches(scales: int) -> list[int]:
    """Sides of the patches that each scale is cut into, 16, 8, 4 and 2 for four: as many of each, as the bottleneck."""
    return [2 ** (scales - scale) for scale in range(scales)]


class Memory(nn.Module):
    """Keys and values of one layer, from the tokens of all scales side by side."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.keys = nn.Linear(width, heads * width, bias=False)
        self.values = nn.Linear(width, heads * width, bias=False)

    def forward(self, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens `(B, n, c)` of each scale -> keys and values `(B, n, heads, sum of c)`."""
        everything = self.norm(torch.cat(tuple(tokens), dim=-1))
        keys, values = (project(everything).unflatten(-1, (self.heads, -1)) for project in (self.keys, self.values))
        return keys, values


class Scale(nn.Module):
    """What one scale does in one layer: its channels attend to those of all scales, then comes an MLP (Eq. 2 to 5)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, heads * width, bias=False)
        self.similarity = nn.InstanceNorm2d(heads)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens `(B, n, c)`, keys and values `(B, n, heads, k)` -> `(B, n, c)`."""
        queries = self.query(self.norm(tokens)).unflatten(-1, (self.heads, -1))
        similarity = torch.einsum("bnhc,bnhk->bhck", queries, keys) / keys.shape[-1] ** 0.5
        attention = self.dropout(self.similarity(similarity).softmax(dim=-1))
        context = torch.einsum("bhck,bnhk->bnc", attention, values) / self.heads  # the mean over heads
        attended = tokens + self.dropout(self.out(context))
        transformed: Tensor = attended + self.mlp(attended)
        return transformed


class Transformer(nn.Module):
    """From the skips to tokens, through all layers but for what the last layer does for each scale alone.

    That lies in the decoder block that joins the scale's skip, so that a block that is trained has gradients for all
    its weights, and one that is not used has none to miss.
    """

    def __init__(self, widths: Sequence[int], options: UCTransNetOptions):
        super().__init__()
        heads, dropout, total = options.heads, options.dropout, sum(widths)
        self.embed = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size=patch, stride=patch)
            for width, patch in zip(widths, patches(len(widths)), strict=True)
        )
        grid = options.positions
        self.positions = nn.ParameterList(torch.zeros(1, width, grid, grid) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.memories = nn.ModuleList(Memory(total, heads) for _ in range(options.depth))
        self.scales = nn.ModuleList(
            nn.ModuleList(Scale(width, heads, dropout) for width in widths) for _ in range(options.depth - 1)
        )

    def forward(self, skips: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Skips, finest first -> their tokens `(B, n, c)` before the last layer, and its keys and values."""
        tokens = [self._tokens(*of_scale) for of_scale in zip(skips, self.embed, self.positions, strict=True)]
        for memory, scales in zip(self.memories, self.scales, strict=False):
            keys, values = memory(tokens)
            tokens = [scale(own, keys, values) for scale, own in zip(scales, tokens, strict=True)]  # type: ignore[call-overload]
        return tokens, *self.memories[-1](tokens)

    def _tokens(self, skip: Tensor, embed: nn.Module, positions: Tensor) -> Tensor:
        patches = embed(skip)
        if patches.shape[-2:] != positions.shape[-2:]:
            positions = nn.functional.interpolate(positions, size=patches.shape[-2:], mode="bilinear")
        tokens: Tensor = self.dropout((patches + positions).flatten(2).transpose(1, 2))
        return tokens


class DecoderBlock(nn.Module):
    """Finish the skip's way through the transformer, weigh its channels by both maps, join it, two convolutions.

    Args:
        inputs: channels of the coarser map.
        width: channels of the skip.
        outputs: channels of what comes out.
        patch: side of the skip's patches.
    """

    def __init__(self, inputs: int, width: int, outputs: int, patch: int, options: UCTransNetOptions):
        super().__init__()
        self.patch = patch
        self.scale = Scale(width, options.heads, options.dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.reconstruct = layer(width, width, kernel=1)
        self.of_skip, self.of_map = nn.Linear(width, width), nn.Linear(inputs, width)
        self.join = layers(layer, width + inputs, outputs)

    def forward(self, x: Tensor, skip: Tensor, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`(B, inputs, h, w)`, the skip `(B, width, 2h, 2w)` and its tokens -> `(B, outputs, 2h, 2w)`."""
        height, width = (side // self.patch for side in skip.shape[-2:])
        grid = self.norm(self.scale(tokens, keys, values)).transpose(1, 2).unflatten(-1, (height, width))
        # The code convolves (1 x 1) after up-sampling: the same values, each computed patch² times.
        skip = skip + nn.functional.interpolate(self.reconstruct(grid), scale_factor=self.patch)
        # Channel-wise cross attention, Eq. 6 and 7; the mean of the up-sampled map is that of the map.
        weights = (self.of_skip(skip.mean(dim=(-2, -1))) + self.of_map(x.mean(dim=(-2, -1)))) / 2
        skip = (skip * weights.sigmoid()[..., None, None]).relu()
        joined: Tensor = self.join(torch.cat([skip, nn.functional.interpolate(x, scale_factor=2)], dim=1))
        return joined


class UCTransNet(SegmentationNetwork):
    """U-Net whose skips pass a channel transformer together, and a channel attention one by one (the authors' code).

    The first level has one convolution, the others two; the head is a 1 x 1 convolution. The part `decoder.0` holds
    the transformer, which every decoder block needs, and so is trained with the first of them. Weights are drawn as
    PyTorch does by default, those of the MLPs by Glorot's rule.
    """

    def __init__(self, in_channels: int, classes: int, options: UCTransNetOptions):
        super().__init__()
        widths = options.widths
        *skips, bottleneck = widths
        self.in_channels, self.multiple = in_channels, 2 ** len(skips)
        outputs = [*reversed(skips[:-1]), skips[0]]
        self.encoder_channels, self.block_channels = widths, tuple(outputs)
        levels = zip((in_channels, *widths), widths, strict=False)
        self.encoder = Pooled(layers(layer, i, width, 2 if k else 1) for k, (i, width) in enumerate(levels))
        self.decoder = nn.ModuleList(
            DecoderBlock(*sizes, options)
            for sizes in zip([bottleneck, *outputs[:-1]], skips[::-1], outputs, patches(len(skips))[::-1], strict=True)
        )
        self.decoder[0].add_module("transformer", Transformer(skips, options))
        self.head = nn.Conv2d(skips[0], classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, Scale):
                module.mlp.apply(_glorot)

    def decode(self, features: list[Tensor], blocks: int) -> Tensor:
        """Feature map after the first `blocks` decoder blocks; see `SegmentationNetwork.decode`."""
        x, skips = features[-1], features[:-1]
        if self._checked(blocks):
            tokens, keys, values = self.decoder[0].get_submodule("transformer")(skips)
            for block, skip, own in zip(list(self.decoder)[:blocks], skips[::-1], tokens[::-1], strict=False):
                x = block(x, skip, own, keys, values)
        return x

    def compile_parts(self) -> None:
        """As `SegmentationNetwork.compile_parts`; the transformer is called by itself."""
        super().compile_parts()
        self.decoder[0].get_submodule("transformer").compile()


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
