"""`glocal recipes`: what there is."""

from pathlib import Path
from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe as text, to copy and edit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Fill in what the recipe derives from this dataset.")] = None,
) -> None:
    """List the recipes, or show one."""
    import yaml

    from glocal.errors import GlocalError
    from glocal.experiments.recipe import read_recipe, recipe_names, recipe_text

    if name is None and data is not None:
        raise GlocalError(
            "--data fills in what one recipe derives: name the recipe, too, such as `glocal recipes auto`."
        )
    if name is None:
        width = max(map(len, recipe_names()))
        for found in recipe_names():
            typer.echo(f"{found:{width}}  {read_recipe(found).get('summary', '')}")
    elif data is None:
        typer.echo(recipe_text(name), nl=False)
    else:
        from glocal.experiments.derive import derived

        settings = derived({**read_recipe(name), "data": str(data)})
        typer.echo(yaml.safe_dump(settings, sort_keys=False), nl=False)
