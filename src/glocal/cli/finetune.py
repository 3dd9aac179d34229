"""`glocal finetune`: one fine-tuning."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def finetune(
    store: Annotated[Path, typer.Argument(help="What `glocal preprocess` made.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; a begun one is continued.")],
    labels: Annotated[str, typer.Option(help="Labelled volumes: a number, `all`, or cases by name: CASE,CASE.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings, for example max_iterations=1000 draw=1 validation=2."),
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option("--from", help="A pre-training run or model file; default: random weights.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="How to learn from few labels, see `glocal methods`; default: supervised.")
    ] = None,
) -> None:
    """Fine-tune on a few labelled volumes; test cases, where there are any, are predicted and measured."""
    from glocal.distributed import rank
    from glocal.experiments.steps import finetune_with
    from glocal.runs import manifest_of

    model = finetune_with(store, run, labels, pretrained, words or [], strategy)
    if rank() > 0:  # the first process speaks for all, and may still be measuring
        return
    if (run / "transfer.json").exists():
        from glocal.files import read_json
        from glocal.model import Transfer

        typer.echo(Transfer(**read_json(run / "transfer.json")).sentence())
    for measured, cases in manifest_of(run)["evaluated"].items():
        from glocal.finetuning.measure import evaluation_of, subjects_of, with_tta

        if cases:
            from rich.console import Console

            from glocal.cli.evaluate import class_table

            frame = evaluation_of(run, measured)
            typer.echo(f"Measured on {subjects_of(measured)} subjects{with_tta(measured)}:")
            Console().print(class_table(frame[frame["checkpoint"] == "last"]))
        elif subjects_of(measured) == "test":
            typer.echo("No labelled volume was kept for testing: the model has no Dice of unseen cases.")
        else:
            typer.echo("No labelled volume was kept for development: there is nothing to choose by.")
    folder = quote(str(run))
    typer.echo(f"Model: {model}. Next: glocal predict {folder} IMAGES OUT, or glocal report {folder}")
