"""Base of the models that read a whole row with masks, and predict the row without them."""

from abc import abstractmethod

import torch
from torch import Tensor

from data_pipeline.vocabulary import PADDING
from pretrain.models.base import ByteModel, Decoder


class BidirectionalModel(ByteModel):
    """Model whose output t depends on all ids that are read. It has no bits per byte and does not generate."""

    evaluation_modes = frozenset()

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of every id.

        Args:
            ids: (rows, T) ids to predict; only the result at their own position depends on them.
            given: (rows, T) ids to read, with masks.

        Returns:
            (rows, T) fp32 nats.
        """
        if given is None:
            raise ValueError("this model reads ids with masks, as its objective makes them, and got none")
        self.check_length(given.shape[1])
        return self.nats(self.encode(given), ids.long())

    @abstractmethod
    def encode(self, given: Tensor) -> Tensor:
        """Return the (rows, T, D) states that predict the ids at their positions, given (rows, T) ids."""

    def empty_example(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return made-up ids to predict and ids to read; see `ByteModel.empty_example`."""
        ids, _ = super().empty_example(rows, device)
        return ids, ids

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> Decoder:
        """Refuse: the model predicts no next id."""
        raise ValueError(f"a {type(self).__name__} does not generate: it predicts hidden bytes, and no next one")


def unpadded(ids: Tensor) -> Tensor:
    """Return the mask of ids that are no padding: (rows, 1, 1, n). A row of padding alone sees itself."""
    is_id = ids != PADDING
    return (is_id | ~is_id.any(1, keepdim=True))[:, None, None]
