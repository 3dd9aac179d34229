"""Pixel-global self-supervised learning with an uncertainty-aware context stabiliser (Zhang & Zhang 2022).

A student learns to predict for one view what a slow teacher predicts for another: once for the whole image, from the
encoder, and once for every pixel that both views show, from the decoder. The context stabiliser subtracts how well the
two agree on any other image that was moved in the same way; pixels of which the teacher is unsure count less.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from glocal.checkpoints import checkpoint_in
from glocal.contrast.collapse import effective_rank, is_collapsed
from glocal.data.sampling import Pool, Slices
from glocal.distributed import all_sum, share, whole
from glocal.engine import TrainingOptions
from glocal.errors import GlocalError
from glocal.model import read_header
from glocal.networks.base import SegmentationNetwork
from glocal.networks.heads import DenseHead, NormedHead
from glocal.networks.registry import NetworkOptions, build
from glocal.networks.resnet50_unet import ResNet50UNetOptions
from glocal.networks.unet import UNetOptions
from glocal.options import Preset, presets
from glocal.pretraining.base import COLLAPSED, Method, Stage
from glocal.randomness import generator, seed_of
from glocal.teacher import Teacher, rising
from glocal.uncertainty import Dropout, mean_uncertainty
from glocal.views.correspondence import matching_grid, values_at
from glocal.views.intensity import IntensityOptions
from glocal.views.ranges import moved
from glocal.views.spatial import SpatialOptions
from glocal.views.view import View, ViewOptions, draw_view

STAGE = "network"
MANY = 6  # images, of which by chance no embeddings lie nearly on one line
ONE_LINE = (
    "All outputs say the same one thing about the images, as far as they differ at all: the global loss has collapsed "
    "in spite of batch norm. Lower learning_rate or use a larger batch, in a new run folder, and look at the probe."
)


class Options(TrainingOptions):
    """Defaults as the paper has them; where it says nothing, as DINO (Caron et al. 2021) has them."""

    method: Literal["pixel-global"] = "pixel-global"
    preset: Preset = "adopted"
    network: NetworkOptions = UNetOptions()
    optimizer: Literal["adamw", "adam", "sgd", "lars"] = "lars"
    learning_rate: float = Field(0.2, gt=0, description="whatever the batch; BYOL has 0.2 x batch / 256")
    weight_decay: float = Field(1e-6, ge=0)
    warmup_iterations: int = Field(40, ge=0, description="the paper's 2 of 500 epochs")
    max_iterations: int = Field(10_000, ge=1)
    batch: int = Field(8, ge=2, description="slices per step")
    variant: Literal["GO", "GP", "GPC", "full"] = Field(
        "full", description="global only, + matched pixels, + context stabiliser, + uncertainty"
    )
    symmetric: bool = Field(False, description="the two views change places, and the mean of both losses is taken")
    momentum: float = Field(0.996, ge=0, le=1, description="lambda of the teacher; rises to 1")
    outputs: int = Field(256, ge=2, description="width of the prediction for an image")
    pixel_outputs: int = Field(32, ge=2, description="C: width of that for a pixel; the loss's memory goes with it")
    match: Literal["nearest", "bilinear"] = Field("nearest", description="how the teacher's map is read between pixels")
    stabiliser_grad: bool = Field(False, description="the student learns from the stabiliser's image too")
    # Uncertainty
    passes: int = Field(20, ge=1, description="random predictions of the teacher")
    passes_at_once: int = Field(5, ge=1, description="bounds the memory; batch norm sees as many passes together")
    uncertainty: Literal["mean", "passes"] = Field("mean", description="entropy of the mean prediction, or mean of all")
    dropout: float = Field(0.1, gt=0, lt=1, description="p: of the features that the decoder gets")
    student_dropout: bool = Field(True, description="the student's decoder too, so that it can do with less")
    # Against collapse
    paper_exact: bool = Field(
        False, description="no temperatures and centring as in DINO, and heads whose last gain is trained"
    )
    temperature: float = Field(0.1, gt=0, description="the student's")
    teacher_temperature: float = Field(0.04, gt=0, description="lower, so that its predictions are sharper")
    centring: float = Field(0.9, ge=0, le=1, description="of the mean that is taken from the teacher's outputs")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=30, crop=(0.55, 1.0), flip=(0.5, 0.5)),  # 0.3 of the area or more
        intensity=IntensityOptions(contrast=0.3, gamma=(0.7, 1.5)),
    )

    _preset = presets({"paper": {"network": ResNet50UNetOptions(), "paper_exact": True, "student_dropout": False}})


def cross_entropy(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_c target_c log softmax(logits / temperature)_c of predictions (B, C, ...): (B, ...), float32 or finer."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    entropies: Tensor = nn.functional.cross_entropy(logits, target.to(logits.dtype), reduction="none")
    return entropies


def local_terms(
    entropies: Tensor, matched: Tensor, context: Tensor | None = None, uncertainty: Tensor | None = None
) -> Tensor:
    """What each pixel adds to the local loss (Eq. 6): (1 - U) |CE(y_t, y_s) - CE(d_t, d_s)|, (B, H, W).

    Args:
        entropies: (B, H, W) cross entropies of student and teacher.
        matched: (B, H, W) bool; a pixel that only one view shows adds 0.
        context: (B, H, W) those of the stabiliser's images; None: the loss is that of CE(y_t, y_s) alone.
        uncertainty: (B, H, W) U in [0, 1]; 0 if None.
    """
    terms = entropies if context is None else (entropies - context).abs()
    terms = terms if uncertainty is None else terms * (1 - uncertainty)
    return terms.masked_fill(~matched, 0)


def another(place: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """For each place (B,) in a list of `count` another one, all others equally likely: (B,)."""
    return (place + torch.randint(1, count, place.shape, generator=rng)) % count


class PixelGlobal(Stage):
    """Trains encoder and decoder, in GO the encoder alone."""

    image_centre: Tensor
    pixel_centre: Tensor

    def __init__(self, network: SegmentationNetwork, pool: Pool, options: Options) -> None:
        blocks = 0 if options.variant == "GO" else network.blocks
        super().__init__(network, pool, options, trained=("encoder", *(f"decoder.{block}" for block in range(blocks))))
        if len(pool) < 2:
            raise GlocalError("pixel-global learns from several slices a step, and there is only one: add volumes.")
        bottleneck, finest = network.encoder_channels[-1], network.decoder_channels(blocks)
        self.heads = nn.ModuleDict({"image": NormedHead(bottleneck, bottleneck, options.outputs, normed=True)})
        if blocks:
            normed = nn.BatchNorm2d(options.pixel_outputs)
            self.heads["pixel"] = nn.Sequential(DenseHead(finest, options.pixel_outputs), normed)
        # Batch norm at the end keeps predictions from collapsing, unless it learns to make all of them small.
        for norm in [list(head.modules())[-1] for head in self.heads.values()]:
            norm.get_parameter("weight").requires_grad_(options.paper_exact)
        self.teacher = Teacher(network, self.heads)
        self._images_seen: Tensor | None = None
        self._pixels_seen: Tensor | None = None
        self.temperature = 1.0 if options.paper_exact else options.temperature
        self.register_buffer("image_centre", torch.zeros(options.outputs))
        self.register_buffer("pixel_centre", torch.zeros(options.pixel_outputs))

    def losses(self, step: int) -> dict[str, Tensor]:
        """L = global + local."""
        o: Options = self.options
        if step:  # the update that ends the step before
            self.teacher.follow((self.network, self.heads), rising(o.momentum, step - 1, o.max_iterations))
        slices = self.pool.epoch(o.batch, o.seed, step)
        batch, own = len(slices), share(len(slices))
        chosen = [slices, self._others(slices, step)] if o.variant in ("GPC", "full") else [slices]
        images = [self.pool.images(some[own]) for some in chosen]
        rngs = (generator(o.seed, step, "view", role) for role in range(2))
        first, second = (draw_view(o.augmentation, batch, _size(images[0]), rng)[own] for rng in rngs)
        ways = [self._one_way(step, 0, batch, images, first, second)]
        if o.symmetric:
            ways.append(self._one_way(step, 1, batch, images, second, first))
        mean = {key: torch.stack([way[key] for way in ways]).mean(0) for key in ways[0]}
        if not o.paper_exact:  # in place: DistributedDataParallel knows a centre by its memory
            self.image_centre.lerp_(mean["image"].to(self.image_centre), 1 - o.centring)
            self.pixel_centre.lerp_(mean["pixel"].to(self.pixel_centre), 1 - o.centring)
        return {"loss": mean["global"] + mean["local"], "global": mean["global"], "local": mean["local"]}

    def _one_way(
        self, step: int, way: int, batch: int, images: list[Tensor], mine: View, theirs: View
    ) -> dict[str, Tensor]:
        """Both losses, with view `mine` for the student, `theirs` for the teacher, and means of the latter's logits."""
        o: Options = self.options
        network, heads = self._teacher()
        taps = self.network.encode(mine.image(images[0]))
        logits = whole(self.heads["image"](taps[-1]), batch)
        with torch.no_grad():
            told = network.encode(theirs.image(images[0]))
            target = whole(heads["image"](told[-1]), batch)
        self.watch((logits / self.temperature).softmax(1))
        self._images_seen = logits.detach()
        loss = cross_entropy(self.prediction(target, self.image_centre), logits, self.temperature).mean()
        found = {"global": loss, "image": target.mean(0), "local": torch.zeros_like(loss), "pixel": self.pixel_centre}
        if o.variant == "GO":
            return found

        device = images[0].device
        points, matched = matching_grid(mine.spatial.to(device), theirs.spatial.to(device), _size(images[0]))
        entropies, total = self._entropies(taps, told, points, self._dropout(device, batch, step, way))
        context = unsure = None
        if len(images) > 1:  # the stabiliser's
            with torch.set_grad_enabled(o.stabiliser_grad and torch.is_grad_enabled()):
                taps = self.network.encode(mine.image(images[1]))
                with torch.no_grad():
                    beside = network.encode(theirs.image(images[1]))
                dropout = self._dropout(device, batch, step, way, "stabiliser")
                context, _ = self._entropies(taps, beside, points, dropout)
        if o.variant == "full":
            dropout = self._dropout(device, batch, step, way, "passes")
            unsure = self._read(self.uncertainty(told, _size(images[0]), dropout)[:, None], points)[:, 0]
        terms = local_terms(entropies, matched, context, unsure)
        sums = all_sum(torch.stack([terms.sum(), matched.sum().to(terms)]))
        mean = all_sum(total) / (batch * matched[0].numel())
        return {**found, "local": sums[0] / sums[1].clamp_min(1), "pixel": mean}

    def warning(self) -> str | None:
        """Collapse of the images' or the pixels' predictions, or temperatures that let it happen."""
        o: Options = self.options
        if self._pixels_seen is not None and bool(is_collapsed(self._pixels_seen)):
            return COLLAPSED
        if (said := super().warning()) is not None:
            return said
        if (seen := self._images_seen) is not None and len(seen) >= MANY and bool(effective_rank(seen) < 1.2):
            return ONE_LINE
        if not o.paper_exact and o.teacher_temperature >= o.temperature:
            return "The teacher is not sharper than the student, and all predictions tend to become equal: lower " + (
                f"teacher_temperature={o.teacher_temperature} below temperature={o.temperature}."
            )
        return None

    def _entropies(
        self, taps: list[Tensor], told: list[Tensor], points: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor]:
        """Cross entropies (b, H, W) of the student's pixels and the teacher's at `points`; the teacher's sums (C,)."""
        size = (points.shape[1], points.shape[2])
        with torch.no_grad():
            logits = _pixels(*self._teacher(), told, size)
            target = self._read(self.prediction(logits, self.pixel_centre), points)
        taps = dropout(taps) if self.options.student_dropout else taps
        answer = _pixels(self.network, self.heads, taps, size)
        some = answer.detach()[..., ::4, ::4].movedim(1, -1).flatten(0, -2)
        self._pixels_seen = (some.float() / self.temperature).softmax(1)
        entropies = cross_entropy(target, answer, self.temperature)
        return entropies, logits.sum((0, 2, 3), dtype=entropies.dtype)

    @torch.no_grad()
    def uncertainty(self, told: list[Tensor], size: tuple[int, int], dropout: Dropout) -> Tensor:
        """U (b, H, W) in [0, 1] of images of `size`, from what the teacher's encoder made of them.

        The passes go through the decoder only: what a network's own encoder may drop is dropped once.
        """
        o: Options = self.options

        def predict(passes: int) -> Tensor:
            logits = _pixels(*self._teacher(), dropout(told, passes), size)
            return self.prediction(logits, self.pixel_centre).view(passes, -1, *logits.shape[1:])

        return mean_uncertainty(predict, o.passes, o.passes_at_once, o.uncertainty)

    def prediction(self, logits: Tensor, centre: Tensor) -> Tensor:
        """The teacher's softmax (b, C, ...) in float32 or finer, centred and sharpened unless `paper_exact`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.options.paper_exact:
            logits = (logits - centre.view(-1, *[1] * (logits.ndim - 2))) / self.options.teacher_temperature
        return logits.softmax(1)

    def _read(self, maps: Tensor, points: Tensor) -> Tensor:
        """Maps (b, C, H, W) at points (b, H, W, 2) in pixels; beyond the edge what lies on it."""
        last = moved(torch.tensor([maps.shape[-1] - 1.0, maps.shape[-2] - 1.0]), points.device)
        points = (points.round() if self.options.match == "nearest" else points).clamp_min(0).minimum(last)
        return values_at(maps, points.flatten(1, 2)).view(maps.shape)

    def _others(self, slices: Slices, step: int) -> Slices:
        """For each slice another one of the pool."""
        place = torch.searchsorted(self.pool.slices, slices.index)
        place = another(place, len(self.pool), generator(self.options.seed, step, "stabiliser"))
        index, store = self.pool.slices[place], self.pool.store
        return Slices(index, store.volume_of[index], store.slice_of[index], store.count_of[index])

    def _dropout(self, device: torch.device, batch: int, *keys: int | str) -> Dropout:
        rng = torch.Generator(device).manual_seed(seed_of(self.options.seed, "dropout", *keys))
        return Dropout(self.options.dropout, batch, rng)

    def _teacher(self) -> tuple[Any, Any]:
        network, heads = self.teacher
        return network, heads


def _pixels(network: Any, heads: Any, taps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Logits (b, C, H, W) for pixels; the decoder's map covers the padded image, these its `size`."""
    logits: Tensor = heads["pixel"](network.decode(taps, network.blocks)[..., : size[0], : size[1]])
    return logits


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


