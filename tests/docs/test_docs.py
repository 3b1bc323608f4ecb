"""Checks of the documentation: its commands run or parse, its links have targets, and its names exist."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from pretrain.cli.app import app
from pretrain.cli.lazy import LazyCommand
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.experiments.grid import grid, with_family
from pretrain.experiments.words import read_words
from tests import commands
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, prose

COMMANDS: Any = typer.main.get_command(app)
WITH_OVERRIDES = {"train", "submit", "config check", "config show"}
OF_SEVERAL_RECIPES = {"sweep", "compare"}
MADE_BY_A_READER = ("runs/", "mine.yaml", "my.yaml")
"""Prefixes of runs and recipes that only a reader makes."""
GENERATED = {"commands.md", "config.md", "notebook.md", "recipes.md", "catalogue.md"}
"""Pages of docs/reference that the site build generates."""


def byteloom_commands() -> Iterator[tuple[Block, list[str]]]:
    """Yield the arguments of every byteloom command that a page shows."""
    for page in PAGES:
        for block in blocks(page):
            for line in block.commands():
                for part in re.split(r"\s(?:&&|\|\|?|>)\s", line):
                    words = shlex.split(re.sub(r"\$[A-Z]+", "0", part), comments=True)
                    if "byteloom" in words:
                        yield block, words[words.index("byteloom") + 1 :]


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return a command's name and its parameters, without running it."""
    command, words, names = COMMANDS, list(arguments), ["byteloom"]
    while words and words[0] in getattr(command, "commands", ()):
        names.append(words.pop(0))
        command = command.commands[names[-1]]
        command = command.load() if isinstance(command, LazyCommand) else command
    with command.make_context(names[-1], words) as context:
        return " ".join(names[1:]), context.params


SHOWN = [(block, words) for block, words in byteloom_commands() if words and not words[0].startswith("--")]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "words"), SHOWN, ids=[f"{block} {' '.join(words[:2])}" for block, words in SHOWN])
def test_every_shown_command_has_existing_options_recipes_and_fields(block: Block, words: list[str]):
    name, params = parsed(words)
    if name in OF_SEVERAL_RECIPES:
        check_recipes_and_grid(params["words"])
        return
    if name not in WITH_OVERRIDES or params["recipe"].startswith(MADE_BY_A_READER):
        return
    if block.page.name == "extending.md":  # fields of the page's package, which test_extending.py installs and runs
        return
    load(params["recipe"], params["overrides"] or [])


def check_recipes_and_grid(words: Sequence[str]) -> None:
    """Load each recipe with each point of its grid."""
    if any(word.startswith(MADE_BY_A_READER) for word in words):
        return
    for entry in read_words(words).entries:
        for point in grid(entry.overrides).values():
            load(entry.recipe, with_family(entry.recipe, point))


RUNNABLE = [page for page in PAGES if any(block.reason is None for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (command for block in blocks(page) if block.reason is None for command in block.commands()):
        name, _, rest = command.partition(" ")
        assert name == "byteloom", f"mark the block of {command!r} as not run, or run it here"
        expand = ["bash", "-c", f"printf '%s\\0' {rest}"]
        words = subprocess.check_output(expand, env={**os.environ, "PATH": path}, text=True).split("\0")[:-1]
        done = commands.run(words, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stderr.decode(errors='replace')}"


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield path and anchor of each link of a page to this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_an_existing_page_and_heading(page: Path):
    broken = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if target.name in GENERATED and target.parent.name == "reference":
            continue  # the site build checks these
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert not broken


def definition(module: ast.AST | None, name: str) -> ast.AST | None:
    """Return the definition of a dotted name in a module: a class, a function or a variable."""
    for part in name.split("."):
        module = next((node for node in ast.iter_child_nodes(module) if part in names_of(node)), None)
        if module is None:
            return None
    return module


def names_of(node: ast.AST) -> set[str]:
    """Return the names that a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", "")} | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.slow
def test_every_file_and_code_name_in_the_docs_exists():
    missing = []
    for page in PAGES:
        if "lab" in page.parts or page.name == "CHANGELOG.md":  # history
            continue
        text = prose(page)
        for path, name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)(?:::([\w.]+))?`", text):
            if not path.startswith(("byteloom/", "data_pipeline/", "launchers/", "pretrain/", "tests/", "benchmarks/")):
                continue
            exists = (ROOT / path).exists()
            if exists and name:
                exists = definition(ast.parse((ROOT / path).read_text(encoding="utf-8")), name) is not None
            if not exists:
                missing.append(f"{page.name}: {path}{'::' if name else ''}{name}")
    assert not missing


def test_every_test_named_in_the_docs_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+?)_?…?`", prose(page))}
    missing = [name for name in named if f"def {name}" not in sources]
    assert sorted(missing) == ["test_batch_is_the_same_for_every_world_size"]  # an example of a name


def test_every_config_field_named_in_the_docs_exists():
    sections = "|".join(Config.model_fields)
    field = re.compile(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)(?:=[^`]*|: [^`]*)?`")
    schema = Config.model_json_schema()
    named = {name for page in PAGES if page.name != "CHANGELOG.md" for name in field.findall(prose(page))}
    suffixes = (".html", ".json", ".jsonl", ".log", ".pt", ".py", ".safetensors", ".yaml")
    files = {name for name in named if name.endswith(suffixes)}
    assert sorted(name for name in named - files if not is_field(schema, name.split("."), schema["$defs"])) == []


def is_field(node: Any, path: Sequence[str], definitions: dict[str, Any]) -> bool:
    """Return whether a JSON schema has a property at a path, in any of its alternatives."""
    if not path:
        return True
    node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    alternatives = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
    inner = node.get("properties", {}).get(path[0])
    return (inner is not None and is_field(inner, path[1:], definitions)) or any(
        is_field(alternative, path, definitions) for alternative in alternatives
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site strictly, so that a warning is an error, and return its folder."""
    if find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material and mkdocstrings are not installed: make setup")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out],
        cwd=ROOT,
        env={**commands.environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return out


@pytest.mark.slow
def test_no_page_of_the_site_loads_from_another_host(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*stylesheet[^>]*//"
    )
    assert not [page.name for page in pages if loading.search(page.read_text(encoding="utf-8"))]


def test_reference_pages_list_every_section_command_and_recipe(site: Path):
    reference = site / "reference"
    config, commands, recipes = (
        (reference / f"{name}.html").read_text(encoding="utf-8") for name in ("config", "commands", "recipes")
    )
    assert all(f"<code>{section}</code>" in config for section in Config.model_fields)
    assert all(f"<code>byteloom {name}</code>" in commands for name in COMMANDS.commands)
    assert "megabyte/text" in recipes
    assert (site / "search/search_index.json").stat().st_size > 100_000
