"""The contrastive loss beside the same losses of peers: making the masks, forward and backward, as in a step."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import Row, compared, main
from glocal.contrast import pairs
from glocal.contrast.losses import Denominator, contrastive_loss

CHANNELS, TEMPERATURE = 128, 0.1
Loss = Callable[[Tensor], Tensor]


def rows() -> Iterator[Row]:
    """NT-Xent beside the libraries that have it; masks that they do not know beside a loop over pairs."""
    if not find_spec("lightly"):
        print("lightly is not installed: `make bench-peers` measures the rows that need it")
    for n in (32, 128, 512):
        yield from nt_xent(n)
    yield positional()
    yield g_d()


def nt_xent(n: int) -> Iterator[Row]:
    """SimCLR's loss of n embeddings, two views of n / 2 images, in both of our forms."""
    from monai.losses import ContrastiveLoss

    embeddings = drawn(n)
    image = torch.arange(n // 2).repeat(2)
    forms: tuple[Denominator, Denominator] = ("all", "one")  # the same value for two views
    ours = {form: glocal(lambda: pairs.g_random(image), form) for form in forms}
    if find_spec("lightly"):
        from lightly.loss import NTXentLoss

        lightly = NTXentLoss(TEMPERATURE)
        for form in forms:
            what = f'NT-Xent, {n} embeddings, denominator "{form}"'
            yield beside(what, embeddings, ours[form], "lightly", lambda z: lightly(*z.chunk(2)), 1)
    monai = ContrastiveLoss(TEMPERATURE)
    what = f'NT-Xent, {n} embeddings, denominator "all"'
    note = "some forty small operations forward and backward: at this size their calls are most of the time"
    goal, note = (8, note) if n == 32 else (100, note if n == 128 else "")
    yield beside(what, embeddings, ours["all"], "MONAI", lambda z: monai(*z.chunk(2)), goal, note)


def positional() -> Row:
    """PCL: two views of 16 slices of all volumes, near positions attract."""
    image = torch.arange(16).repeat(2)
    position = pairs.position_of(image % 8, 8)

    def masks() -> pairs.Masks:
        return pairs.positional(image, position, 0.35)

    return beside("PCL, 32 embeddings", drawn(32), glocal(masks, "all"), "loop over pairs", looped(masks, "all"))


def g_d() -> Row:
    """GLCL's G^D: four volumes in four partitions, an original and a view of each slice."""
    image, original = torch.arange(16).repeat(2), torch.arange(32) < 16

    def masks() -> pairs.Masks:
        return pairs.g_d(image, image // 4, image % 4, original)

    return beside("GLCL G^D, 32 embeddings", drawn(32), glocal(masks, "one"), "loop over pairs", looped(masks, "one"))


def beside(
    what: str, embeddings: Tensor, ours: Loss, against: str, theirs: Loss, goal: float | None = None, note: str = ""
) -> Row:
    """Compare value and gradient of two losses of the same embeddings, then time them."""
    for one, other in zip(step(ours, embeddings), step(theirs, embeddings), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    works = (lambda: step(ours, embeddings)), (lambda: step(theirs, embeddings))
    return compared(what, works[0], against, works[1], goal, note=note, seconds=2)


def step(loss: Loss, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    value = loss(embeddings)
    return value.detach(), torch.autograd.grad(value, embeddings)[0]


def drawn(n: int) -> Tensor:
    """Embeddings that want a gradient."""
    return torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(n)).requires_grad_()


def glocal(masks: Callable[[], pairs.Masks], form: Denominator) -> Loss:
    """Our loss; the masks are made each time."""
    return lambda z: contrastive_loss(z, *masks(), TEMPERATURE, denominator=form)


def looped(masks: Callable[[], pairs.Masks], form: Denominator) -> Loss:
    """The equations as they stand: over anchors, their positives, and what is below the fraction bar."""

    def loss(z: Tensor) -> Tensor:
        positive, negative = masks()
        e = (normalize(z) @ normalize(z).T / TEMPERATURE).exp()
        terms: list[Any] = []
        for i in range(len(z)):
            attract = [j for j in range(len(z)) if positive[i, j]]
            below: Any = sum(e[i, k] for k in range(len(z)) if negative[i, k])
            if form == "one":
                terms += [-(e[i, j] / (e[i, j] + below)).log() for j in attract]
            elif attract:
                below = below + sum(e[i, j] for j in attract)
                terms.append(sum(-(e[i, j] / below).log() for j in attract) / len(attract))
        return torch.stack(terms).mean()

    return loss


if __name__ == "__main__":
    main(rows)
