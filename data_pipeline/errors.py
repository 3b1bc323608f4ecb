"""Errors of corpora. Each has a message of one line for the user."""

from byteloom.core.errors import CorrectableError
from byteloom.core.faults import FaultClass


class CorpusError(CorrectableError):
    """A corpus cannot be read, written or used as asked."""


class DamagedCorpusError(CorpusError):
    """A corpus is damaged, incomplete, or not the one that it was."""

    fault = FaultClass.DAMAGED


class MissingFileError(DamagedCorpusError):
    """A file of a corpus is missing."""


class ForbiddenError(CorpusError):
    """A file of a corpus may not be read. Some servers give this answer for missing files, too."""


class UnreachableError(CorpusError):
    """The place of a source does not answer. This is never the fault of a document: the work ends, and can resume."""


class CorruptBlockError(DamagedCorpusError):
    """A block's bytes are not those that were written, or its disk fails to read them."""


class ShardEndsError(CorruptBlockError):
    """A shard ends before a block does."""


class BadDocumentError(CorpusError):
    """A document cannot be read or decoded. It can be left out without harm to the corpus."""