@torch.no_grad()
def uncertainty_maps(run: Path, pool: Pool, slices: Slices) -> Tensor:
    """The uncertainty of a finished pre-training's teacher about slices, for figures: U (B, H, W) in [0, 1].

    It looks at the images as they are. As in training, its batch norms take their statistics from what they see: give
    them a whole volume or a batch of slices. Of a pixel of 1 the teacher knows nothing.

    Raises:
        GlocalError: the run folder holds no pre-training of this method with a decoder.
    """
    header = read_header(run / "model.safetensors")
    settings = header.provenance.get("pretraining", {})
    if settings.get("method") != "pixel-global" or settings.get("variant") == "GO":
        raise GlocalError(f"{run} has no teacher of pixels: give a run of pixel-global of another variant than GO.")
    options = Options.model_validate(settings)
    stage = PixelGlobal(build(header.network, header.channels, len(header.labels)), pool, options)
    tensors = load_file(str(checkpoint_in(run / f"stage-1-{STAGE}")))
    stage.load_state_dict({k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")})
    images = pool.images(slices)
    stage.to(images.device)
    told = stage._teacher()[0].encode(images)
    return stage.uncertainty(told, _size(images), stage._dropout(images.device, len(slices), "figure"))


def _stages(options: Any) -> list[tuple[str, Any]]:
    return [(STAGE, PixelGlobal)]


PIXEL_GLOBAL = Method(
    paper="Z. Zhang, W. Zhang: Pixel-global self-supervised learning with uncertainty-aware context stabilizer. "
    "arXiv:2210.00646, 2022.",
    summary="a student predicts what a slow teacher says of another view, for the image and for every pixel in both",
    version=2,
    options=Options,
    stages=_stages,
)
