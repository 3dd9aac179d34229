"""Collapse: the network maps every image to one point, and the loss stands still at a value known beforehand."""

import math

from torch import Tensor

from glocal.contrast.losses import unit


def collapse_value(count: int) -> float:
    """The loss that equal embeddings give in PCL and SimCLR, ln(2B - 1): each anchor finds 2B - 1 equal candidates.

    Args:
        count: number of embeddings in a step, 2B, at least 2.

    Returns:
        The value, in the unit of `contrastive_loss` (before any scale the method applies).
    """
    return math.log(count - 1)


def is_collapsed(features: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Whether all embeddings point the same way: their mean pairwise cosine is above 1 - tolerance.

    All zero vectors count as collapsed; a single embedding does not.

    Args:
        features: (N, C) embeddings of different images.
        tolerance: how far the mean cosine may be from 1.

    Returns:
        Scalar bool tensor, without waiting for the device.
    """
    n = len(features)
    # The variance of unit vectors, with n - 1 in its denominator, is 1 - their mean pairwise cosine: no N x N matrix.
    return unit(features.detach()).var(0, correction=0).sum() * n < tolerance * (n - 1)
