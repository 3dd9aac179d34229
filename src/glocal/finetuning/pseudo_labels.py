"""Label maps that a network made: a file for training to read, and masks in native geometry for people to look at."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot

from glocal.data.dataset import read_dataset
from glocal.data.image import write_like
from glocal.data.inputs import mask_name
from glocal.data.prepare import restore
from glocal.data.sampling import Pool, Slices
from glocal.errors import GlocalError
from glocal.files import replacing
from glocal.inference import slice_probabilities

IGNORED = 255  # what nothing is to be learnt from
_BINS = 4096  # of the probabilities that a class's threshold is found in; a power of 2, so that their edges are exact
_AT_ONCE = 32  # slices


class PseudoLabels:
    """The pseudo-labels of all slices of a pool, round by round: `folder/round-K/labels.npy`."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        store, index = pool.store, pool.slices
        self.slices = Slices(index, store.volume_of[index], store.slice_of[index], store.count_of[index])
        self.classes = len(store.labels)
        self._shape = (len(pool), *store.plan.options.size)

    def path(self, number: int) -> Path:
        """The file of round `number`: uint8 `(N, H, W)`, slices in the order of `slices`."""
        return self.folder / f"round-{number}" / "labels.npy"

    def write(self, number: int, network: nn.Module, confidence: float, kept: float) -> None:
        """Label all slices, in the precision that training runs in.

        Args:
            number: of the round.
            network: gives logits; in evaluation mode, see `folded`.
            confidence: pixels whose largest probability is smaller become `IGNORED`.
            kept: at least this share of the pixels of each class does not, its most confident ones.
        """
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
        thresholds = torch.full((self.classes,), confidence)
        if confidence and kept:
            thresholds = thresholds.minimum(least_kept(self._counts(network), kept))
        with replacing(self.path(number)) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for probability, label in self._predictions(network):
                label = label.where(probability >= thresholds[label], IGNORED)
                file.write(label.to(torch.uint8).numpy().tobytes())

    def read(self, number: int) -> NDArray[np.uint8]:
        """The pseudo-labels of a round, `(N, H, W)`; they stay on disk until they are indexed.

        Raises:
            GlocalError: the file is missing or damaged.
        """
        path = self.path(number)
        try:
            labels: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path) from error
        if labels.shape != self._shape or labels.dtype != np.dtype(np.uint8):
            raise _damaged(path)
        return labels

    def write_masks(self, number: int) -> None:
        """Write a round's masks beside its file, in native geometry, of all cases whose raw images are still there.

        Raises:
            GlocalError: the file is missing or damaged, an image cannot be read, or there is no space.
        """
        store, labels = self.pool.store, self.read(number)
        try:
            dataset = read_dataset(store.dataset)
        except GlocalError:
            return
        images = {case.name: case.images[0] for case in dataset.cases}
        for volume in self.pool.volumes.tolist():
            case, undo = store.volumes[volume].case, store.volumes[volume].undo
            if case in images:
                mask = restore(self._one_hot(labels[(self.slices.volume == volume).numpy()]), undo)
                mask[mask == self.classes] = IGNORED
                write_like(self.path(number).with_name(mask_name(case, dataset.file_ending)), mask, images[case])

    def _predictions(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The largest probability and its class, `(m, H, W)` each, of all slices in their order."""
        device = self.pool.store.device
        for rows in torch.split(torch.arange(len(self.slices)), _AT_ONCE):
            for part in slice_probabilities(network, self.pool.images(self.slices[rows]), device):
                yield part.max(1)

    def _counts(self, network: nn.Module) -> Tensor:
        """What `least_kept` takes: one more look at all slices, so that never more than a few are held."""
        counts = torch.zeros(self.classes * _BINS, dtype=torch.long)
        for probability, label in self._predictions(network):
            bins = (probability * _BINS).long().clamp(max=_BINS - 1)
            counts += (label * _BINS + bins).flatten().bincount(minlength=len(counts))
        return counts.view(self.classes, _BINS)

    def _one_hot(self, labels: NDArray[np.uint8]) -> Iterator[Tensor]:
        """Label maps `(n, H, W)` as probabilities, some slices at a time; ignored pixels are one class more."""
        for part in torch.split(torch.from_numpy(labels).long().clamp(max=self.classes), _AT_ONCE):
            yield one_hot(part, self.classes + 1).movedim(-1, 1).float()


def least_kept(counts: Tensor, kept: float) -> Tensor:
    """The largest threshold of each class that at least the share `kept` of its pixels reaches.

    The (1 - kept)-quantile of the class's probabilities, as in class-balanced self-training (Zou et al., ECCV 2018),
    rounded down to the edge of a bin.

    Args:
        counts: `(K, B)` pixels of each class whose probability is in each of B equal parts of [0, 1].
        kept: in [0, 1].

    Returns:
        `(K,)` float32.
    """
    reaching = counts.flip(1).cumsum(1).flip(1)  # the lower edge of each bin
    enough = reaching >= kept * counts.sum(1, keepdim=True).double()
    return (enough.sum(1) - 1) / counts.shape[1]


def _damaged(path: Path) -> GlocalError:
    return GlocalError(
        f"{path} is missing or damaged: delete checkpoint.safetensors in the folder of that run, and it begins anew."
    )
