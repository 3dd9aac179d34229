"""The loss against slow loops written from the papers, and where arithmetic usually breaks."""

import math

import pytest
import torch
from torch import Tensor

from glocal.contrast import pairs
from glocal.contrast.losses import Denominator, contrastive_loss, unit

FORMS: tuple[Denominator, Denominator] = ("one", "all")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def random_masks(seed: int, *shape: int) -> pairs.Masks:
    """Masks with some empty rows: anchors without positives, without negatives, without both."""
    draw = torch.rand(*shape, generator=generator(seed))
    positive, negative = draw < 0.3, draw > 0.6
    positive[..., 0, :], negative[..., 1, :] = False, False
    positive[..., 2, :], negative[..., 2, :] = False, False
    return positive, negative


def slow_cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum() / (u.square().sum().sqrt() * v.square().sum().sqrt())


def slow_loss(
    anchors: Tensor, others: Tensor, positive: Tensor, negative: Tensor, temperature: float, form: Denominator
) -> Tensor:
    """Mean over pairs (one) or anchors (all) of one matrix of pairs, term by term."""
    terms = []
    for i, anchor in enumerate(anchors):
        e = [torch.exp(slow_cosine(anchor, other) / temperature) for other in others]
        attract = [j for j in range(len(others)) if positive[i, j]]
        repel = [e[k] for k in range(len(others)) if negative[i, k]]
        if form == "one":
            terms += [-torch.log(e[j] / (e[j] + sum(repel))) for j in attract]
        elif attract:
            below = sum(repel) + sum(e[j] for j in attract)
            terms.append(sum(-torch.log(e[j] / below) for j in attract) / len(attract))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_slow_loop(form: Denominator, seed: int) -> None:
    anchors = normal(seed, 7, 5).requires_grad_()
    others = normal(seed + 10, 9, 5).requires_grad_()
    masks = random_masks(seed, 7, 9)
    fast = contrastive_loss(anchors, *masks, 0.2, denominator=form, candidates=others)
    slow = slow_loss(anchors, others, *masks, 0.2, form)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, [anchors, others]), torch.autograd.grad(slow, [anchors, others])
    )


@pytest.mark.parametrize("form", FORMS)
def test_candidates_default_to_the_anchors(form: Denominator) -> None:
    z = normal(0, 8, 5).requires_grad_()
    masks = random_masks(1, 8, 8)
    fast, slow = contrastive_loss(z, *masks, 0.1, denominator=form), slow_loss(z, z, *masks, 0.1, form)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, z), torch.autograd.grad(slow, z))


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions_pool_their_terms(form: Denominator) -> None:
    z = normal(2, 2, 3, 6, 4)
    positive, negative = random_masks(3, 2, 3, 6, 6)
    loss = contrastive_loss(z, positive, negative, 0.1, denominator=form)
    sums, counts = 0.0, 0
    for a in range(2):
        for b in range(3):
            rows = positive[a, b].any(-1)
            count = int(rows.sum() if form == "all" else positive[a, b].sum())
            sums += slow_loss(z[a, b], z[a, b], positive[a, b], negative[a, b], 0.1, form).item() * count
            counts += count
    assert loss.item() == pytest.approx(sums / counts, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_shared_over_leading_dimensions(form: Denominator) -> None:
    z = normal(4, 5, 6, 4)
    positive, negative = random_masks(5, 6, 6)
    shared = contrastive_loss(z, positive, negative, 0.1, denominator=form)
    spread = contrastive_loss(z, positive[None], negative[None], 0.1, denominator=form)
    torch.testing.assert_close(spread, shared)
    mean = torch.stack([contrastive_loss(x, positive, negative, 0.1, denominator=form) for x in z]).mean()
    torch.testing.assert_close(shared, mean)


@pytest.mark.parametrize("form", FORMS)
def test_order_and_length_of_the_features_do_not_matter(form: Denominator) -> None:
    z = normal(6, 10, 5)
    positive, negative = random_masks(7, 10, 10)
    order = torch.randperm(10, generator=generator(8))
    loss = contrastive_loss(z, positive, negative, 0.1, denominator=form)
    shuffled = contrastive_loss(z[order], positive[order][:, order], negative[order][:, order], 0.1, denominator=form)
    stretched = contrastive_loss(z * torch.arange(1, 11)[:, None], positive, negative, 0.1, denominator=form)
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(stretched, loss)


@pytest.mark.parametrize("form", FORMS)
def test_no_positive_pair_is_zero_with_a_graph(form: Denominator) -> None:
    z = normal(9, 4, 3).requires_grad_()
    none = torch.zeros(4, 4, dtype=torch.bool)
    loss = contrastive_loss(z, none, ~none, 0.1, denominator=form)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_no_negatives_costs_nothing() -> None:
    z = normal(10, 4, 3).float().requires_grad_()
    others = ~torch.eye(4, dtype=torch.bool)
    loss = contrastive_loss(z, others, torch.zeros_like(others), 0.1, denominator="one")
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_identical_views_at_temperature_one_hundredth(form: Denominator, dtype: torch.dtype) -> None:
    # e^100 overflows float32: only log-sum-exp survives. Orthogonal images, so the right value is ln(1 + 6 e^-100).
    z = torch.eye(4).repeat(2, 1).to(dtype).requires_grad_()
    loss = contrastive_loss(z, *pairs.g_random(torch.arange(4).repeat(2)), 0.01, denominator=form)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-40)
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_opposite_views_at_temperature_one_hundredth(form: Denominator) -> None:
    # s = -100 for the positive, +100 for one of the two negatives.
    z = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], requires_grad=True)
    loss = contrastive_loss(z, *pairs.g_random(torch.tensor([0, 1, 0, 1])), 0.01, denominator=form)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_zero_vectors_have_no_gradient_and_break_nothing(form: Denominator, temperature: float) -> None:
    z = normal(11, 8, 5).float()
    z[[0, 5]] = 0
    z.requires_grad_()
    loss = contrastive_loss(z, *pairs.g_random(torch.arange(4).repeat(2)), temperature, denominator=form)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad[[0, 5]] == 0).all()
    assert (z.grad[[1, 4]] != 0).any()


def test_all_zero_vectors_give_the_loss_of_equal_ones() -> None:
    z = torch.zeros(6, 3, requires_grad=True)
    loss = contrastive_loss(z, *pairs.g_random(torch.arange(3).repeat(2)), 0.1, denominator="all")
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5))
    assert z.grad is not None
    assert (z.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(form: Denominator, dtype: torch.dtype) -> None:
    half = normal(12, 8, 16).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    masks = random_masks(13, 8, 8)
    losses = [contrastive_loss(z, *masks, 0.1, denominator=form) for z in (half, full)]
    gradients = [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (half, full), strict=True)]
    assert losses[0].dtype == torch.float32
    assert losses[0] == losses[1]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_loss(form: Denominator) -> None:
    z, masks = normal(14, 8, 16).float(), random_masks(15, 8, 8)
    plain = contrastive_loss(z, *masks, 0.1, denominator=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(z, *masks, 0.1, denominator=form) == plain


@pytest.mark.parametrize("form", FORMS)
def test_float32_agrees_with_float64(form: Denominator) -> None:
    z, masks = normal(16, 32, 128), random_masks(17, 32, 32)
    exact = contrastive_loss(z, *masks, 0.01, denominator=form)
    assert contrastive_loss(z.float(), *masks, 0.01, denominator=form).item() == pytest.approx(exact.item(), rel=1e-5)


def test_unit_has_length_one_or_zero() -> None:
    lengths = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0], [1e-9, 0.0]])).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0, 0.0]))
