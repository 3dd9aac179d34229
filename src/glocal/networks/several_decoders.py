"""One encoder with several decoders that differ in how they double the size (cross-consistency, MC-Net)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from glocal.errors import GlocalError
from glocal.networks.attention_unet import AttentionUNetOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.blocks import Up
from glocal.networks.pcl_unet import PCLUNetOptions
from glocal.networks.resnet50_unet import ResNet50UNetOptions
from glocal.networks.unet import UNetOptions

# Networks that can double the size in several ways.
Branching = UNetOptions | PCLUNetOptions | AttentionUNetOptions | ResNet50UNetOptions
Decoders = Annotated[tuple[Up, ...], Field(min_length=2, description="how each doubles the size")]


class SeveralDecodersOptions(BaseModel):
    """Options of a network with several decoders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["several-decoders"] = "several-decoders"
    of: Annotated[Branching, Field(discriminator="name", description="the network whose encoder and decoder these are")]
    decoders: Decoders
    predict: Literal["mean"] | Annotated[int, Field(ge=0)] = Field(
        "mean", description="mean of the decoders' probabilities, or the number of one decoder, from 0"
    )

    @model_validator(mode="after")
    def _predicted_by_one_of_them(self) -> "SeveralDecodersOptions":
        if self.predict != "mean" and self.predict >= len(self.decoders):
            raise GlocalError(
                f"There are {len(self.decoders)} decoders, numbered from 0: predict={self.predict} is none of them."
            )
        return self


def with_decoders(
    network: BaseModel, decoders: Sequence[Up], predict: Literal["mean"] | Up = "mean"
) -> SeveralDecodersOptions:
    """The network with several decoders in the place of its own.

    The one that doubles the size as the network itself does comes first, where there is one: a pre-trained decoder
    then fits it in all its weights.

    Args:
        network: the options of the network.
        decoders: how each doubles the size.
        predict: mean of the decoders' probabilities, or the decoder of this name.

    Raises:
        GlocalError: the network has one way only, or `predict` is none of the decoders.
    """
    if not isinstance(network, Branching):
        able = ", ".join(kind.model_fields["name"].default for kind in get_args(Branching))
        name = getattr(network, "name", "This network")
        raise GlocalError(f"{name} cannot have decoders that double the size in other ways: choose one of {able}.")
    if predict not in ("mean", *decoders):
        raise GlocalError(f"predict={predict} is none of the decoders: choose mean, {' or '.join(decoders)}.")
    ordered = sorted(decoders, key=lambda up: up != network.up)  # stable: the others as they were named
    number: Any = "mean" if predict == "mean" else ordered.index(predict)
    return SeveralDecodersOptions(of=network, decoders=tuple(ordered), predict=number)


class SeveralDecoders(SegmentationNetwork):
    """The network `of` with one decoder and head for each way of doubling the size.

    `decoder` and `head` are those of the first, so that a pre-trained decoder reaches it; the others are
    `others.0.decoder`, `others.0.head`, ... and always begin at random.
    """

    def __init__(self, options: SeveralDecodersOptions, build: Callable[[Any], SegmentationNetwork]):
        """Make the decoders.

        Args:
            options: `predict` says what `segment` gives.
            build: makes a network of options such as `of`.
        """
        super().__init__()
        first, *others = (build(options.of.model_copy(update={"up": up})) for up in options.decoders)
        self.encoder, self.decoder, self.head = first.encoder, first.decoder, first.head
        self.others = nn.ModuleList(nn.ModuleDict({"decoder": n.decoder, "head": n.head}) for n in others)
        self.in_channels, self.multiple, self.bottleneck_norm = first.in_channels, first.multiple, first.bottleneck_norm
        self.encoder_channels, self.block_channels = first.encoder_channels, first.block_channels
        self.predict = options.predict

    @property
    def branches(self) -> list[tuple[Any, Any]]:
        """Decoder and head of each."""
        others: Any = self.others
        return [(self.decoder, self.head), *((other["decoder"], other["head"]) for other in others)]

    def each(self, x: Tensor) -> list[Tensor]:
        """Images `(B, C, H, W)` -> the logits `(B, classes, H, W)` of each decoder, from one pass of the encoder."""
        return self._logits(x, self.branches)

    def segment(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, classes, H, W)` whose softmax is what is predicted."""
        if self.predict != "mean":
            return self._logits(x, [self.branches[self.predict]])[0]
        return torch.stack([logits.float().log_softmax(1) for logits in self.each(x)]).logsumexp(0)

    def compile_parts(self) -> None:
        """As of any network, the other decoders included."""
        self.encoder.compile()
        for decoder, head in self.branches:
            for part in (*decoder, head):
                part.compile()

    def _logits(self, images: Tensor, branches: Sequence[tuple[Any, Any]]) -> list[Tensor]:
        features, logits = self.encode(images), []
        for decoder, head in branches:
            x, skips = features[-1], [*reversed(features[:-1]), None]  # as `decode` has it
            for block, skip in zip(decoder, skips, strict=False):
                x = block(x, skip)
            logits.append(head(x)[..., : images.shape[-2], : images.shape[-1]])
        return logits
