"""Decoder-only Transformer over bytes, with full causal attention, a sliding window, or sparse attention.

It is the baseline of MEGABYTE (arXiv:2305.07185, table 15) and, with a window, of SpaceByte (arXiv:2404.14408). With
strided or fixed attention it is the Sparse Transformer (arXiv:1904.10509):

    learned start, then ids shifted by one (T, D) ─▶ pre-norm blocks ─▶ tied head: nats of every byte

Output t depends only on the ids before t. By default, linear maps have no bias. If attention does not cross documents,
output t depends only on the ids before t in its document, and on the separator before the document.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.distributed.context import Context
from pretrain.models.base import ByteModel
from pretrain.models.blocks.attention import visible_after, window_pairs
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import set_context
from pretrain.models.blocks.documents import documents_of, visible_in_prefix, visible_in_window
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_byte import MOST_HEADS, PredictsFurther
from pretrain.models.blocks.multi_head import Attention, MultiHead
from pretrain.models.blocks.positions import Rotary
from pretrain.models.blocks.sparse_attention import SparseAttention, SparseCache
from pretrain.models.blocks.sparse_pattern import SparseMasks, SparsePattern, layer_patterns, sparse_masks
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family
from pretrain.objectives import Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class TransformerConfig(StackConfig, PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Decoder-only Transformer over bytes."""

    family: Literal["transformer"] = "transformer"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    window: int | None = Field(default=None, ge=1)
    """Positions that attention sees in each layer: its own and those right before it. A byte then depends on layers x
    (window - 1) + 1 bytes before it. Null: all."""
    attention: Literal["full", "strided", "fixed"] = "full"
    """Earlier positions that attention sees. strided and fixed are those of the Sparse Transformer. strided: the last
    positions, and every position whose distance is a multiple of the stride. fixed: the own block, and the last columns
    of earlier blocks."""
    attention_stride: int | None = Field(default=None, ge=1)
    """Positions of a block of strided and fixed attention; about the square root of T."""
    attention_summary: int = Field(default=8, ge=1)
    """Columns of each earlier block that fixed attention sees. The paper has 8, 16 or 32 of 128 or 256."""
    attention_groups: int = Field(default=1, ge=1)
    """Sub-blocks of summary columns that heads see in turn. They lie from the end of a block on. The number divides the
    heads."""
    attention_layers: Literal["merged", "interleaved"] = "merged"
    """Way in which layers see the two parts of sparse attention. merged: both in each layer. interleaved: near
    positions in even layers, and far ones in odd layers."""
    attention_across_documents: bool = True
    """Whether a position sees earlier documents of its row. If not, attention stops at separators. Positions do not
    restart at a document."""
    positions: Literal["learned", "rotary", "grid"] = "rotary"
    """Encoding of positions. learned: a table of T positions. rotary: rotary angles in every attention layer. grid: a
    table of blocks and one of columns, for sparse attention."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers. MEGABYTE's baseline has relu."""
    biases: bool = False
    """Whether linear maps and the head have biases. MEGABYTE's baseline has none; nanoGPT's maps may have them."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. Embeddings have no dropout."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of attention weights that training drops. Null: as `dropout`. 0 lets CUDA use FlexAttention."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations. MEGABYTE's is 0.006."""

    @model_validator(mode="after")
    def _sparse_fields_fit(self) -> Self:
        if self.attention == "full":
            if self.attention_stride is not None or self.positions == "grid":
                field = "positions: grid" if self.attention_stride is None else "attention_stride"
                raise ValueError(f"{field} needs attention: strided or fixed")
            return self
        if self.attention_stride is None:
            raise ValueError(f"attention: {self.attention} needs attention_stride")
        if self.window is not None:
            raise ValueError(f"window and attention: {self.attention} exclude each other")
        if self.attention == "fixed":
            if self.attention_summary * self.attention_groups > self.attention_stride:
                raise ValueError(
                    f"{self.attention_groups} groups of {self.attention_summary} summary columns do not fit into "
                    f"blocks of {self.attention_stride}"
                )
            if self.heads % self.attention_groups:
                raise ValueError(f"attention_groups ({self.attention_groups}) does not divide heads ({self.heads})")
        return self

    @property
    def patterns(self) -> list[SparsePattern]:
        """Sparse patterns that the layers have in turn; none with full attention."""
        if self.attention == "full" or self.attention_stride is None:
            return []
        is_fixed = self.attention == "fixed"
        summary, groups = (self.attention_summary, self.attention_groups) if is_fixed else (1, 1)
        pattern = SparsePattern(self.attention, self.attention_stride, summary, groups)
        return layer_patterns(pattern, interleaved=self.attention_layers == "interleaved")


