"""Loading of the compiled shim. It must precede `import torch`."""

import ctypes
import importlib.util
from pathlib import Path


def load(shim: Path) -> None:
    """Load the shim, and the libraries of torch whose symbols it needs."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for library in (folder / "libc10.so", folder / "libtorch_cpu.so", shim):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
