"""The store: the slices of all volumes, in memory if they fit, else read from disk when they are needed."""

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from glocal.data.orientation import Undo
from glocal.data.plan import Plan
from glocal.errors import GlocalError
from glocal.files import read_json

Kind = Literal["images", "labels"]
_TYPES: dict[Kind, tuple[torch.dtype, torch.dtype]] = {  # in the files, and as training wants it
    "images": (torch.float16, torch.float32),
    "labels": (torch.uint8, torch.int64),
}


@dataclass(frozen=True)
class StoredVolume:
    """One volume of the store; spacing is the native one in mm, (x, y, z), `image` tells its voxels from others."""

    case: str
    subject: str
    slices: int
    labelled: bool
    undo: Undo
    spacing: tuple[float, float, float]
    image: str | None  # None in a store of before it was written


class Store:
    """The slices of a preprocessed dataset, numbered through all volumes in order. Make one with `preprocess`.

    Attributes:
        plan: how the volumes were prepared.
        name: of the dataset.
        dataset: folder of the raw dataset.
        labels: structure to value, background included.
        split: the dataset's own lists of cases, if it has any.
        volumes: the volumes in order.
        warnings: what was odd about the dataset and its cases.
        volume_of: `(N,)` the volume of each slice.
        slice_of: `(N,)` its number in this volume.
        count_of: `(N,)` how many slices this volume has.
        first: `(V,)` the number of each volume's first slice.
    """

    def __init__(self, path: Path, index: Mapping[str, Any], memory_limit: int) -> None:
        manifest, cases = index["manifest"], index["cases"]
        self.path = path
        self.plan = Plan.model_validate(manifest["plan"])
        self.name: str = manifest["name"]
        self.dataset = Path(manifest["dataset"])
        self.labels: dict[str, int] = manifest["labels"]
        self.split: dict[str, list[str]] | None = manifest["split"]
        twins = _twins(cases)
        self.volumes = tuple(_stored(case, twins.get(case["subject"], case["subject"])) for case in cases)
        self.warnings = (
            *self.plan.warnings,
            *(f"{b} has an image of {a} too: the two count as one subject." for b, a in twins.items()),
            *(f"{case['name']}: {text}" for case in cases for text in case["warnings"]),
        )
        # What they are made of and how: neither the place of the raw files nor the wording of a warning belongs to it.
        content = json.dumps([[case[key] for key in ("name", "subject", "sources", "plan")] for case in cases])
        self._digest = hashlib.sha256(content.encode()).hexdigest()

        counts = torch.tensor([volume.slices for volume in self.volumes])
        self.first = counts.cumsum(0) - counts
        self.volume_of = torch.arange(len(counts)).repeat_interleave(counts)
        self.slice_of = torch.arange(len(self.volume_of)) - self.first[self.volume_of]
        self.count_of = counts[self.volume_of]

        self._labelled = torch.tensor([volume.labelled for volume in self.volumes])
        self._numbers = {volume.case: number for number, volume in enumerate(self.volumes)}
        size = self.plan.options.size
        self._shapes: dict[Kind, tuple[int, ...]] = {"images": (self.plan.channels, *size), "labels": size}
        bytes_of_slice = size[0] * size[1] * (2 * self.plan.channels + 1)  # float16 and uint8
        self.in_memory = len(self.volume_of) * bytes_of_slice <= memory_limit
        self._start = cache(self._header)
        self.device = torch.device("cpu")
        self._held: dict[Kind, Tensor] = {}

    @classmethod
    def open(cls, path: Path, memory_limit: int = 2 * 2**30) -> "Store":
        """Open a store; its index is read now, its volumes when they are first needed.

        Args:
            path: folder of the store.
            memory_limit: bytes; a store that is not larger is held in memory.

        Raises:
            GlocalError: not a store, unfinished, or damaged.
        """
        if not (path / "plan.json").is_file():
            raise GlocalError(f"{path} is not a store of preprocessed slices: make one with `glocal preprocess`.")
        if not (path / "index.json").is_file():
            raise GlocalError(
                f"The store {path} is unfinished: start the same `glocal preprocess` again, it continues."
            )
        try:
            with _uncollected():
                return cls(path, read_json(path / "index.json"), memory_limit)
        except (KeyError, TypeError, ValidationError) as error:
            raise GlocalError(
                f"{path / 'index.json'} is not of this version of glocal: preprocess into a new folder."
            ) from error

    def to(self, device: torch.device | str) -> "Store":
        """This store, its slices coming out on `device` from now on; held in memory, they lie there as one tensor."""
        self.device = torch.device(device)
        self._held = {kind: held.to(self.device) for kind, held in self._held.items()}
        return self

    def images(self, indices: Tensor) -> Tensor:
        """Slices by number `(B,)` as images `(B, C, H, W)` float32."""
        return self._fetch("images", indices)

    def labels_of(self, indices: Tensor) -> Tensor:
        """Label maps `(B, H, W)` int64 of slices by number `(B,)`.

        Raises:
            GlocalError: a slice's volume has no label map.
        """
        labelled = self._labelled[self.volume_of[indices]]
        if not labelled.all():
            case = self.volumes[int(self.volume_of[indices[~labelled]][0])].case
            raise GlocalError(f"Case {case} has no label map: leave it out of the labelled cases, or label it.")
        return self._fetch("labels", indices)

    def volume(self, case: str) -> Tensor:
        """All slices of a case, `(n, C, H, W)` float32.

        Raises:
            GlocalError: no such case.
        """
        number = self.index_of(case)
        return self.images(self.first[number] + torch.arange(self.volumes[number].slices))

    def index_of(self, case: str) -> int:
        """The number of a case's volume.

        Raises:
            GlocalError: no such case.
        """
        if case not in self._numbers:
            raise GlocalError(
                f"The store {self.path} holds no case {case}: check its name, or preprocess its dataset again."
            )
        return self._numbers[case]

    def digest(self) -> str:
        """SHA-256 that identifies the data: cases, subjects, the digests of their source files, and the plan."""
        return self._digest

    def _fetch(self, kind: Kind, indices: Tensor) -> Tensor:
        stored, wanted = _TYPES[kind]
        if self.in_memory:
            if kind not in self._held:
                self._held[kind] = self._all(kind).to(self.device)
            return self._held[kind][indices.to(self.device)].to(wanted)
        # The CPU converts a slice while it copies it; to a GPU the small type travels, and is converted there.
        result = torch.empty(
            (len(indices), *self._shapes[kind]),
            dtype=wanted if self.device.type == "cpu" else stored,
            pin_memory=self.device.type == "cuda",
        )
        one = torch.empty((1, *self._shapes[kind]), dtype=stored)
        places = zip(self.volume_of[indices].tolist(), self.slice_of[indices].tolist(), strict=True)
        for row, (number, place) in zip(result, places, strict=True):
            self._read(one.numpy(), kind, number, place)
            row.copy_(one[0])
        return result.to(self.device, non_blocking=True).to(wanted)

    def _all(self, kind: Kind) -> Tensor:
        result = torch.zeros((len(self.volume_of), *self._shapes[kind]), dtype=_TYPES[kind][0])
        for number, volume in enumerate(self.volumes):
            if kind == "images" or volume.labelled:
                start = int(self.first[number])
                self._read(result[start : start + volume.slices].numpy(), kind, number, 0)
        return result

    def _read(self, slices: NDArray[Any], kind: Kind, number: int, place: int) -> None:
        """Read `slices` `(n, ...)` of a volume, from number `place` on.

        Nothing stays open or mapped, so that ten thousand volumes cost a process no more than one: no handles, no
        maps, no memory. The page cache keeps what is read often.
        """
        path = self._path(kind, number)
        start = self._start(kind, number) + place * slices[0].nbytes
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                rest = memoryview(slices).cast("B")  # type: ignore[arg-type]  # NumPy's stubs lack the buffer protocol
                while count := file.readinto(rest):  # the system reads 2 GiB at a time at most
                    rest = rest[count:]
        except OSError as error:
            raise _damaged(path) from error
        if rest:
            raise _damaged(path)

    def _header(self, kind: Kind, number: int) -> int:
        """Where the slices begin in a volume's file, which is checked against the index."""
        path, stored = self._path(kind, number), np.dtype(str(_TYPES[kind][0]).removeprefix("torch."))
        shape = (self.volumes[number].slices, *self._shapes[kind])
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file)
                start, size = file.tell(), file.seek(0, os.SEEK_END)
        except (OSError, ValueError) as error:
            raise _damaged(path) from error
        if header != (shape, False, stored):
            raise GlocalError(f"{path} does not fit the store's index: delete the store and preprocess again.")
        if size < start + prod(shape) * stored.itemsize:
            raise _damaged(path)
        return start

    def _path(self, kind: Kind, number: int) -> str:
        return f"{self.path}/{kind}/{self.volumes[number].case}.npy"


def _damaged(path: str) -> GlocalError:
    return GlocalError(f"{path} is missing or damaged: delete the store and preprocess again.")


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it would walk a long index again and again while that is read, and find nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stored(case: Mapping[str, Any], subject: str) -> StoredVolume:
    x, y, z = case["spacing"]
    undo = Undo.from_dict(case["undo"])
    return StoredVolume(case["name"], subject, case["slices"], case["labelled"], undo, (x, y, z), case.get("image"))


def _twins(cases: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Subjects that share an image with an earlier one, and that one: apart they would leak from training to test."""
    first: dict[str, str] = {}
    twins: dict[str, str] = {}
    for case in cases:
        subject = twins.get(case["subject"], case["subject"])
        owner = first.setdefault(case["voxels"], subject)
        if owner != subject:
            twins = {b: owner if a == subject else a for b, a in twins.items()} | {subject: owner}
    return twins
