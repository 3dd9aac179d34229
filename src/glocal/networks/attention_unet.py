"""Attention U-Net (Oktay et al. 2018): what comes from below says which places of a skip are let through."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import Up, Widths, he
from glocal.networks.unet import DecoderBlock, encoder


class AttentionUNetOptions(BaseModel):
    """Options of the Attention U-Net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["attention-unet"] = "attention-unet"
    widths: Widths = (64, 128, 256, 512, 1024)
    up: Up = Field("nearest", description="how the decoder doubles the size")


class Gate(nn.Module):
    """Additive gate, Eq. 1 and 2 of the paper: x ψ with ψ = σ(1 x 1(ReLU(W_x x + W_g g))), half as wide inside.

    g is the up-sampled map, of the skip's own size, so that ψ need not be resampled.
    """

    def __init__(self, width: int):
        super().__init__()
        inner = max(1, width // 2)
        self.skip = nn.Conv2d(width, inner, kernel_size=1, bias=False)  # W_x
        self.gating = nn.Conv2d(width, inner, kernel_size=1)  # W_g
        self.weight = nn.Conv2d(inner, 1, kernel_size=1)  # ψ

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """The skip and the gating map, both `(B, width, H, W)` -> the skip, weighted at each place."""
        logits: Tensor = self.weight((self.skip(x) + self.gating(g)).relu())
        return x * logits.sigmoid()


class GatedBlock(nn.Module):
    """The U-Net's decoder block with a gate on the skip: `(B, inputs, h, w)` -> `(B, width, 2h, 2w)`."""

    def __init__(self, inputs: int, width: int, up: Up):
        super().__init__()
        self.block, self.gate = DecoderBlock(inputs, width, up=up), Gate(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` is the coarser map; `skip` `(B, width, 2h, 2w)` the encoder's feature of this block's size."""
        up = self.block.up(x)
        joined: Tensor = self.block.join(torch.cat([up, self.gate(skip, up)], dim=1))
        return joined


class AttentionUNet(SegmentationNetwork):
    """Encoder and decoder of `unet` with a gate on every skip; the head is a 1 x 1 convolution."""

    def __init__(self, in_channels: int, classes: int, options: AttentionUNetOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.multiple = in_channels, 2 ** (len(widths) - 1)
        self.encoder_channels, self.block_channels = widths, widths[-2::-1]
        self.encoder = encoder(in_channels, widths)
        self.decoder = nn.ModuleList(
            GatedBlock(inputs, width, options.up) for inputs, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)
        self.apply(he)
