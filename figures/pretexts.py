"""Methods that hide something of a slice and ask for it: rotation, inpainting, context-restoration."""

from torch import Tensor

from figures.sheet import BLUE, VERMILION, Sheet
from figures.step import SIDE, pool_of, stage_of, watched
from glocal.data.store import Store

COLUMNS, WIDE = 4, 190


def rotation(store: Store) -> Sheet:
    """A slice in its four rotations, as a step shows them."""
    batch, number = 3, 1
    seen = watched(stage_of(pool_of(store), "rotation", batch=batch), "turned")
    sheet = Sheet(290)
    for turn in range(4):
        x = 60 + turn * 208
        sheet.image(seen.inputs[0][0][turn * batch + number, 0], x, 14, WIDE)
        sheet.arrow((x + WIDE / 2, 208), (x + WIDE / 2, 248))
        sheet.text(f"{90 * turn}°", x + WIDE / 2, 268, 13, color=BLUE, weight="bold")
    sheet.text("input", 30, 14 + WIDE / 2)
    sheet.text("answer", 30, 268)
    return sheet


def inpainting(store: Store) -> Sheet:
    """Slices with their boxes, and what they should become."""
    seen = watched(stage_of(pool_of(store), "inpainting", batch=COLUMNS, seed=1), "restoration_error")
    _, images, _ = seen.calls["restoration_error"][0].given
    return _restored(seen.inputs[0][0], images)


def context_restoration(store: Store) -> Sheet:
    """Slices with patches that changed places, and what they should become."""
    stage = stage_of(pool_of(store), "context-restoration", batch=COLUMNS, seed=1)
    seen = watched(stage, "rearranged")
    (images, here, _), mixed = seen.calls["rearranged"][0]
    sheet = _restored(mixed, images)
    # The last `pairs` x 2 windows of 5 x 5 pixels, by their first pixel.
    patch = stage.options.patch
    for column, places in enumerate(here):
        for first in places[:: patch * patch].tolist():
            row, right = divmod(first, SIDE)
            scale = WIDE / SIDE
            spot = 60 + column * 208 + right * scale, 14 + row * scale
            sheet.rectangle(*spot, patch * scale, patch * scale, edgecolor=VERMILION, linewidth=1.1, zorder=3)
    return sheet


def _restored(inputs: Tensor, targets: Tensor) -> Sheet:
    sheet = Sheet(450)
    for row, (name, pictures) in enumerate((("input", inputs), ("target", targets))):
        for column, picture in enumerate(pictures[:COLUMNS, 0]):
            sheet.image(picture, 60 + column * 208, 14 + row * 232, WIDE)
        sheet.text(name, 30, 14 + row * 232 + WIDE / 2)
    for column in range(COLUMNS):
        x = 60 + column * 208 + WIDE / 2
        sheet.arrow((x, 208), (x, 242))
    return sheet
