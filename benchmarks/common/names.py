"""Options of the benchmarks that name models or corpora."""

import argparse
from collections.abc import Collection


def names(text: str) -> list[str]:
    """Return names between semicolons, each once."""
    if found := list(dict.fromkeys(name.strip() for name in text.split(";") if name.strip())):
        return found
    raise argparse.ArgumentTypeError("no name is given")


def known_names(parser: argparse.ArgumentParser, option: str, chosen: list[str], known: Collection[str]) -> list[str]:
    """Return the chosen names; end the process with an error that lists the known names if one is unknown."""
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--{option}: {'; '.join(unknown)} is not known; choose from: {'; '.join(known)}")
    return chosen
