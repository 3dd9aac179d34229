"""Pre-train a network on a store, stage after stage, and keep exactly what was trained."""

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glocal import engine, runs
from glocal.checkpoints import seconds_spent, training_state
from glocal.contrast import losses
from glocal.data import sampling
from glocal.data.sampling import Pool
from glocal.data.split import (
    Draw,
    ProtocolOptions,
    Split,
    begin_on_split,
    draw_labels,
    make_split,
    refuse_leakage,
)
from glocal.data.store import Store
from glocal.devices import computing, joined
from glocal.distributed import first_decides
from glocal.engine import TrainingOptions, train
from glocal.files import replacing, write_json
from glocal.model import Header, save_model, transfer
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NETWORKS, build
from glocal.pretraining.base import Method
from glocal.pretraining.probe import probe
from glocal.pretraining.registry import method_named, pretraining_options
from glocal.randomness import seed_of
from glocal.views import view


def pretrain(
    store: Path | Store,
    run: Path,
    settings: Mapping[str, Any],
    protocol: ProtocolOptions | None = None,
    split: Split | None = None,
) -> Path:
    """Pre-train a network on the images of a store's pre-training cases.

    Labels are read by a method that uses them alone, and only those of the volumes that its options draw.

    Args:
        store: what `preprocess` made.
        run: the run folder; one that was begun with the same settings is continued.
        settings: `method` and any of its options.
        protocol: says which cases may be seen when no `split` is given.
        split: the cases by use.

    Returns:
        The model file, `run/model.safetensors`.

    Raises:
        GlocalError: unknown settings, another run's folder, a stage that the data do not allow, too few labels for a
            method that uses them, or a test subject among the cases to train on.
    """
    started = time.time()
    options = pretraining_options(settings)
    method = method_named(settings["method"])
    store = store if isinstance(store, Store) else Store.open(store)
    protocol = protocol or ProtocolOptions()
    split = split or make_split(store.volumes, store.split, protocol, options.seed)
    cases = split.pretrain + (split.test if protocol.transductive else ())
    subjects = sorted({store.volumes[store.index_of(case)].subject for case in cases})
    refuse_leakage(store.volumes, split, subjects, "would be pre-trained on", protocol.transductive)

    draw = _draw_of(store, split, options, protocol) if method.uses_labels else None

    pool, labelled = Pool(store.to(joined(options.device)), cases), [Pool(store, draw.train)] if draw else []
    if not runs.finished(run):
        # What the last stage cannot do is said now, not after the first has run for hours.
        for number, (_, make) in enumerate(method.stages(options)):
            network = build(options.network, store.plan.channels, len(store.labels))  # type: ignore[attr-defined]
            stage = make(network, pool, options, *labelled)
            if number:  # what the first cannot do, its own first step says soon enough
                with torch.no_grad():
                    stage.to(joined(options.device))(0)

    facts = facts_of_run(store, options, protocol)
    header = Header(
        kind="pretrained",
        network=options.network,  # type: ignore[attr-defined]  # every method has it
        channels=store.plan.channels,
        labels=store.labels,
        plan=store.plan,
        provenance={
            "pretraining": options.model_dump(mode="json"),
            "paper": method.paper,
            "dataset": store.name,
            "store": store.digest(),
            "subjects": subjects,
            "images": [image for case in cases if (image := store.volumes[store.index_of(case)].image)],
            "transductive": protocol.transductive,
            **({"labelled": list(draw.train)} if draw else {}),
            **runs.environment(),
        },
    )
    with ExitStack() as stack:
        if not first_decides(lambda: begin_on_split(stack, run, "pretrain", facts, options, split, draw)):
            started -= seconds_spent(run)
            warnings = _train_stages(method, options, [pool, *labelled], run, header)
            first_decides(lambda: _finish(run, _last_stage(method, options, run), pool.store, split, options, header))
            first_decides(lambda: runs.finish(run, started, kind="pretrain", warnings=warnings))
    return run / "model.safetensors"


