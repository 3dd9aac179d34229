"""How much: one contrastive loss for every strategy; who attracts and repels whom comes as two boolean masks."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

Denominator = Literal["one", "all"]

VERSION = 1  # raised by hand when a loss, its pairs or its regions give other values (see `runs.identity`)
SHORTEST = 1e-8  # a shorter feature vector has no direction


def unit(features: Tensor) -> Tensor:
    """Features of length one, in float32 or finer; a zero vector stays zero and receives no gradient.

    Args:
        features: (..., C), any floating type.

    Returns:
        (..., C), float64 if the features are, else float32.
    """
    # Contiguous, for the vectors of a map are often a permuted view, and products of such are slow.
    features = features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    # Dividing by max(length, eps), as is common, would give a zero vector a gradient of 1/eps.
    return features.div(length.masked_fill(length <= SHORTEST, math.inf))


def contrastive_loss(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float,
    *,
    denominator: Denominator,
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
        positive: (..., N, M) bool, candidate j attracts anchor i; it may lack leading dimensions. Masks on the CPU
            are best: what they hold is counted, and a GPU would have to be waited for.
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
        total, count = _terms(anchors, others, positive, negative, temperature, denominator)
        return total.div(max(count, 1))


def contrastive_loss_in_chunks(
    features: Tensor,
    masks: Callable[[slice], tuple[Tensor, Tensor]],
    temperature: float,
    *,
    denominator: Denominator,
    candidates: Tensor | None = None,
    anchors_at_once: int = 256,
) -> Tensor:
    """`contrastive_loss` of so many anchors that neither similarities nor masks of all of them fit into memory.

    The anchors go through in chunks, and of each its part of the gradient is kept but nothing of size (n, M): at the
    peak about 25 bytes times `anchors_at_once` times M (float32; up to 60 with the freed blocks that the allocator of a
    CPU holds back). Backward multiplies what forward found, so that nothing is computed twice; there is no second
    derivative.

    Leading dimensions are not divided. Many small losses, one per location of a map, need no chunks: their similarities
    are no larger than the features while a location has no more candidates than channels. Use `contrastive_loss`.

    Args:
        features: (..., N, C) anchors.
        masks: gives positive and negative, (..., n, M) bool, see `contrastive_loss`, of the anchors `rows`, a slice
            within 0 .. N.
        temperature: tau > 0.
        denominator: ``one`` or ``all``, see `contrastive_loss`.
        candidates: (..., M, C); the anchors themselves if None.
        anchors_at_once: n, 1 or more; bounds the memory and changes nothing else.

    Returns:
        Scalar, see `contrastive_loss`.
    """
    with torch.autocast(features.device.type, enabled=False):
        anchors = unit(features)
        others = None if candidates is None else unit(candidates)
        loss: Tensor = _InChunks.apply(anchors, others, masks, temperature, denominator, anchors_at_once)  # type: ignore[no-untyped-call]
        return loss


def _terms(
    anchors: Tensor, others: Tensor, positive: Tensor, negative: Tensor, temperature: float, denominator: Denominator
) -> tuple[Tensor, int]:
    """Sum of the terms that `contrastive_loss` takes the mean of, and how many they are."""
    similarity = (anchors / temperature) @ others.mT  # (..., N, M)
    device, several = similarity.device, similarity.numel() // max(1, positive.numel())
    # The lowest finite number, not -inf: its exp() is 0 too, and a row without any negative stays finite.
    absent = torch.finfo(similarity.dtype).min
    if denominator == "one":
        repulsion = similarity.masked_fill(~negative.to(device), absent).logsumexp(-1)  # (..., N)
        # log(e^s + e^repulsion) - s, of the positive pairs alone: they are few, and softplus is slow.
        positive = positive.expand(similarity.shape[-positive.ndim :])  # a leading 1 stands for all
        pair: tuple[Any, ...] = (..., *positive.nonzero().to(device).unbind(-1))
        terms = softplus(repulsion[pair[:-1]] - similarity[pair], threshold=50)
        return terms.sum(), terms.numel()
    count = positive.sum(-1, keepdim=True)  # (..., N, 1), as the masks
    share = (positive.to(similarity.dtype) / count.clamp_min(1)).to(device)
    likelihood = similarity.masked_fill(~(positive | negative).to(device), absent).log_softmax(-1)
    return -(share * likelihood).sum(), several * int(count.count_nonzero())


class _InChunks(torch.autograd.Function):
    """The loss of unit vectors and, in the same pass, its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        others: Tensor | None,
        masks: Callable[[slice], tuple[Tensor, Tensor]],
        temperature: float,
        denominator: Denominator,
        anchors_at_once: int,
    ) -> Tensor:
        """Sum terms and gradients over the chunks, then divide both by the number of terms."""
        # Leaves of graphs of our own: each chunk's is freed by its backward(), which adds to the leaves' `grad`.
        leaf = anchors.detach().requires_grad_(ctx.needs_input_grad[0])
        other = leaf if others is None else others.detach().requires_grad_(ctx.needs_input_grad[1])
        total, count = torch.zeros((), dtype=leaf.dtype, device=leaf.device), 0
        for start in range(0, leaf.shape[-2], anchors_at_once):
            rows = slice(start, min(start + anchors_at_once, leaf.shape[-2]))
            with torch.enable_grad():
                part, found = _terms(leaf[..., rows, :], other, *masks(rows), temperature, denominator)
            if part.requires_grad:
                part.backward()  # type: ignore[no-untyped-call]
            total, count = total + part.detach(), count + found
        ctx.count = max(count, 1)
        ctx.save_for_backward(leaf.grad, None if others is None else other.grad)
        return total.div(ctx.count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward found."""
        gradients = [None if found is None else found * (grad / ctx.count) for found in ctx.saved_tensors]
        return *gradients, None, None, None, None
