"""Fine-tune a network on a few labelled volumes, keep the last and the best-validation weights, and measure them."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from glocal import engine, inference, runs
from glocal.checkpoints import seconds_spent
from glocal.data import sampling
from glocal.data.dataset import read_dataset, some
from glocal.data.sampling import Pool
from glocal.data.split import (
    Draw,
    Member,
    ProtocolOptions,
    Split,
    begin_on_split,
    draw_labels,
    make_split,
    read_split,
    refuse_leakage,
)
from glocal.data.store import Store
from glocal.devices import joined
from glocal.distributed import first_decides, rank
from glocal.engine import train
from glocal.errors import GlocalError
from glocal.evaluation import metrics
from glocal.files import replacing, write_json
from glocal.finetuning.base import FinetuningOptions, Strategy
from glocal.finetuning.measure import Validation, calibrate, is_measured, measure, measured_cases
from glocal.finetuning.registry import finetuning_options, strategy_named
from glocal.model import Header, Transfer, digest_of_weights, find_model, read_header, save_model, transfer
from glocal.networks.base import SegmentationNetwork
from glocal.networks.registry import NETWORKS, build
from glocal.progress import console
from glocal.randomness import seed_of
from glocal.views import view
from glocal.views.moves import refuse_still

TRANSDUCTIVE = "Transductive: the images of test subjects, not their labels, were part of the pre-training."
NOTHING_UNLABELLED = (
    "No volume was left without labels: what the strategy learns from unlabelled slices it learnt from the labelled "
    "ones, without their labels."
)


def finetune(
    store: Path | Store,
    run: Path,
    settings: Mapping[str, Any],
    pretrained: Path | None = None,
    protocol: ProtocolOptions | None = None,
    split: Split | None = None,
) -> Path:
    """Fine-tune on the labelled volumes of one draw, then predict and measure the test (or development) cases.

    A training that was measured on development subjects, for choosing, is not repeated to be measured on test subjects.

    Args:
        store: what `preprocess` made.
        run: the run folder; one that was begun with the same settings is continued.
        settings: options of the strategy, `labels` among them.
        pretrained: a pre-trained model file or run; None starts at random.
        protocol: how cases are split where no `split` is given, and what is evaluated.
        split: the cases by use; None takes that of the pre-training, else makes one.

    Returns:
        The model file with the last weights, `run/model.safetensors`.

    Raises:
        GlocalError: unknown settings, another run's folder, too few labels, or a test subject that training has seen.
    """
    started = time.time()
    options, protocol = finetuning_options(settings), protocol or ProtocolOptions()
    store = store if isinstance(store, Store) else Store.open(store)
    # A finished run, which is only measured now, can do without the weights that it began with.
    gone = pretrained is not None and not pretrained.exists() and runs.finished(run)
    source = None if pretrained is None or gone else find_model(pretrained)
    split = split or (read_split(run) if gone else _split_of(source, store, protocol, options.seed))
    draw = draw_of(store.volumes, split, options, protocol)
    if protocol.tta:
        refuse_still(options.augmentation.spatial, "protocol.tta=true")
    joined(options.device)
    header, begin, report = _start(store, options, source, split, draw)
    before = runs.settings_of(run)["pretrained"] if gone else _before(source)
    facts = facts_of_run(store, options, split, protocol) | {"pretrained": before}
    with ExitStack() as stack:
        finished = first_decides(lambda: begin_on_split(stack, run, "finetune", facts, options, split, draw))
        cases = measured_cases(store, split, protocol)
        if not finished:
            if report is not None and rank() == 0:
                write_json(run / "transfer.json", report.as_dict())
                console.print(report.sentence(), highlight=False)
            if cases:  # where their label maps are: a dataset that has moved is said before training, not after
                read_dataset(store.dataset)
            started -= seconds_spent(run)
            warnings = _train(store, run, options, split, draw, header, begin)
        if rank() == 0 and not is_measured(run, protocol.measured):  # the first process measures alone
            if finished:
                stack.enter_context(runs.held(run))
            if cases:
                measure(store, run, protocol, cases, joined(options.device))
            evaluated = {protocol.measured: list(cases)}
            if finished:
                (run / "report.html").unlink(missing_ok=True)  # it would not say all
                runs.amend(run, evaluated=runs.manifest_of(run)["evaluated"] | evaluated)
            else:
                transductive = (header.provenance["pretraining"] or {}).get("transductive")
                runs.finish(
                    run,
                    started,
                    kind="finetune",
                    store=str(store.path.resolve()),
                    warnings=[TRANSDUCTIVE, *warnings] if transductive else warnings,
                    evaluated=evaluated,
                )
    return run / "model.safetensors"


def _train(
    store: Store,
    run: Path,
    options: FinetuningOptions,
    split: Split,
    draw: Draw,
    header: Header,
    begin: Callable[[int], SegmentationNetwork],
) -> list[str]:
    """Train and keep the last weights, and with validation volumes the best; warnings in plain words."""
    device, entry = joined(options.device), strategy_named(options.strategy)
    store.to(device)
    labelled, unlabelled = Pool(store, draw.train), Pool(store, unlabelled_of(store.volumes, split, draw))
    # Another draw is also another choice of batches and views, so that draws of `all` labels tell chance from effect.
    seeded = options.model_copy(update={"seed": seed_of(options.seed, "training", options.draw)})
    strategy = entry.make(begin, labelled, unlabelled, seeded, run)
    if options.compile:
        for module in strategy.modules():
            if isinstance(module, SegmentationNetwork):
                module.compile_parts()
    validate = Validation(store, draw.validation, run / "best.safetensors", header, device) if draw.validation else None
    warnings = train(strategy, seeded, run, run.name, validate, options.evaluate_every)
    if rank() == 0:
        save_model(run / "model.safetensors", strategy.predictor.state_dict(), header)
        if draw.validation:
            calibrate(store, run, draw.validation, device)
        _keep_examples(run / "examples.npz", strategy)
    if entry.uses_unlabelled and set(unlabelled.volumes.tolist()) <= set(labelled.volumes.tolist()):
        warnings = [NOTHING_UNLABELLED, *warnings]
    if absent := _absent(labelled):
        warnings = [
            f"No labelled volume holds {absent}, so the network has not learnt it: label one that does.",
            *warnings,
        ]
    return warnings


def _absent(labelled: Pool) -> str:
    """The structures that no slice of a pool has."""
    parts = torch.split(labelled.slices, 256)
    present = {value for part in parts for value in torch.unique(labelled.store.labels_of(part)).tolist()}
    return ", ".join(name for name, value in labelled.store.labels.items() if value not in present | {0})


def unlabelled_of(members: Sequence[Member], split: Split, draw: Draw) -> tuple[str, ...]:
    """The cases of the pre-training pool whose labels a fine-tuning does not have; without any, its labelled ones.

    Those of validation subjects are never among them, although they are in the pool.
    """
    subject = {member.case: member.subject for member in members}
    aside = {subject[case] for case in draw.validation}
    others = [case for case in split.pretrain if case not in draw.train and subject[case] not in aside]
    return tuple(others) or draw.train


def _keep_examples(path: Path, strategy: Strategy) -> None:
    """The strategy's pictures for the report, as arrays: drawn there, so that they look like all others."""
    import numpy as np

    arrays = {
        f"{title}/{kind}": values.cpu().numpy()
        for title, (images, labels) in strategy.examples().items()
        for kind, values in (("images", images), ("labels", labels))
        if values is not None
    }
    if arrays:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stubs forbid names in general


