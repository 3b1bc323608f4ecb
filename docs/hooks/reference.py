"""MkDocs hook: render the reference pages from the code, at each build of the site.

Config (pydantic) ─▶ reference/config.md      fields, types, defaults, bounds, docstrings
typer app         ─▶ reference/commands.md    commands, arguments, options
configs/*.yaml    ─▶ reference/recipes.md     names, tasks, and the debug recipe in full
catalogue         ─▶ reference/catalogue.md   Transformers of papers, with their lineage
notebook.ipynb    ─▶ reference/notebook.md    cells, outputs and pictures
"""

import json
import types
import typing
from collections.abc import Iterator
from inspect import cleandoc, getdoc
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from byteloom.core.configs import find_preset, recipe_names
from byteloom.core.registries.names import RegisteredName
from byteloom.core.registries.nodes import RegisteredNodes
from pretrain.catalogue import read_catalogue
from pretrain.cli.app import app
from pretrain.cli.lazy import LazyCommand
from pretrain.config.loading import load
from pretrain.config.schema import Config

BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the rendered pages to the pages of the site."""
    pages = {
        "config": config_page(),
        "commands": commands_page(),
        "recipes": recipes_page(),
        "catalogue": catalogue_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    notebook, resources = MarkdownExporter().from_filename(Path(config.docs_dir) / "guides/use/notebook.ipynb")
    for name, content in {"notebook.md": notebook, **resources["outputs"]}.items():
        files.append(File.generated(config, f"reference/{name}", content=content))
    return files


def config_page() -> str:
    """Return the page of all sections and fields of a recipe."""
    parts = [
        "# Config fields",
        "A recipe is a YAML file with these sections. On the command line, a field is `section.field=value`. "
        "`byteloom config explain FIELD` prints the same text.",
        *_sections(Config, ()),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(node: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    """Yield a heading, a docstring and a table for each config node below a node."""
    for name, field in node.model_fields.items():
        inner = (*path, name)
        heading = f"{'#' * min(len(inner) + 1, 4)} `{'.'.join(inner)}`"
        nodes = _nodes(field.annotation)
        for section in nodes:
            yield heading + (_kind_of(section) if len(nodes) > 1 else "")
            yield from _section(section, inner)
        if not path and not nodes:
            yield heading
            yield field.description or ""
        for each in field.metadata:
            if isinstance(each, RegisteredNodes):
                for entry, section in each.nodes().items():
                    yield f"{'#' * min(len(inner) + 2, 4)} `{'.'.join((*inner, entry))}`"
                    yield from _section(section, (*inner, entry))


def _section(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of a config node, without its heading."""
    yield cleandoc(section.__doc__ or "")
    if any(not _is_section(each) for each in section.model_fields.values()):
        yield _table(section)
    yield from _sections(section, path)


def _is_section(field: FieldInfo) -> bool:
    """Return whether a field is a config node of its own, which has its own heading."""
    annotation = field.annotation
    return bool(_nodes(annotation)) and typing.get_origin(annotation) not in (dict, tuple, list)


