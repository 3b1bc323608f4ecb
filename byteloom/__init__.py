"""The public API of Byteloom.

    import byteloom

    byteloom.prepare(["books/"], Path("corpora/books"), byteloom.PrepareOptions(holdout=0.01))
    with byteloom.open_corpus("corpora/books/train") as corpus:
        print(corpus.raw_bytes)

Names are imported when they are first used, so `import byteloom` takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.preparation.prepare import PrepareOptions, prepare

    __version__: str
    open_corpus = Corpus

__all__ = ["PrepareOptions", "__version__", "open_corpus", "prepare"]

_SOURCES = {
    "PrepareOptions": ("data_pipeline.preparation.prepare", "PrepareOptions"),
    "open_corpus": ("data_pipeline.corpus.corpus", "Corpus"),
    "prepare": ("data_pipeline.preparation.prepare", "prepare"),
}
"""Public names: the module that defines each, and its name there."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - few ask for it

        value: Any = version("byteloom")
    elif name in _SOURCES:
        module, attribute = _SOURCES[name]
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'byteloom' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
