"""Transformer-XL: segments in order, each layer reading the hidden states of the segments before.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860, section 3:

    memory of layer n: (M, D) inputs of that layer in the segments before, without gradient ─┐
    ids, one late (T, D) ─▶ layer n: queries of the segment over keys of memory + segment ◀──┘ ─▶ tied head: nats
                                     │
                    the last M of memory + segment are the next segment's memory

Two things are this file's own. Blocks are pre-norm, as in all models here (an option of the authors' code; the paper's
are post-norm). And a document does not see the one before: attention stops at separators, in the memory and in the
segment alike, so cutting a row into segments nowhere changes what a byte may depend on, but for the memory's length.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.models.base import ByteModel, Memory
from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_head import MultiHead
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary, rotate, sinusoids
from pretrain.models.blocks.transformer import PreNorm, StackConfig, linear_weights
from pretrain.models.blocks.unit import run_unit
from pretrain.models.initial import Initial
from pretrain.models.registry import Family, register_family


class TransformerXLConfig(StackConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Transformer-XL (arXiv:1901.02860)."""

    family: Literal["transformer_xl"] = "transformer_xl"
    """Which model; each family has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one segment, which is one training sequence."""
    memory_length: int = Field(ge=0)
    """M: positions before the segment whose hidden states each layer keeps; the paper trains with M = T. What a byte
    depends on reaches about layers x M bytes back. Training then needs data.lanes = train.global_batch, and checkpoints
    hold the memory, of layers x M x width numbers a row. 0: segments are strangers."""
    feed_forward_width: int | None = Field(default=None, ge=1)
    """Channels between the two maps of a feed-forward layer; null is 4 times the width."""
    positions: Literal["relative", "rotary"] = "relative"
    """How distances are told: sinusoids of the distance with content and position biases u and v as in the paper, or
    rotary angles."""
    activation: Activation = "relu"
    """Of the feed-forward layers; the paper's is relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of attention weights and of what each layer adds to the residual stream; embeddings have none."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights, a normal distribution cut at two deviations."""


NOTHING = -1
"""In a memory, the id at positions before the row's beginning."""