def facts_of_run(store: Store, options: TrainingOptions, protocol: ProtocolOptions) -> dict[str, Any]:
    """What makes a pre-training the run it is, beside its options and the split."""
    method, network = options.method, options.network.name  # type: ignore[attr-defined]  # every method has them
    return {
        "store": store.digest(),
        "transductive": protocol.transductive,
        **({"budget": protocol.budget} if method_named(method).uses_labels else {}),  # what `labels` counts
        "versions": {
            method: method_named(method).version,
            network: NETWORKS[network].version,
            "engine": engine.VERSION,
            "sampling": sampling.VERSION,
            "views": view.VERSION,
            "contrast": losses.VERSION,
        },
    }


def _draw_of(store: Store, split: Split, options: Any, protocol: ProtocolOptions) -> Draw:
    """The labelled volumes that the method may see: those of the fine-tuning with the same options and seed."""
    draw = draw_labels(
        store.volumes, split, options.labels, options.validation, options.seed, options.draw, protocol.budget
    )
    subjects = {volume.subject for volume in store.volumes if volume.case in draw.train}
    # Transductive or not: labels of test subjects are never trained on.
    refuse_leakage(store.volumes, split, subjects, "would be pre-trained on with labels", transductive=False)
    return draw


def _finish(run: Path, model: Path, store: Store, split: Split, options: TrainingOptions, header: Header) -> None:
    """The run's model, and what its frozen encoder knows beside that of the network it began as."""
    with replacing(run / "model.safetensors") as temporary:
        shutil.copyfile(model, temporary)
    networks = {name: _fresh_network(options, header) for name in ("pretrained", "random")}
    transfer(networks["pretrained"], model)
    with computing(options.threads or torch.get_num_threads(), deterministic=True):
        probe(networks, store, split.pretrain, split.development, options.seed, run)


def _fresh_network(options: TrainingOptions, header: Header) -> SegmentationNetwork:
    """The network as every stage begins with it, before what earlier stages have trained is put into it."""
    torch.manual_seed(seed_of(options.seed, "weights"))
    return build(header.network, header.channels, len(header.labels))


def stage_folder(run: Path, number: int, name: str) -> Path:
    """Where stage `number` (from 1) of a pre-training lies."""
    return run / f"stage-{number}-{name}"


def _last_stage(method: Method, options: TrainingOptions, run: Path) -> Path:
    stages = method.stages(options)
    return stage_folder(run, len(stages), stages[-1][0]) / "model.safetensors"


def _train_stages(method: Method, options: TrainingOptions, pools: list[Pool], run: Path, header: Header) -> list[str]:
    """Train every stage that is not done; each begins with exactly what the stage before it trained."""
    warnings: list[str] = []
    before: Path | None = None
    trained: tuple[str, ...] = ()
    kept: dict[str, Any] = {}  # precision and threads of the first stage, whichever machine continues
    for number, (name, make) in enumerate(method.stages(options), start=1):
        folder = stage_folder(run, number, name)
        folder.mkdir(exist_ok=True)
        network = _fresh_network(options, header)
        if before is not None:
            report = transfer(network, before).as_dict()
            first_decides(partial(write_json, folder / "transfer.json", report))
        if options.compile:
            network.compile_parts()
        torch.manual_seed(seed_of(options.seed, "heads", number))
        stage = make(network, pools[0], options, *pools[1:])
        trained += tuple(part for part in stage.trained if part not in trained)
        before = folder / "model.safetensors"
        if before.exists():
            warnings += training_state(folder).get("warnings", [])
        else:
            warnings += train(stage, options.model_copy(update=kept), folder, f"{run.name}: {name}")
            provenance = {**header.provenance, "stage": name, "parts": list(trained)}
            stage_header = header.model_copy(update={"provenance": provenance})
            first_decides(partial(save_model, before, _parts(stage.network, trained), stage_header))
        state = first_decides(partial(training_state, folder))
        kept = {key: state[key] for key in ("precision", "threads")}
    return warnings


def _parts(network: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights and running statistics of some parts of a network."""
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in network.state_dict().items() if key.startswith(prefixes)}
