"""The networks a recipe can name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from glocal.errors import GlocalError
from glocal.networks.attention_unet import AttentionUNet, AttentionUNetOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.bcdu_net import BCDUNet, BCDUNetOptions
from glocal.networks.nnunet import NNUNet, PlainOptions, ResidualOptions
from glocal.networks.pcl_unet import PCLUNet, PCLUNetOptions
from glocal.networks.resnet50_unet import ResNet50UNet, ResNet50UNetOptions
from glocal.networks.several_decoders import SeveralDecoders, SeveralDecodersOptions
from glocal.networks.uctransnet import UCTransNet, UCTransNetOptions
from glocal.networks.unet import UNet, UNetOptions
from glocal.options import closest, validated


def _named(settings: Any) -> Any:
    """Settings that name no network are those of a U-Net."""
    return {"name": "unet", **settings} if isinstance(settings, Mapping) else settings


# The options of any network, told apart by `name`; a type only, its default is `UNetOptions()`.
NetworkOptions = Annotated[
    Annotated[
        UNetOptions
        | PCLUNetOptions
        | AttentionUNetOptions
        | UCTransNetOptions
        | BCDUNetOptions
        | ResNet50UNetOptions
        | PlainOptions
        | ResidualOptions,
        Field(discriminator="name"),
    ],
    BeforeValidator(_named),
]
# What a trained model may be of: a strategy may give a network several decoders.
TrainedOptions = NetworkOptions | SeveralDecodersOptions


@dataclass(frozen=True)
class NetworkEntry:
    """A network by name: its options, `build(in_channels, classes, options)`, and where it was published.

    `version` is raised by hand whenever its results change (see `runs.identity`).
    """

    options: type[BaseModel]
    build: Callable[[int, int, Any], SegmentationNetwork]
    summary: str
    paper: str
    version: int


NETWORKS: dict[str, NetworkEntry] = {
    "unet": NetworkEntry(
        UNetOptions,
        UNet,
        "U-Net with batch normalisation and nearest-neighbour up-sampling",
        "K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu: Contrastive learning of global and local features "
        "for medical image segmentation with limited annotations. NeurIPS 2020.",
        version=1,
    ),
    "pcl-unet": NetworkEntry(
        PCLUNetOptions,
        PCLUNet,
        "U-Net with leaky ReLU and transposed convolutions, no normalisation in its coarsest level",
        "D. Zeng et al.: Positional contrastive learning for volumetric medical image segmentation. MICCAI 2021.",
        version=1,
    ),
    "attention-unet": NetworkEntry(
        AttentionUNetOptions,
        AttentionUNet,
        "unet with an attention gate on every skip",
        "O. Oktay et al.: Attention U-Net: learning where to look for the pancreas. MIDL 2018.",
        version=1,
    ),
    "uctransnet": NetworkEntry(
        UCTransNetOptions,
        UCTransNet,
        "U-Net whose skips pass a transformer over channels",
        "H. Wang, P. Cao, J. Wang, O. R. Zaiane: UCTransNet: rethinking the skip connections in U-Net from a "
        "channel-wise perspective with transformer. AAAI 2022.",
        version=1,
    ),
    "bcdu-net": NetworkEntry(
        BCDUNetOptions,
        BCDUNet,
        "U-Net with a densely connected bottleneck and a bidirectional ConvLSTM at every skip",
        "R. Azad, M. Asadi-Aghbolaghi, M. Fathy, S. Escalera: Bi-directional ConvLSTM U-Net with densely connected "
        "convolutions. ICCV Workshops 2019.",
        version=1,
    ),
    "resnet50-unet": NetworkEntry(
        ResNet50UNetOptions,
        ResNet50UNet,
        "U-Net decoder on a ResNet-50, with random weights",
        "K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. CVPR 2016.",
        version=1,
    ),
    "nnunet-plain": NetworkEntry(
        PlainOptions,
        NNUNet,
        "nnU-Net's U-Net in 2-D, with instance normalisation",
        "F. Isensee et al.: nnU-Net: a self-configuring method for deep learning-based biomedical image "
        "segmentation. Nature Methods 18, 2021.",
        version=1,
    ),
    "nnunet-residual": NetworkEntry(
        ResidualOptions,
        NNUNet,
        "nnU-Net's U-Net with residual encoder in 2-D, with instance normalisation",
        "F. Isensee et al.: nnU-Net revisited: a call for rigorous validation in 3D medical image segmentation. "
        "MICCAI 2024.",
        version=1,
    ),
}


def network_named(name: str) -> NetworkEntry:
    """The network `name`.

    Raises:
        GlocalError: there is none; suggests the closest.
    """
    if name not in NETWORKS:
        raise GlocalError(f"There is no network {name!r}: {closest(name, NETWORKS)}")
    return NETWORKS[name]


def network_options(settings: Mapping[str, Any]) -> NetworkOptions:
    """The typed options of `settings`, whose key `name` names the network (`unet` if absent).

    Raises:
        GlocalError: unknown network, unknown key, or a value that does not fit.
    """
    kind: Any = network_named(str(settings.get("name", "unet"))).options
    options: NetworkOptions = validated(kind, settings, "network")
    return options


def build(options: TrainedOptions, in_channels: int, classes: int) -> SegmentationNetwork:
    """Build a network for images of `in_channels` channels and `classes` classes, background included.

    Weights are drawn from torch's global generator: seed it before this call.
    """
    if isinstance(options, SeveralDecodersOptions):
        return SeveralDecoders(options, lambda of: build(of, in_channels, classes))
    return NETWORKS[options.name].build(in_channels, classes, options)
