"""A full pre-training step beside the bare network, and what precision, compilation and determinism change.

Full: draw the batch, make the views, forward, loss, backward, optimiser: one iteration of the engine. Bare: the same
network and head forward on ready images, the mean square of what comes out, backward, the same optimiser.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, compared, main, take_turns
from glocal.data.phantom import phantom
from glocal.data.plan import PreprocessOptions
from glocal.data.preprocess import preprocess
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.devices import computing, fabric_for, precision_of
from glocal.engine import iterate, set_up
from glocal.networks.registry import build
from glocal.pretraining.base import Stage
from glocal.pretraining.registry import method_named, pretraining_options
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions

WIDTHS = [16, 32, 64, 128, 128, 128]
# The same for all methods, whatever their own defaults.
VIEWS = ViewOptions(
    spatial=SpatialOptions(rotation=15, scale=(0.9, 1.5), shift=0.15),
    intensity=IntensityOptions(brightness=0.3, contrast=0.5, gamma=(0.7, 1.5), noise=0.05),
).model_dump()


def settings(method: str, images: int) -> dict[str, Any]:
    """Of a method whose step sends `images` images through the network."""
    common = {"network": {"widths": WIDTHS}, "optimizer": "adamw", "augmentation": VIEWS, "max_iterations": 100_000}
    if method == "pcl":
        return {"method": method, **common, "batch": images // 2}
    of_stage = {"volumes": images // 4, "partitions": 4, "originals": False, "views": 1, "local_batch": images // 2}
    return {"method": method, **common, **of_stage}


def stages(store: Store, method: str, images: int, **more: Any) -> Iterator[tuple[str, Stage]]:
    """The stages of a method on all cases of a store."""
    options: Any = pretraining_options({**settings(method, images), **more})
    for name, make in method_named(method).stages(options):
        torch.manual_seed(0)
        network = build(options.network, store.plan.channels, len(store.labels))
        yield f"{method} {name}", make(network, Pool(store, [v.case for v in store.volumes]), options)


def full(stage: Stage, device: torch.device) -> Callable[[], Any]:
    """One iteration after the other, as the engine does it."""
    options = stage.options
    fabric = fabric_for(device, options.precision)
    module, optimizer = set_up(fabric, stage, options)
    steps = iter(range(options.max_iterations))
    return lambda: iterate(fabric, module, optimizer, options, next(steps))


def bare(stage: Stage, device: torch.device, images: int, contiguous: bool = False) -> Callable[[], Any]:
    """The same arithmetic of network and head on ready images; `contiguous` without channels-last."""
    fabric = fabric_for(device, stage.options.precision)
    module, optimizer = set_up(fabric, stage, stage.options)
    shape = (images, *stage.pool.images(stage.pool.uniform(1, torch.Generator())).shape[1:])
    x = torch.rand(shape, device=device).to(memory_format=torch.channels_last)
    if contiguous:
        stage.to(memory_format=torch.contiguous_format)
        x = x.contiguous()
    stage.losses = lambda step: {"loss": output(stage, x).float().square().mean()}  # type: ignore[method-assign]
    return lambda: iterate(fabric, module, optimizer, stage.options, 0)


def output(stage: Any, x: Tensor) -> Tensor:
    """What a stage's network and head make of images."""
    if "encoder" in stage.trained:
        head: nn.Module = stage.g1 if hasattr(stage, "g1") else stage.head
        return head(stage.network.encode(x)[-1])
    with torch.no_grad():
        features = stage.network.encode(x)
    return stage.g2(stage.network.decode(features, stage.options.blocks))


def make_store(folder: Path, side: int, subjects: int = 40) -> Store:
    """Synthetic hearts as slices of `side` x `side`."""
    if not (folder / "raw").exists():
        phantom(folder / "raw", subjects)
    return preprocess(folder / "raw", folder / f"store-{side}", PreprocessOptions(size=(side, side)), workers=1)


def against_bare(store: Store, images: int, device: torch.device, goal: float) -> Iterator[Row]:
    """Every stage beside its bare network; `goal` for the ratio of their times."""
    side = store.plan.options.size[0]
    for method in ("gcl", "pcl"):
        pairs = zip(stages(store, method, images), stages(store, method, images), strict=True)
        for (name, whole), (_, network) in pairs:
            row = compared(
                f"pre-training step, {name}, {images} images of {side}²",
                full(whole, device),
                "bare network",
                bare(network, device, images),
                goal,
                "at most",
                note=precision_of(device, "auto"),
                seconds=8,
            )
            rate = 1e3 * images / row.ours[0]
            yield Row(**{**vars(row), "note": f"{row.note}, {rate:.0f} images/s"})


def encoder(store: Store, **more: Any) -> Stage:
    """The stage of PCL, for what is measured on one stage."""
    return next(stages(store, "pcl", 40, **more))[1]


def precision(store: Store, device: torch.device) -> Row:
    """Default precision and memory format beside float32, contiguous."""
    side = store.plan.options.size[0]
    return compared(
        f"bare network, 40 images of {side}², default precision and memory format",
        bare(encoder(store), device, 40),
        "float32, contiguous",
        bare(encoder(store, precision="float32"), device, 40, contiguous=True),
        1.7,
        note=f"default here: {precision_of(device, 'auto')}, channels-last; what it does to Dice: precision.json",
        seconds=8,
    )


def deterministic(store: Store, device: torch.device) -> Row:
    """What `deterministic=true` costs."""
    works = {}
    for exactly in (False, True):
        step = full(encoder(store), device)

        def work(step: Callable[[], Any] = step, exactly: bool = exactly) -> None:
            with computing(torch.get_num_threads(), exactly):
                step()

        works[exactly] = work
    return compared(
        f"pcl step, 40 images of {store.plan.options.size[0]}², deterministic=true",
        works[True],
        "deterministic=false",
        works[False],
        sense="at most",
    )


def compiled(store: Store, device: torch.device) -> Row:
    """What `compile=true` gains, and what the first step pays for it."""
    slow, fast = encoder(store), encoder(store)
    fast.network.compile_parts()
    works = {"theirs": full(slow, device), "ours": full(fast, device)}
    start = time.perf_counter()
    works["ours"]()
    paid = time.perf_counter() - start
    taken = {name: (low * 1e3, middle * 1e3) for name, (low, middle) in take_turns(works, 8).items()}
    ours, theirs = taken["ours"], taken["theirs"]
    pays = paid / max(1e-9, (theirs[0] - ours[0]) / 1e3)
    note = f"compiling takes {paid:.0f} s: it pays from iteration {pays:.0f} on" if ours < theirs else "it never pays"
    side = store.plan.options.size[0]
    return Row(
        f"pcl step, 40 images of {side}², compile=true",
        "ms",
        ours,
        "compile=false",
        theirs,
        theirs[0] / ours[0],
        note=note,
    )


def rows() -> Iterator[Row]:
    """The table of this file."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for side in (96, 192):
            store = make_store(Path(folder), side)
            yield from against_bare(store, 40, cpu, 1.10)
            yield precision(store, cpu)
        yield deterministic(make_store(Path(folder), 96), cpu)
        yield compiled(make_store(Path(folder), 96), cpu)


if __name__ == "__main__":
    main(rows)
