"""Collapse: the network maps every image to one point, and the loss stands still (for PCL at ln(2B - 1))."""

from torch import Tensor

from glocal.contrast.losses import unit


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