def _table(node: type[BaseModel]) -> str:
    """Return the table of the plain fields of a config node."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in node.model_fields.items():
        if not _is_section(field):
            lines.append(f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |")
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, attribute):,}"
        for limit in field.metadata
        for attribute, sign in BOUNDS
        if getattr(limit, attribute, None) is not None
    ]
    names = next((entry.names() for entry in field.metadata if isinstance(entry, RegisteredName)), None)
    return _cell(", ".join([" \\| ".join(names) if names else _type_name(field.annotation), *limits]))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value.model_dump_json()}`" if isinstance(value, BaseModel) else f"`{json.dumps(value, default=str)}`"


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " \\| ".join(map(_type_name, arguments))
    if origin is dict:
        return f"mapping of {_type_name(arguments[1])}"
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    names = {
        BaseModel: "section",
        types.NoneType: "null",
        str: "text",
        int: "integer",
        float: "number",
        bool: "true \\| false",
        Any: "any",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _kind_of(section: type[BaseModel]) -> str:
    """Return the end of the heading of a section that is one of several: its family or its name."""
    field = "family" if "family" in section.model_fields else "name"
    return f" of the {field} `{section.model_fields[field].default}`"


def _nodes(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes within an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is BaseModel else [annotation]
    found = [node for argument in typing.get_args(annotation) for node in _nodes(argument)]
    return list(dict.fromkeys(found))


def catalogue_page() -> str:
    """Return the page of the catalogue of Transformers, with a picture of its lineage."""
    entries = read_catalogue().values()
    rows = [
        f"| [{entry.name}]({entry.source}) | {entry.date} | {entry.lab} | {entry.architecture} | {entry.task} "
        f"| {', '.join(entry.extends)} | {_cell(entry.extension)} | {entry.sizes} "
        f"| {', '.join(f'`{recipe}`' for recipe in entry.recipes)} |"
        for entry in entries
    ]
    columns = ["model", "date", "lab", "architecture", "task", "extends", "what it adds", "parameters", "recipes"]
    parts = [
        "# Catalogue of Transformers",
        "The Transformers of Amatriain et al. 2023 (arXiv:2302.07730), and others that Byteloom trains. Models with "
        "recipes train here on bytes; the others are data only. `byteloom models --by family` lists the catalogue, "
        "`byteloom models --lineage` draws its tree, and `byteloom models about GPT-3` shows an entry with its "
        "results.",
        "![Lineage of the models: each below the first one that it extends](../assets/lineage.svg)",
        "\n".join([f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Return the page of all commands with their arguments and options."""
    parts = [
        "# Commands",
        "`byteloom COMMAND --help` prints the same text. Shell completion: `byteloom --install-completion`.",
        *_commands(typer.main.get_command(app), "byteloom"),
    ]
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, listed in group.commands.items():
        command = listed.load() if isinstance(listed, LazyCommand) else listed
        path = f"{prefix} {name}"
        yield f"## `{path}`"
        yield cleandoc(command.help or getdoc(command) or "")
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        if shown:
            lines = ["| parameter | meaning | default |", "| --- | --- | --- |"]
            yield "\n".join([*lines, *map(_parameter, shown)])
        if hasattr(command, "commands"):
            yield from _commands(command, path)


def _parameter(parameter: Any) -> str:
    """Return the row of an argument or an option."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    default = "required" if parameter.required else ""
    if parameter.default not in (None, False, ()) and parameter.show_default:
        default = f"`{getattr(parameter.default, 'value', parameter.default)}`"
    title = " ".join(f"`{name}`" for name in names)
    return f"| {title} | {_cell(parameter.help or '')} | {default} |"


def recipes_page() -> str:
    """Return the page of the recipes that come with Byteloom."""
    recipes = recipe_names()
    lines = ["| recipe | family | sequence length |", "| --- | --- | --- |"]
    for name in recipes:
        model = load(name).model
        lines.append(f"| `{name}` | {model.family} | {model.sequence_length:,} |")
    parts = [
        "# Recipes",
        "A command takes a recipe by its name, from any folder: `byteloom train debug`. `byteloom models` lists the "
        "same recipes with sizes and the figures of the papers.",
        "\n".join(lines),
        "## The recipe `debug`",
        "This recipe names every field and explains it.",
        _yaml(recipes["debug"]),
        "## The cluster preset `gpu`",
        "[Run on a Slurm cluster](../guides/operation/cluster.md#write-a-preset-for-your-cluster) explains the fields.",
        _yaml(find_preset("gpu")),
    ]
    return "\n\n".join(parts) + "\n"


def _yaml(path: Path) -> str:
    return f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"


def _cell(text: str) -> str:
    """Return text as one line of a table cell."""
    return " ".join(text.split()).replace("\\|", "|").replace("|", "\\|").replace("<", "&lt;")
