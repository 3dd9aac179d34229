"""Dense contrast: a loss per location (JCL) beside a loop over locations, and every cell against every cell (IDEAL)."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Row, compared, main, take_turns
from glocal.contrast import pairs
from glocal.contrast.losses import contrastive_loss, contrastive_loss_in_chunks

SLICES, CHANNELS, SIDE, TEMPERATURE = 16, 128, 32, 0.1
SIDE_OF_PEER = 16  # at 32, NTXentLoss would take sixteen times the memory, about 17 GiB
Loss = Callable[[Tensor], Tensor]


def rows() -> Iterator[Row]:
    """Time of both, peak memory of the second."""
    yield per_location()
    if find_spec("lightly"):
        yield from every_cell_beside_lightly()
    else:
        print("lightly is not installed: `make bench-peers` measures the rows that need it")
    yield from queries_and_keys()


def per_location() -> Row:
    """JCL: at each location the two branches' vectors of all slices, near positions attract."""
    image = torch.arange(SLICES).repeat(2)
    masks = pairs.positional(image, pairs.position_of(image, SLICES), 0.1)

    def ours(maps: Tensor) -> Tensor:
        return contrastive_loss(maps.flatten(2).permute(2, 0, 1), *masks, TEMPERATURE, denominator="all")

    def looped(maps: Tensor) -> Tensor:
        vectors = maps.flatten(2).unbind(-1)
        return torch.stack([contrastive_loss(at, *masks, TEMPERATURE, denominator="all") for at in vectors]).mean()

    maps = drawn(2 * SLICES, CHANNELS, SIDE, SIDE).detach().to(memory_format=torch.channels_last).requires_grad_()
    agree(ours, looped, maps)
    return compared(
        f"JCL, {SIDE} x {SIDE} locations, {2 * SLICES} maps",
        lambda: step(ours, maps),
        "loop over locations",
        lambda: step(looped, maps),
        50,
        note="the loop calls the same loss at each location: only the calls can be saved; the rest is memory "
        "traffic of maps of 17 MB, which both have",
    )


def every_cell_beside_lightly() -> Iterator[Row]:
    """Two views of a batch: a cell and its twin attract, all other cells of the batch repel, as in NT-Xent."""
    cells = drawn(2 * SLICES * SIDE_OF_PEER**2, CHANNELS)
    agree(every_cell, nt_xent, cells)
    what = f"every cell against every cell, {len(cells)} cells"
    note = f"maps of {SIDE_OF_PEER} x {SIDE_OF_PEER}; at {SIDE} x {SIDE} NTXentLoss would need sixteen times its memory"
    yield compared(
        what, lambda: step(every_cell, cells), "lightly", lambda: step(nt_xent, cells), 1, note=note, seconds=1
    )
    a, b = apart(every_cell, len(cells)), apart(nt_xent, len(cells))
    yield Row(f"{what}: memory", "MiB", (a, a), "lightly", (b, b), a / b, 0.5, "at most", note)


def queries_and_keys() -> Iterator[Row]:
    """IDEAL at full size: cells of the queries' maps against all cells of the keys' maps."""
    cells = drawn(2 * SLICES * SIDE**2, CHANNELS)
    what = f"IDEAL, {len(cells) // 2} queries against as many keys"
    seconds = take_turns({"ours": lambda: step(keys_of_a_batch, cells)}, seconds=0, rounds=1)["ours"]
    yield Row(what, "s", seconds, note="one similarity matrix alone is 1024 MiB")
    peak = apart(keys_of_a_batch, len(cells))
    yield Row(f"{what}: memory", "MiB", (peak, peak))


def every_cell(cells: Tensor) -> Tensor:
    """Ours; a row of the masks is made when it is needed."""
    me = torch.arange(len(cells))
    twin = me.roll(len(cells) // 2)

    def masks(rows: slice) -> pairs.Masks:
        positive = twin[rows, None] == me
        return positive, (me[rows, None] != me) & ~positive

    return contrastive_loss_in_chunks(cells, masks, TEMPERATURE, denominator="one")


def keys_of_a_batch(cells: Tensor) -> Tensor:
    """The first half are queries, the second the keys, which do not learn."""
    queries, keys = cells.chunk(2)
    me = torch.arange(len(queries))

    def masks(rows: slice) -> pairs.Masks:
        positive = me[rows, None] == me
        return positive, ~positive

    return contrastive_loss_in_chunks(queries, masks, TEMPERATURE, denominator="one", candidates=keys.detach())


def nt_xent(cells: Tensor) -> Tensor:
    """What lightly computes for the same cells."""
    from lightly.loss import NTXentLoss

    loss: Tensor = NTXentLoss(TEMPERATURE)(*cells.chunk(2))
    return loss


def step(loss: Loss, features: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    value = loss(features)
    return value.detach(), torch.autograd.grad(value, features)[0]


def agree(ours: Loss, theirs: Loss, features: Tensor) -> None:
    """Value and gradient are the same."""
    (value, gradient), (other, expected) = step(ours, features), step(theirs, features)
    torch.testing.assert_close(value, other, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


def apart(loss: Loss, cells: int) -> float:
    """Peak memory of one step above what was there before it, in MiB, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(peak, loss, cells).result()


def peak(loss: Loss, cells: int) -> float:
    """What `apart` does there; the first step is a small one, so that all code is loaded."""
    torch.set_num_threads(1)
    step(loss, drawn(64, CHANNELS))
    features = drawn(cells, CHANNELS)
    before = status("VmRSS")
    step(loss, features)
    return status("VmHWM") - before


def status(name: str) -> float:
    """A figure of this process in MiB: VmRSS, memory now; VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def drawn(*shape: int) -> Tensor:
    """Features that want a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


if __name__ == "__main__":
    main(rows)