def _split_of(source: Path | None, store: Store, protocol: ProtocolOptions, seed: int) -> Split:
    """The split of the pre-training (`source` is in its folder, or in that of a stage), if it was on these data."""
    for folder in () if source is None else (source.parent, source.parent.parent):
        same_data = source is not None and read_header(source).provenance.get("store") == store.digest()
        if same_data and (folder / "split.json").exists():
            return read_split(folder)
    return make_split(store.volumes, store.split, protocol, seed)


def draw_of(
    members: Sequence[Member],
    split: Split,
    options: FinetuningOptions,
    protocol: ProtocolOptions,
) -> Draw:
    """The labelled volumes of a fine-tuning.

    Raises:
        GlocalError: several budgets, or too few labelled volumes.
    """
    labels = options.labels
    if isinstance(labels, tuple) and (isinstance(labels[0], int) or "all" in labels):
        raise GlocalError(
            "A single fine-tuning takes one number of labels: several are for `glocal run` and `glocal experiment`."
        )
    named: Any = labels
    return draw_labels(members, split, named, options.validation, options.seed, options.draw, protocol.budget)


def facts_of_run(store: Store, options: FinetuningOptions, split: Split, protocol: ProtocolOptions) -> dict[str, Any]:
    """What makes a fine-tuning the run it is, beside its options and the weights it starts from."""
    return {
        "store": store.digest(),
        "split": split.index,
        "budget": protocol.budget,
        "versions": {
            options.strategy: strategy_named(options.strategy).version,
            options.network.name: NETWORKS[options.network.name].version,
            "engine": engine.VERSION,
            "sampling": sampling.VERSION,
            "views": view.VERSION,
            "inference": inference.VERSION,
            "metrics": metrics.VERSION,
        },
    }


