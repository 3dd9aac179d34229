"""Collapse: the network maps every image to one point, or all to one line, and the loss stands still.

For PCL it then stands at ln(2B - 1).
"""

import torch
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


def effective_rank(features: Tensor) -> Tensor:
    """In how many directions embeddings differ: (sum of λ)^2 / sum of λ^2 over the eigenvalues λ of their covariance.

    Also called the participation ratio: 1 if all lie on one line, at most N - 1 and C. Batch norm behind an embedding
    forbids that all are equal, but not this.

    Args:
        features: (N, C) embeddings of different images.

    Returns:
        Scalar, without waiting for the device; 0 if all are equal.
    """
    vectors = features.detach().float()
    centred = vectors - vectors.mean(0)
    gram = centred @ centred.T  # N times the eigenvalues of the covariance, and zeros
    rank: Tensor = gram.trace().square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)
    return rank
