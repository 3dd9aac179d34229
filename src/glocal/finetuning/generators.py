"""Generators that change labelled slices, for a segmentation network to learn more from (Chaitanya et al. 2019)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from glocal.networks.blocks import he
from glocal.networks.unet import convolution

NOISE = 100  # numbers of a z


class FieldNetwork(nn.Module):
    """Noise and an image -> a field of the image's size; the authors' layers, of any image size.

    The noise becomes a map of a 32nd of the image's sides, rounded up, that is doubled five times and cropped.

    Args:
        channels: C, of the images.
        size: (H, W), theirs.
        width: channels at full size, of which the smallest map has eight times as many.
        last: makes the field of `width` channels, `(B, width, H, W)` -> `(B, F, H, W)`.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int, last: nn.Module):
        super().__init__()
        self.size, smallest = size, (-(-size[0] // 32), -(-size[1] // 32))
        widths = (8 * width, 8 * width, 4 * width, 2 * width, width)
        self.spread = nn.Sequential(
            nn.Linear(NOISE, widths[0] * smallest[0] * smallest[1]), nn.ReLU(), nn.Unflatten(1, (widths[0], *smallest))
        )
        plain = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, kernel_size=2))
        layers = [*(convolution(*pair, kernel=2) for pair in pairwise(widths)), plain]
        self.grow = nn.Sequential(*(nn.Sequential(nn.Upsample(scale_factor=2), made) for made in layers))
        self.see = nn.Sequential(convolution(channels, width), convolution(width, width))
        self.join = nn.Sequential(convolution(2 * width, width), convolution(width, width), last)
        self.apply(he)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images `(B, C, H, W)` and noise `(B, NOISE)` -> `(B, F, H, W)`, in the images' precision."""
        grown = self.grow(self.spread(noise))[..., : self.size[0], : self.size[1]]
        field: Tensor = self.join(torch.cat([grown, self.see(images)], 1))
        return field.to(images.dtype)


class Deformation(nn.Module):
    """G_V: moves every pixel of image and labels.

    Args:
        channels: C, of the images.
        size: (H, W), theirs.
        width: see `FieldNetwork`.
        reach: no pixel moves further than this share of the image's side.
    """

    limit: Tensor

    def __init__(self, channels: int, size: tuple[int, int], width: int, reach: float):
        super().__init__()
        self.field = FieldNetwork(channels, size, width, nn.Conv2d(width, 2, kernel_size=3, padding=1))
        self.register_buffer("limit", reach * torch.tensor([size[1], size[0]]).view(2, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `(B, C, H, W)`, probabilities `(B, K, H, W)`, noise -> both moved, and the flow `(B, 2, H, W)`."""
        # Nearly as it is where it is small; without an end, its reward could drive it out of the image.
        flow = self.limit * torch.tanh(self.field(images, noise) / self.limit)
        warped = warp(torch.cat([images, targets[:, 1:]], 1), flow)
        moved, foreground = warped[:, : images.shape[1]], warped[:, images.shape[1] :]
        background = 1 - foreground.sum(1, keepdim=True)  # what comes from outside is class 0, too
        return moved, torch.cat([background, foreground], 1), flow


class Intensity(nn.Module):
    """G_I: adds a field with values in (-1, 1) to the image; labels stay."""

    def __init__(self, channels: int, size: tuple[int, int], width: int):
        super().__init__()
        self.field = FieldNetwork(channels, size, width, nn.Conv2d(width, channels, kernel_size=1, bias=False))

    def forward(self, images: Tensor, targets: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `(B, C, H, W)`, probabilities, noise -> images with the field, the same probabilities, the field."""
        added = torch.tanh(self.field(images, noise))
        return images + added, targets, added


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Maps `(B, C, H, W)` seen through a flow `(B, 2, H, W)`, (x, y) in pixels: bilinear, 0 outside.

    Pixel p of the result is x at p + flow(p). The same as `grid_sample`, whose gradient has no deterministic form on a
    GPU; here that of the flow has, and `x` needs none.
    """
    height, width = x.shape[-2:]
    across = flow[:, 0] + torch.arange(width, device=flow.device)
    down = flow[:, 1] + torch.arange(height, device=flow.device)[:, None]
    left, top = across.detach().floor(), down.detach().floor()
    seen = torch.zeros_like(x)
    for column in (left, left + 1):
        for row in (top, top + 1):
            weight = (1 - (across - column).abs()) * (1 - (down - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            corner = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
            seen = seen + corner * (weight * inside)[:, None]
    return seen
