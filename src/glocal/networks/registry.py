"""The networks a recipe can name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glocal.networks.base import SegmentationNetwork
from glocal.networks.unet import UNet, UNetOptions

# Each network's options carry its `name`; a second network makes this a union that the name discriminates.
NetworkOptions = UNetOptions


@dataclass(frozen=True)
class NetworkEntry:
    """A network by name: `build(in_channels, classes, options)`, and where it was published.

    `version` is raised by hand whenever its results change (see `runs.identity`).
    """

    build: Callable[[int, int, Any], SegmentationNetwork]
    summary: str
    paper: str
    version: int


NETWORKS: dict[str, NetworkEntry] = {
    "unet": NetworkEntry(
        UNet,
        "U-Net with batch normalisation and nearest-neighbour up-sampling",
        "K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features "
        "for medical image segmentation with limited annotations. NeurIPS 2020.",
        version=1,
    ),
}


def build(options: NetworkOptions, in_channels: int, classes: int) -> SegmentationNetwork:
    """Build a network for images of `in_channels` channels and `classes` classes, background included.

    Weights are drawn from torch's global generator: seed it before this call.
    """
    return NETWORKS[options.name].build(in_channels, classes, options)
