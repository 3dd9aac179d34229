"""From a volume to its mask: slices through the network, probabilities back to native geometry, argmax there."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glocal.data.dataset import some
from glocal.data.image import Volume, read_image, write_like
from glocal.data.inputs import Input, list_inputs
from glocal.data.plan import Plan
from glocal.data.prepare import Prepared, prepare, restore
from glocal.devices import device_named, whole_float32
from glocal.ensemble import Ensemble, Models, Variation, softened
from glocal.errors import GlocalError
from glocal.files import digest, replacing, write_json
from glocal.model import find_model
from glocal.predictions import PAGE, RECORD, Maps, begun, refuse_changes
from glocal.progress import track
from glocal.runs import held
from glocal.uncertainty import entropy

VERSION = 1  # raised by hand when the same network gives other masks (see `runs.identity`)
# Few on a CPU, so that the finest feature maps stay in its cache.
_PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20}


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


def predictor(models: Models, vary: Variation, device: torch.device) -> nn.Module:
    """One network on `device`, for prediction, that is the mean of all that is averaged over."""
    networks = [folded(network.to(device)) for network in models.networks]
    return Ensemble(networks, vary.views, vary.passes).to(device) if vary.several else networks[0]


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
        with whole_float32():
            found = network(part.to(device)).float().softmax(1).cpu()
        yield found


def predict(
    model: Path,
    images: Path | Sequence[Input],
    out: Path,
    probabilities: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    others: Sequence[Path] = (),
    tta: bool = False,
    uncertainty: bool = False,
    passes: int = 0,
) -> list[Path]:
    """Predict masks for images, in their native geometry and format.

    DICOM series get NIfTI masks, `.mhd` images `.mha` masks and `.nhdr` images `.nrrd` masks: one file each. Beside
    them lie `predictions.json` (models, options, what was measured) and `cases.csv`, see `evaluation.cases`.

    Args:
        model: a model file or a run folder.
        images: a folder of image files or DICOM series, one file, or the cases themselves.
        out: folder for the masks; `CASE` and the ending of the input, as nnU-Net names them.
        probabilities: also write `CASE.npz` with `probabilities` `(K, z, y, x)` float16.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: replace masks that exist; without it they are kept, so that a stopped prediction continues, and what
            another image, model or option would replace is refused.
        others: further models, whose probabilities are averaged with those of the first.
        tta: average over moved views of each slice, too (test-time augmentation).
        uncertainty: also write `CASE_uncertainty`, float32 in [0, 1], and `predictions.html`.
        passes: average over so many predictions with random dropout, in place of one without.

    Returns:
        The masks' paths.

    Raises:
        GlocalError: no such model or images, models that do not fit together, nothing to vary, or `out` is the images'
            folder, holds masks of something else, or masks that were changed and lack a map, or another process
            writes there; and when all others are done, an image that cannot be used.
    """
    models = Models.load([find_model(path) for path in (model, *others)])
    if isinstance(images, Path) and out.resolve() == (images if images.is_dir() else images.parent).resolve():
        raise GlocalError(f"{out} holds the images themselves: choose another folder for the masks.")
    where = device_named(device)
    vary = models.variation(tta, passes, every_decoder=uncertainty)
    network = predictor(models, vary, where)
    plan, maps = models.headers[0].plan, Maps(probabilities, uncertainty, models.temperature)
    inputs = list_inputs(images, plan.channels) if isinstance(images, Path) else list(images)
    with held(out):
        record = begun(out, models.files, vary.options, inputs, overwrite)
        writing = record.pop("writing", None)
        if not overwrite:
            refuse_changes(out, record["cases"], inputs, maps, writing)
        record |= {
            "summary": vary.sentence(uncertainty),
            "calibration": models.sentence(vary.several or "decoders" in vary.options),
            "temperature": maps.temperature,
            "papers": models.papers,
        }
        write_json(out / RECORD, record)
        unusable: dict[str, GlocalError] = {}
        for case in track(inputs, "Predicting", len(inputs)):
            there = [name for name in record["cases"].get(case.name, {}).get("files", []) if (out / name).exists()]
            if not overwrite and set(maps.files(case)) <= set(there):
                continue
            try:
                volume, prepared = _prepared(case, plan)
            except GlocalError as error:  # hundreds of others need not wait for this one to be mended
                unusable[case.name] = error
                continue
            # Said before it is written: what a stopped prediction leaves is told from a mask of somebody else.
            write_json(out / RECORD, record | {"writing": case.target})
            made = _predict_case(network, plan, case, volume, prepared, out / case.target, maps, where)
            record["cases"][case.name] = made
            write_json(out / RECORD, record)
        if record["cases"]:
            _write_overview(out, record, plan, uncertainty)
    if unusable:
        first, *rest = unusable
        more = f" The same holds for {some(rest)}, each for a reason of its own." if rest else ""
        raise GlocalError(f"{unusable[first]}{more} All other masks are in {out}.") from unusable[first]
    return [out / case.target for case in inputs]


def _prepared(case: Input, plan: Plan) -> tuple[Volume, Prepared]:
    """A case as it is in its files, and as the network sees it."""
    volume = read_image(case.files)
    try:
        return volume, prepare(volume, plan)
    except GlocalError as error:
        raise GlocalError(f"{case.files[0]}: {error}") from error


def _predict_case(
    network: nn.Module,
    plan: Plan,
    case: Input,
    volume: Volume,
    prepared: Prepared,
    target: Path,
    maps: Maps,
    device: torch.device,
) -> dict[str, Any]:
    """Write what is wanted of a case; what was measured of it."""
    from glocal.evaluation.cases import case_measures

    shape, undo = volume.array.shape[1:], prepared.undo
    kept = np.empty((len(plan.labels), *shape), dtype=np.float16) if maps.probabilities else None
    unsure = np.empty(shape, dtype=np.float32) if maps.uncertainty else None

    def watch(place: slice, native: Tensor) -> None:
        if maps.temperature is not None:
            native = softened(native, maps.temperature)
        if kept is not None:
            undo.oriented(kept)[place] = native.numpy()
        if unsure is not None:
            undo.oriented(unsure[None])[place, 0] = entropy(native).numpy()

    parts = slice_probabilities(network, prepared.images, device)
    mask = restore(parts, undo, watch if maps.probabilities or maps.uncertainty else None)
    if kept is not None:
        with replacing(target.parent / f"{case.name}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, probabilities=kept)
    if unsure is not None:
        write_like(target.with_name(case.uncertainty), unsure, case.files[0])
    write_like(target, mask, case.files[0])  # last, because its presence says that the case is done
    spacing = volume.geometry.spacing if plan.options.spacing_known else None
    doubts = None if unsure is None else undo.oriented(unsure[None])[:, 0]
    return {
        "image": str(case.files[0].resolve()),
        "digest": case.digest(),
        "mask": digest(target),
        "files": maps.files(case),
        "map": case.uncertainty if maps.uncertainty else None,
        "undo": undo.as_dict(),
        "spacing": spacing,
        "warnings": list(prepared.warnings),
        **case_measures(undo.oriented(mask[None])[:, 0], doubts, plan.labels, spacing),
    }


def _write_overview(out: Path, record: dict[str, Any], plan: Plan, uncertainty: bool) -> None:
    """`cases.csv`, and with uncertainty `predictions.html`."""
    from glocal.overview import write_cases, write_page

    table = write_cases(out, record)
    if uncertainty:
        write_page(out / PAGE, record, table, plan.labels)
