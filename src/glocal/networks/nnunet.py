"""nnU-Net's networks in 2-D (Isensee et al. 2021 and 2024): plain, and with a residual encoder.

Every weight has its place in the package that nnU-Net takes them from; deep supervision is left out.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import LeakyReLU, TransposedBlock, Widths, he_leaky, layer

normed = partial(layer, norm=partial(nn.InstanceNorm2d, eps=1e-5, affine=True))
leaky = partial(normed, activation=LeakyReLU)


class PlainOptions(BaseModel):
    """Options of nnU-Net's plain U-Net; its planner takes more levels for larger images, each at most 512 wide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["nnunet-plain"] = "nnunet-plain"
    widths: Widths = (32, 64, 128, 256, 512, 512)
    convolutions: int = Field(2, ge=1, description="of each level")
    decoder_convolutions: int = Field(2, ge=1, description="of each decoder block, after the skip was joined")


class ResidualOptions(BaseModel):
    """Options of nnU-Net's U-Net with a residual encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["nnunet-residual"] = "nnunet-residual"
    widths: Widths = (32, 64, 128, 256, 512, 512)
    depths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = Field(
        (1, 3, 4, 6), description="residual blocks of each level, finest first; further levels have as many as the last"
    )
    decoder_convolutions: int = Field(1, ge=1, description="of each decoder block, after the skip was joined")


class PlainEncoder(nn.ModuleList):
    """Levels of convolutions; the first of each but the finest has stride 2."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], count: int):
        super().__init__(
            nn.Sequential(
                leaky(inputs, width, stride=2 if level else 1), *(leaky(width, width) for _ in range(1, count))
            )
            for level, (inputs, width) in enumerate(zip((in_channels, *widths), widths, strict=False))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> features of all levels, finest first; level k has sides H / 2^k, W / 2^k."""
        features = []
        for level in self:
            x = level(x)
            features.append(x)
        return features


class ResidualBlock(nn.Module):
    """Two convolutions around a short cut, which is pooled and projected where needed (He T. et al. 2019, ResNet-D)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = leaky(inputs, width, stride=stride), normed(width, width, activation=None)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.project = (
            nn.Identity() if inputs == width else normed(inputs, width, kernel=1, bias=False, activation=None)
        )
        self.activation = LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` -> `(B, width, H / stride, W / stride)`."""
        activated: Tensor = self.activation(self.conv2(self.conv1(x)) + self.project(self.pool(x)))
        return activated


class ResidualEncoder(nn.Module):
    """A convolution, then levels of residual blocks; the first of each but the finest has stride 2."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        self.stem = leaky(in_channels, widths[0])
        self.levels = nn.ModuleList()
        inputs = widths[0]
        for level, width in enumerate(widths):
            blocks = [ResidualBlock(inputs, width, stride=2 if level else 1)]
            blocks += [ResidualBlock(width, width, stride=1) for _ in range(1, depths[min(level, len(depths) - 1)])]
            self.levels.append(nn.Sequential(*blocks))
            inputs = width

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` -> features of all levels, finest first; level k has sides H / 2^k, W / 2^k."""
        features, x = [], self.stem(x)
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class NNUNet(SegmentationNetwork):
    """U-Net with instance norm, leaky ReLU, strided and transposed convolutions; the head is a 1 x 1 convolution.

    Weights are drawn as `he_leaky` says; the last norm of each residual block starts at 0, so that it passes what it
    gets. Prediction folds nothing into the convolutions, and several processes need not share statistics: those of an
    instance norm are the image's own.
    """

    bottleneck_norm = "instance"

    def __init__(self, in_channels: int, classes: int, options: PlainOptions | ResidualOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.multiple = in_channels, 2 ** (len(widths) - 1)
        self.encoder_channels, self.block_channels = widths, widths[-2::-1]
        if isinstance(options, PlainOptions):
            self.encoder = PlainEncoder(in_channels, widths, options.convolutions)
        else:
            self.encoder = ResidualEncoder(in_channels, widths, options.depths)
        self.decoder = nn.ModuleList(
            TransposedBlock(inputs, width, leaky, options.decoder_convolutions)
            for inputs, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)
        self.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    he_leaky(module)
    if isinstance(module, ResidualBlock):
        norm = module.conv2.get_submodule("norm")
        nn.init.zeros_(norm.get_parameter("weight"))
        nn.init.zeros_(norm.get_parameter("bias"))


# Where a weight of ours is in PlainConvUNet and ResidualEncoderUNet; `conv` and `norm` are there under two names.
_PLACES = (
    (r"encoder\.(\d+)\.(\d+)\.", r"encoder.stages.\1.0.convs.\2."),
    (r"encoder\.stem\.", r"encoder.stem.convs.0."),
    (r"encoder\.levels\.(\d+)\.(\d+)\.project\.", r"encoder.stages.\1.blocks.\2.skip.1."),  # 0 is the pooling
    (r"encoder\.levels\.(\d+)\.(\d+)\.", r"encoder.stages.\1.blocks.\2."),
    (r"decoder\.(\d+)\.up\.", r"decoder.transpconvs.\1."),
    (r"decoder\.(\d+)\.join\.(\d+)\.", r"decoder.stages.\1.convs.\2."),
)


def to_dynamic_network_architectures(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `NNUNet` under the names of `dynamic_network_architectures` (0.4), for `load_state_dict`.

    There the networks are `PlainConvUNet` and `ResidualEncoderUNet` with `conv_bias=True`, `norm_op=InstanceNorm2d` and
    `norm_op_kwargs={"eps": 1e-5, "affine": True}`. Every layer is listed there as often as it can be reached: the
    encoder again below the decoder, and each convolution and norm again in `all_modules`. Coarser logits, which only
    deep supervision uses and which are not trained here, are 0.
    """
    found: dict[str, Tensor] = {}
    blocks = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("decoder."))
    for name, value in state_dict.items():
        kind = name.rpartition(".")[2]
        if name.startswith("head."):
            layers = [f"decoder.seg_layers.{block}.{kind}" for block in range(blocks)]
            # Their input is as wide as the block's skip, which its convolution gives.
            widths = [state_dict[f"decoder.{block}.up.bias"].shape[0] for block in range(blocks)]
            for place, width in zip(layers[:-1], widths[:-1], strict=True):
                shape = (value.shape[0], width, 1, 1) if kind == "weight" else value.shape
                found[place] = value.new_zeros(shape)
            found[layers[-1]] = value
            continue
        place = _place(name)
        twin = re.sub(r"\.conv\.(\w+)$", r".all_modules.0.\1", re.sub(r"\.norm\.(\w+)$", r".all_modules.1.\1", place))
        names = {place, twin}
        if place.startswith("encoder."):
            names |= {f"decoder.{one}" for one in names}
        found |= dict.fromkeys(names, value)
    return found


def _place(name: str) -> str:
    for pattern, there in _PLACES:
        place, matches = re.subn(f"^{pattern}", there, name)
        if matches:
            return place
    raise KeyError(name)
