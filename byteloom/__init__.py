"""The public API of Byteloom.

    import byteloom

    byteloom.prepare(["books/"], Path("corpora/books"), byteloom.PrepareOptions(holdout=0.01))
    byteloom.train("debug", data={"shards": "corpora/books/train"}, run={"name": "first"})

    model = byteloom.load("runs/first")
    model.bits_per_byte("corpora/books/validation")
    model.bits(b"bits of each byte")
    for byte in model.generate(b"Once upon", bytes=400, temperature=0.8):
        print(byte)

Names are imported when they are first used, so `import byteloom` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byteloom.core.errors import CorrectableError
    from byteloom.dataset import StreamDataset
    from byteloom.model import Model, load
    from byteloom.stream import Stream
    from byteloom.training import train
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.preparation.prepare import PrepareOptions, prepare
    from data_pipeline.readers.options import ReadOptions
    from data_pipeline.sources.listing import Selection

    __version__: str
    open_corpus = Corpus

_HOMES = {
    "CorrectableError": "byteloom.core.errors",
    "Model": "byteloom.model",
    "PrepareOptions": "data_pipeline.preparation.prepare",
    "ReadOptions": "data_pipeline.readers.options",
    "Selection": "data_pipeline.sources.listing",
    "Stream": "byteloom.stream",
    "StreamDataset": "byteloom.dataset",
    "load": "byteloom.model",
    "open_corpus": "data_pipeline.corpus.corpus:Corpus",
    "prepare": "data_pipeline.preparation.prepare",
    "train": "byteloom.training",
}
"""Module of each public name; the name there follows a colon if it is another."""

__all__ = [
    "CorrectableError",
    "Model",
    "PrepareOptions",
    "ReadOptions",
    "Selection",
    "Stream",
    "StreamDataset",
    "__version__",
    "load",
    "open_corpus",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'byteloom' has no attribute {name!r}")
    value = globals()[name] = _imported(name)
    return value


def _imported(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("byteloom")
    module, _, there = _HOMES[name].partition(":")
    return getattr(import_module(module), there or name)


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
