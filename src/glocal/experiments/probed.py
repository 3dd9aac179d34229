"""What pre-training has learnt, in words, tables and a picture: the sections of reports made from probes."""

from pathlib import Path
from typing import Any

import numpy as np

from glocal.files import read_json
from glocal.pretraining.probe import NEAR
from glocal.reporting.html import Picture, Section, Table
from glocal.reporting.rows import slice_rows

TITLE = "Has pre-training learnt anything?"
WEIGHTS = {"pretrained": "pre-trained", "random": "random weights", "guess": "guessing"}
FIGURES = {
    "off": "Linear probe off by",
    "r2": "R²",
    "neighbour_off": "Nearest neighbour off by",
    "neighbour_near": f"Neighbours within {NEAR}",
}
NOTE = (
    "No labels are used. Distances are parts of the volume: 0 is its first slice, 1 its last. The linear probe is a "
    "ridge regression of the position on the encoder's features; the nearest neighbour is the slice of another subject "
    "with the most similar ones. Random weights are those that pre-training began with; guessing is the mean position, "
    "or any slice of another subject."
)


def probed(run: Path) -> list[Section]:
    """What the frozen features of a pre-training tell of a slice's place; nothing of a run that was not probed."""
    if not (run / "probe.json").exists():
        return []
    found = read_json(run / "probe.json")
    if "note" in found:
        return [Section(TITLE, verdict(found))]
    whose = "were not pre-trained on" if found["held_out"] else "were pre-trained on, each told by others of them"
    measured = f"Measured on {found['slices']} slices of {found['subjects']} subjects who {whose}. {NOTE}"
    rows = [[name, *(f"{found[key][figure]:.2f}" for figure in FIGURES)] for key, name in WEIGHTS.items()]
    with np.load(run / "probe.npz") as file:
        names = ["Slices", *(f"Nearest neighbours: {WEIGHTS[key]}" for key in ("pretrained", "random"))]
        rows_of_slices = [(name, images, None) for name, images in zip(names, file["images"], strict=True)]
        picture = slice_rows(rows_of_slices, file["positions"])
    table = Table("Position of a slice from frozen features", ["Weights", *FIGURES.values()], rows, measured)
    caption = "Slices, and those of other subjects that have the most similar features; numbers are positions"
    return [Section(TITLE, verdict(found), [table], [Picture(caption, picture, "png", wide=True)])]


def verdict(found: dict[str, Any]) -> str:
    """The content of a `probe.json` in words."""
    single = found["single"]
    left_out = f" Volumes of one slice have no position to learn and are left out ({single})." if single else ""
    if "note" in found:
        return f"{found['note']}{left_out}"
    probe, neighbour = ([f"{found[key][figure]:.2f}" for key in WEIGHTS] for figure in ("off", "neighbour_off"))
    better = [is_better(found, figure) for figure in ("off", "neighbour_off")]
    if all(better):
        learnt = "pre-training has learnt where a slice lies."
    elif any(better):
        clear = "probe" if better[0] else "neighbour"
        learnt = (
            f"only the {clear} is clearly better than with random weights, so pre-training has learnt a part of it."
        )
    else:
        learnt = (
            "neither is clearly better than with random weights, so nothing shows that pre-training has learnt where a "
            "slice lies. Whether its weights help all the same, only fine-tuning tells."
        )
    return (
        f"Position of a slice from frozen features: a linear probe is off by {probe[0]} of the volume (random weights "
        f"{probe[1]}, guessing {probe[2]}), the nearest neighbour by {neighbour[0]} (random weights {neighbour[1]}, "
        f"guessing {neighbour[2]}): {learnt}{left_out}"
    )


def is_better(found: dict[str, Any], figure: str) -> bool:
    """Whether a figure is clearly better than with random weights: by more than two standard errors over subjects."""
    gain = found["gain"][figure]
    return bool(gain["mean"] > 2 * gain["error"])


def all_probed(run: Path) -> list[Section]:
    """The probes of all pre-trainings of a run in one table, means over splits; nothing if there are none."""
    probes: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(run.glob("pretrain/split-*/*/probe.json")):
        found = read_json(path)
        if "note" not in found:
            probes.setdefault(path.parent.name, []).append(found)
    if not probes:
        return []

    def mean(of: list[dict[str, Any]], key: str, figure: str) -> str:
        return f"{np.mean([found[key][figure] for found in of]):.2f}"

    rows = [
        [
            name,
            *(f"{mean(of, 'pretrained', figure)} / {mean(of, 'random', figure)}" for figure in FIGURES),
            f"{sum(is_better(found, 'off') for found in of)} of {len(of)}",
        ]
        for name, of in sorted(probes.items())
    ]
    table = Table(
        "Position of a slice from frozen features: pre-trained / random weights",
        ["Pre-training", *FIGURES.values(), "Probe clearly better"],
        rows,
        f"Means over the splits; the last column counts those in which it is. {NOTE}",
    )
    return [Section(TITLE, tables=[table])]
