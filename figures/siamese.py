"""Methods in which nothing repels: byol, simsiam and simtriplet."""

from collections.abc import Sequence

from torch import Tensor

from figures.sheet import BLUE, VERMILION, Sheet
from figures.step import pool_of, stage_of, watched
from glocal.data.store import Store
from glocal.randomness import generator
from glocal.reporting.figures import QUIET

SHOWN = 24  # of the numbers of an embedding


def byol(store: Store) -> Sheet:
    """Both directions of a slice, with its predictions and projections in a step."""
    stage = stage_of(pool_of(store), "byol", batch=8, hidden=256, outputs=64)
    seen = watched(stage, "prediction_error")
    pairs = [(q[0], z[0]) for (q, z), _ in seen.calls["prediction_error"]]
    return _both_ways(seen.inputs[0][0], seen.inputs[1][0], pairs, "slow copy of\nencoder, projector", "2 − 2 cos")


def simsiam(store: Store) -> Sheet:
    """Both directions of a slice, with its predictions and embeddings in a step."""
    stage = stage_of(pool_of(store), "simsiam", batch=8, hidden=64, outputs=128)
    seen = watched(stage, "negative_cosine")
    pairs = [(p[0], z[0]) for (p, z), _ in seen.calls["negative_cosine"]]
    return _both_ways(seen.inputs[0][0], seen.inputs[0][0], pairs, "encoder, projector,\nthe same", "−½ cos")


def _both_ways(
    online: Tensor, target: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], other: str, distance: str
) -> Sheet:
    """View 1 of the first slice predicts view 2, and the reverse."""
    sheet, half = Sheet(386), len(online) // 2
    letters = ("q", "z") if "slow" in other else ("p", "z")
    for way, (prediction, projection) in enumerate(pairs):
        top = 14 + way * 186
        rows = ((online[way * half, 0], way + 1), (target[(1 - way) * half, 0], 2 - way))
        for row, ((picture, view), vector) in enumerate(zip(rows, (prediction, projection), strict=True)):
            y, colour = top + row * 88, (BLUE, QUIET)[row]
            sheet.image(picture, 66, y, 80)
            sheet.text(f"view {view}", 34, y + 40)
            sheet.arrow((150, y + 40), (176, y + 40))
            sheet.box("encoder, projector" if not row else other, 180, y + 17, 200, 46)
            if not row:
                sheet.arrow((384, y + 40), (410, y + 40))
                sheet.box("predictor", 414, y + 17, 100, 46)
            sheet.arrow((518 if not row else 384, y + 40), (545, y + 40))
            if row:
                _stop(sheet, 464, y + 40)
            sheet.text(f"${letters[row]}_{view}$", 560, y + 40, 12)
            _strip(sheet, vector, 580, y + 28, 192, colour)
        sheet.pull((782, top + 40), (782, top + 128), connectionstyle="arc3,rad=-0.5")
        sheet.text(distance, 850, top + 84, color=BLUE)
    return sheet


def simtriplet(store: Store) -> Sheet:
    """A slice, the one beside it, and which of their views predict each other in a step."""
    pool = pool_of(store)
    stage = stage_of(pool, "simtriplet", batch=8, hidden=64, outputs=128)
    seen = watched(stage, "triplet_loss", "negative_cosine")
    (predictions, embeddings), _ = seen.calls["triplet_loss"][0]
    compared = [(_place(p, predictions), _place(z, embeddings)) for (p, z), _ in seen.calls["negative_cosine"]]
    slices = pool.epoch(8, stage.options.seed, 0)
    beside = pool.neighbours(slices, generator(stage.options.seed, 0, "neighbours"))
    sheet, at = Sheet(342), {2: 96, 0: 380, 1: 664}  # where the views x3, x1 and x2 are
    for view, x in at.items():
        sheet.image(seen.inputs[0][0].chunk(3)[view][0, 0], x, 34, 130)
        sheet.text(f"$x_{view + 1}$", x + 65, 18, 12)
    for p, z in compared:
        right, high = at[z] > at[p], 74 if at[z] > at[p] else 122
        start, end = (at[p] + 138, at[z] - 8) if right else (at[p] - 8, at[z] + 138)
        sheet.pull((start, high), (end, high))
        sheet.text(f"½ D($p_{p + 1}$, $z_{z + 1}$)", (start + end) / 2, high - 14, color=BLUE)
    for shown, x, views, name in ((slices, 251, (2, 0), "a slice"), (beside, 677, (1,), "the slice beside it")):
        sheet.image(pool.images(shown[:1])[0, 0], x, 210, 104)
        for view in views:
            sheet.arrow((x + 52, 206), (at[view] + 65, 170))
        sheet.text(f"{name}: {int(shown.number[0]) + 1} of {int(shown.count[0])}", x + 52, 328, color=QUIET)
    sheet.text("$x_2$ and $x_3$ are not compared", 516, 262, color=QUIET)
    return sheet


def _place(vectors: Tensor, among: Sequence[Tensor]) -> int:
    return next(place for place, some in enumerate(among) if some is vectors)


def _stop(sheet: Sheet, x: float, y: float) -> None:
    """No gradient goes back from here."""
    for shift in (-3, 3):
        sheet.line([(x + shift, y - 10), (x + shift, y + 10)], VERMILION, linewidth=2)
    sheet.text("no gradient", x, y + 22, 8, color=VERMILION)


def _strip(sheet: Sheet, vector: Tensor, x: float, y: float, width: float, colour: str) -> None:
    """The first numbers of a vector."""
    sheet.map(vector[None, :SHOWN].expand(3, -1), x, y, width)
    sheet.rectangle(x, y, width, 3 * width / SHOWN, edgecolor=colour, linewidth=1.5, zorder=3)
