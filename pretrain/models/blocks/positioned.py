"""Ids with positions, as the first block of an encoder or of a decoder reads them."""

from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.models.blocks.context import Dropout
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.positions import Rotary, sinusoids

Positions = Literal["learned", "sinusoidal", "rotary"]
"""Encoding of positions. learned: a table. sinusoidal: sines and cosines that are added (Vaswani et al. 2017). rotary:
rotary angles in every self-attention layer."""


class AddedPositions(nn.Module):
    """Positions that are added to embeddings, with dropout of the sum."""

    def __init__(self, width: int, length: int, positions: Positions, dropout: float) -> None:
        """Build the table of learned positions, without values.

        Args:
            width: channels.
            length: most positions.
            positions: their encoding.
            dropout: share of the sum that is dropped in training.
        """
        super().__init__()
        self.positions = positions
        self.learned = nn.Parameter(torch.empty(length, width)) if positions == "learned" else None
        self.dropout = Dropout(dropout)

    @property
    def rotary(self) -> Rotary | None:
        """Rotary positions of the self-attention layers; None if positions are added."""
        return Rotary() if self.positions == "rotary" else None

    def forward(self, embedded: Tensor, first: int = 0) -> Tensor:
        """Add positions to embeddings.

        Args:
            embedded: (rows, n, width) embeddings.
            first: position of the first of them.
        """
        if self.learned is not None:
            embedded = embedded + self.learned[first : first + embedded.shape[1]]
        elif self.positions == "sinusoidal":
            places = torch.arange(first, first + embedded.shape[1], device=embedded.device)
            embedded = embedded + sinusoids(places, embedded.shape[2]).to(embedded.dtype)
        dropped: Tensor = self.dropout(embedded)
        return dropped


class PositionedIds(AddedPositions):
    """Embeddings of ids plus their positions, with dropout."""

    def __init__(
        self, symbols: int, width: int, length: int, positions: Positions, *, scale: float, dropout: float
    ) -> None:
        """Build the tables, without values.

        Args:
            symbols: number of ids.
            width: channels.
            length: most positions.
            positions: their encoding.
            scale: factor of the embeddings: the root of the width in Vaswani et al. 2017.
            dropout: share of the result that is dropped in training.
        """
        super().__init__(width, length, positions, dropout)
        self.table = embedding(symbols, width)
        self.scale = scale

    def embed(self, ids: Tensor) -> Tensor:
        """Return the (rows, n, width) scaled embeddings of (rows, n) ids."""
        embedded: Tensor = self.table(ids.long())
        return embedded if self.scale == 1.0 else embedded * self.scale
