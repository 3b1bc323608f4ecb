"""Forward passes of the families in plain torch, which exports carry as model.py.

A reference needs torch and safetensors alone. Byteloom's own references share `layers`, `patches`, `mamba2` and
`encoding`, which exports carry beside it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parent
SHARED = ("encoding", "mamba2", "patches", "layers")
"""Modules that references share. Each imports only later ones."""
PROGRAM = 'if __name__ == "__main__":'
"""Beginning of the part of a reference that runs as a program."""


def files_of(reference: Path, *, in_package: bool = False) -> dict[str, str]:
    """Return the files of an export's reference: their text by their name.

    Args:
        reference: Python file that imports nothing of Byteloom but `SHARED`.
        in_package: whether the files are modules of one package, which import each other relatively. They are then no
            program.
    """
    source = reference.read_text(encoding="utf-8")
    files = {"model.py": source.partition(PROGRAM)[0].rstrip() + "\n" if in_package else source}
    for name in SHARED:
        here, there = f"from {__name__}.{name} import", f"from {'.' if in_package else ''}{name} import"
        if any(here in source for source in files.values()):
            files[f"{name}.py"] = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
            files = {file: source.replace(here, there) for file, source in files.items()}
    return files


def load_reference(reference: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Return the model of a reference.

    Args:
        reference: Python file with a class `Model`.
        config: section `model` of a recipe, with all defaults.
        weights: parameters by name.
    """
    spec = importlib.util.spec_from_file_location(f"byteloom_reference_{reference.stem}", reference)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(config, weights)
