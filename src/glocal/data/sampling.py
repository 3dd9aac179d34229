"""What a batch holds: slices drawn from the volumes that may be trained on, with their volume and place."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.randomness import generator

VERSION = 1  # raised by hand when the same seed draws other slices (see `runs.identity`)


@dataclass(frozen=True)
class Slices:
    """Some slices: for each `(B,)` its flat index in the store, its volume, its number there and their count."""

    index: Tensor
    volume: Tensor
    number: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> "Slices":
        """Some of them, in the order of `rows`."""
        return Slices(self.index[rows], self.volume[rows], self.number[rows], self.count[rows])


class Pool:
    """The slices of some cases of a store, and ways to draw from them, each a function of a generator or a seed."""

    def __init__(self, store: Store, cases: Sequence[str]) -> None:
        """Pool the slices of `cases`.

        Raises:
            GlocalError: no case at all, or one that the store does not hold.
        """
        if not cases:
            raise GlocalError("There is no volume to train on: the split leaves none.")
        self.store = store
        self.volumes = torch.tensor(sorted({store.index_of(case) for case in cases}))
        chosen = torch.zeros(len(store.first), dtype=torch.bool).index_fill(0, self.volumes, True)
        self.slices = chosen[store.volume_of].nonzero().squeeze(1)
        self._order = lru_cache(1)(self._shuffled)

    def __len__(self) -> int:
        return len(self.slices)

    def images(self, slices: Slices) -> Tensor:
        """Images `(B, C, H, W)` float32, on the store's device."""
        return self.store.images(slices.index)

    def labels(self, slices: Slices) -> Tensor:
        """Label maps `(B, H, W)` int64, on the store's device."""
        return self.store.labels_of(slices.index)

    def uniform(self, batch: int, rng: torch.Generator) -> Slices:
        """`batch` slices uniformly from all, with replacement (G^R, L^R, fine-tuning of Chaitanya et al. 2020)."""
        return self._slices(self.slices[torch.randint(len(self.slices), (batch,), generator=rng)])

    def epoch(self, batch: int, seed: int, step: int) -> Slices:
        """Batch `step` of endless shuffled passes over all slices; the incomplete last batch of a pass is dropped.

        A pool smaller than `batch` gives all its slices every time.
        """
        batch = min(batch, len(self.slices))
        passes, place = divmod(step, len(self.slices) // batch)
        return self._slices(self._order(seed, passes)[place * batch : (place + 1) * batch])

    def partitioned(self, volumes: int, partitions: int, rng: torch.Generator) -> Slices:
        """One slice of every partition of `volumes` distinct volumes (G^D of Chaitanya et al. 2020), volume by volume.

        Partition s holds the slices i with floor(i S / n) = s. A pool with fewer volumes gives all it has; a volume
        with fewer slices than partitions has empty ones, which give no slice.
        """
        chosen = self.volumes[torch.randperm(len(self.volumes), generator=rng)[:volumes]]
        first, count = self.store.first[chosen][:, None], self.store.count_of[self.store.first[chosen]][:, None]
        bounds = torch.arange(partitions + 1)
        edges = -(-bounds * count // partitions)  # (volumes, S + 1): the first slice of each partition, rounded up
        low, width = edges[:, :-1], edges.diff(dim=1)
        offset = (torch.rand(width.shape, generator=rng, dtype=torch.float64) * width).long()
        return self._slices((first + low + offset)[width > 0])

    def neighbours(self, slices: Slices, rng: torch.Generator) -> Slices:
        """A slice beside each: the one before or after it in its volume, as chance has it.

        The first and the last have one neighbour only; the slice of a volume of one is its own.
        """
        side = 2 * torch.randint(2, (len(slices),), generator=rng) - 1
        number = slices.number + side
        inside = (number >= 0) & (number < slices.count)
        return self._slices(slices.index + torch.where(inside, side, -side) * (slices.count > 1))

    def _shuffled(self, seed: int, passes: int) -> Tensor:
        """The order of one pass; the last one is kept, since a pass over many slices takes thousands of steps."""
        return self.slices[torch.randperm(len(self.slices), generator=generator(seed, "epoch", passes))]

    def _slices(self, index: Tensor) -> Slices:
        store = self.store
        return Slices(index, store.volume_of[index], store.slice_of[index], store.count_of[index])
