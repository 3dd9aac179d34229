"""From a volume to its mask: slices through the network, probabilities back to native geometry, argmax there."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glocal.data.dicom import dicom_series
from glocal.data.image import FILE_ENDINGS, file_ending, is_volume_file, read_image, write_like
from glocal.data.plan import Plan
from glocal.data.prepare import prepare, restore
from glocal.devices import device_named
from glocal.errors import GlocalError
from glocal.files import digest, read_json, replacing, write_json
from glocal.model import find_model, load_network
from glocal.progress import track

VERSION = 1  # raised by hand when the same network gives other masks (see `runs.identity`)
# Few on a CPU, so that the finest feature maps stay in its cache.
_PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20}
# A mask is one file: these headers have their voxels in a second one, their formats have an ending that has not.
_IN_ONE_FILE = {".mhd": ".mha", ".nhdr": ".nrrd"}


def folded(network: nn.Module) -> nn.Module:
    """A copy of `network` for prediction: the same function up to rounding, in two thirds of the time.

    A batch norm that follows a convolution in an `nn.Sequential` becomes part of its weights, and weights are kept in
    channels-last order. The copy is in evaluation mode; `network` is left as it is.
    """
    copy = deepcopy(network).eval()
    for module in copy.modules():
        if isinstance(module, nn.Sequential):
            for k, (layer, norm) in enumerate(pairwise(list(module))):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[k], module[k + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from its stubs
    return copy


@torch.inference_mode()
def slice_probabilities(network: nn.Module, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Class probabilities of slices, some slices at a time, so that those of a whole volume need not be held.

    Args:
        network: gives logits; in evaluation mode, on the device: see `folded`.
        images: `(n, C, H, W)` float32.

    Yields:
        `(m, K, H, W)` float32 on the CPU.
    """
    at_once = max(1, _PIXELS_AT_ONCE[device.type] // images[0, 0].numel())
    for part in torch.split(images, at_once):  # in float32 on every device, so that masks do not depend on it
        yield network(part.to(device)).float().softmax(1).cpu()


@dataclass(frozen=True)
class Input:
    """A case to predict: its channel files (or one DICOM folder) and the mask's file name."""

    name: str
    files: tuple[Path, ...]
    target: str


def list_inputs(images: Path, channels: int) -> list[Input]:
    """The cases in a folder: image files (`CASE_0000...` per channel, or any name with one channel), DICOM folders.

    Folders without a DICOM series are passed over, for example one that holds the masks.

    Raises:
        GlocalError: nothing to read, a missing channel, or two cases of one name.
    """
    if not images.exists():
        raise GlocalError(f"{images} does not exist: give a folder of images, or one image file.")
    files = [images] if images.is_file() else sorted(p for p in images.iterdir() if not p.name.startswith("."))
    cases: dict[str, dict[int, Path]] = {}
    for path in files:
        if dicom_series(path) if path.is_dir() else is_volume_file(path):
            stem = path.name if path.is_dir() else path.name.removesuffix(file_ending(path))
            match = re.fullmatch(r"(.+)_(\d{4})", stem)
            name, channel = (match[1], int(match[2])) if match else (stem, 0)
            if channel in cases.setdefault(name, {}):
                raise GlocalError(f"{path} and {cases[name][channel].name} would write one mask: rename one of them.")
            cases[name][channel] = path
    if not cases and images.is_dir() and dicom_series(images):
        cases = {images.resolve().name: {0: images}}  # the folder may be one DICOM series itself
    if not cases:
        raise GlocalError(f"{images} holds no image (files ending in {', '.join(FILE_ENDINGS)}, or DICOM folders).")
    if channels == 1:  # scan_0001 and scan_0002 are two scans then, unless there is a scan_0000
        for name in [name for name, found in cases.items() if 0 not in found]:
            cases |= {f"{name}_{number:04d}": {0: path} for number, path in cases.pop(name).items()}
    return [_input(name, found, channels) for name, found in sorted(cases.items())]


def _input(name: str, found: dict[int, Path], channels: int) -> Input:
    if sorted(found) != list(range(channels)):
        wanted = ", ".join(f"{name}_{channel:04d}" for channel in range(channels))
        raise GlocalError(f"The model needs {channels} channel(s) of {name} ({wanted}), found {len(found)}.")
    first = found[0]
    ending = ".nii.gz" if first.is_dir() else file_ending(first).lower()  # a mask of a DICOM series is written as NIfTI
    return Input(name, tuple(found[channel] for channel in range(channels)), name + _IN_ONE_FILE.get(ending, ending))


def predict(
    model: Path, images: Path, out: Path, probabilities: bool = False, device: str = "auto", overwrite: bool = False
) -> list[Path]:
    """Predict masks for all images of a folder, in their native geometry, format and header.

    DICOM series get NIfTI masks, `.mhd` images `.mha` masks and `.nhdr` images `.nrrd` masks: one file each.

    Args:
        model: a model file or a run folder.
        images: a folder of image files or DICOM series, or one file.
        out: folder for the masks; `CASE` and the ending of the input, as nnU-Net names them.
        probabilities: also write `CASE.npz` with `probabilities` `(K, z, y, x)` float16.
        overwrite: replace masks that exist; without it they are kept, so that a stopped prediction continues.

    Returns:
        The masks' paths.

    Raises:
        GlocalError: no such model or images, an unreadable image, or `out` is the images' folder.
    """
    network, header = load_network(find_model(model))
    if out.resolve() == (images if images.is_dir() else images.parent).resolve():
        raise GlocalError(f"{out} holds the images themselves: choose another folder for the masks.")
    where = device_named(device)
    network = folded(network.to(where))
    inputs = list_inputs(images, header.channels)
    _refuse_other_masks(out, find_model(model), inputs, overwrite)
    masks = []
    for case in track(inputs, "Predicting", len(inputs)):
        target = out / case.target
        if overwrite or not target.exists() or (probabilities and not (out / f"{case.name}.npz").exists()):
            _predict_case(network, header.plan, case, target, probabilities, where)
        masks.append(target)
    return masks


def _refuse_other_masks(out: Path, model: Path, inputs: list[Input], overwrite: bool) -> None:
    """Masks that exist are kept only if this very model made them: `predictions.json` names it."""
    record, made_by = out / "predictions.json", {"model": str(model.resolve()), "digest": digest(model)}
    begun = read_json(record) if record.exists() else {}
    if not overwrite and begun.get("digest") != made_by["digest"] and any((out / i.target).exists() for i in inputs):
        raise GlocalError(
            f"{out} holds masks of these images by {begun.get('model', 'something else')}: choose another folder, or "
            "replace them with --overwrite."
        )
    write_json(record, made_by)


def _predict_case(
    network: nn.Module, plan: Plan, case: Input, target: Path, probabilities: bool, device: torch.device
) -> None:
    volume = read_image(case.files)
    try:
        prepared = prepare(volume, plan)
    except GlocalError as error:
        raise GlocalError(f"{case.files[0]}: {error}") from error
    kept = np.empty((len(plan.labels), *volume.array.shape[1:]), dtype=np.float16) if probabilities else None
    mask = restore(slice_probabilities(network, prepared.images, device), prepared.undo, kept)
    if kept is not None:
        with replacing(target.parent / f"{case.name}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, probabilities=kept)
    write_like(target, mask, case.files[0])  # last, because its presence says that the case is done
