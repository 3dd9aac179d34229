"""`glocal methods`: what there is."""

import typer


def methods() -> None:
    """List pre-training methods, fine-tuning strategies and networks, each with its paper."""
    from glocal.experiments.methods import methods as registered

    for kind, entries in registered().items():
        typer.secho(kind, bold=True)
        for name, (summary, paper) in entries.items():
            typer.echo(f"  {name:21}{summary}\n{'':23}{paper}")
