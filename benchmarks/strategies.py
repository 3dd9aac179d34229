"""What a step of every fine-tuning strategy costs, beside a step of supervised training and beside its networks alone.

Slices of 96 x 96, network, batches and all else as in the recipe acdc-strategies, on synthetic hearts, two of which
are labelled. Measured is the second half of the training, of self-training the last round, of task-augmentation both
phases; labelling the unlabelled slices, which begins each round, is a row of its own. Weights are hardly trained, so
that masks are ragged: where they are looked at (the pieces of bcp), a real step may take another time.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, main, take_turns
from benchmarks.passes import measured, stepping
from benchmarks.step import make_store
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.devices import fabric_for, precision_of
from glocal.experiments.recipe import read_recipe
from glocal.finetuning.base import FinetuningOptions, Strategy
from glocal.finetuning.registry import STRATEGIES, finetuning_options, strategy_named
from glocal.finetuning.self_training import SelfTraining
from glocal.finetuning.task_augmentation import TaskAugmentation
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import build


def strategy(store: Store, options: FinetuningOptions, folder: Path) -> Strategy:
    """A strategy with two labelled volumes; all others are unlabelled."""
    entry = strategy_named(options.strategy)

    def begin(number: int) -> SegmentationNetwork:
        torch.manual_seed(number)
        return build(entry.network(options, options.network), store.plan.channels, len(store.labels))

    cases = [volume.case for volume in store.volumes]
    return entry.make(begin, Pool(store, cases[:2]), Pool(store, cases[2:]), options, folder)


def phases(learner: Strategy) -> Mapping[str, range]:
    """The iterations to measure, by what is said of them."""
    end = learner.options.max_iterations
    if isinstance(learner, TaskAugmentation):
        return {
            ", while generators learn": range(learner.generators_from, learner.final_from),
            ", final network": range(learner.final_from, end),
        }
    if isinstance(learner, SelfTraining):
        return {", in a round": range(learner.rounds[-1], end)}
    return {"": range(end // 2, end)}


def rows() -> Iterator[Row]:
    """Every phase of every strategy, and pseudo-labelling."""
    recipe = read_recipe("acdc-strategies")
    common = {**recipe["finetune"], "network": recipe["network"]}
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), recipe["preprocess"]["size"][0])

        def make(name: str) -> Strategy:
            return strategy(store, finetuning_options({**common, "strategy": name}), Path(folder) / name)

        supervised = make("supervised")
        reference = stepping(supervised, supervised.options, phases(supervised)[""])
        for name in ("supervised", *(name for name in STRATEGIES if name != "supervised")):
            for phase, steps in phases(make(name)).items():
                yield row(f"{name}{phase}", partial(make, name), steps, reference)
        learner = make("self-training")
        assert isinstance(learner, SelfTraining)
        yield labelling(learner)


def row(name: str, make: Callable[[], Strategy], steps: range, reference: Callable[[], Any]) -> Row:
    """One phase of a strategy."""
    options = make().options
    step, networks, supervised, passes = measured(make, options, steps, reference)
    precision, of_networks = precision_of(torch.device("cpu"), options.precision), step[0] / networks[0]
    return Row(
        f"fine-tuning step, {name}",
        "ms",
        step,
        "supervised",
        supervised,
        step[0] / supervised[0],
        sense="at most",
        note=f"{precision}; {of_networks:.3g} x its networks alone ({networks[0]:.4g} ms), "
        f"{step[1] / networks[1]:.3g} x by the medians; {passes}",
    )


def labelling(learner: SelfTraining) -> Row:
    """Labelling all unlabelled slices, as at the beginning of each round."""
    o, count, cpu = learner.options, len(learner.unlabelled), torch.device("cpu")
    fabric = fabric_for(cpu, o.precision)

    def work() -> None:
        with fabric.autocast():
            learner.label(1)

    low, middle = take_turns({"labelling": work}, seconds=12)["labelling"]
    times = (low * 1e3, middle * 1e3)
    note = f"{precision_of(cpu, o.precision)}; {times[0] / count:.3g} ms a slice, once in each of {o.rounds} rounds"
    return Row(f"self-training, labelling {count} slices", "ms", times, note=note)


if __name__ == "__main__":
    main(rows)
