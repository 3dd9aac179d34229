"""ideal: cells of the encoder's map attract and repel each other."""

from typing import Any

from torch import Tensor

from figures.sheet import BLUE, VERMILION, Sheet, role_of
from figures.step import SIDE, Seen, pool_of, stage_of, trained, watched
from glocal.data.store import Store
from glocal.reporting.figures import QUIET

CELLS = SIDE // 16  # of the bottleneck's map, along an axis
NUMBER, ANCHOR = 2, 20  # the slice of the batch, the cell of its query view
QUERY, KEY, SIDE_OF_VIEW = 20, 340, 216  # where its views are, and how wide
TITLES = {
    "geometry": "correspondence=geometry: the cell that shows the same place attracts; × there is none",
    "similarity": "correspondence=similarity: the cell with the most similar features attracts; here after 60 steps",
}


def ideal(store: Store) -> Sheet:
    """Which cell of the key maps attracts a cell of the query map, and which repel, from the masks of a step."""
    sheet = Sheet(592)
    for row, (correspondence, title) in enumerate(TITLES.items()):
        options: dict[str, Any] = {"batch": 5, "seed": 4, "momentum": 0.9, "correspondence": correspondence}
        stage = trained(stage_of(pool_of(store), "ideal", **options), 60 * row)
        seen, y = watched(stage, "contrastive_loss_in_chunks"), 44 + row * 270
        sheet.text(title, 20, y - 28, 10, "left", weight="bold")
        sheet.text("query view", 128, y - 8, color=QUIET)
        sheet.text("key view", KEY + SIDE_OF_VIEW / 2, y - 8, color=QUIET)
        _views(sheet, seen, y, others=not row)
        if row:
            sheet.text("all other cells of all\nkey views repel, as above", 740, y + SIDE_OF_VIEW / 2, color=QUIET)
        else:
            sheet.text("key views of other slices", 740, y - 8, color=QUIET)
    words = {"anchor": "a cell of the query map", "positive": "attracts it", "negative": "repel it: all other cells"}
    sheet.legend(572, neither="", **words)
    return sheet


def _views(sheet: Sheet, seen: Seen, y: float, others: bool) -> None:
    """The query view and the key views, the cells by their role."""
    masks: Any = seen.calls["contrastive_loss_in_chunks"][0].given[1]
    positive, negative = (mask[0] for mask in masks(slice(NUMBER * CELLS**2, (NUMBER + 1) * CELLS**2)))
    queries, keys = seen.inputs[0][0][:, 0], seen.inputs[1][0][:, 0]
    sheet.image(queries[NUMBER], QUERY, y, SIDE_OF_VIEW)
    for cell in range(CELLS**2):
        sheet.frame("anchor" if cell == ANCHOR else "", *_cell(cell, QUERY, y, SIDE_OF_VIEW))
    spots = {NUMBER: (KEY, y, SIDE_OF_VIEW)}
    if others:
        beside = [some for some in range(len(keys)) if some != NUMBER]
        spots |= {some: (632 + k % 2 * 112, y + k // 2 * 112, 104) for k, some in enumerate(beside)}
    for some, (x, top, wide) in spots.items():
        sheet.image(keys[some], x, top, wide)
        _cells(sheet, [mask[ANCHOR].view(-1, CELLS**2)[some] for mask in (positive, negative)], x, top, wide)
    _lines(sheet, positive.view(CELLS**2, -1, CELLS**2)[:, NUMBER], y)


def _cell(number: int, x: float, y: float, side: float) -> tuple[float, float, float, float]:
    """Corner and sides of a cell of a map that is drawn at (x, y)."""
    wide = side / CELLS
    return x + number % CELLS * wide, y + number // CELLS * wide, wide, wide


def _cells(sheet: Sheet, masks: list[Tensor], x: float, y: float, side: float) -> None:
    """The cells of a key map by their role."""
    for number in range(CELLS**2):
        left, top, wide, high = _cell(number, x, y, side)
        if role_of(number, -1, *masks) == "positive":
            sheet.frame("positive", left, top, wide, high)
        elif role_of(number, -1, *masks) == "negative":
            inner = left + 2, top + 2, wide - 4, high - 4
            sheet.rectangle(*inner, edgecolor=VERMILION, linestyle=(0, (2.2, 1.3)), linewidth=0.9, zorder=3)


def _lines(sheet: Sheet, positive: Tensor, y: float) -> None:
    """From every cell of the query map to the one that attracts it."""
    half = SIDE_OF_VIEW / CELLS / 2
    for query, row in enumerate(positive):
        left, top, *_ = _cell(query, QUERY, y, SIDE_OF_VIEW)
        if not row.any():
            sheet.text("×", left + half, top + half, color="white")
            continue
        right, low, *_ = _cell(int(row.nonzero()), KEY, y, SIDE_OF_VIEW)
        look = {"linewidth": 2.4, "zorder": 6} if query == ANCHOR else {"linewidth": 0.7, "alpha": 0.75, "zorder": 5}
        ends = [(left + half, top + half), (right + half, low + half)]
        sheet.line(ends, BLUE, marker=".", markersize=4, **look)
