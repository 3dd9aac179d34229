"""Methods that tell slices apart: simclr and moco."""

from typing import Any

from torch import Tensor

from figures.sheet import Sheet, role_of
from figures.step import pool_of, stage_of, watched
from glocal.data.store import Store
from glocal.reporting.figures import QUIET


def simclr(store: Store) -> Sheet:
    """Two views of every slice of a batch, from the masks of a step."""
    seen = watched(stage_of(pool_of(store), "simclr", batch=7), "contrastive_loss")
    _, positive, negative, _ = seen.calls["contrastive_loss"][0].given
    anchor, side, sheet = 2, 108, Sheet(304)
    (images,) = seen.inputs[0]
    for image, picture in enumerate(images[:, 0]):
        view, number = divmod(image, 7)
        x, y = 74 + number * 117, 28 + view * 118
        sheet.image(picture, x, y, side, role_of(image, anchor, positive[anchor], negative[anchor]))
    for number in range(7):
        sheet.text(f"slice {number + 1}", 128 + number * 117, 14, color=QUIET)
    for view in range(2):
        sheet.text(f"view {view + 1}", 36, 82 + view * 118)
    sheet.legend(282, neither="")
    return sheet


def moco(store: Store) -> Sheet:
    """Queries, keys and the queue, after as many steps as fill it, from the masks of the step."""
    pool, batch, queue, last = pool_of(store, 0, 1), 6, 24, 5
    stage: Any = stage_of(pool, "moco", batch=batch, queue=queue)
    ring = dict[int, Tensor]()  # what the keys in the queue show
    for step in range(last):
        keys = watched(stage, step=step).inputs[1][0]
        for place in range(batch):
            ring[(step * batch + place) % queue] = keys[place, 0]
    shown = stage.queued.tolist()
    seen = watched(stage, "contrastive_loss", step=last)
    _, positive, negative, _ = seen.calls["contrastive_loss"][0].given
    queries, keys = seen.inputs[0][0][:, 0], seen.inputs[1][0][:, 0]
    slices = pool.epoch(batch, stage.options.seed, last).index.tolist()
    # The query whose slice is in the queue, too.
    anchor, side, sheet = next(n for n, index in enumerate(slices) if index in shown), 62, Sheet(388)
    for number in range(batch):
        sheet.image(queries[number], 116 + number * 67, 30, side, "anchor" if number == anchor else "")
        sheet.image(keys[number], 116 + number * 67, 106, side, role_of(number, -1, positive[anchor], negative[anchor]))
    for place, picture in ring.items():
        row, column = divmod(place, 12)
        role = role_of(batch + place, -1, positive[anchor], negative[anchor])
        sheet.image(picture, 84 + column * 67, 208 + row * 67, side, role)
    sheet.text("queries\n(encoder)", 56, 61)
    sheet.text("keys\n(slow copy)", 56, 137)
    sheet.text("slices of this step", 317, 16, color=QUIET)
    sheet.text("queue: the\nlast 24 keys", 42, 272, 8.5)
    oldest = [(84 + (last * batch % 12) * 67, 201), (84 + (last * batch % 12 + batch) * 67 - 5, 201)]
    sheet.line(oldest, QUIET, linewidth=1.5)
    sheet.arrow((520, 137), (686, 198), connectionstyle="arc3,rad=-0.3")
    sheet.text("then these keys take\nthe places of the oldest", 740, 150, color=QUIET)
    sheet.legend(366, neither="other keys of the step; older keys of the anchor's slice")
    return sheet
