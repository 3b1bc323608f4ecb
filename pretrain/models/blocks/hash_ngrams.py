"""Embeddings of n-grams of bytes by their hashes (Byte Latent Transformer, arXiv:2412.09871, equations 3 to 5)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models.blocks.documents import documents_of
from pretrain.models.blocks.embedding import embedding

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""Base of each hash function, from the authors' code."""
OFFSET = 4
"""Number of byte 0 in a hash, after the authors' four special symbols."""
SPECIAL = 1
"""Number of SEPARATOR in a hash: the authors' beginning of a document. PADDING has the next one."""


class NgramConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Hash n-gram embeddings (arXiv:2412.09871, section 3.2.1)."""

    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(3, 4, 5, 6, 7, 8), min_length=1)
    """Bytes of the n-grams that end at a position."""
    buckets: int = Field(default=500_002, ge=1)
    """Vectors of the table of each size. N-grams whose hashes agree modulo this number share a vector."""
    functions: int = Field(default=1, ge=1, le=len(PRIMES))
    """Hash functions of each size, which have tables of their own."""
    normalize: bool = False
    """True: the sum is divided by the number of its vectors, as in the paper. False: it is not, as in the authors'
    code."""


class HashNgrams(nn.Module):
    """Tables of vectors of n-grams, which are added to the embeddings of bytes."""

    def __init__(self, config: NgramConfig, width: int, *, across_documents: bool) -> None:
        """Make the tables.

        Args:
            config: sizes of the n-grams and of the tables.
            width: channels of a vector.
            across_documents: whether n-grams contain ids of the document before.
        """
        super().__init__()
        self.config, self.across_documents = config, across_documents
        self.tables = nn.ModuleList(
            embedding(config.buckets, width) for _ in range(config.functions * len(config.sizes))
        )

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        """Add the vectors of the n-grams that end at each position.

        Args:
            x: (rows, n, width) embeddings of the last n ids.
            read: (rows, m) ids up to these positions, with m >= n. N-grams that reach further have zeros there.

        Returns:
            (rows, n, width)
        """
        for table, buckets in zip(self.tables, self.hashes(read), strict=True):
            x = x + table(buckets[:, -x.shape[1] :])
        return x / (1 + len(self.tables)) if self.config.normalize else x

    def hashes(self, read: Tensor) -> list[Tensor]:
        """Return the bucket of the n-gram that ends at each position, for each table; see `forward`.

        The hash of ids t_1 … t_n is t_1 + t_2 p + … + t_n p^(n-1) modulo 2^64, as a signed number.

        Returns:
            (rows, m) integers below `buckets`, for each function and size.
        """
        symbols = torch.where(read < SEPARATOR, read + OFFSET, read - SEPARATOR + SPECIAL)
        documents = None if self.across_documents else documents_of(read)
        found = []
        for prime in PRIMES[: self.config.functions]:
            value, by_size = torch.zeros_like(symbols), {}
            for size in range(1, max(self.config.sizes) + 1):
                value = value * prime + _shifted(symbols, documents, size - 1)
                by_size[size] = value % self.config.buckets
            found += [by_size[size] for size in self.config.sizes]
        return found


def _shifted(symbols: Tensor, documents: Tensor | None, count: int) -> Tensor:
    """Return the symbol `count` positions before each position; 0 before the row, or before the position's document."""
    length = symbols.shape[1]
    before = F.pad(symbols, (count, 0))[:, :length]
    if documents is None:
        return before
    return before.where(F.pad(documents, (count, 0), value=-1)[:, :length] == documents, 0)
