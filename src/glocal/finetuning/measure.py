"""What a fine-tuning is worth: Dice on validation volumes while it trains, every metric on test cases afterwards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from glocal import runs
from glocal.data.dataset import Dataset, read_dataset
from glocal.data.image import write_like
from glocal.data.inputs import mask_name
from glocal.data.prepare import restore
from glocal.data.split import ProtocolOptions, Split
from glocal.data.store import Store
from glocal.ensemble import Models
from glocal.errors import GlocalError
from glocal.evaluation.calibration import calibrated
from glocal.evaluation.evaluate import evaluate
from glocal.evaluation.metrics import dice
from glocal.files import replacing
from glocal.inference import folded, predictor, slice_probabilities
from glocal.model import Header, add_provenance, load_network, read_header, save_model
from glocal.randomness import generator

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINTS = {"last": "model.safetensors", "best": "best.safetensors"}
_PIXELS = 500_000  # that a temperature is fitted on: enough for one number


class Validation:
    """Looks at the validation volumes during training and keeps the best weights beside the last ones.

    The best value so far is in the model file itself, so a run that is continued goes on comparing with it.
    """

    def __init__(self, store: Store, cases: tuple[str, ...], path: Path, header: Header, device: torch.device) -> None:
        self.store, self.cases, self.path, self.header, self.device = store, cases, path, header, device

    def __call__(self, strategy: nn.Module) -> dict[str, float]:
        """Mean foreground Dice over the validation volumes, on preprocessed slices."""
        trained: Any = strategy.predictor
        network, values = folded(trained), []
        for case in self.cases:
            images = self.store.volume(case)
            mask = torch.cat([part.argmax(1) for part in slice_probabilities(network, images, self.device)]).numpy()
            truth = _truth(self.store, case).cpu().numpy()
            values += [dice(mask == k, truth == k) for k in self.store.labels.values() if k]
        value = float(np.mean(values))
        best = read_header(self.path).provenance["validation_dice"] if self.path.exists() else -1.0
        if value > best:
            provenance = {**self.header.provenance, "validation_dice": value}
            save_model(self.path, trained.state_dict(), self.header.model_copy(update={"provenance": provenance}))
        return {"validation_dice": value}


def _truth(store: Store, case: str) -> Tensor:
    first = int(store.first[store.index_of(case)])
    return store.labels_of(torch.arange(first, first + int(store.count_of[first])))


def calibrate(store: Store, run: Path, cases: tuple[str, ...], device: torch.device) -> None:
    """Fit the temperature of the last and of the best weights on validation volumes, and write it into their files.

    The header's provenance then has `temperature`, and in `calibration` how many `volumes` it was fitted on, and of
    their pixels the negative log-likelihood `nll` and the expected calibration error `ece`, each before and after.
    Weights, and so masks, stay as they are.
    """
    for path in (run / file for file in CHECKPOINTS.values()):
        if path.exists():
            network = folded(load_network(path)[0].to(device))
            found = calibrated(*_some_pixels(network, store, cases, device))
            facts = {"volumes": len(cases), "nll": found.nll, "ece": found.ece}
            add_provenance(path, temperature=found.temperature, calibration=facts)


def _some_pixels(
    network: nn.Module, store: Store, cases: tuple[str, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits `(N, K)` and labels `(N,)` of all pixels of cases, or of a random part where these are too many."""
    labels = {case: _truth(store, case).cpu() for case in cases}
    part = _PIXELS / sum(of_case.numel() for of_case in labels.values())
    logits, truth, rng = [], [], generator(0, "calibration")
    for case in cases:
        rest = labels[case].flatten()
        for probabilities in slice_probabilities(network, store.volume(case), device):
            pixels = probabilities.movedim(1, -1).flatten(0, 2)
            own, rest = rest[: len(pixels)], rest[len(pixels) :]
            chosen = torch.rand(len(pixels), generator=rng) < part
            logits.append(pixels[chosen].clamp_min(torch.finfo(pixels.dtype).tiny).log())
            truth.append(own[chosen])
    return torch.cat(logits), torch.cat(truth)


