"""`glocal pretrain`: one pre-training."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def pretrain(
    store: Annotated[Path, typer.Argument(help="What `glocal preprocess` made.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; a begun one is continued.")],
    method: Annotated[str, typer.Option(help="See `glocal methods`.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings, for example max_iterations=2000 seed=1 device=cpu."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="For a method that uses labels: a number of volumes, `all`, or cases by name: CASE,CASE."),
    ] = None,
) -> None:
    """Pre-train a network on the images of a store, most methods without any label."""
    from glocal.experiments.steps import pretrain_with

    model = pretrain_with(store, run, method, words or [], labels)
    further = f"glocal finetune {quote(str(store))} RUN --from {quote(str(run))} --labels {labels or 2}"
    typer.echo(f"Weights: {model}. Next: {further}")
