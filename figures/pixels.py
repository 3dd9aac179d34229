"""Methods that learn pixel by pixel: pixel-global and label-efficient."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

from figures.sheet import LOOKS, Sheet, role_of
from figures.step import SIDE, pool_of, stage_of, watched
from figures.windows import VIEW, two_windows, view_at
from glocal.data.store import Store
from glocal.pretraining.pixel_global import uncertainty_maps
from glocal.pretraining.pretrain import pretrain
from glocal.reporting.figures import QUIET

# The pre-training whose teacher is asked for its uncertainty.
SHORT = {
    **{"method": "pixel-global", "network": {"widths": [8, 16, 32]}, "batch": 6, "passes": 10, "momentum": 0.9},
    **{"max_iterations": 100, "optimizer": "adam", "learning_rate": 2e-3, "warmup_iterations": 10},
    **{"device": "cpu", "precision": "float32", "threads": 1, "log": []},
}
MARKS = (".", "^", "s", "o")  # of background, right ventricle, myocardium, left ventricle
STRUCTURES = ("right ventricle", "myocardium", "left ventricle")
ANCHORED = 2


def pixel_global(store: Store) -> Sheet:
    """Which pixels of two views match in a step; and of which pixels a briefly trained teacher is unsure."""
    stage, number = stage_of(pool_of(store), "pixel-global", batch=8, passes=1), 1
    seen = watched(stage, "matching_grid", "draw_view")
    points, matched = (some[number] for some in seen.calls["matching_grid"][0].result)
    draws = [call.result.spatial[number : number + 1] for call in seen.calls["draw_view"][:2]]
    places = torch.arange(8, SIDE, 16)
    rows, columns = (some.flatten() for some in torch.meshgrid(places, places, indexing="ij"))
    both = [torch.stack([columns, rows], 1) + 0.5, points[rows, columns] + 0.5]
    picture = stage.pool.images(stage.pool.epoch(8, stage.options.seed, 0))[number, 0]
    sheet = Sheet(700)
    two_windows(sheet, picture, draws, both, matched[rows, columns], ("student's view", "teacher's view"))
    fading = (0.4 + 0.6 * matched.float()).numpy()
    sheet.image(seen.inputs[0][0][number, 0], view_at(0), 34, VIEW, alpha=fading)
    sheet.image(seen.inputs[1][0][number, 0], view_at(1), 34, VIEW)
    what = "At each pixel of its view the student predicts what the teacher says of the same place; faded: no match."
    sheet.text(what, 450, 332, color=QUIET)
    _uncertain(sheet, store, 360)
    return sheet


def _uncertain(sheet: Sheet, store: Store, y: float) -> None:
    """Some slices of a volume, and the teacher's uncertainty about them."""
    pool, side = pool_of(store, 0), 148
    slices = pool.epoch(len(pool), 0, 0)
    slices = slices[slices.number.argsort()]
    with TemporaryDirectory() as folder:
        pretrain(store, Path(folder) / "run", SHORT)
        unsure = avg_pool2d(uncertainty_maps(Path(folder) / "run", pool, slices)[:, None], 3)[:, 0]
    low, high = float(unsure.min()), float(unsure.max())
    for column, number in enumerate((1, 4, 7)):
        x = 214 + column * 160
        sheet.image(pool.images(slices)[number, 0], x, y, side)
        sheet.image(unsure[number], x, y + 156, side, cmap="cividis", vmin=low, vmax=high)
    sheet.text("slices of\na volume", 140, y + side / 2)
    sheet.text("uncertainty\nof the teacher", 136, y + 156 + side / 2)
    sheet.image(torch.linspace(1, 0, 60)[:, None].expand(60, 8), 704, y + 174, 15, cmap="cividis")
    for value, place in ((high, y + 180), (low, y + 282)):
        sheet.text(f"{value:.2f}", 740, place, 8.5, color=QUIET)
    what = f"After {SHORT['max_iterations']} steps. The more unsure the teacher is of a pixel, the less it counts."
    sheet.text(what, 450, y + 322, color=QUIET)


def label_efficient(store: Store) -> Sheet:
    """The pixels of two slices in two views by their roles for one of them, from the masks of a step."""
    stage: Any = stage_of(pool_of(store), "label-efficient", 1, local_batch=2, seed=1)
    seen = watched(stage, "pixel_loss", "contrastive_loss_in_chunks")
    _, labels, _ = seen.calls["pixel_loss"][0].given
    masks = seen.calls["contrastive_loss_in_chunks"][0].given[1]
    chosen = int((labels.nonzero()[:, 0] == (labels == ANCHORED).nonzero()[4]).nonzero())  # among the anchors
    (anchor,), stride, side = labels.nonzero()[chosen].tolist(), stage.options.stride, 212
    positive, negative = (mask[0] for mask in masks(slice(chosen, chosen + 1)))
    sheet, across = Sheet(316), SIDE // stride
    for place, image in enumerate((0, 2, 1, 3)):  # the views of a slice beside each other
        x, y = 12 + place * 220 + place // 2 * 4, 32
        sheet.image(seen.inputs[0][0][image, 0], x, y, side)
        sheet.text(f"slice {place // 2 + 1}, view {place % 2 + 1}", x + side / 2, 16, color=QUIET)
        pixels = range(image * across**2, (image + 1) * across**2)
        for pixel in pixels:
            row, column = divmod(pixel % across**2, across)
            spot = x + (column * stride + 0.5) * side / SIDE, y + (row * stride + 0.5) * side / SIDE
            _mark(sheet, spot, int(labels[pixel]), role_of(pixel, anchor, positive, negative))
    words = {"positive": "the same structure, in all slices and views, attracts it", "negative": "all else repels it"}
    sheet.legend(268, neither="", anchor="a pixel", **words)
    for place, (label, name) in enumerate(enumerate(("background, no anchor itself", *STRUCTURES))):
        x = 30 + (0, 230, 390, 530)[place]
        sheet.line([(x, 298)], QUIET, marker=MARKS[label], markersize=7)
        sheet.text(name, x + 12, 298, align="left", color=QUIET)
    return sheet


def _mark(sheet: Sheet, spot: tuple[float, float], label: int, role: str) -> None:
    """A pixel: its structure by the shape, its role by the colour."""
    size = 11 if role == "anchor" else 3.4 if label else 2
    look = {"markeredgecolor": "white", "markeredgewidth": 0.4 if label else 0}
    if role == "anchor":
        sheet.text("A", *spot, 7.5, color="white", weight="bold")
    sheet.line([spot], LOOKS[role][0], marker=MARKS[label], markersize=size, zorder=5 + (role == "anchor"), **look)
