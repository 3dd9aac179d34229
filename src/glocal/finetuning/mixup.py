"""Mixup: every training image is a mixture of two, and so is its target (Zhang et al., ICLR 2018)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from glocal.distributed import share, whole
from glocal.finetuning.base import FinetuningOptions, Strategy, StrategyEntry
from glocal.finetuning.losses import as_probabilities
from glocal.randomness import generator
from glocal.views.ranges import moved
from glocal.views.view import draw_view


class Options(FinetuningOptions):
    """As supervised fine-tuning, and how strongly slices are mixed (Chaitanya et al. 2020)."""

    strategy: Literal["mixup"] = "mixup"
    alpha: float = Field(0.1, gt=0, description="small: most mixtures are nearly one of their two slices; 1: any share")


class Mixup(Strategy):
    """The segmentation loss of mixed slices and their mixed, therefore soft, labels."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Segmentation loss of one mixed batch."""
        images, targets, batch = self.mixed_batch(step)
        return {"loss": self.loss(whole(self.network(images), batch), whole(targets, batch))}

    def mixed_batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """This process's share of a batch of mixtures, of the slices and views of supervised fine-tuning.

        Returns:
            Images `(b, C, H, W)`, probabilities `(b, K, H, W)`, and the size of the whole batch.
        """
        o: Options = self.options
        slices = self.labelled.uniform(o.batch, generator(o.seed, step, "slices"))
        first, second, lam = draw_mixtures(len(slices), o.alpha, generator(o.seed, step, "mixup"))
        own = share(len(slices))
        # Whatever is mixed into this share is made here, each once: slices and views are the same in every process.
        needed, place = torch.unique(torch.stack([first[own], second[own]]), return_inverse=True)
        images, labels = self.labelled.images(slices[needed]), self.labelled.labels(slices[needed])
        size = (images.shape[-2], images.shape[-1])
        view = draw_view(o.augmentation, len(slices), size, generator(o.seed, step, "view"))[needed]
        # Contiguous as `whole` makes them, so that sums are taken in one order however many processes there are.
        targets = as_probabilities(view.labels(labels), len(self.labelled.store.labels))
        return *mix(view.image(images), targets, place[0], place[1], lam[own]), len(slices)


def draw_mixtures(batch: int, alpha: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What `mix` makes `batch` mixtures of a batch of this size from.

    Returns:
        `(batch,)` each: two items, drawn independently with replacement, and lambda ~ Beta(alpha, alpha).
    """
    first, second = torch.randint(batch, (2, batch), generator=rng)
    # Beta is a ratio of two Gamma(alpha), and these are Gamma(alpha + 1) U^(1 / alpha): as logarithms, so that for a
    # small alpha they do not both become 0.
    powers = torch.rand(2, batch, generator=rng, dtype=torch.float64).log() / alpha
    gamma = torch._standard_gamma(torch.full_like(powers, alpha + 1), generator=rng).log() + powers
    return first, second, (gamma[0] - gamma[1]).sigmoid()


def mix(images: Tensor, targets: Tensor, first: Tensor, second: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """lambda x_i + (1 - lambda) x_j, of images and of targets (Zhang et al. 2018, section 2).

    Args:
        images: `(n, C, H, W)`.
        targets: probabilities `(n, K, H, W)`, one-hot or soft.
        first: `(b,)` the item i of each mixture.
        second: `(b,)` its item j.
        lam: `(b,)` in [0, 1].

    Returns:
        Images `(b, C, H, W)` and probabilities `(b, K, H, W)`.
    """
    first, second, lam = (moved(numbers, images.device) for numbers in (first, second, lam))

    def mixed(x: Tensor) -> Tensor:
        part = lam.to(x.dtype).view(-1, 1, 1, 1)
        return part * x[first] + (1 - part) * x[second]

    return mixed(images), mixed(targets)


MIXUP = StrategyEntry(
    paper="H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz: mixup: beyond empirical risk minimization. ICLR 2018.",
    summary="train on mixtures of two labelled slices and of their labels",
    version=1,
    options=Options,
    make=Mixup,
)
