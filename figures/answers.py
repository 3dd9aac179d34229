"""Methods that predict an answer: swav (which prototypes?) and dino (what does the teacher say?)."""

from figures.sheet import GREEN, SKY, Sheet
from figures.step import SIDE, pool_of, stage_of, trained, watched
from glocal.data.store import Store
from glocal.reporting.figures import QUIET


def swav(store: Store) -> Sheet:
    """Assignments and predictions of some slices after some steps, as the loss is given them."""
    heads = {"hidden": 64, "outputs": 32, "prototypes": 12, "frozen": 5}
    stage = trained(stage_of(pool_of(store), "swav", batch=12, **heads), 60)
    seen = watched(stage, "cross_view_loss", step=60)
    scores, assigned, temperature = seen.calls["cross_view_loss"][0].given
    predicted, views = (scores / temperature).softmax(-1), seen.inputs[0][0][:, 0].view(2, -1, SIDE, SIDE)
    sheet, rows, size = Sheet(432), 4, (156, 66)
    columns = ((10, 92, 266), (820, 652, 478))  # of view, prediction and assignment
    tops = [float(some[:, :rows].max()) for some in (predicted, assigned)]
    for view, (picture, first, second) in enumerate(columns):
        for row in range(rows):
            y = 78 + row * 80
            sheet.image(views[view, row], picture, y, 70)
            sheet.bars(predicted[view, row], tops[0], first, y + 2, size, SKY)
            sheet.bars(assigned[view, row], tops[1], second, y + 2, size, GREEN)
        sheet.text(f"view {view + 1}", picture + 35, 62, weight="bold")
        sheet.text("predicted", first + 78, 62, color=QUIET)
        sheet.text("assigned: the target", second + 78, 62, color=QUIET)
        there = columns[1 - view][2] + (100 if view else 56)
        sheet.pull((first + 78, 50), (there, 50), connectionstyle=f"arc3,rad={0.22 if view else -0.22}")
    what = "One bar a prototype. Each slice of the batch is assigned to some, and all prototypes get the same in all."
    sheet.text(what, 450, 414, color=QUIET)
    return sheet


def dino(store: Store) -> Sheet:
    """Which view's prediction is compared with which answer of the teacher, after some steps."""
    heads = {"hidden": 64, "bottleneck": 32, "outputs": 24, "frozen": 5, "head_norm": True}
    stage = trained(stage_of(pool_of(store), "dino", batch=12, local_views=4, **heads), 60)
    seen = watched(stage, "cross_view_loss", step=60)
    scores, told, temperature = seen.calls["cross_view_loss"][0].given
    predicted, batch = (scores / temperature).softmax(-1), scores.shape[1]
    views = [picture for size in seen.inputs[0] for picture in size[::batch, 0]]
    sheet = Sheet(438)
    sheet.text("student", 170, 16, weight="bold")
    sheet.text("teacher, a slow copy", 745, 16, weight="bold")
    for target in range(2):
        y = 88 + target * 180
        sheet.image(views[target], 800, y, 92)
        sheet.bars(told[target, 0], float(told[:, 0].max()), 576, y + 10, (214, 72), GREEN)
        sheet.text(f"answer to view {target + 1}", 683, y + 96, color=QUIET)
    for view, picture in enumerate(views):
        y, side = 36 + view * 66, 58 if view < 2 else 40
        sheet.image(picture, 64 + (58 - side) / 2, y + (58 - side) / 2, side)
        sheet.text(f"view {view + 1}", 30, y + 29)
        sheet.bars(predicted[view, 0], float(predicted[:, 0].max()), 132, y + 4, (214, 50), SKY)
        for target in range(2):
            if target != view:
                sheet.pull((350, y + 29), (570, 88 + target * 180 + 28 + 8 * view), linewidth=1.3)
    return sheet
