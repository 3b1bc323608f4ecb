"""What can be wrong with a corpus, said in one line to the person who named it."""


class CorpusError(Exception):
    """A corpus cannot be read, written or used as asked."""


class CorruptBlockError(CorpusError):
    """A block's bytes are not the bytes that were written."""
