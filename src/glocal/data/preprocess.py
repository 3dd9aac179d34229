"""A whole dataset into a store: in parallel, resumable, every file whole or absent."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from glocal import __version__
from glocal.data.dataset import Case, Dataset, read_dataset
from glocal.data.image import files_of, read_image, read_labels, require_same_grid
from glocal.data.orientation import Undo
from glocal.data.plan import Plan, PreprocessOptions, make_plan
from glocal.data.prepare import VERSION, Prepared, prepare, prepare_labels
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.files import digest, read_json, replacing, stamp, write_json
from glocal.processes import cores
from glocal.progress import track
from glocal.runs import held

__all__ = [
    "Plan",
    "Prepared",
    "PreprocessOptions",
    "Undo",
    "make_plan",
    "prepare",
    "prepare_labels",
    "preprocess",
]

WORKER = "glocal-preprocess"  # the name of its threads

Record = dict[str, Any]
Stamps = dict[str, list[int] | None]


def preprocess(
    dataset: Path | Dataset,
    store: Path,
    options: PreprocessOptions,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Store:
    """Prepare every case of a dataset and write the store; started again it continues where it was interrupted.

    Args:
        dataset: raw dataset, or its folder.
        store: folder to write; a store begun with the same options is completed, changed cases are done anew.
        options: what is done to every volume.
        workers: cases at the same time, each in a thread; default one for each core.
        executor: where to run instead, for example `dask.distributed.Client(...).get_executor()`; it stays open.

    Raises:
        GlocalError: the store was begun otherwise, a case cannot be prepared (named), or the disk is full.
        Busy: another process is making this store.
    """
    dataset = read_dataset(dataset) if isinstance(dataset, Path) else dataset
    store = store.resolve()
    _refuse_other_folder(store)
    with held(store):
        plan = _begin(dataset, store, options)
        records = {case.name: record for case in dataset.cases if (record := _untouched(case, store, plan))}
        cases = [case for case in dataset.cases if case.name not in records]
        task = partial(_prepare_case, root=dataset.root, store=store, plan=plan)
        workers = min(workers or cores(), len(cases))
        if executor is None and workers <= 1:
            done = [task(case) for case in track(cases, "Preprocessing", len(cases))]
        else:
            done = _in_parallel(task, cases, nullcontext(executor) if executor else _pool(workers))
        records |= {record["name"]: record for record in done}
        manifest = {
            "glocal": __version__,
            "name": dataset.name,
            "dataset": str(dataset.root.resolve()),
            "channels": dataset.channels,
            "labels": dataset.labels,
            "split": dataset.split,
            "plan": plan.model_dump(mode="json"),
        }
        # Without the stamps: the digest is made of the index, and a file that was only touched is the same data.
        indexed = [{key: v for key, v in records[case.name].items() if key != "stamps"} for case in dataset.cases]
        write_json(store / "index.json", {"manifest": manifest, "cases": indexed})
    return Store.open(store)


def _refuse_other_folder(store: Path) -> None:
    if (store / "plan.json").is_file() or not store.exists():
        return
    if not store.is_dir() or any(not path.name.startswith(".") for path in store.iterdir()):
        raise GlocalError(f"{store} is not empty and is no store: choose a new folder.")


def _begin(dataset: Dataset, store: Path, options: PreprocessOptions) -> Plan:
    """The plan of a store begun earlier, or a new one; the frame of a store never changes, whatever cases come."""
    path = store / "plan.json"
    if not path.is_file():
        plan = make_plan(dataset, options)
        write_json(path, {"name": dataset.name, "plan": plan.model_dump(mode="json")})
        return plan
    content = read_json(path)
    begun = (
        PreprocessOptions.model_validate(content["plan"]["options"]).model_dump(mode="json")  # later ones at defaults
        | {"dataset": content["name"]}
        | {k: content["plan"][k] for k in ("labels", "channels")}
    )
    now = options.model_dump(mode="json") | {
        "dataset": dataset.name,
        "labels": dataset.labels,
        "channels": len(dataset.channels),
    }
    for key in now:
        if begun.get(key) != now[key]:
            raise GlocalError(
                f"{store} was begun with {key}: {json.dumps(begun.get(key))}, now it is {json.dumps(now[key])}: "
                "choose a new folder, or delete this one."
            )
    for leftover in store.glob("*/.????????.*"):  # of a killed process
        leftover.unlink(missing_ok=True)
    return Plan.model_validate(content["plan"])


def _untouched(case: Case, store: Path, plan: Plan) -> Record | None:
    """The record of a finished case whose sources nobody has touched since; none of them is read."""
    record, stamps = _finished(case, store, plan), _stamps(case)
    return record if record and record.get("stamps") == stamps and None not in stamps.values() else None


def _finished(case: Case, store: Path, plan: Plan) -> Record | None:
    """The record of a case that was prepared by the same plan, whatever its sources hold by now."""
    path = _record_path(case, store)
    if not path.is_file() or not all(target.is_file() for target in _targets(case, store)):
        return None
    record: Record = read_json(path)
    return record if (record.get("subject"), record.get("plan")) == (case.subject, _plan_digest(plan)) else None


def _prepare_case(case: Case, root: Path, store: Path, plan: Plan) -> Record:
    """Write one case's files unless they are there already, made of the same sources by the same plan."""
    stamps = _stamps(case)  # before the files are read: what changes meanwhile is seen at the next start
    sources = {file.name: digest(file) for file in _sources(case)}
    record = _finished(case, store, plan)
    if record is None or record.get("sources") != sources:
        try:
            arrays, found = _arrays(case, plan)
        except GlocalError as error:
            raise GlocalError(f"Case {case.name}: {error} `glocal check {root}` lists what else is wrong.") from error
        (store / "index.json").unlink(missing_ok=True)  # unfinished from now on
        _record_path(case, store).unlink(missing_ok=True)
        for target, array in zip(_targets(case, store), arrays, strict=True):
            with replacing(target) as temporary:
                np.save(temporary, array)
        made_of = {"sources": sources, "subject": case.subject, "plan": _plan_digest(plan)}
        record = {"name": case.name, **made_of, **found}
    record["stamps"] = stamps
    write_json(_record_path(case, store), record)
    return record


