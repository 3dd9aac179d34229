"""`glocal evaluate`: predictions against label maps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_SHOWN = 10


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label maps.")],
    labels: Annotated[Path, typer.Argument(help="Folder of label maps, or a dataset with dataset.json and labelsTr.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the table (CSV); default: evaluation.csv beside the predictions."),
    ] = None,
    spacing_unknown: Annotated[
        bool, typer.Option("--spacing-unknown", help="The voxel size is a placeholder: leave out all that is in mm.")
    ] = False,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Tolerance of the Surface Dice in mm.")] = 1.0,
) -> None:
    """Compare predictions with label maps: Dice, IoU, surface distances and Surface Dice per case and class."""
    from rich.console import Console

    from glocal.evaluation import evaluate as evaluation

    target = out or predictions / "evaluation.csv"
    frame = evaluation.evaluate(predictions, labels, target, spacing_known=not spacing_unknown, tolerance=tolerance)
    console = Console()
    console.print(class_table(frame, tolerance))
    console.print(_case_table(frame))
    console.print(f"All {len(frame)} rows: {target}", markup=False, highlight=False, soft_wrap=True)


def class_table(frame: "pd.DataFrame", tolerance: float = 1.0) -> "Table":
    """The table by class that people see, from the rows of an evaluation."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from glocal.evaluation.evaluate import FOREGROUND, note_counts, pooled_dice, summary
    from glocal.evaluation.metrics import EMPTY_POLICY

    columns = {
        "dice": ("Dice", 3),
        "hd95": ("HD95\nmm", 1),
        "assd": ("ASSD\nmm", 1),
        "nsd": (f"NSD\n{tolerance:g} mm", 3),
    }
    statistics = summary(frame).set_index(["class", "metric"])
    shown = [metric for metric in columns if metric in statistics.index.get_level_values("metric")]
    counts, pooled = note_counts(frame).sum(), pooled_dice(frame)[FOREGROUND]
    table = Table(
        title=f"{frame['case'].nunique()} cases: mean ± standard deviation",
        caption=f"{', '.join(f'{count} {note}' for note, count in counts.items())}. {EMPTY_POLICY} "
        f"All cases pooled as one: Dice {pooled:.3f}.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # 80 columns are few
    )
    table.add_column("Class", min_width=10)  # a name may be broken, but not give way to numbers
    for heading in ("Lowest\nDice", *(columns[metric][0] for metric in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in statistics.index.get_level_values("class").unique():
        rows = statistics.loc[name]
        cells = [f"{rows.at['dice', 'min']:.3f}"]
        for metric in shown:
            mean, sd, digits = rows.at[metric, "mean"], rows.at[metric, "sd"], columns[metric][1]
            cells.append(
                f"{mean:.{digits}f}" + ("" if sd != sd else f" ± {sd:.{digits}f}")
            )  # one case has no deviation
        table.add_row(escape(name), *cells)
    return table


def _case_table(frame: "pd.DataFrame") -> "Table":
    """The cases that need a look first: those with the lowest mean Dice."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    worst = frame.groupby("case")["dice"].mean().sort_values().head(_SHOWN)
    table = Table(
        title=f"The {len(worst)} lowest of {frame['case'].nunique()} cases: Dice", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("Case")
    for heading in (*frame["class"].unique(), "Mean"):
        table.add_column(escape(heading), justify="right")
    table.add_column("Note")
    for case, mean in worst.items():
        rows = frame[frame["case"] == case]
        lost = rows[rows["dice"] == 0].query("note != ''").groupby("note")["class"]
        notes = "; ".join(f"{note}: {', '.join(names)}" for note, names in lost)
        table.add_row(escape(str(case)), *(f"{value:.3f}" for value in rows["dice"]), f"{mean:.3f}", escape(notes))
    return table
