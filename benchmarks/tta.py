"""What `predict --tta` does to Dice, on the development subjects of finished fine-tunings.

    python -m benchmarks.tta RUN [RUN ...]

looks at the run folders that were measured on development subjects, measures them again with five views of each slice,
and keeps the differences, by augmentation of the fine-tuning, in `results/tta.json`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from benchmarks.harness import RESULTS, Row, line, machine, pinned


def mean_dice(frame: pd.DataFrame) -> float:
    """Over classes, then over cases."""
    return float(frame.groupby("case")["dice"].mean().mean())


def measured(run: Path) -> dict[str, Any] | None:
    """Dice of a run without and with five views; None if it was not measured on development subjects."""
    import torch

    from glocal import runs
    from glocal.data.dataset import read_dataset
    from glocal.data.store import Store
    from glocal.ensemble import Models
    from glocal.evaluation.evaluate import evaluate
    from glocal.finetuning.measure import evaluation_file, predict_cases
    from glocal.inference import predictor

    manifest, settings = runs.manifest_of(run), runs.settings_of(run)
    cases = manifest.get("evaluated", {}).get("development")
    if not cases:
        return None
    before = pd.read_csv(evaluation_file(run, "development")).query("checkpoint == 'last'")
    store = Store.open(Path(manifest["store"]))
    dataset, models = read_dataset(store.dataset), Models.load([run / "model.safetensors"])
    network = predictor(models, models.variation(tta=True, passes=0, every_decoder=False), torch.device("cpu"))
    with TemporaryDirectory() as folder:
        predict_cases(network, store, dataset, tuple(cases), Path(folder), torch.device("cpu"))
        options = {"class_names": store.labels, "spacing_known": store.plan.options.spacing_known, "cases": cases}
        after = evaluate(Path(folder), dataset.root, **options)
    spatial = settings["augmentation"]["spatial"]
    return {
        "augmentation": f"rotation {spatial['rotation']:g}, scale {spatial['scale'][0]:g} to {spatial['scale'][1]:g}",
        "pretrained": (settings["pretrained"] or {}).get("method", "random"),
        "strategy": settings["strategy"],
        "labels": settings["labels"],
        "draw": settings["draw"],
        "cases": len(cases),
        "plain": mean_dice(before),
        "tta": mean_dice(after),
    }


def row(augmentation: str, found: pd.DataFrame) -> Row:
    """The fine-tunings of one augmentation."""
    difference = found["tta"] - found["plain"]
    return Row(
        f"Dice with --tta minus without, fine-tuned with {augmentation}",
        "Dice",
        (float(difference.mean()), float(difference.median())),
        ratio=float(difference.mean()),
        goal=0,
        note=f"mean (median) of {len(found)} trainings, better in {int((difference > 0).sum())}; "
        f"{found['cases'].max()} development cases; {found['plain'].mean():.3f} without",
    )


def main(runs: Sequence[Path]) -> None:
    """Measure, print and keep."""
    pinned()
    found = pd.DataFrame([values for run in runs if (values := measured(run))])
    if found.empty:
        sys.exit(
            "None of these runs was measured on development subjects: fine-tune with protocol.evaluate=development."
        )
    rows = [row(str(name), group) for name, group in found.groupby("augmentation")]
    content: dict[str, Any] = {
        "machine": machine(),
        "command": "python -m benchmarks.tta RUN [RUN ...]",
        "dice": found.round(4).to_dict("records"),
        "rows": [asdict(each) for each in rows],
    }
    (RESULTS / "tta.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(found.round(3).to_string(), *map(line, rows), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.tta RUN [RUN ...]")
    main([Path(run) for run in sys.argv[1:]])
