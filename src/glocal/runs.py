"""A run is a folder: the settings it was begun with, what made it, and whether it is done."""

import errno
import fcntl
import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from glocal import __version__
from glocal.errors import Busy, GlocalError
from glocal.files import read_json, write_json, write_text

# These say where and how fast a run computes, not what: it may continue elsewhere.
_FREE_KEYS = {"device", "log"}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
FAILURE = "failure.txt"  # in the folder of a run that failed: why


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `{"views": {"rotation": 3}}` becomes `{"views.rotation": 3}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def begin(folder: Path, kind: str, settings: dict[str, Any], options: type[BaseModel] | None = None) -> None:
    """Begin a run in `folder`, or continue the one that was begun there with the same settings.

    Args:
        folder: the run folder; created if absent.
        kind: `pretrain`, `finetune` or `run`.
        settings: plain values as YAML holds them.
        options: what some of the settings are the values of.

    Raises:
        GlocalError: the folder holds something else, or a run that was begun with other settings (names the key).
    """
    _used_gpu_memory(forget=True)  # of what this process did before
    recipe = folder / "recipe.yaml"
    settings = yaml.safe_load(yaml.safe_dump({"kind": kind, **settings}, sort_keys=False))
    if recipe.exists():
        _refuse_difference(folder, _completed(settings_of(folder), options), settings)
        return
    # Beside the hidden files of a process that begins the same run right now, and why it could not begin before.
    if folder.is_dir() and any(not (path.name.startswith(".") or path.name == FAILURE) for path in folder.iterdir()):
        raise GlocalError(f"{folder} is not empty and holds no run: choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise GlocalError(f"{folder} is a file: choose a folder for the run.")
    write_text(recipe, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _completed(begun: dict[str, Any], options: type[BaseModel] | None) -> dict[str, Any]:
    """The settings of a run begun by an earlier version, with the options that came later at their defaults."""
    known = {} if options is None else {key: begun[key] for key in options.model_fields if key in begun}
    try:
        return begun | (options.model_validate(known).model_dump(mode="json") if options else {})
    except ValidationError:  # an option of then is none any more: its difference will be named
        return begun


def _refuse_difference(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = flatten(begun), flatten(now)
    if old["kind"] != new["kind"]:
        raise GlocalError(f"{folder} holds a run of `glocal {old['kind']}`: choose another run folder.")
    # The method first: where it differs, most other keys do.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key not in ("method", "strategy"), key)):
        if key.rsplit(".", 1)[-1] not in _FREE_KEYS and old.get(key) != new.get(key):
            raise GlocalError(
                f"{folder} was begun with {key}={old.get(key)}, now it is {new.get(key)}: "
                "choose another run folder, or give the first value to continue."
            )


def identity(settings: dict[str, Any]) -> str:
    """What makes a run the run it is, as twelve hexadecimal digits.

    Its settings hold the data's digest and the `versions` of the components that compute it. These are raised by hand
    when results change: a refactoring leaves hours of results valid, a changed loss does not. Where and how fast a run
    computes (`device`, `log`) is no part of it.
    """
    return hashlib.sha256(json.dumps(_binding(settings), sort_keys=True).encode()).hexdigest()[:12]


def _binding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the free keys. An empty part stays: it says something else than one that is not there."""
    return {k: _binding(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in _FREE_KEYS}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while writing into it; the system lets go of it when this process ends, however it ends.

    Raises:
        Busy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"Another process is working in {folder}: wait until it has ended, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise GlocalError(
                f"The disk of {folder} knows no locks, which keep two processes from writing the same files: choose a "
                "folder on another disk, or have it mounted with flock."
            ) from error
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # of processes that were forked meanwhile, too


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings a run was begun with.

    Raises:
        GlocalError: the folder holds no run.
    """
    try:
        settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GlocalError(
            f"{folder} holds no run of glocal (no readable recipe.yaml): choose another folder."
        ) from error
    if not isinstance(settings, dict) or "kind" not in settings:
        raise GlocalError(
            f"{folder} holds no run of glocal: its recipe.yaml is of something else; choose another folder."
        )
    return settings


def finish(folder: Path, started: float, **facts: Any) -> None:
    """Write `manifest.json`: the run is done; versions, machine, time, peak memory and the given facts.

    Args:
        folder: the run folder.
        started: seconds since the epoch; an interrupted training began as much earlier as it had trained by then.
        facts: whatever else is to be known of it.
    """
    write_json(folder / "manifest.json", {**facts, **environment(), "seconds": round(time.time() - started, 1)})


def amend(folder: Path, **facts: Any) -> None:
    """Give facts of a finished run's manifest other values: what was measured later changes neither date nor time."""
    write_json(folder / "manifest.json", {**manifest_of(folder), **facts})


def finished(folder: Path) -> bool:
    """Whether the run in `folder` was completed."""
    return (folder / "manifest.json").exists()


def manifest_of(folder: Path) -> dict[str, Any]:
    """What `finish` wrote.

    Raises:
        GlocalError: the run is not finished.
    """
    if not finished(folder):
        raise GlocalError(f"The run in {folder} is not finished: start its command again, it continues.")
    content: dict[str, Any] = read_json(folder / "manifest.json")
    return content


def environment() -> dict[str, Any]:
    """Versions, machine, date and the peak memory of this process (MiB), on the GPU too if it has used one."""
    gpu = _used_gpu_memory()
    packages = ("torch", "lightning-fabric", "monai", "simpleitk", "numpy", "scipy")
    return {
        "glocal": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **({} if gpu is None else {"peak_gpu_memory_mib": gpu}),
    }


def _used_gpu_memory(forget: bool = False) -> int | None:
    """The most of a GPU's memory (MiB) that this process held since it was to `forget` it; None if it used none."""
    torch: Any = sys.modules.get("torch")  # which is slow to import, and was if it is used
    if torch is None or not torch.cuda.is_initialized():
        return None
    peaks = [torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())]
    if forget:
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    return int(max(peaks)) // 2**20
