"""Coverage: how much of a corpus an epoch reads."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from byteloom.core.text import count
from data_pipeline.errors import CorruptBlockError
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.documents import THREADS

SAMPLED_BLOCKS = 256
"""Largest number of blocks whose documents are measured; in a larger corpus, the bytes of an epoch are estimated."""

REST = 0.01
"""Share of the bytes that an epoch may skip because they do not fill a row or a batch."""


class Coverage(BaseModel, frozen=True, use_attribute_docstrings=True):
    """Documents and bytes of a corpus that an epoch reads."""

    documents: int
    """Number of documents that an epoch reads, whole or in part."""
    documents_in_all: int
    """Number of documents in the corpus."""
    bytes: int
    """Bytes of documents that an epoch reads, before withdrawn documents and damaged blocks are masked."""
    bytes_in_all: int
    """Bytes of all documents."""
    is_estimate: bool
    """True if `bytes` is an estimate from a sample of the blocks."""
    withdrawn: int
    """Documents that are withdrawn."""

    @property
    def share(self) -> float:
        """Share of the corpus's bytes."""
        return self.bytes / self.bytes_in_all

    @property
    def leaves_out(self) -> bool:
        """True if an epoch skips a document, or a larger share of the bytes than REST."""
        return self.documents < self.documents_in_all or self.share < 1 - REST or self.withdrawn > 0

    def __str__(self) -> str:
        about = "about " if self.is_estimate else ""
        percent = math.floor(1000 * self.share) / 10  # never 100 % of less
        text = (
            f"an epoch reads {self.documents:,} of {self.documents_in_all:,} documents and {about}{self.bytes:,} of "
            f"{self.bytes_in_all:,} bytes ({percent:.1f} %)"
        )
        return text + (f"; {count(self.withdrawn, 'document')} withdrawn" if self.withdrawn else "")


def coverage_of(stream: ByteStream) -> Coverage:
    """Return what an epoch of a stream reads. This may read where documents end in up to SAMPLED_BLOCKS blocks.

    Raises:
        CorpusError: they cannot be read.
    """
    corpus = stream.corpus
    in_all, documents = corpus.raw_bytes, int(corpus.lengths["documents"].sum(dtype=np.int64))
    units = stream.sequences_per_epoch * stream.order.sequence_length
    share, is_estimate = units / stream.order.units, False
    read = math.ceil(documents * share)
    if stream.packing.packing == "document" and stream.packing.documents != "split":
        of_documents, is_estimate = _share_of_rows(stream)
        share *= of_documents
    return Coverage(
        documents=read,
        documents_in_all=documents,
        bytes=round(in_all * share),
        bytes_in_all=in_all,
        is_estimate=is_estimate,
        withdrawn=len({entry.key for entry in corpus.withdrawn}),
    )


def _share_of_rows(stream: ByteStream) -> tuple[float, bool]:
    """Return which share of the bytes of documents lies in rows of one a document, and whether it is an estimate."""
    corpus, row = stream.corpus, stream.sequence_length
    blocks = np.unique(np.linspace(0, len(corpus.lengths) - 1, SAMPLED_BLOCKS).astype(int))

    def lengths_of(block: int) -> NDArray[np.int64] | None:
        try:
            return stream.rows.document_lengths(range(block, block + 1), corpus.read_ends)[0]
        except CorruptBlockError:  # reading the block names the damage
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        sampled = [lengths for lengths in pool.map(lengths_of, blocks.tolist()) if lengths is not None]
    lengths = np.concatenate([np.empty(0, np.int64), *sampled])
    is_estimate = len(sampled) < len(corpus.lengths)
    return (float(np.minimum(lengths, row).sum() / lengths.sum()) if len(lengths) else 1.0), is_estimate
