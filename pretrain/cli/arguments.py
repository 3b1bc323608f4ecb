"""Arguments that several commands have."""

from typing import Annotated

import typer

from byteloom.core.configs import recipe_names
from pretrain.cli import argument_types as types


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipe names that begin with a text; a shell completes paths itself where there is none."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="Recipe: a name that `byteloom models` lists, such as debug or megabyte/text, or a .yaml file.",
        show_default=False,
        autocompletion=complete_recipe,
        parser=types.location,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Overrides of fields, such as train.steps=50 model.patch_size=4.",
        show_default=False,
    ),
]