def measured_cases(store: Store, split: Split, protocol: ProtocolOptions) -> tuple[str, ...]:
    """The labelled cases that a training of this split is measured on."""
    wanted = split.test if protocol.evaluate == "test" else split.development
    return tuple(volume.case for volume in store.volumes if volume.case in wanted and volume.labelled)


def is_measured(run: Path, measured: str) -> bool:
    """Whether a training is finished and was `measured` as a protocol says, if it has such subjects."""
    return runs.finished(run) and measured in runs.manifest_of(run)["evaluated"]


def evaluation_file(run: Path, measured: str) -> Path:
    """What was `measured` of a training, as its protocol says; written by `measure`."""
    return run / f"evaluation-{measured}.csv"


def evaluation_of(run: Path, measured: str) -> "pd.DataFrame":
    """What `evaluation_file` holds: one row per checkpoint, case and class, these and subjects as they are called."""
    import pandas as pd

    # A case may be called 007, a class 1 and a subject NA.
    text = dict.fromkeys(("subject", "case", "class"), str)
    path = evaluation_file(run, measured)
    try:
        frame = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except (OSError, ValueError):
        frame = pd.DataFrame()
    if not {"checkpoint", "dice", *text} <= set(frame.columns):
        raise GlocalError(f"{path} is missing or damaged: put a copy back, or train in another folder.")
    return frame


def predictions_folder(run: Path, measured: str, checkpoint: str = "last") -> Path:
    """Where the masks of the last or best checkpoint are; those with moved views lie apart."""
    return run / f"predictions{'-best' * (checkpoint == 'best')}{'-tta' * measured.endswith('-tta')}"


def subjects_of(measured: str) -> str:
    """Whose volumes were `measured`: test or development."""
    return measured.removesuffix("-tta")


def with_tta(measured: str) -> str:
    """Words to follow on whose volumes were `measured`; none without moved views."""
    return ", predicted with moved views (--tta)" if measured.endswith("-tta") else ""


def measure(
    store: Store, run: Path, protocol: ProtocolOptions, cases: tuple[str, ...], device: torch.device
) -> "pd.DataFrame":
    """Predict cases in native geometry and write `evaluation-MEASURED.csv`: one row per checkpoint, case and class.

    The masks of the last checkpoint stay in `predictions/`, those of the best in `predictions-best/`; with moved views
    the names of both end in `-tta`.

    Raises:
        GlocalError: the raw dataset is no longer where the store was made from.
    """
    import pandas as pd

    dataset = read_dataset(store.dataset)
    frames = []
    for name in ("last", "best"):
        model, folder = run / CHECKPOINTS[name], predictions_folder(run, protocol.measured, name)
        if not model.exists():
            continue
        models = Models.load([model])
        network = predictor(models, models.variation(protocol.tta, passes=0, every_decoder=False), device)
        predict_cases(network, store, dataset, cases, folder, device)
        frame = evaluate(
            folder,
            dataset.root,
            class_names=store.labels,
            spacing_known=store.plan.options.spacing_known,
            cases=cases,
        )
        frame.insert(0, "checkpoint", name)
        frame["transductive"] = bool((models.headers[0].provenance["pretraining"] or {}).get("transductive"))
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    subject = {volume.case: volume.subject for volume in store.volumes}
    table.insert(2, "subject", table["case"].map(subject))
    with replacing(evaluation_file(run, protocol.measured)) as temporary:
        table.to_csv(temporary, index=False)
    return table


def predict_cases(
    network: nn.Module, store: Store, dataset: Dataset, cases: tuple[str, ...], folder: Path, device: torch.device
) -> None:
    """Write the masks of cases of a store by a `predictor` into `folder`, in native geometry, format and header."""
    images = {case.name: case.images[0] for case in dataset.cases}
    for case in cases:
        undo = store.volumes[store.index_of(case)].undo
        mask = restore(slice_probabilities(network, store.volume(case), device), undo)
        write_like(folder / mask_name(case, dataset.file_ending), mask, images[case])
