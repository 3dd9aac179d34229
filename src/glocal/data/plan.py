"""How the volumes of a dataset become slices: the options a user sets, and the plan that treats every volume alike."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from glocal.data.dataset import Dataset
from glocal.data.image import read_image
from glocal.data.orientation import ARRAY_AXES, Frame, distinct_axis, frame_of
from glocal.errors import GlocalError

Percent = Annotated[float, Field(ge=0, le=100)]


class PreprocessOptions(BaseModel):
    """What is done to every volume before the network sees it, in this order. Pairs are (rows, columns)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n4: bool = Field(
        False,
        description="Correct the bias field of MR images first (N4: 4 levels of 50 iterations at full resolution, "
        "convergence 0.001, no mask; about a minute a volume).",
    )
    intensity: Literal["percentile", "zscore", "window"] = Field(
        "percentile",
        description="Per volume and channel: low and high percentile to 0 and 1; mean 0 and deviation 1; or a fixed "
        "window of values to 0 and 1.",
    )
    percentiles: tuple[Percent, Percent] = Field((1.0, 99.0), description="The low and the high percentile, 0 to 100.")
    clip: bool = Field(True, description="Cut values beyond the percentiles off (percentile and zscore).")
    window: tuple[float, float] | None = Field(
        None, description="The window of values mapped to 0 and 1, in Hounsfield units for CT; the rest is cut off."
    )
    slice_axis: Literal["auto", "x", "y", "z"] = Field(
        "auto",
        description="The axis of the file across the slices, where no axis has a clearly larger spacing than the "
        "others; auto takes the one with the fewest slices.",
    )
    spacing: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="Resample the slices to this pixel size in mm; without it pixels stay as they are."
    )
    spacing_known: bool = Field(
        True, description="False if the spacing in the headers is a placeholder: then nothing is measured in mm."
    )
    field: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="Crop the slices around their centre, or pad them with 0, to this many pixels."
    )
    size: tuple[PositiveInt, PositiveInt] = Field(description="Resize the slices to this many pixels for the network.")

    @model_validator(mode="after")
    def _consistent(self) -> "PreprocessOptions":
        if self.spacing is not None and not self.spacing_known:
            raise GlocalError(
                "spacing cannot be set when spacing_known is false: remove spacing, or correct the headers."
            )
        if (self.intensity == "window") != (self.window is not None):
            raise GlocalError("intensity: window and window: [low, high] belong together: set both or neither.")
        for name, pair in (("percentiles", self.percentiles), ("window", self.window)):
            if pair is not None and not pair[0] < pair[1]:
                raise GlocalError(f"{name} must be [low, high] with low below high, not {list(pair)}.")
        return self


class Plan(BaseModel):
    """All that a new volume needs to be treated like those of the store; part of every model file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: PreprocessOptions
    channels: PositiveInt = Field(description="Number of image channels.")
    labels: dict[str, int] = Field(description="Structure to value, background included: 0, 1, 2, ...")
    slice_axis: Literal["x", "y", "z"] = Field(
        description="File axis across the slices where neither spacing nor direction decides."
    )
    axes: Frame | None = Field(
        description="Reference frame: LPS directions in which slices, rows and columns follow each other. A volume's "
        "slice axis is the one with clearly the largest spacing, else the one nearest to the first of these."
    )
    warnings: tuple[str, ...] = Field((), description="What was assumed about the dataset.")


def make_plan(dataset: Dataset, options: PreprocessOptions) -> Plan:
    """Resolve the options for a dataset; its first case gives the reference frame.

    Raises:
        GlocalError: no case, labels not numbered 0, 1, 2, ..., or a first image that is unreadable or not 3-D.
    """
    if not dataset.cases:
        raise GlocalError(f"{dataset.root} holds no case: put images into its imagesTr folder.")
    values = sorted(dataset.labels.values())
    if values != list(range(len(values))) or len(values) > 256:
        raise GlocalError(f"The labels in {dataset.root / 'dataset.json'} must be numbered 0, 1, 2, ... not {values}.")
    first = dataset.cases[0]
    geometry = read_image(first.images[:1]).geometry
    warnings: list[str] = []
    axis = distinct_axis(geometry) if options.spacing_known else None
    if axis is not None and options.slice_axis not in ("auto", ARRAY_AXES[axis]):
        warnings.append(
            f"slice_axis: {options.slice_axis} is not used: in {first.name} the spacing along {ARRAY_AXES[axis]} is "
            "clearly the largest, so slices are taken across it."
        )
    if axis is None and options.slice_axis != "auto":
        axis = ARRAY_AXES.index(options.slice_axis)
    if axis is None:
        axis = min(range(3), key=lambda k: geometry.size[2 - k])
        warnings.append(
            f"No axis has a clearly larger spacing than the others: slices are taken across {ARRAY_AXES[axis]}, which "
            f"has the fewest in {first.name}; set slice_axis to choose."
        )
    if not geometry.direction_known:
        warnings.append(f"The header of {first.name} states no direction: all volumes keep their order of axes.")
    return Plan(
        options=options,
        channels=len(dataset.channels),
        labels=dataset.labels,
        slice_axis=ARRAY_AXES[axis],
        axes=frame_of(geometry, axis) if geometry.direction_known else None,
        warnings=tuple(warnings),
    )
