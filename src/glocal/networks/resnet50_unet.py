"""A U-Net on ResNet-50 (He et al., CVPR 2016), the backbone of IDEAL and of the pixel-global method."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import Up, he, layer, layers

DEPTHS = (3, 4, 6, 3)  # bottleneck blocks of the four stages


class ResNet50UNetOptions(BaseModel):
    """Options of the ResNet-50 U-Net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["resnet50-unet"] = "resnet50-unet"
    width: int = Field(64, ge=1, description="of the stem; the four stages have 4, 8, 16 and 32 times as many channels")
    decoder_widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=5, max_length=5)] = (
        256,
        128,
        64,
        32,
        16,
    )
    up: Up = Field("nearest", description="how the decoder doubles the size")


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution around a short cut; the 3 x 3 has the stride (ResNet "v1.5")."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        plain = partial(layer, bias=False)
        outputs = 4 * planes
        self.residual = nn.Sequential(
            plain(inputs, planes, kernel=1),
            plain(planes, planes, stride=stride),
            plain(planes, outputs, kernel=1, activation=None),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else plain(inputs, outputs, kernel=1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` -> `(B, 4 planes, H / stride, W / stride)`."""
        added: Tensor = self.residual(x) + self.shortcut(x)
        return added.relu()


class Encoder(nn.Module):
    """ResNet-50 without its classifier."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.stem = layer(in_channels, width, kernel=7, stride=2, bias=False)
        self.stages = nn.ModuleList()
        inputs = width
        for number, depth in enumerate(DEPTHS):
            planes, stride = width * 2**number, 1 if number == 0 else 2
            blocks = [Bottleneck(inputs if k == 0 else 4 * planes, planes, 1 if k else stride) for k in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = 4 * planes

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> the stem's map at H / 2 and those of the stages at H / 4, H / 8, H / 16, H / 32."""
        features = [self.stem(x)]
        x = nn.functional.max_pool2d(features[0], kernel_size=3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class DecoderBlock(nn.Module):
    """Double the size, join the skip if there is one, two convolutions."""

    def __init__(self, inputs: int, skip: int, width: int, up: Up):
        super().__init__()
        self.up = (
            nn.ConvTranspose2d(inputs, inputs, kernel_size=2, stride=2)
            if up == "transposed"
            else nn.Upsample(scale_factor=2, mode=up)
        )
        self.join = layers(partial(layer, bias=False), inputs + skip, width)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """`(B, inputs, h, w)` and the skip `(B, skip, 2h, 2w)` or none -> `(B, width, 2h, 2w)`."""
        up = self.up(x)
        joined: Tensor = self.join(up if skip is None else torch.cat([up, skip], dim=1))
        return joined


class ResNet50UNet(SegmentationNetwork):
    """ResNet-50 encoder, skips from the stem and the first three stages, five decoder blocks, 3 x 3 logits.

    The last decoder block, to the image's own size, has no skip. No weights of natural images are loaded: convolutions
    of the encoder are drawn from N(0, 2 / fan_out) as in the paper, those of the decoder from N(0, 2 / fan_in).
    """

    def __init__(self, in_channels: int, classes: int, options: ResNet50UNetOptions):
        super().__init__()
        width, outputs = options.width, options.decoder_widths
        channels = (width, *(4 * width * 2**stage for stage in range(len(DEPTHS))))
        self.in_channels, self.multiple = in_channels, 2 ** len(channels)
        self.encoder_channels, self.block_channels = channels, outputs
        self.encoder = Encoder(in_channels, width)
        inputs: Sequence[int] = (channels[-1], *outputs)
        skips = (*channels[-2::-1], 0)
        self.decoder = nn.ModuleList(
            DecoderBlock(*sizes, options.up) for sizes in zip(inputs, skips, outputs, strict=False)
        )
        self.head = nn.Conv2d(outputs[-1], classes, kernel_size=3, padding=1)
        self.apply(he)
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
