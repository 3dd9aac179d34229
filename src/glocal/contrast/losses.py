"""How much: one contrastive loss for every strategy; who attracts and repels whom comes as two boolean masks."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

SHORTEST = 1e-8  # a shorter feature vector has no direction


def unit(features: Tensor) -> Tensor:
    """Features of length one, in float32 or finer; a zero vector stays zero and receives no gradient.

    Args:
        features: (..., C), any floating type.

    Returns:
        (..., C), float64 if the features are, else float32.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    # Dividing by max(length, eps), as is common, would give a zero vector a gradient of 1/eps.
    return features * torch.where(length > SHORTEST, 1 / length.clamp_min(SHORTEST), 0)


def contrastive_loss(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    *,
    denominator: Literal["one", "all"],
    candidates: Tensor | None = None,
) -> Tensor:
    """Contrastive loss of any strategy, from cosine similarities s_ij = cos(feature i, candidate j) / temperature.

    ``one`` (Chaitanya et al. 2020, Eq. 1): the mean over all positive pairs i -> j of
    -log(e^s_ij / (e^s_ij + sum over the negatives k of i of e^s_ik)).
    ``all`` (SupCon, Khosla et al. 2020, Eq. 2; PCL, Zeng et al. 2021): the mean over anchors i of the mean over their
    positives j of -log(e^s_ij / sum over the positives and negatives k of i of e^s_ik); anchors without a positive
    are left out.

    Args:
        features: (..., N, C) anchors.
        positive: (..., N, M) bool, candidate j attracts anchor i; it may lack leading dimensions.
        negative: (..., N, M) bool, candidate j repels anchor i; it may lack leading dimensions.
        temperature: tau > 0.
        denominator: ``one`` or ``all``, see above.
        candidates: (..., M, C); the anchors themselves if None.

    Returns:
        Scalar in float32, or float64 for float64 features; zero, with a graph, if there is no positive pair.
    """
    with torch.autocast(features.device.type, enabled=False):
        anchors = unit(features)
        others = anchors if candidates is None else unit(candidates)
        similarity = (anchors / temperature) @ others.mT  # (..., N, M)
        # The lowest finite number, not -inf: its exp() is 0 too, and a row without negatives stays finite.
        absent = torch.finfo(similarity.dtype).min
        if denominator == "one":
            repulsion = similarity.masked_fill(~negative, absent).logsumexp(-1, keepdim=True)  # (..., N, 1)
            terms = softplus(repulsion - similarity, threshold=50)  # = logaddexp(s, repulsion) - s
            chosen = positive
        else:
            count = positive.sum(-1)  # (..., N)
            attraction = torch.where(positive, similarity, 0).sum(-1) / count.clamp_min(1)
            terms = similarity.masked_fill(~(positive | negative), absent).logsumexp(-1) - attraction  # (..., N)
            chosen = count > 0
        return torch.where(chosen, terms, 0).sum() / chosen.expand_as(terms).sum().clamp_min(1)
