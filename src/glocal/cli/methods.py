"""`glocal methods`: what there is."""

import typer


def methods() -> None:
    """List pre-training methods, fine-tuning strategies and networks, each with its paper."""
    from glocal.finetuning.registry import STRATEGIES
    from glocal.networks.registry import NETWORKS
    from glocal.pretraining.registry import METHODS

    for title, entries in (
        ("Pre-training methods", METHODS),
        ("Fine-tuning strategies", STRATEGIES),
        ("Networks", NETWORKS),
    ):
        typer.secho(title, bold=True)
        for name, entry in entries.items():
            typer.echo(f"  {name:12}{entry.summary}\n{'':14}{entry.paper}")
