"""What a fine-tuning strategy is: options, and a step turned into losses."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from glocal.data.sampling import Pool
from glocal.engine import TrainingOptions
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NetworkOptions
from glocal.networks.unet import UNetOptions
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(min_length=1)]


class FinetuningOptions(TrainingOptions):
    """What every strategy has. Nothing is frozen: all parts of the network are trained."""

    strategy: str = Field("supervised", description="see `glocal methods`")
    network: NetworkOptions = Field(UNetOptions(), description="with pre-trained weights, theirs is taken")
    labels: PositiveInt | Literal["all"] | Several[PositiveInt | Literal["all"]] | Several[str] = Field(
        2,
        description="labelled volumes to train on: a number or `all` (a list of these for several trainings), "
        "or cases by name",
    )
    validation: int = Field(0, ge=0, description="further labelled volumes that only choose the best checkpoint")
    draw: int = Field(0, ge=0, description="which random choice of the labelled volumes")
    batch: int = Field(10, ge=1, description="slices per step")
    loss: Literal["dice", "dice+ce"] = Field("dice+ce", description="dice: as Chaitanya et al., background included")
    evaluate_every: int = Field(50, ge=1, description="iterations between looks at the validation volumes")
    augmentation: ViewOptions = ViewOptions(
        spatial=SpatialOptions(rotation=30, scale=(0.8, 1.3), shift=0.15, anisotropy=0.1, elastic=2.5, elastic_grid=6),
        intensity=IntensityOptions(brightness=0.2, contrast=0.3, gamma=(0.7, 1.5), noise=0.05),
    )


class Strategy(nn.Module):
    """A strategy knows the network, the labelled slices, the unlabelled ones and its options.

    Args:
        network: all of it is trained; `network(images)` gives logits.
        labelled: slices of the labelled volumes of this draw.
        unlabelled: slices of all volumes that may be trained on; a supervised strategy leaves them alone.
        options: the strategy's own.
    """

    def __init__(self, network: SegmentationNetwork, labelled: Pool, unlabelled: Pool, options: Any) -> None:
        super().__init__()
        self.network, self.labelled, self.unlabelled, self.options = network, labelled, unlabelled, options
        network.requires_grad_(True)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Losses of iteration `step`; `loss` is minimised, the others are only logged."""
        raise NotImplementedError

    def forward(self, step: int) -> dict[str, Tensor]:
        """The same as `losses`: what the engine calls."""
        return self.losses(step)


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy by name; `version` is raised by hand whenever its results change (see `runs.identity`)."""

    paper: str
    summary: str
    version: int
    options: type[FinetuningOptions]
    make: type[Strategy]
