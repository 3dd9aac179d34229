"""The U-Net of Chaitanya et al. 2020 (Contrastive learning of global and local features, NeurIPS 33)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, cat, nn

from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork


class UNetOptions(BaseModel):
    """Options of the U-Net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["unet"] = "unet"
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(16, 32, 64, 128, 128, 128),
        min_length=2,
        description="Channels of each level, finest first; between two levels the image is halved.",
    )


def convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    """Convolution that keeps the size, batch norm, ReLU: `(B, inputs, H, W)` -> `(B, outputs, H, W)`."""
    # TensorFlow's momentum .99 is 0.01 here; its SAME padding of an even kernel is one pixel right and bottom.
    layers = {
        "conv": nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2),
        "norm": nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        "relu": nn.ReLU(inplace=True),
    }
    return nn.Sequential(OrderedDict(layers if kernel % 2 else {"pad": nn.ZeroPad2d((0, 1, 0, 1)), **layers}))


class Encoder(nn.ModuleList):
    """Per level two convolutions; 2 x 2 max-pooling between levels, none after the last."""

    def __init__(self, in_channels: int, widths: Sequence[int]):
        before = (in_channels, *widths)
        super().__init__(
            nn.Sequential(convolution(inputs, width), convolution(width, width))
            for inputs, width in zip(before, widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> features of all levels, finest first; level k has sides H / 2^k, W / 2^k."""
        features = [self[0](x)]
        for level in list(self)[1:]:
            features.append(level(nn.functional.max_pool2d(features[-1], 2)))
        return features


class DecoderBlock(nn.Module):
    """Double the size, join the skip, convolve: `(B, inputs, h, w)` -> `(B, width, 2h, 2w)`."""

    def __init__(self, inputs: int, width: int, convolutions: int = 2):
        super().__init__()
        # Nearest-neighbour up-sampling and a 2 x 2 convolution, as the authors' code; no transposed convolution.
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), convolution(inputs, width, kernel=2))
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

    encoder: Encoder

    def __init__(self, in_channels: int, classes: int, options: UNetOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.encoder_channels, self.multiple = in_channels, widths, 2 ** (len(widths) - 1)
        self.encoder = Encoder(in_channels, widths)
        self.decoder = nn.ModuleList(
            DecoderBlock(widths[level + 1], widths[level], convolutions=2 if level else 1)
            for level in reversed(range(len(widths) - 1))
        )
        finest = widths[0]
        self.head = nn.Sequential(
            convolution(finest, finest),
            convolution(finest, finest),
            nn.Conv2d(finest, classes, kernel_size=3, padding=1, bias=False),
        )
        self.apply(_initialise)

    def decoder_channels(self, blocks: int) -> int:
        """Channels of the feature map after the first `blocks` decoder blocks; 0 is the bottleneck."""
        return self.encoder_channels[-1 - self._checked(blocks)]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images `(B, C, H, W)` -> features, finest first; see `SegmentationNetwork.encode`."""
        features: list[Tensor] = self.encoder(self._padded(x))
        return features

    def decode(self, features: list[Tensor], blocks: int) -> Tensor:
        """Feature map after the first `blocks` decoder blocks; see `SegmentationNetwork.decode`."""
        x = features[-1]
        for block, skip in zip(list(self.decoder)[: self._checked(blocks)], reversed(features[:-1]), strict=False):
            x = block(x, skip)
        return x

    def _checked(self, blocks: int) -> int:
        if not 0 <= blocks <= self.blocks:
            raise GlocalError(f"The network has {self.blocks} decoder blocks, {blocks} were asked for: choose fewer.")
        return blocks


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
