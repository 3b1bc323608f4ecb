"""The public API of Byteloom.

    import byteloom

    byteloom.prepare(["books/"], Path("corpora/books"), byteloom.PrepareOptions(holdout=0.01))
    with byteloom.open_corpus("corpora/books/train") as corpus:
        print(corpus.raw_bytes)

Names are imported when they are first used, so `import byteloom` takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.preparation.prepare import PrepareOptions, prepare

    __version__: str
    open_corpus = Corpus

__all__ = ["PrepareOptions", "__version__", "open_corpus", "prepare"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'byteloom' has no attribute {name!r}")
    value = globals()[name] = _imported(name)
    return value


def _imported(name: str) -> Any:
    # ruff: noqa: PLC0415 - imports take time, and each name is used by few
    if name == "__version__":
        from importlib.metadata import version

        return version("byteloom")
    if name == "open_corpus":
        from data_pipeline.corpus.corpus import Corpus

        return Corpus
    from data_pipeline.preparation import prepare

    return getattr(prepare, name)


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
