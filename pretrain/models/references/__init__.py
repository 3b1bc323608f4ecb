"""Forward passes of the families in plain torch, which exports carry as model.py.

A reference needs torch and safetensors alone. Byteloom's own references share `layers`, which exports carry beside it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parent
HERE = f"from {__name__}.layers import"
"""Beginning of the statement with which a reference imports from `layers`."""
PROGRAM = 'if __name__ == "__main__":'
"""Beginning of the part of a reference that runs as a program."""


def files_of(reference: Path, *, in_package: bool = False) -> dict[str, str]:
    """Return the files of an export's reference: their text by their name.

    Args:
        reference: Python file that imports nothing of Byteloom but `layers`.
        in_package: whether the files are modules of one package, which import each other relatively. They are then no
            program.
    """
    source = reference.read_text(encoding="utf-8")
    if in_package:
        source = source.partition(PROGRAM)[0].rstrip() + "\n"
    if HERE not in source:
        return {"model.py": source}
    layers = (FOLDER / "layers.py").read_text(encoding="utf-8")
    return {
        "model.py": source.replace(HERE, "from .layers import" if in_package else "from layers import"),
        "layers.py": layers,
    }


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
