"""What a step of every pre-training method costs, beside its own networks alone and beside a step of SimCLR.

Slices of 96 x 96, network, batches and all else as in the recipe acdc-methods, on synthetic hearts.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, main
from benchmarks.passes import measured, stepping
from benchmarks.step import make_store
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.devices import precision_of
from glocal.experiments.recipe import read_recipe
from glocal.networks.registry import build
from glocal.pretraining.base import Stage
from glocal.pretraining.registry import method_named, pretraining_options


def stage(store: Store, options: Any, make: Callable[..., Stage]) -> Stage:
    """A stage on all slices of a store; a method that uses labels has those of two volumes."""
    torch.manual_seed(0)
    cases = [volume.case for volume in store.volumes]
    labelled = [Pool(store, cases[:2])] if method_named(options.method).uses_labels else []
    network = build(options.network, store.plan.channels, len(store.labels))
    return make(network, Pool(store, cases), options, *labelled)


def rows() -> Iterator[Row]:
    """Every stage of every contender of the recipe."""
    recipe = read_recipe("acdc-methods")
    contenders: dict[str, Any] = {
        name: pretraining_options({"network": recipe["network"], **settings})
        for name, settings in recipe["pretrain"].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), recipe["preprocess"]["size"][0])
        simclr = contenders["simclr"]
        ((_, make),) = method_named("simclr").stages(simclr)
        reference = stepping(stage(store, simclr, make), simclr, second_half(simclr))
        for name, options in contenders.items():
            for part, make in method_named(options.method).stages(options):
                yield row(f"{name} {part}", partial(stage, store, options, make), options, reference)


def second_half(options: Any) -> range:
    """Iterations in which nothing waits any more that is to begin late."""
    return range(options.max_iterations // 2, options.max_iterations)


def row(name: str, make: Callable[[], Stage], options: Any, reference: Callable[[], Any]) -> Row:
    """One stage."""
    step, networks, simclr, passes = measured(make, options, second_half(options), reference)
    return Row(
        f"pre-training step, {name}",
        "ms",
        step,
        "its networks alone",
        networks,
        step[0] / networks[0],
        1.10,
        "at most",
        f"{precision_of(torch.device('cpu'), options.precision)}; {step[1] / networks[1]:.3g} x by the medians; "
        f"{step[0] / simclr[0]:.3g} x a step of simclr; {passes}",
    )


if __name__ == "__main__":
    main(rows)
