"""JCL, later renamed MACL: encoder and first decoder blocks learn together, on three levels (Zeng S. et al., 2023).

Two branches see the same slices. The auxiliary one is the encoder, at full size. The dominant one is encoder and n
decoder blocks, of the slice at 2^-n of its size: n blocks double its features n times, so that both end with maps of
one size. The branches shall agree in their features (L_ER), and, by the slices' positions as in PCL, on the whole
slice (L_g) and at each location of the maps (L_d).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import Masks, position_of, positional
from glocal.data.sampling import Pool, Slices
from glocal.distributed import share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.networks.base import SegmentationNetwork
from glocal.networks.pcl_unet import PCLUNetOptions
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.options import presets
from glocal.pretraining.base import Method, Stage
from glocal.pretraining.jcl_branches import (
    distance,
    feature_error,
    instance_projector,
    other_network,
    pixel_projector,
    reduced,
)
from glocal.pretraining.pcl import borderline
from glocal.randomness import generator
from glocal.teacher import Teacher
from glocal.views.spatial import SpatialOptions
from glocal.views.view import View, ViewOptions, draw_view

# What a preset sets where nothing else is given; macl, the released code and the text of the journal, is the defaults.
MOVED = ViewOptions(spatial=SpatialOptions(rotation=180, scale=(0.7, 1.3), shift=0.1, probability=0.67)).model_dump()
METHOD_V1 = {"view_groups": 1, "fixed": MOVED, "variable": MOVED, "dominant_pixel_projector": True}
TRAINING_V1 = {
    "network": PCLUNetOptions(),
    "learning_rate": 0.1,
    "warmup_iterations": 0,
    "batch": 32,
    "threshold": 0.1,
    "scale": "none",
}


class Options(TrainingOptions):
    """Defaults as paper and code have them (`preset=macl`), but for a warm-up and t off the lattice, as in PCL."""

    method: Literal["jcl"] = "jcl"
    preset: Literal["macl", "jcl", "paper"] = Field(
        "macl",
        exclude=True,  # what it sets is kept instead
        description="macl: the code and IEEE JBHI; jcl: arXiv v1; paper: its training, too; sets only what "
        "is not given itself",
    )
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "sgd"
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    max_iterations: int = Field(10_000, ge=1, description="optimiser steps of each stage")
    batch: int = Field(16, ge=2, description="N: slices per step")
    blocks: int = Field(2, ge=0, description="n: decoder blocks, and the dominant scale 2^-n; 0 is PCL, L_g alone")
    connection: Literal["shared", "independent", "ema"] = Field(
        "shared", description="the auxiliary encoder: the same, another one, or a slow copy without gradient"
    )
    momentum: float = Field(0.999, ge=0, le=1, description="of the slow copy")
    stages: Literal[1, 2] = Field(1, description="2: the encoder with L_g first, then the decoder on it, frozen")
    downsampled: bool = Field(True, description="stages=2: in the first, the second view is at 2^-n of its size too")
    lambda1: float = Field(1.0, gt=0, description="weight of L_g, whole slices")
    lambda2: float = Field(0.5, ge=0, description="weight of L_d, locations")
    lambda3: float = Field(1.0, ge=0, description="weight of L_ER, features; with stages=2 there is no L_ER")
    dense: Literal["supcon", "mse", "byol"] = Field("supcon", description="the form of L_d; byol: MSE of unit vectors")
    dominant_pixel_projector: bool = Field(False, description="g_pix for the dominant map too")
    outputs: int = Field(128, ge=1, description="D: width of the projections")
    threshold: float = Field(
        0.11, gt=0, lt=1, description="t: positions nearer than this attract; keep off multiples of 1/n"
    )
    position: Literal["pcl", "centre"] = Field("pcl", description="(i + 1) / n as the code, or (i + 0.5) / n")
    temperature: float = Field(0.1, gt=0)
    scale: Literal["supcon", "none"] = Field("supcon", description="supcon: L_g and L_d times temperature / 0.07")
    view_groups: Literal[1, 2] = Field(
        2, description="2: fixed views for L_d and L_ER, variable ones for L_g; 1: the fixed ones for all"
    )
    fixed: ViewOptions = Field(ViewOptions(), description="moved alike in both branches; values change in each")
    variable: ViewOptions = Field(
        ViewOptions(
            spatial=SpatialOptions(rotation=180, scale=(0.7, 1.3), elastic=4, flip=(0.5, 0.5), probability=0.67)
        ),
        description="each branch has its own; what the encoder sees where it learns alone",
    )

    _preset = presets({"jcl": METHOD_V1, "paper": {**METHOD_V1, **TRAINING_V1}})


class Joint(Stage):
    """The two branches: encoder and decoder together; as the second of two stages, the decoder on a frozen encoder."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        o, blocks = options, tuple(f"decoder.{block}" for block in range(options.blocks))
        first = ("encoder",) if o.stages == 1 else ()
        super().__init__(network, pool, o, trained=(*first, *blocks), frozen=() if first else ("encoder",))
        refuse_impossible(o, pool)
        deep, late = network.encoder_channels[-1], network.decoder_channels(o.blocks)
        self.lambda3 = o.lambda3 if o.stages == 1 else 0.0
        self.other = other_network(network, o.network, o.connection)
        self.auxiliary_instance = instance_projector(deep, o.outputs)
        self.dominant_instance = instance_projector(late, o.outputs)
        if o.lambda2:
            width = o.outputs if o.dominant_pixel_projector else late  # the two maps are compared
            self.auxiliary_pixel = pixel_projector(deep, width)
            self.dominant_pixel = pixel_projector(late, width) if o.dominant_pixel_projector else nn.Identity()

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = λ1 L_g + λ2 L_d + λ3 L_ER."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        masks, images = masks_of(slices, o), self.pool.images(slices[share(len(slices))])
        x_a, x_d = self.views(images, step, len(slices))
        deep_a = self.auxiliary(step).encode(x_a)[-1]  # (., 16f, H/16, W/16) for the papers' U-Net
        features = self.network.encode(reduced(x_d, o.blocks, self.network.multiple))
        deep_d = features[-1]  # (., 16f, sH/16, sW/16)
        # At 2^-n the network may have padded more: the cells that both maps have show the same places.
        late = self.network.decode(features, o.blocks)[..., : deep_a.shape[-2], : deep_a.shape[-1]]

        fixed, variable = slice(len(images)), slice(-len(images), None)  # the same rows if there is one group only
        instances = torch.cat([self.auxiliary_instance(deep_a[variable]), self.dominant_instance(late[variable])])
        embeddings = whole(instances, len(slices))  # (2N, D)
        self.watch(embeddings)
        found = {"L_g": supcon(embeddings, masks, o)}
        loss = o.lambda1 * found["L_g"]
        if o.lambda2:
            pixels_a, pixels_d = self.auxiliary_pixel(deep_a[fixed]), self.dominant_pixel(late[fixed])
            if o.dense == "supcon":
                maps = whole(torch.cat([pixels_a, pixels_d]), len(slices))
                found["L_d"] = supcon(maps.flatten(2).permute(2, 0, 1), masks, o)  # one loss for each location
            else:
                found["L_d"] = whole(distance(pixels_a, pixels_d, o.dense == "byol"), len(slices)).mean()
            loss = loss + o.lambda2 * found["L_d"]
        if self.lambda3:
            found["L_ER"] = whole(feature_error(deep_a[fixed], deep_d[fixed]), len(slices)).mean()
            loss = loss + self.lambda3 * found["L_ER"]
        return {"loss": loss, **found}

    def views(self, images: Tensor, step: int, batch: int) -> list[Tensor]:
        """x_a and x_d of this process's share `(b, C, H, W)` of a batch: the fixed views, then the variable ones.

        The groups that some loss asks for go through a branch together: `(b or 2b, C, H, W)` each.
        """
        o: Options = self.options
        groups = []
        if o.view_groups == 1 or o.lambda2 or self.lambda3:
            size = (images.shape[-2], images.shape[-1])
            draws = [draw_view(o.fixed, batch, size, generator(o.seed, step, "fixed", branch)) for branch in (0, 1)]
            alike = [View(draws[0].spatial, draw.intensity)[share(batch)] for draw in draws]
            groups.append([view.image(images) for view in alike])
        if o.view_groups == 2:
            groups.append([self.view(o.variable, images, step, branch, batch) for branch in (0, 1)])
        return [torch.cat(group) for group in zip(*groups, strict=True)]

    def auxiliary(self, step: int) -> SegmentationNetwork:
        """The network whose encoder is the auxiliary one."""
        if not len(self.other):
            return self.network
        if isinstance(self.other, Teacher) and step:
            self.other.follow([self.network], self.options.momentum)
        other: SegmentationNetwork = self.other[0]  # type: ignore[assignment]
        return other

    def warning(self) -> str | None:
        """Collapse, or a threshold whose neighbours hang on rounding."""
        return super().warning() or borderline(self.options.threshold, self.pool)


