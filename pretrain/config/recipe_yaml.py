"""Reader and writer of the YAML of recipes, with the plain values of YAML 1.2."""

import re
from typing import Any

import yaml

MOST_DIGITS = 300
"""Most digits of a whole number. A float holds no more, and Python refuses to read more than 4,300."""


class RecipeLoader(yaml.SafeLoader):
    """Reader of YAML 1.2's plain values: 3e-4 is a number, 010 is ten; on, off, yes, no and dates are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 a table of the class, as in the base class

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number, or raise an error for one of too many digits."""
        text = self.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
        return int(text)


class RecipeDumper(yaml.SafeDumper):
    """Writer of YAML that `RecipeLoader` reads back: text that looks like a number is quoted."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 a table of the class, as in the base class


RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    for _class in (RecipeLoader, RecipeDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def as_yaml(tree: dict[str, Any]) -> str:
    """Return a tree of plain values as a recipe."""
    return yaml.dump(tree, Dumper=RecipeDumper, sort_keys=False)


def as_flow(value: Any) -> str:
    """Return a value as it is written in one line of a recipe."""
    written = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, sort_keys=False, width=2**31)
    return str(written).partition("\n")[0]


def as_scalar(value: str) -> str:
    """Return a text as it is written in a recipe: in quotes where YAML would read it as another type."""
    return yaml.dump(value, Dumper=RecipeDumper).splitlines()[0]
