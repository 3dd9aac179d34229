"""BCDU-Net (Azad et al., ICCV workshops 2019): a densely connected bottleneck, skips joined by ConvLSTMs."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import ReLU, Widths, he, layer, layers


class BCDUNetOptions(BaseModel):
    """Options of BCDU-Net."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["bcdu-net"] = "bcdu-net"
    widths: Widths = (64, 128, 256, 512)
    dense: int = Field(3, ge=1, description="pairs of convolutions in the coarsest level, each sees all before it")
    dropout: float = Field(0.5, ge=0, lt=1, description="after each of these pairs, and on the coarsest skip")


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution and ReLU, as the code: batch norm only after up-sampling."""
    return layer(inputs, outputs, norm=None)


class Encoder(nn.Module):
    """Levels with 2 x 2 max-pooling between them; the last is densely connected."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], dense: int, dropout: float):
        super().__init__()
        *finer, coarsest = widths
        levels = zip((in_channels, *finer), finer, strict=False)
        self.levels = nn.ModuleList(layers(convolution, inputs, width) for inputs, width in levels)
        wide = (finer[-1], *(coarsest * k for k in range(1, dense)))
        self.dense = nn.ModuleList(layers(convolution, inputs, coarsest) for inputs in wide)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> features of all levels, finest first."""
        features = []
        for level in self.levels:
            features.append(level(x))
            x = nn.functional.max_pool2d(features[-1], 2)
        features[-1] = self.dropout(features[-1])
        outputs: list[Tensor] = []
        for pair in self.dense:
            outputs.append(self.dropout(pair(torch.cat(outputs, dim=1) if outputs else x)))
        return [*features, outputs[-1]]


class ConvLSTM(nn.Module):
    """A convolutional LSTM over two maps (Shi et al. 2015, as Keras has it: no peepholes)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.input = nn.Conv2d(inputs, 4 * width, kernel_size=3, padding=1)
        self.recurrent = nn.Conv2d(width, 4 * width, kernel_size=3, padding=1, bias=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two maps `(B, inputs, H, W)` -> the hidden state after the second `(B, width, H, W)`."""
        enter, _, new, show = self.input(first).chunk(4, dim=1)  # before the first there is nothing to forget
        cell = enter.sigmoid() * new.tanh()
        hidden = show.sigmoid() * cell.tanh()
        enter, keep, new, show = (self.input(second) + self.recurrent(hidden)).chunk(4, dim=1)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state: Tensor = show.sigmoid() * cell.tanh()
        return state


class RecurrentBlock(nn.Module):
    """Up-sample, pass skip and map through a ConvLSTM in both orders, convolve.

    Both directions are half as wide as the skip, Y = tanh(W_f h_f + W_b h_b + b) (Eq. 4) as wide as it. The code has
    one direction only, and no Y.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        half = max(1, width // 2)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(inputs, width, kernel_size=2, stride=2), nn.BatchNorm2d(width), ReLU()
        )
        self.forwards, self.backwards = ConvLSTM(width, half), ConvLSTM(width, half)
        self.merge = nn.Conv2d(2 * half, width, kernel_size=1)
        self.join = layers(convolution, width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`(B, inputs, h, w)` and the skip `(B, width, 2h, 2w)` -> `(B, width, 2h, 2w)`."""
        up = self.up(x)
        hidden = torch.cat([self.forwards(skip, up), self.backwards(up, skip)], dim=1)
        joined: Tensor = self.join(self.merge(hidden).tanh())
        return joined


class BCDUNet(SegmentationNetwork):
    """BCDU-Net with three poolings by default; the head is a 1 x 1 convolution.

    Weights are drawn from N(0, 2 / fan_in), biases start at 0, those of the LSTMs' forget gates at 1.
    """

    bottleneck_norm = "none"

    def __init__(self, in_channels: int, classes: int, options: BCDUNetOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.multiple = in_channels, 2 ** (len(widths) - 1)
        self.encoder_channels, self.block_channels = widths, widths[-2::-1]
        self.encoder = Encoder(in_channels, widths, options.dense, options.dropout)
        self.decoder = nn.ModuleList(
            RecurrentBlock(inputs, width) for inputs, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)
        self.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    he(module)
    if isinstance(module, ConvLSTM):  # after the convolutions in it
        assert module.input.bias is not None
        nn.init.ones_(module.input.bias.chunk(4)[1].data)