class Encoder(Stage):
    """L_g alone, on the encoder alone: the first of two stages, and what is left of the method without blocks (PCL)."""

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        super().__init__(network, pool, options, trained=("encoder",))
        refuse_impossible(options, pool)
        self.instance = instance_projector(network.encoder_channels[-1], options.outputs)

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = λ1 L_g, of two views of each slice."""
        o: Options = self.options
        slices = self.pool.epoch(o.batch, o.seed, step)
        images = self.pool.images(slices[share(len(slices))])
        first, second = (self.view(o.variable, images, step, role, len(slices)) for role in (0, 1))
        if o.blocks and o.downsampled:
            second = reduced(second, o.blocks, self.network.multiple)
            instances = torch.cat([self.instance(self.network.encode(view)[-1]) for view in (first, second)])
        else:
            instances = self.instance(self.network.encode(torch.cat([first, second]))[-1])
        embeddings = whole(instances, len(slices))
        self.watch(embeddings)
        return {"loss": o.lambda1 * supcon(embeddings, masks_of(slices, o), o)}

    def warning(self) -> str | None:
        """Collapse, or a threshold whose neighbours hang on rounding."""
        return super().warning() or borderline(self.options.threshold, self.pool)


def masks_of(slices: Slices, options: Options) -> Masks:
    """Who attracts and who repels whom among the N vectors of the auxiliary and the N of the dominant branch."""
    image = torch.arange(len(slices)).repeat(2)
    place = position_of(slices.number, slices.count, options.position).repeat(2)
    return positional(image, place, options.threshold)


def supcon(vectors: Tensor, masks: Masks, options: Options) -> Tensor:
    """L_g of `(2N, D)` embeddings; L_d of `(h w, 2N, D)` vectors, compared within each location (arXiv v1, Eq. 10, 11).

    The equations sum over pairs of one branch with the other; the code, like PCL, takes the mean over all 2N anchors,
    each against the vectors of both branches.
    """
    loss = contrastive_loss(vectors, *masks, options.temperature, denominator="all")
    return loss * (options.temperature / 0.07 if options.scale == "supcon" else 1.0)


def refuse_impossible(o: Options, pool: Pool) -> None:
    """What no run could learn from."""
    if int(pool.store.count_of[pool.slices].max()) < 2:
        raise GlocalError(
            "JCL compares places within volumes, and every volume here is a single slice: use gcl, strategy=random."
        )
    if o.blocks == 0 and o.stages == 2:
        raise GlocalError("Without decoder blocks there is nothing to train in a second stage: set stages=1.")
    if o.connection != "shared" and (o.blocks == 0 or o.stages == 2):
        raise GlocalError(
            f"connection={o.connection} needs the two branches in one stage: set blocks=1 or more and stages=1, or "
            "connection=shared."
        )


def _stages(options: Any) -> list[tuple[str, Any]]:
    if options.blocks == 0:
        return [("encoder", Encoder)]
    return [("joint", Joint)] if options.stages == 1 else [("encoder", Encoder), ("decoder", Joint)]


JCL = Method(
    paper="S. Zeng et al.: Multi-level asymmetric contrastive learning for medical image segmentation pre-training. "
    "arXiv:2309.11876, 2023 (JCL in version 1, MACL since).",
    summary="PCL for encoder and first decoder blocks at once, on slices, locations and features",
    version=2,
    options=Options,
    stages=_stages,
)
