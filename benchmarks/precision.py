"""What the default precision does to Dice: the same trainings in float32 and bfloat16, on development subjects.

    python -m benchmarks.precision DATASET OUT

trains the recipe `acdc-small` in both precisions (an hour and a half on two cores; started again it continues), pairs
the trainings by contender and draw, and keeps the differences in `results/precision.json`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness import RESULTS, Row, line, machine, pinned

PROTOCOL = ["threads=1", "protocol.evaluate=development", "protocol.draws=3", "finetune.labels=2"]


def scores(data: Path, out: Path, precision: str) -> pd.Series:
    """Mean foreground Dice over development subjects, by contender and draw; trained if it is not yet."""
    from glocal.experiments.run import run

    folder = run("acdc-small", [f"data={data}", f"out={out / precision}", f"precision={precision}", *PROTOCOL], 1)
    table = pd.read_csv(folder / "scores.csv")
    return table[table["checkpoint"] == "last"].set_index(["contender", "draw"])["dice"]


def seconds(out: Path, precision: str) -> float:
    """How long the pre-training took."""
    manifest = json.loads((out / precision / "pretrain" / "split-0" / "pcl" / "manifest.json").read_text("utf-8"))
    return float(manifest["seconds"])


def main(data: Path, out: Path) -> None:
    """Train, pair, print and keep."""
    pinned()
    values = pd.DataFrame({name: scores(data, out, name) for name in ("float32", "bfloat16")})
    values["difference"] = values["bfloat16"] - values["float32"]
    by_contender = values.groupby("contender")["difference"].agg(["mean", "std"])
    differences = values["difference"]
    row = Row(
        "Dice, default precision minus float32, ACDC development subjects, 2 labels",
        "Dice",
        (float(differences.mean()), float(differences.median())),
        ratio=abs(float(differences.mean())),
        goal=0.01,
        sense="at most",
        note=f"mean (median) of {len(values)} pairs: random and PCL, {len(values) // 2} draws; standard error of the "
        f"mean {differences.sem():.3f}",
    )
    content: dict[str, Any] = {
        "machine": machine(),
        "command": "python -m benchmarks.precision DATASET OUT",
        "dice": values.reset_index().to_dict("records"),
        "rows": [asdict(row)],
        "seconds of pre-training": {name: seconds(out, name) for name in ("float32", "bfloat16")},
    }
    (RESULTS / "precision.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(values.round(3).to_string(), by_contender.round(3).to_string(), sep="\n\n")
    print(line(row))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.precision DATASET OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
