"""What can be wrong with a corpus, said in one line to the person who named it."""


class CorpusError(Exception):
    """A corpus cannot be read, written or used as asked."""


class MissingFileError(CorpusError):
    """A file of a corpus is not there."""


class ForbiddenError(CorpusError):
    """A file of a corpus may not be read. Some servers say so of files that are not there, too."""


class CorruptBlockError(CorpusError):
    """A block's bytes are not the bytes that were written, or its disk does not give them."""


class ShardEndsError(CorruptBlockError):
    """A shard ends before a block does."""


class BadDocumentError(CorpusError):
    """A document cannot be read or decoded. It can be left out; the corpus is none the worse for it."""
