"""Decoder-only Transformer over bytes, with full causal attention or a sliding window.

It is the baseline of MEGABYTE (arXiv:2305.07185, table 15) and, with a window, of SpaceByte (arXiv:2404.14408):

    learned start, then ids shifted by one (T, D) ─▶ pre-norm blocks ─▶ tied head: nats of every byte

Output t depends only on the ids before t. By default, linear maps have no bias. If attention does not cross documents,
output t depends only on the ids before t in its document, and on the separator before the document.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.distributed.context import Context
from pretrain.models.base import ByteModel
from pretrain.models.blocks.attention import window_pairs
from pretrain.models.blocks.context import set_context
from pretrain.models.blocks.documents import documents_of, visible_in_window
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_head import Attention
from pretrain.models.blocks.positions import Rotary
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, register_family

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class TransformerConfig(StackConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Decoder-only Transformer over bytes."""

    family: Literal["transformer"] = "transformer"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    window: int | None = Field(default=None, ge=1)
    """Positions that attention sees in each layer: its own and those right before it. A byte then depends on layers x
    (window - 1) + 1 bytes before it. Null: all."""
    attention_across_documents: bool = True
    """Whether a position sees earlier documents of its row. If not, attention stops at separators. Positions do not
    restart at a document."""
    positions: Literal["learned", "rotary"] = "rotary"
    """Encoding of positions. learned: a table of T positions. rotary: rotary angles in every attention layer."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers. MEGABYTE's baseline has relu."""
    biases: bool = False
    """Whether linear maps and the head have biases. MEGABYTE's baseline has none; nanoGPT's maps may have them."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. Embeddings have no dropout."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations. MEGABYTE's is 0.006."""


class Transformer(ByteModel):
    """Decoder-only Transformer over bytes with a tied head."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.attends_across_documents = config.attention_across_documents
        self.window = config.window
        self.initial_std = config.initial_std
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.sequence_length, config.width))
        rotary = Rotary() if config.positions == "rotary" else None
        attention = partial(Attention, rotary=rotary, window=config.window, bias=config.biases)
        self.stack = Stack(config, config.activation, config.dropout, attention, config.biases)
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY)) if config.biases else None
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config, and 0 for biases."""
        return Initial() if name.endswith("bias") else Initial(self.initial_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`."""
        length = ids.shape[1]
        self.check_length(length)
        if self.context.size > 1:
            ids = F.pad(ids, (0, -length % (self.context.size * self.part_multiple)), value=PADDING)
        own = self.context.own(ids.shape[1])
        x = self.embed(ids[:, :-1], own)
        visible: tuple[Any, ...] = ()
        if not self.attends_across_documents:
            visible = (self.visible(F.pad(documents_of(ids[:, :-1]), (1, 0)), x),)
        nats = self.nats(self.stack(x, None, *visible), ids[:, own].long())
        return self.context.placed(nats)[:, :length]

    def set_context(self, context: Context) -> None:
        """Set the part of the rows for all layers."""
        self.context = context
        set_context(self, context)

    @property
    def part_multiple(self) -> int:
        """Number of positions of which each rank has a multiple if rows are cut: whole windows."""
        return self.window if self.window is not None and self.window < self.sequence_length else 1

    def visible(self, documents: Tensor, x: Tensor) -> "Tensor | BlockMask":
        """Return the mask in which positions see their documents, in the form that the attention layers take.

        Args:
            documents: (rows, keys) document of each position that may be seen.
            x: (rows, n, D) input of the first block at the last n of these positions; at this rank's part of them if
                rows are cut.
        """
        if self.window is not None and x.shape[1] * self.context.size > self.window:
            own, blocks = self.context.own(documents.shape[1]), -(-x.shape[1] // self.window)
            return visible_in_window(documents[:, max(own.start - self.window, 0) : own.stop], self.window)[:, -blocks:]
        return self.stack.visible(documents, x)

    def embed(self, before: Tensor, own: slice | None = None) -> Tensor:
        """Return what positions of rows read: the learned start, then the embeddings of the ids before.

        Args:
            before: (rows, n) first ids of the rows.
            own: positions, among the first n + 1. None: all of these.

        Returns:
            (rows, positions, D)
        """
        own = slice(0, before.shape[1] + 1) if own is None else own
        start = self.start.expand(before.shape[0], 1, -1)
        # Ranks other than the first drop the start, whose gradient is then zeros.
        embedded = torch.cat([start, self.embedding(before[:, max(own.start - 1, 0) : own.stop - 1].long())], 1)
        embedded = embedded[:, own.start - own.stop :]
        return embedded if self.positions is None else embedded + self.positions[own]

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embedding table, and the biases of the head if it has them."""
        return self.embedding.weight, self.head_bias

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "TransformerDecoder":
        """Return a new decoder of `rows` rows."""
        return TransformerDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        head = 2 * length * self.stack.width * VOCABULARY
        return self.stack.flops(length, pairs=window_pairs(length, self.window)) + head


class TransformerDecoder:
    """Decoder over cached keys and values: those of the whole context, or of the last w - 1 positions of a window."""

    def __init__(self, model: Transformer, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._caches = model.stack.empty_caches(None if model.window is None else model.window - 1)
        self._documents = torch.zeros(rows, 1, dtype=torch.long, device=model.start.device)
        """(rows, n) document of every position whose keys are cached; before the first, that of position 0."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._advance(ids)
        return self._logits(self._model.embed(ids))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        model, read = self._model, ids.long()[:, None]
        self._advance(read)
        embedded = model.embedding(read)
        if model.positions is not None:
            embedded = embedded + model.positions[self.length]
        return self._logits(embedded)

    def _advance(self, read: Tensor) -> None:
        self._model.check_room(self.length + read.shape[1])
        self.length += read.shape[1]
        if not self._model.attends_across_documents:
            self._documents = torch.cat([self._documents, self._documents[:, -1:] + documents_of(read)], 1)

    def _logits(self, x: Tensor) -> Tensor:
        model = self._model
        if model.attends_across_documents:
            return model.logits(model.stack(x, self._caches)[:, -1])
        if model.window is not None:
            self._documents = self._documents[:, -max(model.window, x.shape[1]) :]
        return model.logits(model.stack(x, self._caches, model.visible(self._documents, x))[:, -1])


def _row_parts(config: TransformerConfig) -> int:
    """Return the number of positions of a row, or of whole windows."""
    length, window = config.sequence_length, config.window
    if window is None or window >= length:
        return length
    return 1 if length % window else length // window


register_family(
    Family(
        name="transformer",
        reference=REFERENCES / "transformer.py",
        config=TransformerConfig,
        build=Transformer,
        free_fields=frozenset({"dropout", "initial_std"}),
        row_parts=_row_parts,
        small={"sequence_length": 32, "width": 32, "layers": 2, "heads": 2, "window": 8, "dropout": 0.1},
    )
)
