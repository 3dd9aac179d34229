"""The loss in chunks against the loss at once: the same value and gradients, whatever the size of a chunk."""

import weakref

import pytest
import torch
from torch import Tensor

from glocal.contrast import losses, pairs
from glocal.contrast.losses import Denominator, contrastive_loss, contrastive_loss_in_chunks

FORMS: tuple[Denominator, Denominator] = ("one", "all")
N, M = 7, 9
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_masks(seed: int, *shape: int) -> pairs.Masks:
    """Masks with some empty rows: anchors without positives, without negatives, without both."""
    draw = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    positive, negative = draw < 0.3, draw > 0.6
    positive[..., 0, :], negative[..., 1, :] = False, False
    positive[..., 2, :], negative[..., 2, :] = False, False
    return positive, negative


class Rows:
    """Masks of the asked rows of whole ones, and which rows were asked for."""

    def __init__(self, whole: pairs.Masks) -> None:
        self.whole = whole
        self.asked: list[slice] = []

    def __call__(self, rows: slice) -> pairs.Masks:
        self.asked.append(rows)
        positive, negative = self.whole
        return positive[..., rows, :], negative[..., rows, :]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_anchors_against_candidates(form: Denominator, at_once: int, leading: tuple[int, ...]) -> None:
    inputs = [normal(0, *leading, N, 5).requires_grad_(), normal(1, *leading, M, 5).requires_grad_()]
    rows = Rows(random_masks(2, *leading, N, M))
    whole = contrastive_loss(inputs[0], *rows.whole, 0.1, denominator=form, candidates=inputs[1])
    parts = contrastive_loss_in_chunks(
        inputs[0], rows, 0.1, denominator=form, candidates=inputs[1], anchors_at_once=at_once
    )
    torch.testing.assert_close(parts, whole, **EXACT)
    # A factor, so that the gradient that comes in is not one.
    gradients = [torch.autograd.grad(-3 * loss, inputs) for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, **EXACT)
    assert [(s.start, s.stop) for s in rows.asked] == [(i, min(i + at_once, N)) for i in range(0, N, at_once)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at_once", [2, 100])
def test_candidates_default_to_the_anchors(form: Denominator, at_once: int) -> None:
    z, rows = normal(3, N, 5).requires_grad_(), Rows(random_masks(4, N, N))
    whole = contrastive_loss(z, *rows.whole, 0.1, denominator=form)
    parts = contrastive_loss_in_chunks(z, rows, 0.1, denominator=form, anchors_at_once=at_once)
    torch.testing.assert_close(parts, whole, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(parts, z), torch.autograd.grad(whole, z), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_shared_over_leading_dimensions(form: Denominator) -> None:
    z, rows = normal(5, 4, N, 5).requires_grad_(), Rows(random_masks(6, N, N))
    whole = contrastive_loss(z, *rows.whole, 0.1, denominator=form)
    parts = contrastive_loss_in_chunks(z, rows, 0.1, denominator=form, anchors_at_once=3)
    torch.testing.assert_close(parts, whole, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(parts, z), torch.autograd.grad(whole, z), **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("learn", [0, 1])
def test_only_one_side_learns(form: Denominator, learn: int) -> None:
    # Keys of a momentum encoder have no gradient; neither have queries against learnt prototypes.
    inputs = [normal(7, N, 5), normal(8, M, 5)]
    inputs[learn].requires_grad_()
    rows = Rows(random_masks(9, N, M))
    whole = contrastive_loss(inputs[0], *rows.whole, 0.1, denominator=form, candidates=inputs[1])
    parts = contrastive_loss_in_chunks(inputs[0], rows, 0.1, denominator=form, candidates=inputs[1], anchors_at_once=3)
    parts.backward()
    torch.testing.assert_close(inputs[learn].grad, torch.autograd.grad(whole, inputs[learn])[0], **EXACT)
    assert inputs[1 - learn].grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("learns", [True, False])
def test_no_gradient_where_none_is_wanted(form: Denominator, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    terms = losses._terms

    def watched(*inputs: object) -> tuple[Tensor, int]:
        total, count = terms(*inputs)  # type: ignore[arg-type]
        made.append(total)
        return total, count

    monkeypatch.setattr(losses, "_terms", watched)
    z, rows = normal(10, N, 5).requires_grad_(learns), Rows(random_masks(11, N, N))
    with torch.set_grad_enabled(not learns):  # features without gradient, and features with one under no_grad
        loss = contrastive_loss_in_chunks(z, rows, 0.1, denominator=form, anchors_at_once=3)
    whole = contrastive_loss(z, *rows.whole, 0.1, denominator=form)
    torch.testing.assert_close(loss, whole.detach(), **EXACT)
    assert not loss.requires_grad
    assert not any(total.requires_grad for total in made[:3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_loss(form: Denominator, dtype: torch.dtype) -> None:
    z, rows = normal(12, N, 16, dtype=dtype).requires_grad_(), Rows(random_masks(13, N, N))
    whole = contrastive_loss(z, *rows.whole, 0.1, denominator=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = contrastive_loss_in_chunks(z, rows, 0.1, denominator=form, anchors_at_once=3)
        parts.backward()
    assert parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    torch.testing.assert_close(z.grad, torch.autograd.grad(whole, z)[0])


@pytest.mark.parametrize("form", FORMS)
def test_no_positive_pair_is_zero_with_a_graph(form: Denominator) -> None:
    z, none = normal(14, N, 5).requires_grad_(), torch.zeros(N, N, dtype=torch.bool)
    loss = contrastive_loss_in_chunks(z, Rows((none, ~none)), 0.1, denominator=form, anchors_at_once=3)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_zero_vectors_have_no_gradient_and_break_nothing(form: Denominator) -> None:
    z = normal(15, 8, 5, dtype=torch.float32)
    z[[0, 5]] = 0
    z.requires_grad_()
    rows = Rows(pairs.g_random(torch.arange(4).repeat(2)))
    loss = contrastive_loss_in_chunks(z, rows, 0.01, denominator=form, anchors_at_once=3)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad[[0, 5]] == 0).all()
    assert (z.grad[[1, 4]] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_chunk_outlives_it(form: Denominator) -> None:
    class Saved:
        """What autograd keeps for backward."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    kept: list[int] = []

    def masks(rows: slice) -> pairs.Masks:
        kept.append(len(alive))
        return positive[rows], negative[rows]

    z, (positive, negative) = normal(16, 8, 5).requires_grad_(), random_masks(17, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = contrastive_loss_in_chunks(z, masks, 0.1, denominator=form, anchors_at_once=2)
        assert loss.requires_grad
        assert kept == 4 * [kept[0]]
        assert max(saved.tensor.numel() for saved in alive) <= z.numel()