class Transformer(ByteModel):
    """Decoder-only Transformer over bytes with a tied head."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.attends_across_documents = config.attention_across_documents
        self.window = config.window
        self.rewinds = config.attention == "full"
        self.initial_std = config.initial_std
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.positions: nn.Parameter | None = None
        self.patterns = config.patterns
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.sequence_length, config.width))
        elif config.positions == "grid":
            (stride, blocks), *_ = ((p.stride, p.blocks(config.sequence_length)) for p in self.patterns)
            self.block_positions = nn.Parameter(torch.empty(blocks, config.width))
            self.column_positions = nn.Parameter(torch.empty(stride, config.width))
        attention = _attention_maker(config)
        self.stack = Stack(
            config, config.activation, config.dropout, attention, config.biases, config.attention_dropout
        )
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY)) if config.biases else None
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config, and 0 for biases."""
        return Initial() if name.endswith("bias") else Initial(self.initial_std)

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`.

        Args:
            ids: (rows, T)
            given: (rows,) lengths of prefixes, whose ids all see each other. None: there are none.
        """
        length = ids.shape[1]
        self.check_length(length)
        if self.context.size > 1:
            ids = F.pad(ids, (0, -length % (self.context.size * self.part_multiple)), value=PADDING)
        own = self.context.own(ids.shape[1])
        x = self.embed(ids[:, :-1], own)
        documents = None if self.attends_across_documents else F.pad(documents_of(ids[:, :-1]), (1, 0))
        visible = self.visible(documents, x) if given is None else visible_in_prefix(given, length)
        nats = self.nats(self.stack(x, None, visible), ids[:, own].long())
        return self.context.placed(nats)[:, :length]

    def set_context(self, context: Context) -> None:
        """Set the part of the rows for all layers."""
        self.context = context
        set_context(self, context)

    @property
    def part_multiple(self) -> int:
        """Number of positions of which each rank has a multiple if rows are cut: whole windows."""
        return self.window if self.window is not None and self.window < self.sequence_length else 1

    def visible(self, documents: Tensor | None, x: Tensor) -> "Tensor | BlockMask | SparseMasks | None":
        """Return the mask in which positions see their documents, in the form that the attention layers take.

        Args:
            documents: (rows, keys) document of each position that may be seen; None if positions see all documents.
            x: (rows, n, D) input of the first block at the last n of these positions; at this rank's part of them if
                rows are cut.
        """
        if self.patterns:
            in_blocks = self.stack.takes_blocks(x, x.shape[1])
            return sparse_masks(self.patterns, x.shape[1], documents, x.device, in_blocks=in_blocks)
        if documents is None:
            return None
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
        return self.place(embedded[:, own.start - own.stop :], own)

    def place(self, embedded: Tensor, own: slice) -> Tensor:
        """Add the vectors of positions, if the model has some, to (rows, n, D) embeddings at the n positions `own`."""
        if self.positions is not None:
            return embedded + self.positions[own]
        if (columns := getattr(self, "column_positions", None)) is None:
            return embedded
        places = torch.arange(own.start, own.stop, device=embedded.device)
        return embedded + self.block_positions[places // len(columns)] + columns[places % len(columns)]

    def empty_caches(self) -> list[LayerCache] | list[SparseCache]:
        """Return an empty cache for each block."""
        if self.patterns:
            return [SparseCache(pattern) for pattern, _ in zip(cycle(self.patterns), self.stack.blocks, strict=False)]
        return self.stack.empty_caches(None if self.window is None else self.window - 1)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embedding table, and the biases of the head if it has them."""
        return self.embedding.weight, self.head_bias

    def head_norm(self) -> nn.Module | None:
        """Return the norm after the last block."""
        return self.stack.norm

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "TransformerDecoder":
        """Return a new decoder of `rows` rows."""
        return TransformerDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        head = 2 * length * self.stack.width * VOCABULARY
        if not self.patterns:
            return self.stack.flops(length, pairs=window_pairs(length, self.window)) + head
        pairs = sum(pattern.pairs(length) for pattern, _ in zip(cycle(self.patterns), self.stack.blocks, strict=False))
        return self.stack.flops(length, pairs=0) + 4 * pairs * self.stack.width + head


class TransformerDecoder:
    """Decoder over cached keys and values: those that later positions see. With full attention, it rewinds."""

    def __init__(self, model: Transformer, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._caches = model.empty_caches()
        self._documents = torch.zeros(rows, 1, dtype=torch.long, device=model.start.device)
        """(rows, n) document of every position; before the first, that of position 0."""
        self.states = model.start.new_empty(rows, 0, model.stack.width)
        """Last hidden states of the last call; see `RewindingDecoder`."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._advance(ids)
        x = self._model.embed(ids)
        if self._model.reads_prompts_whole:
            visible: Tensor | BlockMask | SparseMasks | None = x.new_ones(1, 1, *[x.shape[1]] * 2, dtype=torch.bool)
        else:
            visible = self._visible(x)
        self.states = self._model.stack(x, self._caches, visible)[:, -1:]
        return self._model.logits(self.states[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        return self.feed(ids[:, None])[:, -1]

    @property
    def most_fed(self) -> int:
        """Return the ids that `feed` takes; see `RewindingDecoder`."""
        return MOST_HEADS if self._model.window is None else min(self._model.window, MOST_HEADS)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids in one pass; see `RewindingDecoder.feed`."""
        model, read = self._model, ids.long()
        self._advance(read)
        x = model.place(model.embedding(read), slice(self.length + 1 - read.shape[1], self.length + 1))
        self.states = model.stack(x, self._caches, self._visible(x))
        return model.logits(self.states)

    def rewind(self, count: int) -> None:
        """Take back ids; see `RewindingDecoder.rewind`."""
        for cache in self._caches:
            assert isinstance(cache, LayerCache)
            cache.rewind(count)
        self.length -= count
        self.states = self.states[:, : self.states.shape[1] - count]
        self._documents = self._documents[:, : self._documents.shape[1] - count]

    def _advance(self, read: Tensor) -> None:
        self._model.check_room(self.length + read.shape[1])
        self.length += read.shape[1]
        if not self._model.attends_across_documents:
            self._documents = torch.cat([self._documents, self._documents[:, -1:] + documents_of(read)], 1)

    def _visible(self, x: Tensor) -> "Tensor | BlockMask | SparseMasks | None":
        """Return the mask of the next positions, which read (rows, n, D), over the cached ones and themselves."""
        model, count = self._model, x.shape[1]
        documents = None if model.attends_across_documents else self._documents
        before = self.length + 1 - count
        if model.patterns:
            return documents if before else model.visible(documents, x)
        kept = before if model.window is None else min(before, model.window - 1)
        past = visible_after(kept, count, model.window, x.device)
        if documents is None:
            return past
        seen = documents[:, -(kept + count) :]
        if past is None:
            return model.visible(seen, x)
        return (past & (seen[:, None, :] == seen[:, -count:, None]))[:, None]


def _visibilities(config: TransformerConfig) -> frozenset[Visibility]:
    """Return causal, and prefix if each position may see the whole row."""
    sees_all = config.window is None and config.attention == "full" and config.attention_across_documents
    return frozenset({Visibility.causal, *([Visibility.prefix] if sees_all else [])})


def _attention_maker(config: TransformerConfig) -> Callable[[int, int, float], MultiHead]:
    """Return the function that makes the attention layers, one after another."""
    rotary = Rotary() if config.positions == "rotary" else None
    if not config.patterns:
        return partial(Attention, rotary=rotary, window=config.window, bias=config.biases)
    patterns = cycle(config.patterns)

    def make(width: int, heads: int, dropout: float) -> MultiHead:
        return SparseAttention(width, heads, dropout, next(patterns), rotary, config.biases)

    return make


def _row_parts(config: TransformerConfig) -> int:
    """Return the number of positions of a row, or of whole windows. Rows of sparse attention are not cut."""
    length, window = config.sequence_length, config.window
    if config.attention != "full":
        return 1
    if window is None or window >= length:
        return length
    return 1 if length % window else length // window


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a Transformer."""
    return {**size.stack(), "initial_std": 0.02}


register_family(
    Family(
        name="transformer",
        reference=REFERENCES / "transformer.py",
        config=TransformerConfig,
        build=Transformer,
        free_fields=frozenset({"dropout", "attention_dropout", "initial_std"}),
        row_parts=_row_parts,
        visibilities=_visibilities,
        of_size=_of_size,
        small={"sequence_length": 32, "width": 32, "layers": 2, "heads": 2, "window": 8, "dropout": 0.1},
    )
)