class TransformerXL(ByteModel):
    decodes_without_end = True

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.sequence_length = config.sequence_length
        self.memory_length = config.memory_length
        self.initial_std = config.initial_std
        self.width = config.width
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.content_bias: nn.Parameter | None = None
        self.position_bias: nn.Parameter | None = None
        if config.positions == "relative":  # u and v of the paper, shared by all layers
            self.content_bias = nn.Parameter(torch.empty(config.heads, config.width // config.heads))
            self.position_bias = nn.Parameter(torch.empty(config.heads, config.width // config.heads))

        def block() -> SegmentBlock:
            rotary = Rotary() if config.positions == "rotary" else None
            attention = SegmentAttention(config.width, config.heads, config.dropout, rotary)
            feed_forward = FeedForward(config.width, config.activation, config.feed_forward_width)
            return SegmentBlock(config.width, attention, feed_forward, config.dropout)

        self.blocks = nn.ModuleList(block() for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        return Initial(self.initial_std)

    @overload
    def forward(self, ids: Tensor) -> Tensor: ...
    @overload
    def forward(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...
    def forward(self, ids: Tensor, memory: Memory | None = None) -> Tensor | tuple[Tensor, Memory]:
        """As the contract says; with a memory, `forward_segment`."""
        nats, new_memory = self.forward_segment(ids, memory or {})
        return nats if memory is None else (nats, new_memory)

    def empty_memory(self, rows: int) -> Memory:
        """Layers' inputs at the last M positions, `states` (rows, layers, M, D), and the `ids` (rows, M) at them."""
        M, device = self.memory_length, self.start.device
        if not M:
            return {}
        states = torch.zeros(rows, len(self.blocks), M, self.width, device=device)
        return {"states": states, "ids": torch.full((rows, M), NOTHING, device=device)}

    def forward_segment(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The price of every id, given those before it in its document, and the memory for what follows in each row.

        Args:
            ids: (rows, T') with 1 <= T' <= sequence_length; each row goes on where the memory's row ends.
            memory: of the segment before, of M positions or fewer. Where a row has none, the learned start is read in
                its place; {} if no row has one.
        Returns:
            (rows, T') fp32 nats, and the new memory: the last memory_length positions of the old one and this segment,
            or {} if that is 0.
        """
        ids = ids.long()
        states, memory = self.run_segment(ids, memory)
        return self.nats(states, ids), memory

    def run_segment(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """As `forward_segment`, with the (rows, T', D) states that the logits are a linear map of."""
        rows, length = ids.shape
        self.check_length(length)
        first = self.start.expand(rows, 1, -1)
        every = ids
        if memory:
            every = torch.cat([memory["ids"].long(), ids], 1)
            last = every[:, -length - 1 : -length]
            first = torch.where((last == NOTHING)[..., None], first, self.embedding(last.clamp(min=0)))
        x = torch.cat([first, self.embedding(ids[:, :-1])], 1)
        documents = F.pad((every[:, :-1] == SEPARATOR).cumsum(1), (1, 0)).masked_fill(every == NOTHING, NOTHING)
        context = Context(visible_keys(documents, length), self.relative(documents.shape[1]))
        before = memory["states"].to(x.dtype).unbind(1) if memory else [None] * len(self.blocks)
        states = []
        for block, old in zip(self.blocks, before, strict=True):
            states.append(self._remembered(x.detach() if old is None else torch.cat([old, x.detach()], 1)))
            x = run_unit(block, x, old, context)
        x = self.norm(x)
        if not self.memory_length:
            return x, {}
        return x, {"states": torch.stack(states, 1), "ids": self._remembered(every)}

    def _remembered(self, positions: Tensor) -> Tensor:
        """The last M of (rows, n, ...) positions: also of those before the segment, if it is short."""
        return positions[:, max(positions.shape[1] - self.memory_length, 0) :]

    def relative(self, keys: int) -> "Relative | None":
        """The paper's relative positions for distances below `keys`."""
        if self.content_bias is None or self.position_bias is None:
            return None
        distances = torch.arange(keys - 1, -1, -1, device=self.start.device)
        return Relative(sinusoids(distances, self.width).to(self.start.dtype), self.content_bias, self.position_bias)

    def head_weights(self) -> tuple[Tensor, None]:
        """The embedding table itself."""
        return self.embedding.weight, None

    def scored(self, length: int) -> slice:
        return slice(0, length)

    def decoder(self, rows: int) -> "TransformerXLDecoder":
        return TransformerXLDecoder(self, rows)

    def flops(self, length: int) -> int:
        """As the contract says, with a full memory; of several rows, all share one projection of the distances."""
        D, keys = self.width, self.memory_length + length
        products = 2 if self.content_bias is None else 3  # with keys and with values; with distances
        of_memory = 2 * D * D  # weights that make keys and values
        of_distances = 0 if self.content_bias is None else D * D
        a_layer = products * length * keys * D + of_memory * self.memory_length + of_distances * self.memory_length
        return 2 * length * (linear_weights(self) + D * VOCABULARY) + 2 * len(self.blocks) * a_layer


@dataclass(frozen=True)
class Relative:
    """The paper's relative positions."""

    distances: Tensor
    """(n, D) R: sinusoids of the distances n - 1 down to 0, of at least as many as there are keys."""
    content_bias: Tensor
    """(heads, D / heads) u"""
    position_bias: Tensor
    """(heads, D / heads) v"""


@dataclass(frozen=True)
class Context:
    """What every layer's attention in one segment needs beside its own weights."""

    visible: Tensor
    """(rows, 1, queries, keys)"""
    relative: Relative | None
    """None: rotary."""


class SegmentCache(LayerCache):
    """Keys and values for decoding, and the keys of distances, which do not change from byte to byte."""

    def __init__(self) -> None:
        super().__init__()
        self.distance_keys: Tensor | None = None


class SegmentAttention(MultiHead):
    """Attention of a segment's positions over memory and segment."""

    def __init__(self, width: int, heads: int, dropout: float, rotary: Rotary | None = None) -> None:
        """Rotary positions, or the paper's relative ones if None."""
        super().__init__(width, heads, dropout)
        self.rotary = rotary
        self.distance_key = nn.Linear(width, width, bias=False) if rotary is None else None
        """W_k,R of the paper."""

    def forward(self, x: Tensor, memory: Tensor | None, context: Context, cache: SegmentCache | None = None) -> Tensor:
        """(rows, queries, D) to the same (section 3.3): position i scores key j with

            (q_i + u) · k_j  +  (q_i + v) · W_k,R R_{i-j},    over the root of a head's channels.

        Args:
            memory: (rows, m, D), normed as x is.
            cache: for decoding: keys and values before x, in the place of memory.
        """
        q, k, v = self.project(x)
        if memory is not None:
            old_k, old_v = self._keys_and_values(memory)
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.rotary:
            places = torch.arange(k.shape[2], device=x.device)
            q, k = rotate(q, places[-q.shape[2] :], self.rotary), rotate(k, places, self.rotary)
            return self.merge(attention(q, k, v, context.visible, self.dropout_now))
        assert context.relative is not None
        distance_keys = self._distance_keys(context.relative, cache)[..., -k.shape[2] :]
        scores = shift_left((q + context.relative.position_bias[:, None]) @ distance_keys) * q.shape[-1] ** -0.5
        bias = scores.masked_fill(~context.visible, float("-inf"))
        q = q + context.relative.content_bias[:, None]
        return self.merge(attention(q, k, v, bias, self.dropout_now))

    def _keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        projected = F.linear(memory, self.query_key_value.weight[memory.shape[2] :])
        k, v = projected.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def _distance_keys(self, relative: "Relative", cache: SegmentCache | None) -> Tensor:
        """W_k,R R: (heads, D / heads, n)."""
        if cache is not None and cache.distance_keys is not None:
            return cache.distance_keys
        assert self.distance_key is not None
        keys = self.distance_key(relative.distances).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        if cache is not None:
            cache.distance_keys = keys
        return keys


class SegmentBlock(PreNorm):
    """The pre-norm block; its memory is normed by the norm of its input."""

    def forward(self, x: Tensor, memory: Tensor | None, context: Context, cache: SegmentCache | None = None) -> Tensor:
        """(rows, queries, D) to the same; arguments as `SegmentAttention.forward`, but for the norm."""
        if memory is not None:
            memory = self.attention_norm(memory)
        return self.add(x, self.attention(self.attention_norm(x), memory, context, cache))


def visible_keys(documents: Tensor, queries: int) -> Tensor:
    """What the last `queries` positions see: the past of their own document.

    Args:
        documents: (rows, keys) the document of every position of memory and segment. A position is in the document of
            the byte it predicts, and a separator is the last id of its own.
    Returns:
        (rows, 1, queries, keys) booleans
    """
    keys = documents.shape[1]
    past = torch.ones(queries, keys, dtype=torch.bool, device=documents.device).tril(keys - queries)
    same = documents[:, None, :] == documents[:, keys - queries :, None]
    return (past & same)[:, None]


def shift_left(scores: Tensor) -> Tensor:
    """From columns that are distances to columns that are keys (appendix B).

    Args:
        scores: (..., queries, keys), column c of the distance keys - 1 - c.
    Returns:
        The same shape: row i is moved left by queries - 1 - i, so that column j <= i + keys - queries is of key j. The
        columns after that, which causal masks hide, hold what the move wraps around.
    """
    *outer, queries, keys = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*outer, keys + 1, queries)
    return padded[..., 1:, :].reshape(*outer, queries, keys)


class TransformerXLDecoder:
    """Byte by byte; at each segment's end the last M positions stay. It is never full.

    Agrees with `forward_segment` over consecutive segments of sequence_length. What stays are keys and values: they are
    functions of the states that a memory holds, position by position.
    """

    def __init__(self, model: TransformerXL, rows: int) -> None:
        self.length = 0
        self._model = model
        self._relative = model.relative(model.memory_length + model.sequence_length)
        self._caches = [SegmentCache() for _ in model.blocks]
        self._documents = torch.empty(rows, 0, dtype=torch.long, device=model.start.device)
        """(rows, n) the document of every position whose keys and values are kept."""
        self._position = 0
        """The next to be run; position t reads the byte before it, and predicts byte t."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self.length = ids.shape[1]
        T = self._model.sequence_length
        logits = self._run(ids[:, : T - 1].long())
        for first in range(T, self.length + 1, T):
            logits = self._run(ids[:, first - 1 : first + T - 1].long())
        return logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        self.length += 1
        return self._run(ids.long()[:, None])

    def _run(self, before: Tensor) -> Tensor:
        """The next positions, all of one segment, which read (rows, n) ids; logits of the id after them.

        Position 0 comes before them, reading the learned start; without memory, that stands at each segment's beginning
        in the place of the first id.
        """
        model = self._model
        if self._position and self._position % model.sequence_length == 0:
            before = self._begin_segment(before)
        x = model.embedding(before)
        documents = (before == SEPARATOR).cumsum(1)
        if self._documents.shape[1]:
            documents = documents + self._documents[:, -1:]
        else:
            x = torch.cat([model.start.expand(x.shape[0], 1, -1), x], 1)
            documents = F.pad(documents, (1, 0))
        self._position += x.shape[1]
        self._documents = torch.cat([self._documents, documents], 1)
        context = Context(visible_keys(self._documents, x.shape[1]), self._relative)
        for block, cache in zip(model.blocks, self._caches, strict=True):
            x = block(x, None, context, cache)
        return model.logits(model.norm(x[:, -1]))

    def _begin_segment(self, before: Tensor) -> Tensor:
        kept = self._model.memory_length
        for cache in self._caches:
            cache.keep_last(kept)
        self._documents = self._documents[:, max(self._documents.shape[1] - kept, 0) :]
        return before if kept else before[:, 1:]


register_family(
    Family(
        name="transformer_xl",
        config=TransformerXLConfig,
        build=TransformerXL,
        free_fields=frozenset({"dropout", "initial_std"}),
        carries_memory=lambda config: config.memory_length > 0,
        small={
            "sequence_length": 32,
            "memory_length": 8,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "dropout": 0.1,
        },
    )
)
