"""The U-Net of Chaitanya et al. 2020 (Contrastive learning of global and local features, NeurIPS 33)."""

from collections import OrderedDict
from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, cat, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import Pooled, Up, Widths, he, upsampling


class UNetOptions(BaseModel):
    """Options of the U-Net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["unet"] = "unet"
    widths: Widths = (16, 32, 64, 128, 128, 128)
    up: Up = Field("nearest", description="how the decoder doubles the size")


def convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    """Convolution that keeps the size, batch norm, ReLU: `(B, inputs, H, W)` -> `(B, outputs, H, W)`."""
    # TensorFlow's momentum .99 is 0.01 here; its SAME padding of an even kernel is one pixel right and bottom.
    layers = {
        "conv": nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2),
        "norm": nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        "relu": nn.ReLU(inplace=True),
    }
    return nn.Sequential(OrderedDict(layers if kernel % 2 else {"pad": nn.ZeroPad2d((0, 1, 0, 1)), **layers}))


def encoder(in_channels: int, widths: tuple[int, ...]) -> Pooled:
    """Per level two convolutions; images `(B, in_channels, H, W)` -> features of all levels."""
    levels = zip((in_channels, *widths), widths, strict=False)
    return Pooled(nn.Sequential(convolution(inputs, width), convolution(width, width)) for inputs, width in levels)


class DecoderBlock(nn.Module):
    """Double the size, join the skip, convolve: `(B, inputs, h, w)` -> `(B, width, 2h, 2w)`."""

    def __init__(self, inputs: int, width: int, convolutions: int = 2, up: Up = "nearest"):
        super().__init__()
        # Nearest-neighbour up-sampling and a 2 x 2 convolution, as the authors' code; no transposed convolution.
        self.up = upsampling(up, inputs, width, partial(convolution, kernel=2))
        self.join = nn.Sequential(*(convolution(width if k else 2 * width, width) for k in range(convolutions)))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` is the coarser map; `skip` `(B, width, 2h, 2w)` the encoder's feature of this block's size."""
        joined: Tensor = self.join(cat([self.up(x), skip], dim=1))
        return joined


class UNet(SegmentationNetwork):
    """U-Net with six levels by default, 2.1 million weights (Chaitanya et al. 2020 and the authors' code).

    A decoder block is as wide as the skip it joins: 128, 128, 64, 32, 16 by default, at sides H/16, H/8, H/4, H/2, H.
    The last block has one 3 x 3 convolution, the others two; the head has two more and the logit convolution, so
    that nothing of them is transferred. Weights are drawn from N(0, 2 / fan_in), biases start at 0.
    """

    def __init__(self, in_channels: int, classes: int, options: UNetOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.multiple = in_channels, 2 ** (len(widths) - 1)
        self.encoder_channels, self.block_channels = widths, widths[-2::-1]
        self.encoder = encoder(in_channels, widths)
        self.decoder = nn.ModuleList(
            DecoderBlock(widths[level + 1], widths[level], convolutions=2 if level else 1, up=options.up)
            for level in reversed(range(len(widths) - 1))
        )
        finest = widths[0]
        self.head = nn.Sequential(
            convolution(finest, finest),
            convolution(finest, finest),
            nn.Conv2d(finest, classes, kernel_size=3, padding=1, bias=False),
        )
        self.apply(he)
