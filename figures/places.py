"""Methods that know where in the body a slice or a region lies: gcl and pcl."""

from typing import Any

from figures.sheet import BLUE, SKY, Sheet, role_of
from figures.step import SIDE, pool_of, stage_of, watched
from glocal.data.store import Store
from glocal.reporting.figures import QUIET


def gcl_global(store: Store) -> Sheet:
    """G^D: partitions by volumes, slice and view, from the masks of a step."""
    seen = watched(stage_of(pool_of(store), "gcl", volumes=4), "contrastive_loss", "partition_of")
    _, positive, negative, _ = seen.calls["contrastive_loss"][0].given
    number, count, _ = seen.calls["partition_of"][0].given
    (images,) = seen.inputs[0]
    slices, anchor, side = len(number), 5, 86  # the original of volume 2 in partition 2
    sheet = Sheet(488)
    for image, picture in enumerate(images[:, 0]):
        (volume, partition), view = divmod(image % slices, 4), image // slices
        x, y = 100 + volume * 202 + view * 93, 46 + partition * 99
        sheet.image(picture, x, y, side, role_of(image, anchor, positive[anchor], negative[anchor]))
        if not view:
            of = f"{number[image] + 1} of {count[image]}"
            sheet.text(of, x - 9, y + side / 2, 7, color=QUIET, rotation=90)
    for volume in range(4):
        sheet.text(f"volume {volume + 1}", 189 + volume * 202, 14, 10.5, weight="bold")
        for view, name in enumerate(("slice", "view")):
            sheet.text(name, 143 + volume * 202 + view * 93, 34, 9, color=QUIET)
    for partition, place in enumerate(("base", "", "", "apex")):
        sheet.text(f"partition {partition + 1}\n{place}".strip(), 40, 89 + partition * 99)
    sheet.legend(466, neither="same partition, takes no part")
    return sheet


def gcl_local(store: Store) -> Sheet:
    """L^R: the regions of two views, from the positions and masks of a step."""
    sheet, anchor, side = Sheet(312), 4, 212  # C
    for pair, rule in enumerate(("neighbours", "all")):
        stage: Any = stage_of(pool_of(store), "gcl", 1, blocks=2, local_batch=2, negatives=rule, seed=1)
        seen = watched(stage, "local_loss")
        vectors, pairs, positive, negative, _ = seen.calls["local_loss"][0].given
        cell = 4 * side / SIDE  # of a map after two blocks
        for half, (image, name) in enumerate(zip(pairs[0].tolist(), "uv", strict=True)):
            x, y = 14 + pair * 446 + half * 218, 52
            sheet.image(seen.inputs[0][0][image, 0], x, y, side)
            sheet.text(f"view {name}", x + side / 2, 40, 9, color=QUIET)
            for region, (row, column) in enumerate(stage.positions.tolist()):
                here = region + half * vectors.shape[1]
                role = role_of(here, anchor, positive[anchor], negative[anchor])
                sheet.frame(role, x + column * cell, y + row * cell, 3 * cell, 3 * cell)
        title = "its five neighbours (as the code)" if rule == "neighbours" else "all other regions (as the text)"
        sheet.text(f"Ω(r): {title}", 229 + pair * 446, 16, 10.5, weight="bold")
    words = {"anchor": "region r of u", "positive": "region r of v attracts", "negative": "Ω(r) of both views repel"}
    sheet.legend(290, neither="", **words)
    sheet.text("dotted: other regions", 886, 290, align="right", color=QUIET)
    return sheet


def pcl(store: Store) -> Sheet:
    """All slices of three volumes at their positions, and who lies within the threshold."""
    pool = pool_of(store, 0, 1, 2)
    stage = stage_of(pool, "pcl", batch=len(pool))
    seen = watched(stage, "contrastive_loss", "positional")
    _, positive, negative, _ = seen.calls["contrastive_loss"][0].given
    _, position, threshold = seen.calls["positional"][0].given
    (images,) = seen.inputs[0]
    slices = pool.epoch(len(pool), stage.options.seed, 0)
    anchor = int(((slices.volume == 1) & (slices.number == slices.count // 2)).nonzero())
    left, wide, side, sheet = 10, 848, 59, Sheet(544)
    place = left + float(position[anchor]) * wide
    _window(sheet, place, threshold * wide)
    for image, picture in enumerate(images[:, 0]):
        row, view = int(slices.volume[image % len(slices)]), image // len(slices)
        x, y = left + float(position[image]) * wide - side / 2, 56 + row * 143 + view * (side + 5)
        sheet.image(picture, x, y, side, role_of(image, anchor, positive[anchor], negative[anchor]))
    for row in range(3):
        count = int(slices.count[slices.volume == row][0])
        sheet.text(f"volume {row + 1}: {count} slices, two views of each", 30, 46 + row * 143, 8.5, "left", color=QUIET)
    _ruler(sheet, left, wide, 484)
    sheet.legend(522, neither="")
    return sheet


def _window(sheet: Sheet, place: float, reach: float) -> None:
    """What lies nearer than the threshold."""
    sheet.rectangle(place - reach, 32, 2 * reach, 440, facecolor=SKY, alpha=0.25, zorder=0)
    sheet.text("$|p_i - p_j| < t$", place, 18, 11, color=BLUE)
    for side in (-reach, reach):
        sheet.line([(place + side, 32), (place + side, 472)], BLUE, linestyle="--", linewidth=1.2)


def _ruler(sheet: Sheet, left: float, wide: float, y: float) -> None:
    """The positions in a volume."""
    sheet.line([(left, y), (left + wide, y)], QUIET, linewidth=1)
    for tenth in range(0, 11, 2):
        x = left + tenth / 10 * wide
        sheet.line([(x, y - 3), (x, y + 3)], QUIET, linewidth=1)
        sheet.text(f"{tenth / 10:g}", x, y + 12, 8, color=QUIET)
    sheet.text("position p of the middle of a picture", 886, y + 38, align="right", color=QUIET)
