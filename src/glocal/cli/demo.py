"""`glocal demo`: the whole road on the embedded phantom."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, the run and report.html.")] = Path("demo"),
) -> None:
    """Phantom, pre-training, fine-tuning, prediction, evaluation, report: a few minutes on two cores."""
    from glocal.experiments.demo import demo as show

    report = show(out)
    typer.echo((report.parent / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"Open {report} in a browser.")
