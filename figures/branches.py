"""jcl: two branches see the same slices, one of them at a fraction of its size."""

from typing import Any

from torch import Tensor

from figures.sheet import BLUE, Sheet, role_of
from figures.step import SIDE, pool_of, stage_of, trained, watched
from glocal.data.store import Store

ZOOM = 180 / SIDE  # units a pixel of the slice
CELL = 11.0  # units a cell of a map
WHO = (
    "$L_g$ (of views that are moved by themselves), and $L_d$ in each cell: slices at nearly the same position attract"
)
TO_MEAN = (((428, 46), (834, 94)), ((762, 356), (798, 356)))  # the auxiliary vector is made of the encoder's features
OVER = "arc,angleA=90,angleB=90,armA=20,armB=80,rad=10", "arc3"


def jcl(store: Store) -> Sheet:
    """What a step makes of a slice in both branches, which maps its losses compare, and who attracts whom."""
    pool = pool_of(store, 1)
    stage: Any = trained(stage_of(pool, "jcl", batch=len(pool), network={"widths": [8, 16, 16, 16]}), 20)
    seen = watched(stage, "feature_error", "supcon")
    slices = pool.epoch(len(pool), stage.options.seed, 0)
    number = int((slices.number == 6).nonzero())
    deep, deep_small = (features[number] for features in seen.calls["feature_error"][0].given)
    vectors, masks, _ = seen.calls["supcon"][1].given  # of L_d: (h w, 2N, channels)
    cells = deep.shape[-1]
    late = [vectors[:, number + branch * len(pool)].T.unflatten(1, (cells, cells)) for branch in range(2)]
    sheet = Sheet(606)
    for branch, (picture, features) in enumerate(zip(seen.inputs[0], (deep, deep_small), strict=True)):
        middle, small = 116 + branch * 240, features.shape[-1]
        side = picture.shape[-1] * ZOOM
        sheet.image(picture[number, 0], 118 - side / 2, middle - side / 2, side)
        _map(sheet, features, 428, middle)
        _map(sheet, late[branch], 692, middle)
        sheet.box(("encoder", "the same\nencoder")[branch], 244, middle - 24, 90, 48)
        sheet.box(("projector", "two decoder\nblocks")[branch], 508, middle - 24, 90, 48)
        sheet.arrow((118 + side / 2 + 8, middle), (238, middle))
        sheet.arrow((338, middle), (422 - small * CELL / 2, middle))
        sheet.arrow((434 + small * CELL / 2, middle), (504, middle))
        sheet.arrow((602, middle), (622, middle))
        sheet.arrow(*TO_MEAN[branch], connectionstyle=OVER[branch])
        sheet.text("mean,\nprojector", 834, middle, 8.5)
    for y, name, pictures in zip((12, 290), ("auxiliary branch", "dominant branch"), seen.inputs[0], strict=True):
        sheet.text(f"{name}: {pictures.shape[-1]} x {pictures.shape[-2]} pixels", 20, y, 10, "left", weight="bold")
    for x, name, upper, lower in (
        (428, "$L_{ER}$", 66, 24),
        (692, "$L_d$\ncell by cell", 66, 66),
        (834, "$L_g$", 24, 24),
    ):
        sheet.pull((x, 116 + upper + 6), (x, 356 - lower - 6), arrowstyle="<|-|>")
        sheet.text(name, x + 10, 240, 11, "left", color=BLUE)
    _batch(sheet, pool.images(slices), slices.number, [mask[number] for mask in masks], number)
    return sheet


def _map(sheet: Sheet, features: Tensor, x: float, y: float) -> None:
    """The mean over the channels of features `(C, h, w)`, around (x, y)."""
    mean, side = features.mean(0), features.shape[-1] * CELL
    sheet.map(mean, x - side / 2, y - side / 2, side)


def _batch(sheet: Sheet, images: Tensor, places: Tensor, masks: list[Tensor], anchor: int) -> None:
    """The slices of the volume in order, in both branches, by their role for a slice in the auxiliary one."""
    positive, negative = masks
    step, y = 780 / len(images), 448
    for place, image in enumerate(places.argsort().tolist()):
        for branch in range(2):
            role = role_of(image + branch * len(images), anchor, positive, negative)
            sheet.image(images[image, 0], 110 + place * step, y + branch * 60, 54, role)
    sheet.text("auxiliary", 56, y + 27)
    sheet.text("dominant", 56, y + 87)
    sheet.text(WHO, 20, 432, 10, "left")
    sheet.legend(588, neither="")