def _record_path(case: Case, store: Path) -> Path:
    return store / "records" / f"{case.name}.json"


def _targets(case: Case, store: Path) -> list[Path]:
    return [store / kind / f"{case.name}.npy" for kind in ("images", "labels")[: 1 + (case.label is not None)]]


def _sources(case: Case) -> list[Path]:
    return [file for path in (*case.images, case.label) if path is not None for file in files_of(path)]


def _stamps(case: Case) -> Stamps:
    return {file.name: stamp(file) for file in _sources(case)}


def _arrays(case: Case, plan: Plan) -> tuple[list[NDArray[Any]], Record]:
    volume = read_image(case.images)
    prepared = prepare(volume, plan)
    arrays: list[NDArray[Any]] = [prepared.images.half().numpy()]
    warnings, kept = list(prepared.warnings), None
    if case.label is not None:
        labels = read_labels(case.label)
        require_same_grid(labels.geometry, volume.geometry, case.label, case.images[0])
        arrays.append(prepare_labels(labels, prepared.undo, plan).numpy())
        kept = prepared.undo.kept(prepared.undo.oriented(labels.array)[:, 0] != 0)
        if kept < 0.99:
            warnings.append(f"The field cuts off {1 - kept:.1%} of the labelled structures: enlarge field.")
    return arrays, {
        "voxels": hashlib.sha256(arrays[0].data).hexdigest(),
        "image": hashlib.sha256(np.ascontiguousarray(volume.array).data).hexdigest()[:16],
        "slices": len(prepared.images),
        "labelled": case.label is not None,
        "spacing": volume.geometry.spacing,
        "kept": kept,
        "warnings": warnings,
        "undo": prepared.undo.as_dict(),
    }


def _plan_digest(plan: Plan) -> str:
    # Without what is at its default, so that a later option which leaves slices as they are leaves stores valid.
    made_how = plan.model_dump(mode="json", exclude_defaults=True, exclude={"warnings"})
    return hashlib.sha256(json.dumps([VERSION, made_how], sort_keys=True).encode()).hexdigest()


def _in_parallel(
    task: Callable[[Case], Record], cases: Sequence[Case], pool: AbstractContextManager[Executor]
) -> list[Record]:
    with pool as executor:
        futures = [executor.submit(_single_threaded, task, case) for case in cases]
        try:
            return [future.result() for future in track(as_completed(futures), "Preprocessing", len(cases))]
        except BrokenProcessPool as error:
            raise GlocalError(
                "A worker process was killed, most likely for lack of memory: start again with fewer workers, "
                "what is done is kept."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _single_threaded(task: Callable[[Case], Record], case: Case) -> Record:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return task(case)


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Threads: nearly all of the work is done outside the interpreter, and they start at once.

    When anything goes wrong, Ctrl-C included, nobody waits for the cases that have been begun.
    """
    threads, of_itk = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=WORKER)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(of_itk)
