"""`glocal phantom`: a synthetic dataset to try everything on."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def phantom(
    dataset: Annotated[Path, typer.Argument(help="Folder to write the dataset to; it must not exist yet.")],
    subjects: Annotated[int, typer.Option(help="How many people to draw, at least 3.")] = 40,
    labelled: Annotated[
        int | None,
        typer.Option(help="How many people of the training pool have label maps; all if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same people.")] = 0,
) -> None:
    """Write a synthetic short-axis cardiac MR dataset: no patients, no download, every command can be tried on it."""
    from glocal.data.phantom import phantom as write

    write(dataset, subjects, labelled, seed)
    typer.echo(f"Wrote {subjects} subjects to {dataset}. Next: glocal check {quote(str(dataset))}")
