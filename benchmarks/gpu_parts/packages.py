"""Stand-ins for packages that modules of Byteloom import and that the benchmark can do without."""

import hashlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Blake3:
    """BLAKE2 of the standard library under the interface of blake3: another digest, at less speed."""

    AUTO = -1

    def __init__(self, content: Any = b"", **_: Any) -> None:
        self._digest = hashlib.blake2b(content, digest_size=32)

    def update(self, content: Any) -> "_Blake3":
        self._digest.update(content)
        return self

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def digest(self) -> bytes:
        return self._digest.digest()


class StandIn(ModuleType):
    """Module in place of a missing package. Its names exist and cannot be used, except for those that are set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> Any:
            raise ModuleNotFoundError(f"{self.__name__} is not installed")

        return type(name, (Exception,), {"__new__": refuse})


def is_installed(name: str) -> bool:
    """Return whether a package is installed."""
    if isinstance(sys.modules.get(name), StandIn):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def stand_in_for_missing_packages() -> None:
    """Make the modules that the parts use importable where only torch, numpy, pydantic and pyyaml are installed."""
    for name in ("zstandard", "tenacity", "blake3"):  # corpora, retries after a fault, digests of checkpoints
        if not is_installed(name):
            sys.modules[name] = StandIn(name)
            if name == "blake3":
                sys.modules[name].blake3 = _Blake3  # type: ignore[attr-defined]
