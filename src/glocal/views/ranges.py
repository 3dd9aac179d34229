"""Ranges in options, numbers drawn from them, and their way to the device."""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] <= limits[1]:
        raise ValueError(f"the first number must not be above the second, but {limits[0]} > {limits[1]}")
    return limits


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ordered)]


def uniform(chance: Tensor, limits: tuple[float, float]) -> Tensor:
    """Spread `chance`, uniform in [0, 1), evenly over `limits`."""
    return limits[0] + (limits[1] - limits[0]) * chance


def log_uniform(chance: Tensor, limits: tuple[float, float]) -> Tensor:
    """Spread `chance`, uniform in [0, 1), over positive `limits` so that each doubling is equally likely."""
    return uniform(chance, (math.log(limits[0]), math.log(limits[1]))).exp()


def moved(numbers: Tensor, device: torch.device | str) -> Tensor:
    """`numbers` on `device`; on its way to a GPU nothing waits for what the GPU is still computing."""
    return numbers.to(device, non_blocking=torch.device(device).type == "cuda")  # the way back must wait
