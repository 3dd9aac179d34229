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
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of other masks of the same cases, such as another tool's: which are better?"),
    ] = None,
) -> None:
    """Compare predictions with label maps: Dice, IoU, surface distances and Surface Dice per case and class."""
    from rich.console import Console

    from glocal.evaluation import evaluate as evaluation
    from glocal.evaluation.compare import compare, subjects_beside
    from glocal.evaluation.evaluate import NO_PREDICTION
    from glocal.files import replacing

    target = out or predictions / "evaluation.csv"
    frame = evaluation.evaluate(predictions, labels, target, spacing_known=not spacing_unknown, tolerance=tolerance)
    console = Console()
    console.print(class_table(frame, tolerance))
    console.print(_case_table(frame))
    console.print(f"All {len(frame)} rows: {target}", markup=False, highlight=False, soft_wrap=True)
    if against is not None:
        other = evaluation.evaluate(against, labels, None, spacing_known=not spacing_unknown, tolerance=tolerance)
        found, target = compare(frame, other, subjects_beside(labels)), target.with_name(f"{target.stem}-against.csv")
        with replacing(target) as temporary:
            found.to_csv(temporary, index=False)
        for folder, rows in ((predictions, frame), (against, other)):
            if missing := rows[rows["note"] == NO_PREDICTION]["case"].nunique():
                cases = f"{missing} of {rows['case'].nunique()} cases"
                typer.secho(f"Warning: {folder} has no mask of {cases}, which count as wholly wrong.", fg="yellow")
        for metric in ("dice", "hd95"):
            if metric in set(found["metric"]):
                console.print(comparison_table(found[found["metric"] == metric], predictions, against))
        console.print(f"All metrics: {target}", markup=False, highlight=False, soft_wrap=True)


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


def comparison_table(rows: "pd.DataFrame", first: Path, second: Path) -> "Table":
    """The table of one metric that people see, from the rows of a comparison."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    name, digits = {"dice": ("Dice", 3), "hd95": ("HD95 in mm", 1)}[str(rows["metric"].iloc[0])]
    table = Table(
        title=f"{name}: {escape(str(first))} (first) against {escape(str(second))}",
        caption=f"Δ: first minus second, paired by subject ({rows['subjects'].max()}), with its 95 % bootstrap "
        "interval. Better: for how many subjects the first is, and the second. p: Wilcoxon's signed-rank test, "
        "adjusted for all rows (Holm). Interval and p speak of other subjects, given these masks.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("Class", min_width=10)
    for heading in ("First", "Second", "Δ", "95 %", "Better", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        p = row["p_holm"]
        cells = [f"{row[key]:.{digits}f}" for key in ("first", "second")]
        cells += [f"{row['difference']:+.{digits}f}", f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"]
        cells += [f"{row['better']} : {row['worse']}", "" if p != p else f"{p:.3f}" if p >= 0.001 else "< 0.001"]
        table.add_row(escape(str(row["class"])), *cells)
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
