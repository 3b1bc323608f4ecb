"""Recipes and cluster presets that come with Byteloom, found by name from any folder.

    byteloom/configs/debug.yaml              the recipe debug
    byteloom/configs/megabyte/text.yaml      the recipe megabyte/text
    byteloom/configs/cluster/gpu.yaml        the preset gpu

In a checkout, byteloom/configs is a link to the folder configs. A text is a path if it starts with `.`, `/` or `~`,
ends in .yaml or .yml, or names a file that exists. Any other text is a name.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

from byteloom.core.storage.locations import expand_home

CONFIGS = (Path(__file__).parents[1] / "configs").resolve()
"""Folder of the recipes that come with Byteloom."""
PRESETS = CONFIGS / "cluster"
"""Folder of the cluster presets."""
SUGGESTIONS = 3
"""Names that an error suggests, at most."""


class UnknownNameError(Exception):
    """No recipe or preset has the name; the message suggests others."""


def find_recipe(text: str) -> Path:
    """Return the file of a recipe that is given by its name or its path.

    A path is returned as it is, whether or not there is a file.

    Raises:
        UnknownNameError: no recipe has this name, or there is no such home folder.
    """
    names = recipe_names()
    path = Path(text)
    if not _is_path(text):
        if text in names:
            return names[text]
        if path.is_dir():
            own = path / "config.yaml"
            hint = f"; the recipe of that run is {own}" if own.is_file() else ""
            raise UnknownNameError(f"{text} is a folder, not a recipe{hint}")
        nearest = _nearest(text, names)
        hint = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
        raise UnknownNameError(
            f"no recipe is named {text}{hint}; `byteloom models` lists the names, and a path ends in .yaml"
        )
    # A recipe was once given by its path in a checkout: configs/megabyte/text.yaml.
    known = path.with_suffix("").as_posix().removeprefix("configs/")
    if known in names and not path.exists():
        raise UnknownNameError(f"there is no file {text}; the recipe that comes with Byteloom is named {known}")
    return _expanded(text)


def find_preset(text: str) -> Path:
    """Return the file of a cluster preset that is given by its name or its path.

    Raises:
        UnknownNameError: no preset has this name, or there is no such home folder.
    """
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if _is_path(text):
        return _expanded(text)
    if text not in presets:
        raise UnknownNameError(f"no such preset; choose one of {', '.join(presets)}, or a .yaml file")
    return presets[text]


def recipe_names() -> dict[str, Path]:
    """Return the file of each recipe that comes with Byteloom, by name."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in recipe_files(CONFIGS)}


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes in a folder, sorted by path; cluster presets are left out."""
    return [path for path in sorted(folder.rglob("*.yaml")) if path.parent.name != "cluster"]


def is_shipped(path: Path) -> bool:
    """Return whether a file comes with Byteloom."""
    return path.resolve().is_relative_to(CONFIGS)


def name_of(recipe: Path) -> str:
    """Return the name of a recipe that comes with Byteloom, or the absolute path of any other."""
    path = recipe.resolve()
    return path.relative_to(CONFIGS).with_suffix("").as_posix() if is_shipped(path) else str(path)


def _is_path(text: str) -> bool:
    path = Path(text)
    return text.startswith((".", "/", "~")) or path.suffix in (".yaml", ".yml") or path.is_file()


def _expanded(text: str) -> Path:
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise UnknownNameError(f"{text}: {error}") from error


def _nearest(text: str, names: Mapping[str, Path]) -> list[str]:
    """Return suggestions: a file whose .yaml is missing in the text, or names with a similar spelling."""
    if Path(f"{text}.yaml").is_file():
        return [f"{text}.yaml"]
    ends = {name: name.rpartition("/")[2] for name in names}
    similar = difflib.get_close_matches(text.rpartition("/")[2], set(ends.values()), 1)
    return (
        difflib.get_close_matches(text, names, SUGGESTIONS, cutoff=0.75)
        or [name for name in names if ends[name] in similar][:SUGGESTIONS]
    )