def _before(source: Path | None) -> dict[str, str] | None:
    if source is None:
        return None
    provenance = read_header(source).provenance
    return {
        "method": provenance["pretraining"]["method"],
        "stage": provenance["stage"],
        "digest": digest_of_weights(source),
    }


def _refuse_other_labels(source: Path, before: Header, store: Store, draw: Draw) -> None:
    """Weights that have seen labels serve no fine-tuning that is to have others: its budget would be a wrong one."""
    seen = before.provenance.get("labelled")
    if seen is not None and (before.provenance["dataset"], set(seen)) != (store.name, set(draw.train)):
        raise GlocalError(
            f"{source} was pre-trained with the labels of {some(seen)} of {before.provenance['dataset']}, but the "
            f"labelled volumes of this fine-tuning are {some(draw.train)} of {store.name}: pre-train with the same "
            "labels, validation, draw and seed."
        )


def _start(
    store: Store, options: FinetuningOptions, source: Path | None, split: Split, draw: Draw
) -> tuple[Header, Callable[[int], SegmentationNetwork], Transfer | None]:
    """The model's header and what begins a network, pre-trained where `source` is given; refuses leakage."""
    subject = {volume.case: volume.subject for volume in store.volumes}
    labelled = sorted({subject[case] for case in draw.train + draw.validation})
    refuse_leakage(store.volumes, split, labelled, "would be fine-tuned on", transductive=False)
    before = None if source is None else read_header(source)
    own = strategy_named(options.strategy).network(options, before.network if before else options.network)

    def begin(number: int) -> SegmentationNetwork:
        torch.manual_seed(seed_of(options.seed, "weights", options.draw, *[number] * (number > 0)))
        network = build(own, store.plan.channels, len(store.labels))
        if source is not None:
            transfer(network, source)
        return network

    report = None
    if source is not None and before is not None:
        if before.kind != "pretrained":
            raise GlocalError(f"{source} was fine-tuned already: start from a pre-training, or from random weights.")
        if before.plan.options != store.plan.options or before.channels != store.plan.channels:
            raise GlocalError(
                f"{source} was pre-trained on slices that were preprocessed in another way: use the same preprocessing."
            )
        if "network" in options.model_fields_set and options.network != before.network:
            raise GlocalError(f"{source} was pre-trained with another network: leave network out, its own is taken.")
        # Subjects of another dataset are other people, unless an image is the same: a folder collected again.
        images = set(before.provenance.get("images", ()))
        seen = {volume.subject for volume in store.volumes if volume.image in images}
        if before.provenance["dataset"] == store.name:
            seen |= set(before.provenance["subjects"])
        refuse_leakage(store.volumes, split, seen, "was seen in pre-training", before.provenance["transductive"])
        _refuse_other_labels(source, before, store, draw)
        report = transfer(build(own, store.plan.channels, len(store.labels)), source)
        if not report.transferred:
            raise GlocalError(f"No weight of {source} fits the network: was it pre-trained with another one?")
    header = Header(
        kind="segmentation",
        network=own,
        channels=store.plan.channels,
        labels=store.labels,
        plan=store.plan,
        provenance={
            "dataset": store.name,
            "finetuning": options.model_dump(mode="json"),
            "papers": [strategy_named(options.strategy).paper] + ([before.provenance["paper"]] if before else []),
            "pretraining": before.provenance if before else None,
            "labelled": list(draw.train),
            "validation": list(draw.validation),
            "subjects": labelled,
            **runs.environment(),
        },
    )
    return header, begin, report
