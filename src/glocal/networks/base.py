"""What every segmentation network offers to pre-training and fine-tuning: its taps and its three named parts."""

from typing import Literal

from torch import Tensor, nn

from glocal.distributed import world_size
from glocal.errors import GlocalError


class SegmentationNetwork(nn.Module):
    """A network of three parts, so that a pre-training method can say which of them it trained.

    Weights of the parts are found in `state_dict` below `encoder.`, `decoder.0.`, `decoder.1.`, ... and `head.`.

    Attributes:
        encoder: image -> features.
        decoder: one module per block, coarsest first; each doubles the resolution.
        head: last feature map -> logits; never transferred.
        in_channels: channels of the image.
        encoder_channels: channels of `encode`'s features, finest first, the bottleneck last.
        block_channels: channels of the map after each decoder block, coarsest first.
        multiple: sides of an image are padded (right and bottom) to a multiple of this, the bottleneck's stride.
        bottleneck_norm: what the bottleneck is normalised over, which must be more than one value.
    """

    encoder: nn.Module
    decoder: nn.ModuleList
    head: nn.Module
    in_channels: int
    encoder_channels: tuple[int, ...]
    block_channels: tuple[int, ...]
    multiple: int
    bottleneck_norm: Literal["batch", "instance", "none"] = "batch"

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.decoder)

    def decoder_channels(self, blocks: int) -> int:
        """Channels of the feature map after the first `blocks` decoder blocks; 0 is the bottleneck."""
        return (self.encoder_channels[-1], *self.block_channels)[self._checked(blocks)]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images `(B, C, H, W)` -> features `(B, c, h, w)`, finest first, the bottleneck last.

        Sides that are no multiple of `multiple` are padded first: the features then cover the padded image.

        Raises:
            GlocalError: wrong number of channels, or an image too small for the network.
        """
        features: list[Tensor] = self.encoder(self._padded(x))
        return features

    def decode(self, features: list[Tensor], blocks: int) -> Tensor:
        """Features of `encode` -> feature map `(B, c, h, w)` after the first `blocks` decoder blocks (0: bottleneck).

        Like the features, the map covers the padded image; only `segment` crops.

        Raises:
            GlocalError: `blocks` is negative or more than the network has.
        """
        x, skips = features[-1], [*reversed(features[:-1]), None]  # the finest block may have none to join
        for block, skip in zip(list(self.decoder)[: self._checked(blocks)], skips, strict=False):
            x = block(x, skip)
        return x

    def segment(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` -> logits `(B, classes, H, W)`, of the images' own size.

        Raises:
            GlocalError: as `encode`.
        """
        logits: Tensor = self.head(self.decode(self.encode(x), self.blocks))
        return logits[..., : x.shape[-2], : x.shape[-1]]

    def forward(self, x: Tensor) -> Tensor:
        """The same as `segment`."""
        return self.segment(x)

    def compile_parts(self) -> None:
        """Have torch compile the encoder, the decoder blocks and the head, each when it first runs."""
        for part in (self.encoder, *self.decoder, self.head):
            part.compile()

    def _checked(self, blocks: int) -> int:
        if not 0 <= blocks <= self.blocks:
            raise GlocalError(f"The network has {self.blocks} decoder blocks, {blocks} were asked for: choose fewer.")
        return blocks

    def _padded(self, x: Tensor) -> Tensor:
        """Check images `(B, C, H, W)` and repeat their last column and row up to a multiple of `multiple`."""
        channels, height, width = x.shape[-3:]
        if channels != self.in_channels:
            raise GlocalError(
                f"The network was built for images of {self.in_channels} channel(s), these have {channels}: "
                "use images with the channels of the dataset it was trained on."
            )
        if min(height, width) < self.multiple:
            raise GlocalError(
                f"Images of {height} x {width} pixels are too small for this network, which halves them down to one "
                f"pixel at {self.multiple}: use a larger image size, or fewer network levels."
            )
        bottleneck_pixels = -(-height // self.multiple) * -(-width // self.multiple)
        if self.bottleneck_norm == "batch" and self.training and len(x) * bottleneck_pixels * world_size() == 1:
            raise GlocalError(
                f"One image of {height} x {width} pixels leaves batch normalisation a single value to train on: "
                "use a larger batch, a larger image size, or fewer network levels."
            )
        if self.bottleneck_norm == "instance" and bottleneck_pixels == 1:
            raise GlocalError(
                f"Images of {height} x {width} pixels leave instance normalisation a single value each: "
                "use a larger image size, or fewer network levels."
            )
        right, bottom = -width % self.multiple, -height % self.multiple
        # Repeating the border adds no edge that anatomy does not have, zeros would.
        return nn.functional.pad(x, (0, right, 0, bottom), mode="replicate") if right or bottom else x
