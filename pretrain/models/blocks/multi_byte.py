"""Multi-byte prediction: further heads, which predict the bytes after the next one from the same hidden state.

    last hidden state of position t ─┬─▶ head of the model: byte t
                                     ├─▶ residual layers ─▶ head 2: byte t + 1
                                     └─▶ residual layers ─▶ head 3: byte t + 2, and so on

Blockwise parallel decoding (Stern et al. 2018), multi-token prediction (Gloeckle et al., arXiv:2404.19737, equation 2),
Medusa (arXiv:2401.10774, section 2.1.1) and EvaByte's released code have such heads. A head is not scored on a byte
after a separator, because the next document does not follow from this one.
"""

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.blocks.documents import documents_of
from pretrain.models.blocks.nats import linear_nats
from pretrain.models.initial import Initial

MOST_HEADS = 16
"""Largest number of heads, and so of bytes that a decoder reads at once and takes back."""


class MultiByteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Heads of multi-byte prediction."""

    heads: int = Field(default=4, ge=2, le=MOST_HEADS)
    """Bytes that each position predicts, the next one included. EvaByte has 8. Gloeckle et al. have 8 for bytes."""
    layers: int = Field(default=1, ge=0)
    """Residual layers of each further head. Medusa has 1. 0: linear heads, as in EvaByte."""
    weight: float = Field(default=0.2, gt=0)
    """Factor of the loss of each further head in the gradient. Gloeckle et al. have 1."""


class PredictsFurther(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Base of the configs of models that may have further heads."""

    multi_byte: MultiByteConfig | None = None
    """Heads that predict bytes after the next one. Training adds their loss to the gradient alone, so bits per byte
    stay those of the next byte. `byteloom generate --speculate` drafts with them. Null: none."""


class ResidualLayer(nn.Module):
    """Layer of Medusa: x + SiLU(W x). W is 0 at first."""

    def __init__(self, width: int) -> None:
        """Build the map, without values."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def own_initial(self, parameter: str) -> Initial:
        """Return 0, with which the layer changes nothing."""
        return Initial()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return x + F.silu(F.linear(x, self.weight))


class FurtherHead(nn.Module):
    """Residual layers and a linear head. It is not tied to the model's head."""

    def __init__(self, width: int, layers: int) -> None:
        """Build the parameters, without values."""
        super().__init__()
        self.layers = nn.ModuleList(ResidualLayer(width) for _ in range(layers))
        self.output = nn.Parameter(torch.empty(VOCABULARY, width))

    def own_initial(self, parameter: str) -> Initial:
        """Return the deviation of most heads of language models."""
        return Initial(0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) last hidden states of the model to those of the linear head."""
        for layer in self.layers:
            x = layer(x)
        return x


class MultiByteHeads(nn.Module):
    """Further heads of a model.

    Their parameters are outside the model's blocks. None is an nn.Linear, which families count by themselves.
    """

    def __init__(self, config: MultiByteConfig, width: int) -> None:
        """Build the heads, without values.

        Args:
            config: number and layers.
            width: channels of the model's last hidden states.
        """
        super().__init__()
        self.weight = config.weight
        self.heads = nn.ModuleList(FurtherHead(width, config.layers) for _ in range(config.heads - 1))

    @property
    def _heads(self) -> list[FurtherHead]:
        return [head for head in self.heads if isinstance(head, FurtherHead)]

    def nats(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the sum of the losses of all further heads at the bytes that they predict.

        Args:
            states: (rows, n, width) last hidden states.
            ids: (rows, n) ids of the same positions.

        Returns:
            (rows, n) fp32 nats. Value t is that of byte t under the heads of the positions before t.
        """
        length = ids.shape[1]
        documents = F.pad(documents_of(ids[:, :-1]), (1, 0))
        total = torch.zeros(ids.shape, device=ids.device)
        for distance, head in enumerate(self._heads, 1):
            ahead = min(distance, length)
            targets = F.pad(ids[:, ahead:], (0, ahead))  # those in the padding are not scored
            nats = linear_nats(head(states).flatten(0, 1), targets.flatten(), head.output)
            nats = nats.view(ids.shape)[:, : length - ahead].float()
            same = documents[:, ahead:] == documents[:, : length - ahead]
            total = total + F.pad(torch.where(same, nats, 0.0), (ahead, 0))
        return total

    def logits(self, states: Tensor) -> Tensor:
        """Map (..., width) last hidden states to the (heads, ..., VOCABULARY) logits of the bytes after the next."""
        return torch.stack([F.linear(head(states), head.output) for head in self._heads])

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over one row, as `ByteModel.flops` counts them."""
        return 2 * length * sum(parameter.numel() for parameter in self.parameters())
