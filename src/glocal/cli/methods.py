"""`glocal methods`: what there is."""

import typer


def methods() -> None:
    """List pre-training methods, fine-tuning strategies and networks, each with its paper."""
    from glocal.experiments.methods import methods as registered

    known = registered()
    width = 2 + max(len(name) for entries in known.values() for name in entries)
    for kind, entries in known.items():
        typer.secho(kind, bold=True)
        for name, (summary, paper) in entries.items():
            typer.echo(f"  {name:{width}}{summary}\n{'':{width + 2}}{paper}")
