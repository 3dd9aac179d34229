"""What the branches of JCL are made of: their input and network, the projectors, and how far their maps are apart."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from glocal.contrast.losses import unit
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions, build
from glocal.teacher import Teacher


def reduced(x: Tensor, blocks: int, multiple: int) -> Tensor:
    """Images `(B, C, H, W)` at 2^-blocks of their size, bilinearly, the centres of the corner pixels kept.

    Their last column and row are repeated first, up to sides that are still multiples of `multiple` when reduced: the
    scale is exact, and a cell of the decoded map shows what the same cell of the full-size features shows.
    """
    side = multiple * 2**blocks
    padded = pad(x, (0, -x.shape[-1] % side, 0, -x.shape[-2] % side), mode="replicate")
    return interpolate(padded, scale_factor=0.5**blocks, mode="bilinear", align_corners=True)


def other_network(
    network: SegmentationNetwork, options: NetworkOptions, connection: Literal["shared", "independent", "ema"]
) -> nn.ModuleList:
    """The network whose encoder the auxiliary branch has: `[another one]`, `[a slow copy]` or, if shared, `[]`."""
    if connection == "ema":
        return Teacher(network)
    if connection == "shared":
        return nn.ModuleList()
    other = build(options, network.in_channels, 2).requires_grad_(False)  # its decoder and its head have no part
    other.encoder.requires_grad_(True)
    return nn.ModuleList([other])


def instance_projector(channels: int, outputs: int) -> nn.Module:
    """g_ins: average pooling, Linear, ReLU, Linear; maps `(B, channels, h, w)` -> `(B, outputs)`, not normalised."""
    layers = (nn.Linear(channels, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def pixel_projector(channels: int, outputs: int) -> nn.Module:
    """g_pix: twice 3 x 3 convolution, batch norm, LeakyReLU; maps `(B, channels, h, w)` -> `(B, outputs, h, w)`."""
    widths = ((channels, outputs), (outputs, outputs))
    blocks = [
        (nn.Conv2d(*width, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU()) for width in widths
    ]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def distance(auxiliary: Tensor, dominant: Tensor, normalised: bool) -> Tensor:
    """L_d as mean squared difference at the same slice and location, of unit vectors if normalised (BYOL).

    Args:
        auxiliary: `(B, C, h, w)`.
        dominant: `(B, C, h, w)`.
        normalised: whether the vectors of the locations are divided by their lengths.

    Returns:
        `(B,)`: a mean for each slice.
    """
    pair = (auxiliary, dominant)
    a, d = (unit(x.movedim(1, -1)) for x in pair) if normalised else (_precise(x) for x in pair)
    return (a - d).square().flatten(1).mean(1)


def feature_error(auxiliary: Tensor, dominant: Tensor) -> Tensor:
    """L_ER: the mean absolute difference between the dominant features and the auxiliary ones at their size.

    Args:
        auxiliary: `(B, C, h, w)` of the slices at full size.
        dominant: `(B, C, h', w')` of the reduced slices.

    Returns:
        `(B,)`: a mean for each slice.
    """
    large = _precise(auxiliary)
    for axis in (2, 3):
        if dominant.shape[axis] == 1:  # no two corners to keep, of which interpolation would take the first
            large = large.mean(axis, keepdim=True)
    small = interpolate(large, size=dominant.shape[-2:], mode="bilinear", align_corners=True)
    return (small - _precise(dominant)).abs().flatten(1).mean(1)


def _precise(x: Tensor) -> Tensor:
    """In float32 or finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
