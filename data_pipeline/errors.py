"""Errors of corpora. Each has a message of one line for the user."""


class CorpusError(Exception):
    """A corpus cannot be read, written or used as asked."""


class MissingFileError(CorpusError):
    """A file of a corpus is missing."""


class ForbiddenError(CorpusError):
    """A file of a corpus may not be read. Some servers give this answer for missing files, too."""


class CorruptBlockError(CorpusError):
    """A block's bytes are not those that were written, or its disk fails to read them."""


class ShardEndsError(CorruptBlockError):
    """A shard ends before a block does."""


class BadDocumentError(CorpusError):
    """A document cannot be read or decoded. It can be left out without harm to the corpus."""
