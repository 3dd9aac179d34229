"""What a pre-training method is: options, and one or more stages that each turn a step into losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from glocal.contrast.collapse import is_collapsed
from glocal.data.sampling import Pool
from glocal.distributed import share
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.randomness import generator
from glocal.views.view import ViewOptions, draw_view

COLLAPSED = (
    "All embeddings have become equal: the pre-training has collapsed and its weights are worth no more than random "
    "ones. Lower learning_rate, raise warmup_iterations or temperature, or use a larger batch, in a new run folder."
)


class Stage(nn.Module):
    """One stage: it knows the network, the slices it may see and the method's options.

    A method's stage adds its heads and says in `losses(step)` what is minimised. It trains the network's parts that
    it names in `trained`; all other weights are frozen.

    Args:
        network: its parts are `encoder`, `decoder.0`, ..., `head`.
        pool: the slices to learn from.
        options: the method's own.
        trained: names of the network's parts that this stage optimises.
        frozen: parts it uses as they are; their batch norm runs in evaluation mode.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        pool: Pool,
        options: Any,
        trained: tuple[str, ...],
        frozen: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.network, self.pool, self.options = network, pool, options
        self.trained, self.frozen = trained, frozen
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(f"{part}." for part in trained)))
        self._embeddings: tuple[Tensor, ...] = ()

    def losses(self, step: int) -> dict[str, Tensor]:
        """Losses of iteration `step`; `loss` is minimised, the others are only logged."""
        raise NotImplementedError

    def forward(self, step: int) -> dict[str, Tensor]:
        """The same as `losses`: what the engine calls."""
        return self.losses(step)

    def train(self, mode: bool = True) -> "Stage":
        """Training mode for everything but the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            self.network.get_submodule(part).train(False)
        return self

    def view(self, options: ViewOptions, images: Tensor, step: int, role: int, batch: int, *keys: str) -> Tensor:
        """One random view of each image.

        Args:
            options: how far images may be changed.
            images: this process's share `(b, C, H, W)` of a batch.
            step: the iteration.
            role: which of the views of this iteration; each is drawn for itself.
            batch: the size of the whole batch.
            keys: what tells views of another batch of this iteration from these.
        """
        size = (images.shape[-2], images.shape[-1])
        draw = draw_view(options, batch, size, generator(self.options.seed, step, "view", role, *keys))
        return draw[share(batch)].image(images)

    def watch(self, *embeddings: Tensor) -> None:
        """Remember embeddings, `(N, C)` each, for the warning that all of one kind have become equal."""
        self._embeddings = tuple(of_kind.detach() for of_kind in embeddings)

    def warning(self) -> str | None:
        """Asked for by the engine now and then."""
        if any(bool(is_collapsed(embeddings)) for embeddings in self._embeddings):
            return COLLAPSED
        return None

    def bottleneck_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the bottleneck for the images of the pool."""
        image = self.pool.store.images(self.pool.slices[:1]).cpu()  # where the network still is
        with torch.no_grad():
            was = self.network.training
            shape = self.network.eval().encode(image)[-1].shape
            self.network.train(was)
        return shape[1], shape[2], shape[3]


class LabelOptions(TrainingOptions):
    """Which labels a method that `uses_labels` may see: those that one fine-tuning, with the same options, has."""

    labels: PositiveInt | Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        2, description="labelled volumes to train on, as those of the fine-tuning: a number, `all`, or cases by name"
    )
    validation: int = Field(0, ge=0, description="labelled volumes that the fine-tuning sets aside; not seen here")
    draw: int = Field(0, ge=0, description="which random choice of the labelled volumes")


@dataclass(frozen=True)
class Method:
    """A pre-training method by name.

    `stages(options)` lists its stages in order: a name for the folder, and what makes the stage from network, pool
    and options. `version` is raised by hand whenever the method's results change (see `runs.identity`).

    A method that `uses_labels` has `LabelOptions`, and its stages are made of a fourth thing: the pool of the labelled
    volumes. Its weights serve the fine-tunings on these volumes only.
    """

    paper: str
    summary: str
    version: int
    options: type[TrainingOptions]
    stages: Callable[[Any], list[tuple[str, Callable[..., Stage]]]]
    uses_labels: bool = False
