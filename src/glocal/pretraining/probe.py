"""What the frozen features of a slice tell of its place in the volume: a linear probe, and its nearest neighbours.

The place is known of every slice without labels: features that tell it no better than those of random weights have
learnt little of the anatomy. What each figure is: docs/methods.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glocal.data.store import Store
from glocal.files import replacing, write_json
from glocal.inference import folded
from glocal.networks.base import SegmentationNetwork
from glocal.progress import track
from glocal.randomness import generator

LIMIT = 1000  # slices of the pre-training cases, and as many of the held-out ones; of more, so many by chance
HELD_OUT = 5  # subjects; with fewer that were not pre-trained on, those that were are asked, in folds
FOLDS = 5
STRENGTHS = [10.0**exponent for exponent in range(-4, 3)]  # of the ridge; 1 is the mean variance along a direction
NEAR = 0.1  # of the volume
SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)  # positions of the slices in the picture
FEW = "Of fewer than three subjects with several slices nothing can be said about how well positions are known."
BROKEN = "The features of the slices are not finite numbers: the weights are broken; lower learning_rate."
_PIXELS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Sample:
    """The slices looked at: for each `(n,)` its index in the store, position in (0, 1), subject and fold.

    A fold is told from, and looked up in, the others. No subject is in two folds, and fold -1 is never asked.
    """

    index: Tensor
    position: Tensor
    subject: Tensor
    fold: Tensor


def probe(
    networks: Mapping[str, SegmentationNetwork],
    store: Store,
    seen: Sequence[str],
    held_out: Sequence[str],
    seed: int,
    folder: Path,
) -> None:
    """Probe the encoders of networks, and write `probe.json` and, for a picture, `probe.npz`.

    The second has `images` `(1 + networks, k, H, W)` uint8: k slices, and below them what each network takes for the
    most similar slices of other subjects; and their `positions` `(1 + networks, k)`.

    Args:
        networks: `pretrained`, and `random` as it was before; their weights are left as they are.
        store: its images are looked at, on its device.
        seen: cases that were pre-trained on.
        held_out: cases that were not, and may be looked at.
        seed: of the choice among very many slices.
        folder: of the run.
    """
    sample = sample_of(store, seen, held_out, seed)
    single = sum(store.volumes[store.index_of(case)].slices == 1 for case in (*seen, *held_out))
    found: dict[str, Any] = {"single": single}
    if len(torch.unique(sample.subject)) < 3:
        return write_json(folder / "probe.json", {**found, "note": FEW})
    features = {name: slice_features(network, store, sample.index) for name, network in networks.items()}
    if not all(x.isfinite().all() for x in features.values()):
        return write_json(folder / "probe.json", {**found, "note": BROKEN})
    neighbours = {name: nearest(x, sample.fold) for name, x in features.items()}
    with replacing(folder / "probe.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **_picture(store, sample, list(neighbours.values())))
    write_json(folder / "probe.json", {**found, **_figures(sample, features, neighbours)})


def sample_of(store: Store, seen: Sequence[str], held_out: Sequence[str], seed: int) -> Sample:
    """The slices of enough held-out subjects, asked for what the others tell; else the others alone, in folds."""
    subjects = {name: number for number, name in enumerate(sorted({volume.subject for volume in store.volumes}))}
    subject_of = torch.tensor([subjects[volume.subject] for volume in store.volumes])[store.volume_of]
    index, new = (_chosen(store, cases, seed) for cases in (seen, held_out))
    if len(torch.unique(subject_of[new])) >= HELD_OUT and len(torch.unique(subject_of[index])) > 1:
        fold = torch.cat([torch.full_like(index, -1), torch.zeros_like(new)])
        index = torch.cat([index, new])
    else:
        fold = torch.unique(subject_of[index], return_inverse=True)[1] % FOLDS
    return Sample(index, (store.slice_of[index] + 0.5).double() / store.count_of[index], subject_of[index], fold)


def _chosen(store: Store, cases: Sequence[str], seed: int) -> Tensor:
    """Slices of volumes with several: all, or `LIMIT` of them by chance, so that no pattern of counts is met."""
    volumes = torch.tensor([store.index_of(case) for case in cases], dtype=torch.long)
    index = (torch.isin(store.volume_of, volumes) & (store.count_of > 1)).nonzero().squeeze(1)
    return index[torch.randperm(len(index), generator=generator(seed, "probe"))[:LIMIT]].sort().values


@torch.inference_mode()
def slice_features(network: SegmentationNetwork, store: Store, index: Tensor) -> Tensor:
    """The mean over the bottleneck's pixels of slices `(n,)`, statistics as they are: `(n, c)` float64, on the CPU."""
    frozen: Any = folded(network.to(store.device))
    parts = torch.split(index, max(1, _PIXELS_AT_ONCE // store.images(index[:1])[0, 0].numel()))
    means = [frozen.encode(store.images(part))[-1].mean((2, 3)).cpu() for part in track(parts, "Probing", len(parts))]
    return torch.cat(means).double()


def predicted(x: Tensor, position: Tensor, subject: Tensor, asked: Tensor) -> Tensor:
    """Positions of slices with features `asked` `(m, c)`, by ridge regression on standardised ones of other subjects.

    Of `STRENGTHS` that one is taken with which each of the others is told best by the rest of them.

    Args:
        x: `(n, c)` features of the others, who are two or more; with `position` and `subject` `(n,)`.
    """
    mean, spread = x.mean(0), x.std(0)  # what differs by no more than rounding does not differ:
    scale = (spread + 1e-6 * mean.abs()).masked_fill(spread <= 1e-6 * spread.max(), torch.inf)
    u, s, vh = torch.linalg.svd((x - mean) / scale, full_matrices=False)
    target = position - position.mean()
    errors = [_error_of_others(u, s**2 / (s**2 + len(x) * strength), target, subject) for strength in STRENGTHS]
    strength = STRENGTHS[int(torch.tensor(errors).argmin())]
    weights: Tensor = vh.T @ (s / (s**2 + len(x) * strength) * (u.T @ target))
    return position.mean() + (asked - mean) / scale @ weights


def _error_of_others(u: Tensor, shrunk: Tensor, target: Tensor, subject: Tensor) -> float:
    """Mean error of telling each subject by a regression on all others, which follows from the one on all.

    With H = 1/n + U diag(shrunk) U^T, the rows G of a subject are off by (1 - H_GG)^-1 times as much without them.
    """
    residual = target - (u * shrunk) @ (u.T @ target)
    total = 0.0
    for number in torch.unique(subject):
        rows = subject == number
        hat = (u[rows] * shrunk) @ u[rows].T + 1 / len(target)
        total += float(torch.linalg.solve(torch.eye(len(hat)).to(hat) - hat, residual[rows]).abs().sum())
    return total / len(target)


def nearest(x: Tensor, fold: Tensor) -> Tensor:
    """For each slice of features `(n, c)` the most similar one of another fold `(n,)`: cosine of centred features."""
    centred = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    similarity = (centred @ centred.T).masked_fill(fold[:, None] == fold, -torch.inf)
    return similarity.argmax(1)


def _figures(sample: Sample, features: Mapping[str, Tensor], neighbours: Mapping[str, Tensor]) -> dict[str, Any]:
    position, subject, fold = sample.position, sample.subject, sample.fold
    asked = fold >= 0
    told = {name: torch.zeros_like(position) for name in (*features, "guess")}
    for number in torch.unique(fold[asked]):
        of_it = fold == number
        told["guess"][of_it] = position[~of_it].mean()
        for name, x in features.items():
            told[name][of_it] = predicted(x[~of_it], position[~of_it], subject[~of_it], x[of_it])
    off = {name: (position - there)[asked] for name, there in told.items()}
    distance = (position[:, None] - position).abs()
    away = {name: distance.gather(1, rows[:, None])[asked, 0] for name, rows in neighbours.items()}
    away["guess"] = distance[asked][fold[asked][:, None] != fold]  # of any slice of another fold
    variance = float((position[asked] - position[asked].mean()).square().mean())
    return {
        "slices": int(asked.sum()),
        "subjects": len(torch.unique(subject[asked])),
        "held_out": bool((fold == -1).any()),
        **{
            name: {
                "off": float(off[name].abs().mean()),
                "r2": 1 - float(off[name].square().mean()) / variance,
                "neighbour_off": float(away[name].mean()),
                "neighbour_near": float((away[name] <= NEAR + 1e-9).double().mean()),
            }
            for name in off
        },
        "gain": {"off": _gain(off, subject[asked]), "neighbour_off": _gain(away, subject[asked])},
    }


def _gain(errors: Mapping[str, Tensor], subject: Tensor) -> dict[str, float]:
    """How much less than random weights pre-trained ones are off: mean over subjects, and its standard error."""
    gain = errors["random"].abs() - errors["pretrained"].abs()
    gains = torch.stack([gain[subject == number].mean() for number in torch.unique(subject)])
    return {"mean": float(gains.mean()), "error": float(gains.std()) / len(gains) ** 0.5}


def _picture(store: Store, sample: Sample, neighbours: Sequence[Tensor]) -> dict[str, Any]:
    """Slices at the positions `SHOWN`, of different subjects as far as there are, and their neighbours."""
    subjects = torch.unique(sample.subject[sample.fold >= 0])
    rows = []
    for number, place in enumerate(SHOWN):
        others = (sample.subject != subjects[number * len(subjects) // len(SHOWN)]) | (sample.fold < 0)
        rows.append(int(((sample.position - place).abs() + 2 * others).argmin()))
    shown = torch.stack([torch.tensor(rows), *(found[rows] for found in neighbours)])
    images = store.images(sample.index[shown].flatten())[:, 0].cpu()
    low, high = images.flatten(1).quantile(torch.tensor([0.005, 0.995]), dim=1)[..., None, None]
    grey = (255 * (images - low) / (high - low).clamp(min=1e-6)).clamp(0, 255).byte()
    return {"images": grey.unflatten(0, shown.shape).numpy(), "positions": sample.position[shown].numpy()}
