"""What tells one kind of slices from another, so that a network or a generator learns to deceive it."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glocal.errors import GlocalError
from glocal.networks.blocks import he, layer

Leaky = partial(nn.LeakyReLU, negative_slope=0.2, inplace=True)
he_leaky = partial(he, slope=0.2)


def untaught(discriminator: nn.Module, *inputs: Tensor) -> Tensor:
    """What the discriminator says of inputs that shall deceive it: the gradient reaches them, not its own weights."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    said: Any = functional_call(discriminator, fixed, inputs)
    return said  # type: ignore[no-any-return]


class MapDiscriminator(nn.Module):
    """Tells segmentations apart, with the image before it (Zhang Y. et al. 2017; layers and widths as SSL4MIS).

    Args:
        classes: K, of the probability maps.
        channels: C, of the images.
        width: channels of the first convolutions; each of the next three doubles them.
        dropout: share of the channels that are dropped after the second and the third convolution.
    """

    def __init__(self, classes: int, channels: int, width: int = 64, dropout: float = 0.5):
        super().__init__()
        halve = partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        self.of_map, self.of_image = halve(classes, width), halve(channels, width)
        self.layers = nn.Sequential(
            *(halve(width, 2 * width), Leaky(), nn.Dropout2d(dropout)),
            *(halve(2 * width, 4 * width), Leaky(), nn.Dropout2d(dropout)),
            *(halve(4 * width, 8 * width), Leaky()),
        )
        self.classifier = nn.Linear(4 * 8 * width, 2)

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """Probabilities `(B, K, H, W)` and images `(B, C, H, W)` -> logits `(B, 2)`.

        Raises:
            GlocalError: sides below 16 pixels.
        """
        height, width = images.shape[-2:]
        if min(height, width) < 16:
            raise GlocalError(
                f"Images of {height} x {width} pixels are too small for the discriminator, which halves them four "
                "times: use a larger image size, or another strategy."
            )
        x = self.layers(self.of_map(maps) + self.of_image(images))
        logits: Tensor = self.classifier(quarters(x).flatten(1))
        return logits


def quarters(x: Tensor) -> Tensor:
    """Means of the four quarters of maps: `(B, C, h, w)` -> `(B, C, 2, 2)`; with odd sides they share the middle.

    As adaptive average pooling, whose gradient has no deterministic form on a GPU.
    """
    for axis in (2, 3):
        side = x.shape[axis]
        half = -(-side // 2)
        parts = x.narrow(axis, 0, half), x.narrow(axis, side - half, half)
        x = torch.cat([part.mean(axis, keepdim=True) for part in parts], axis)
    return x


class ImageDiscriminator(nn.Module):
    """Tells real images from generated ones (Chaitanya et al. 2019, code).

    Args:
        channels: C, of the images.
        size: (H, W), theirs.
        width: channels of the first of five convolutions, each of which halves the image.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int = 16):
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width, 8 * width, 8 * width)
        deep = widths[-1]
        self.layers = nn.Sequential(
            *(layer(*pair, kernel=5, stride=2, activation=Leaky) for pair in pairwise(widths)),
            nn.Flatten(),
            *(nn.Linear(deep * -(-size[0] // 32) * -(-size[1] // 32), deep), Leaky()),
            *(nn.Linear(deep, deep), Leaky()),
            nn.Linear(deep, 1),
        )
        self.apply(he_leaky)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B,)`, above 0 for what looks real."""
        logits: Tensor = self.layers(images)
        return logits.squeeze(1)
