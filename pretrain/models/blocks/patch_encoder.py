"""Convolutional patch encoder of MEGABYTE (arXiv:2305.07185, section 2.3.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

FILTER_SIZES = (3, 5, 7)
"""Filter sizes of the encoder, in order."""


class PatchEncoder(nn.Module):
    """Causal convolutions x + relu(convolution(x)) with filters of growing size (section 2.3.1)."""

    def __init__(self, width: int) -> None:
        """Build the filters over `width` channels."""
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(width, width, size, bias=False) for size in FILTER_SIZES)

    @property
    def reach(self) -> int:
        """Positions before its own position that an output depends on."""
        return sum(size - 1 for size in FILTER_SIZES)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape; output t depends on x up to position t.

        Args:
            x: embedded bytes.
            documents: (rows, n) document of each byte, if filters see zeros in place of other documents.
        """
        if not x.shape[1]:
            return x
        if documents is not None:
            return self._within_documents(x, documents)
        x = x.transpose(1, 2)
        for size, causal_filter in zip(FILTER_SIZES, self.filters, strict=True):
            x = x + F.relu(causal_filter(F.pad(x, (size - 1, 0))))
        return x.transpose(1, 2)

    def _within_documents(self, x: Tensor, documents: Tensor) -> Tensor:
        """Apply each filter as one product with the bytes that it reaches, after hiding those of other documents."""
        for size, causal_filter in zip(FILTER_SIZES, self.filters, strict=True):
            reached = F.pad(documents, (size - 1, 0), value=-1).unfold(1, size, 1)
            seen = reached == documents[..., None]
            assert isinstance(causal_filter, nn.Conv1d)
            windows = F.pad(x, (0, 0, size - 1, 0)).unfold(1, size, 1) * seen[:, :, None]
            x = x + F.relu(windows.flatten(2) @ causal_filter.weight.flatten(1).t())
        return x

    def flops(self, length: int) -> int:
        """Return the operations of the convolutions over one row of `length` positions."""
        return 2 * length * sum(p.numel() for p in self.parameters())
