"""Draw docs/figures/demo.png from a finished demonstration: `python -m figures.demo [RUN]`."""

import io
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

from figures.__main__ import FOLDER
from glocal.data.dataset import read_dataset
from glocal.data.store import Store
from glocal.experiments.sections import shown_slice
from glocal.reporting.comparisons import PictureRow, picture_grid
from glocal.reporting.figures import in_few_colours

NAMES = {"random": "random weights", "pcl": "pre-trained (PCL)"}


def picture(run: Path) -> bytes:
    """The worst, the median and the best test case of the first draw by mean Dice of both, as in experiments: PNG."""
    results = pd.read_csv(run / "results.csv").query("draw == 0")
    dice = results.groupby(["case", "contender"])["dice"].mean().unstack()
    order = dice.mean(axis=1).sort_values().index
    folders = [run / "finetune/split-0" / name / "labels-2-draw-0/predictions" for name in NAMES]
    store = Store.open(run / "store")
    dataset, rows = read_dataset(store.dataset), []
    for word, place in (("Worst", 0), ("Median", (len(order) - 1) // 2), ("Best", len(order) - 1)):
        shown = shown_slice(store, dataset, folders, order[place])
        assert shown.truth is not None  # it was measured
        masks = dict(zip(NAMES.values(), shown.masks, strict=True))
        scores = dice.loc[order[place]].rename(NAMES).to_dict()
        rows.append(PictureRow(f"{word} case: {shown.title}", shown.image, shown.truth, masks, scores, shown.aspect))
    buffer, grid = io.BytesIO(), Image.open(io.BytesIO(picture_grid(rows, list(NAMES.values()), store.labels)))
    grid.reduce(2).save(buffer, "png")  # the README shows it small, and noise is long to load
    return in_few_colours(buffer.getvalue())


if __name__ == "__main__":
    (FOLDER / "demo.png").write_bytes(picture(Path(*sys.argv[1:] or ["demo", "run"])))
    print("docs/figures/demo.png")
