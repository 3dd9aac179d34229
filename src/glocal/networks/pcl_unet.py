"""The U-Net of Zeng D. et al. 2021 (Positional contrastive learning, MICCAI), used by JCL and MACL too."""

from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import LeakyReLU, Pooled, ReLU, TransposedBlock, Up, Widths, he_leaky, layer, layers


class PCLUNetOptions(BaseModel):
    """Options of PCL's U-Net; base width f is 32, or 48 with widths 48, 96, 192, 384, 768."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["pcl-unet"] = "pcl-unet"
    widths: Widths = (32, 64, 128, 256, 512)
    up: Up = Field("transposed", description="how the decoder doubles the size")
    center_norm: bool = Field(False, description="batch norm in the coarsest level too; the code has none there")


class PCLUNet(SegmentationNetwork):
    """U-Net with leaky ReLU and transposed convolutions, 7.8 million weights (the authors' code).

    The coarsest level, "center" in the code, has no batch norm and plain ReLU. Skips are joined whole: images are
    padded, so that nothing need be cropped. The head is a 1 x 1 convolution without bias. Weights are drawn as
    `he_leaky` says.
    """

    def __init__(self, in_channels: int, classes: int, options: PCLUNetOptions):
        super().__init__()
        widths = options.widths
        self.in_channels, self.multiple = in_channels, 2 ** (len(widths) - 1)
        self.encoder_channels, self.block_channels = widths, widths[-2::-1]
        self.bottleneck_norm = "batch" if options.center_norm else "none"
        leaky = partial(layer, activation=LeakyReLU)
        center = partial(layer, norm=nn.BatchNorm2d if options.center_norm else None, activation=ReLU)
        levels = zip((in_channels, *widths), widths[:-1], strict=False)
        self.encoder = Pooled(layers(leaky, inputs, width) for inputs, width in levels)
        self.encoder.append(layers(center, widths[-2], widths[-1]))
        self.decoder = nn.ModuleList(
            TransposedBlock(inputs, width, leaky, up=options.up)
            for inputs, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1, bias=False)
        self.apply(he_leaky)
