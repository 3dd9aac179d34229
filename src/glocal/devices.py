"""Where a training computes and how exactly: device, precision, one process or several."""

import atexit
import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger

from glocal import distributed
from glocal.errors import GlocalError

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision at every start


def device_named(name: str) -> torch.device:
    """The device `name` says; `auto` is a GPU if there is one: the first, or of several processes each its own.

    Raises:
        GlocalError: unknown or absent device.
    """
    try:
        device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    except RuntimeError as error:
        raise GlocalError(f"device={name} is not known: use auto, cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise GlocalError(f"device={name} is not supported: use auto, cpu, cuda or cuda:0.")
    if device.type == "cuda" and distributed.started() > 1:
        if device.index is not None:
            raise GlocalError(f"device={name} is one GPU for {distributed.started()} processes: use device=auto.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0))
        if device.index >= torch.cuda.device_count():
            raise GlocalError(
                f"Process {device.index + 1} of this machine sees {torch.cuda.device_count()} GPU(s), none its own: "
                "start no more processes than GPUs, and let each of them see all (srun --gpu-bind=none)."
            )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GlocalError(f"device={name} was asked for, but this machine has {torch.cuda.device_count()} GPUs.")
    return device


def joined(name: str) -> torch.device:
    """`device_named`, after this process has met those it was started with (torchrun, srun); alone it just goes on.

    Raises:
        GlocalError: unknown or absent device.
    """
    device = device_named(name)
    if distributed.started() > 1:
        fabric_for(device, "float32")
        atexit.register(distributed.part)
    return device


def fabric_for(
    device: torch.device, precision: str, loggers: list[Logger] | None = None, in_turns: bool = False
) -> Fabric:
    """Device, processes and precision, as Lightning Fabric wants them.

    Args:
        device: what to compute on.
        precision: `auto`, `float32` or `bfloat16`.
        loggers: where figures go.
        in_turns: some weights get no gradient in some iterations.
    """
    several = distributed.started() > 1
    nodes = _nodes() if several else 1
    one = 1 if device.type == "cpu" else [device.index or 0]
    fabric = Fabric(
        accelerator=device.type,
        strategy=f"ddp{'_find_unused_parameters_true' * in_turns}" if several else "auto",
        devices=distributed.started() // nodes if several else one,
        num_nodes=nodes,
        precision="bf16-mixed" if precision_of(device, precision) == "bfloat16" else "32-true",
        loggers=loggers or [],
    )
    fabric.launch()  # several processes meet
    return fabric


def _nodes() -> int:
    """How many machines the processes were started on."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        return distributed.started() // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_NODES") or 1)


def precision_of(device: torch.device, precision: str) -> str:
    """`precision`, where `auto` takes bfloat16 if the device has units for it."""
    if precision == "auto":
        return "bfloat16" if _has_bfloat16_units(device) else "float32"
    return precision


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolve in float32 where that is asked for: GPUs would otherwise leave out 13 of its 23 bits (TF32)."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def computing(threads: int, deterministic: bool) -> Iterator[None]:
    """Compute with so many threads, and only by algorithms that give the same result each time, or by the fastest.

    On the CPU all that is used here is deterministic anyway, given the number of threads.
    """
    exact, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    before = torch.get_num_threads(), exact, fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark  # type: ignore[attr-defined]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    # Filling new memory finds faults in programs, and costs time; every batch has the same size.
    _compute(threads, deterministic, False, not deterministic)
    try:
        with whole_float32():
            yield
    finally:
        _compute(*before)


def _compute(threads: int, exact: bool, fill: bool, fastest: bool) -> None:
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = fastest


def keep_freed_memory() -> None:
    """Let glibc reuse the large blocks of one step in the next, instead of handing them back and faulting them in.

    The larger threshold first: older versions allow 32 MiB at most, and without it the other one makes all slower.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim_threshold, mmap_threshold = -1, -3
    if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):
        mallopt(trim_threshold, 2**31 - 1)
