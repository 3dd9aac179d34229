"""What several networks are built of."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, cat, nn

Widths = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    Field(min_length=2, description="Channels of each level, finest first; between two levels the image is halved."),
]
Up = Literal["nearest", "bilinear", "transposed"]  # ways to double the size of a map

ReLU = partial(nn.ReLU, inplace=True)
LeakyReLU = partial(nn.LeakyReLU, negative_slope=0.01, inplace=True)


def layer(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    bias: bool = True,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] | None = ReLU,
) -> nn.Sequential:
    """Convolution, normalisation, activation: `(B, inputs, H, W)` -> `(B, outputs, H / stride, W / stride)`."""
    parts: dict[str, nn.Module] = {
        "conv": nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=bias)
    }
    if norm is not None:
        parts["norm"] = norm(outputs)
    if activation is not None:
        parts["activation"] = activation()
    return nn.Sequential(OrderedDict(parts))


def layers(make: Callable[[int, int], nn.Module], inputs: int, width: int, count: int = 2) -> nn.Sequential:
    """`count` layers after each other, all `width` wide."""
    return nn.Sequential(*(make(width if k else inputs, width) for k in range(count)))


class Pooled(nn.ModuleList):
    """Levels with 2 x 2 max-pooling between them, none after the last."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> features of all levels, finest first; level k has sides H / 2^k, W / 2^k."""
        features = [self[0](x)]
        for level in list(self)[1:]:
            features.append(level(nn.functional.max_pool2d(features[-1], 2)))
        return features


def upsampling(up: Up, inputs: int, outputs: int, mix: Callable[[int, int], nn.Module]) -> nn.Module:
    """What doubles the size of a map: `(B, inputs, h, w)` -> `(B, outputs, 2h, 2w)`.

    Args:
        up: by a transposed convolution, or by interpolation.
        inputs: channels of the map.
        outputs: channels of what comes out.
        mix: makes what changes the channels after an interpolation, from inputs and outputs.
    """
    if up == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=up), mix(inputs, outputs))


class TransposedBlock(nn.Module):
    """Decoder block: double the size by a transposed convolution, join the skip, convolve.

    Args:
        inputs: channels of the coarser map.
        width: channels of the skip, and of what comes out.
        make: makes a layer from its inputs and outputs.
        count: layers after the skip was joined.
        up: interpolation with a 1 x 1 convolution in the place of the transposed one.
    """

    def __init__(
        self, inputs: int, width: int, make: Callable[[int, int], nn.Module], count: int = 2, up: Up = "transposed"
    ):
        super().__init__()
        self.up = upsampling(up, inputs, width, partial(nn.Conv2d, kernel_size=1))
        self.join = layers(make, 2 * width, width, count)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`(B, inputs, h, w)` and the skip `(B, width, 2h, 2w)` -> `(B, width, 2h, 2w)`."""
        joined: Tensor = self.join(cat([self.up(x), skip], dim=1))
        return joined


def he(module: nn.Module, slope: float = 0.0) -> None:
    """Draw the weights of a (transposed) convolution from N(0, 2 / ((1 + slope^2) fan_in)); its bias starts at 0.

    Args:
        module: anything else is left as it is.
        slope: of the leaky ReLU that follows, below 0.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, a=slope)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


he_leaky = partial(he, slope=0.01)
