"""`glocal report`: a run as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="A finished run: of `run`, `pretrain` or `finetune`.")]) -> None:
    """Write report.html: curves, tables, pictures and settings of a run in one file."""
    from glocal.experiments.report import report as write

    typer.echo(f"Report: {write(run)}")
