"""Transformer-XL: segments in order; each layer also reads the hidden states of earlier segments.

Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860, section 3:

    memory of layer n: (M, D) inputs of that layer in earlier segments, without gradient ───┐
    ids shifted by one (T, D) ─▶ layer n: queries of the segment, keys of memory + segment ◀┘ ─▶ tied head: nats
                                     │
                    the last M of memory + segment are the next segment's memory

By default, blocks are pre-norm and linear maps have no bias, as in the other models here. `norm: post`, `biases`,
`scale_embeddings` and `dropout_places: everywhere` are the authors' code. One difference has no option: a document does
not see the previous one, because attention stops at separators in the memory and in the segment. Where a row is cut
into segments therefore changes the context of a byte only through the memory's length.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, overload

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.models.adapters import whole_weight
from pretrain.models.base import ByteModel, Memory
from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_byte import MOST_HEADS, PredictsFurther
from pretrain.models.blocks.multi_head import MultiHead
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary, rotate, sinusoids
from pretrain.models.blocks.transformer import PreNorm, StackConfig, last_norm, linear_weights
from pretrain.models.blocks.unit import run_unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, UsageOption, register_family


class TransformerXLConfig(StackConfig, PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Transformer-XL (arXiv:1901.02860)."""

    attends_across_documents: ClassVar[bool] = False
    """False: a position sees only its own document. Objectives that read pairs refuse such a model."""
    family: Literal["transformer_xl"] = "transformer_xl"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one segment. A segment is one training sequence."""
    memory_length: int = Field(ge=0)
    """M: positions before the segment whose hidden states each layer keeps. The paper trains with M = T. A byte depends
    on about layers x M bytes before it. With M above 0, training needs data.lanes = train.global_batch, and checkpoints
    hold the memory: layers x M x width numbers a row. 0: segments are independent."""
    feed_forward_width: int | None = Field(default=None, ge=1)
    """Channels between the two maps of a feed-forward layer; null is 4 times the width."""
    same_length: bool = False
    """Whether every position sees exactly the last M positions, its own among them. Without it, a position sees the
    memory and all earlier positions of its segment, so the last position sees more than the first."""
    positions: Literal["relative", "rotary"] = "relative"
    """Encoding of distances. relative: sinusoids of the distance, with content and position biases u and v, as in the
    paper. rotary: rotary angles."""
    clamp_length: int | None = Field(default=None, ge=1)
    """Longest distance that relative positions encode. Longer distances are encoded as this one. null: none is."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers. The paper's is relu."""
    norm: Literal["pre", "post"] = "pre"
    """Place of the norms. pre: before each layer, and after the last block. post: after each sum of a layer's input and
    output, and none after the last block, as in the paper."""
    final_norm: bool = True
    """Whether a norm follows the last block with `norm: pre`. With `pre_lnorm`, the authors' code has none."""
    scale_embeddings: bool = False
    """Whether the first layer reads embeddings times the root of the width. The authors' code does."""
    biases: bool = False
    """Whether feed-forward layers and the head have biases, as in the authors' code."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of each layer's output that training drops."""
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of attention weights that training drops. Null: `dropout`. The authors' 12 layers on enwik8 have 0."""
    dropout_places: Literal["layers", "everywhere"] = "layers"
    """Places of `dropout`. layers: the output of each layer. everywhere: also embeddings, the sinusoids of distances,
    the channels within feed-forward layers, and the head's input, as in the authors' code."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.same_length and not self.memory_length:
            raise ValueError(
                "same_length shows each position memory_length positions; with memory_length 0 it sees none"
            )
        if self.clamp_length is not None and self.positions != "relative":
            raise ValueError(f"clamp_length needs positions: relative, and positions is {self.positions}")
        return self


NOTHING = -1
"""Id at the positions of a memory that precede the start of the row."""


class TransformerXL(ByteModel):
    """Transformer-XL over bytes, with a tied head."""

    attends_across_documents = False
    evaluation_modes = ByteModel.evaluation_modes | {"memory"}
    decodes_without_end = True
    rewinds = True

    def __init__(self, config: TransformerXLConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.memory_length = config.memory_length
        self.clamp_length = config.clamp_length
        self.visible_length = config.memory_length if config.same_length else None
        """Positions that each position sees, its own among them. None: all of the memory and the segment before it."""
        self.initial_std = config.initial_std
        self.width = config.width
        self.scale = config.width**0.5 if config.scale_embeddings else 1.0
        """Factor of the embeddings that the first layer reads."""
        self.dropout = nn.Dropout(config.dropout if config.dropout_places == "everywhere" else 0.0)
        """Dropout outside the blocks."""
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.content_bias: nn.Parameter | None = None
        self.position_bias: nn.Parameter | None = None
        if config.positions == "relative":  # u and v of the paper, shared by all layers
            self.content_bias = nn.Parameter(torch.empty(config.heads, config.width // config.heads))
            self.position_bias = nn.Parameter(torch.empty(config.heads, config.width // config.heads))

        def block() -> SegmentBlock:
            rotary = Rotary() if config.positions == "rotary" else None
            dropped = config.dropout if config.attention_dropout is None else config.attention_dropout
            attention = SegmentAttention(config.width, config.heads, dropped, rotary)
            feed_forward = FeedForward(
                config.width, config.activation, config.feed_forward_width, config.biases, self.dropout.p
            )
            return SegmentBlock(config.width, attention, feed_forward, config.dropout, is_post=config.norm == "post")

        self.blocks = nn.ModuleList(block() for _ in range(config.layers))
        self.norm = LayerNorm(config.width) if config.norm == "pre" and config.final_norm else nn.Identity()
        self.has_last_norm = config.norm == "post" or config.final_norm
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY)) if config.biases else None
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config, and 0 for the biases of linear maps."""
        is_bias = name.endswith("bias") and name not in ("content_bias", "position_bias")
        return Initial() if is_bias else Initial(self.initial_std)

    @overload
    def forward(self, ids: Tensor) -> Tensor: ...
    @overload
    def forward(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...
    def forward(self, ids: Tensor, memory: Memory | None = None) -> Tensor | tuple[Tensor, Memory]:
        """Return the negative log-likelihood of every id; with a memory, see `forward_segment`."""
        nats, new_memory = self.forward_segment(ids, memory or {})
        return nats if memory is None else (nats, new_memory)

    def empty_memory(self, rows: int) -> Memory:
        """Return the memory of rows that begin.

        Returns:
            `states`, (rows, layers, M, D) inputs of the layers at the last M positions; `ids`, (rows, M) the ids there.
            {} if M is 0.
        """
        M, device = self.memory_length, self.start.device
        if not M:
            return {}
        states = torch.zeros(rows, len(self.blocks), M, self.width, device=device)
        return {"states": states, "ids": torch.full((rows, M), NOTHING, device=device)}

    def forward_segment(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the negative log-likelihood of every id, and the memory for the next segment.

        Each id is predicted from the earlier ids of its document.

        Args:
            ids: (rows, T') with 1 <= T' <= sequence_length; each row continues the memory's row.
            memory: memory of the previous segment, of M positions or fewer. A row that begins reads the learned start
                in its place. {} if all rows begin.

        Returns:
            (rows, T') fp32 nats, and the new memory: the last M positions of the old memory and of this segment, or {}
            if M is 0.
        """
        ids = ids.long()
        states, memory = self.run_segment(ids, memory)
        return self.nats(states, ids), memory

    def run_segment(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the (rows, T', D) last hidden states, and the new memory; see `forward_segment`."""
        rows, length = ids.shape
        self.check_length(length)
        first = self.start.expand(rows, 1, -1)
        every = ids
        if memory:
            every = torch.cat([memory["ids"].long(), ids], 1)
            last = every[:, -length - 1 : -length]
            first = torch.where((last == NOTHING)[..., None], first, self.embedding(last.clamp(min=0)))
        x = self.dropout(self.scaled(torch.cat([first, self.embedding(ids[:, :-1])], 1)))
        documents = F.pad((every[:, :-1] == SEPARATOR).cumsum(1), (1, 0)).masked_fill(every == NOTHING, NOTHING)
        visible = visible_keys(documents, length, self.visible_length)
        context = SegmentContext(visible, self.relative(documents.shape[1]))
        before = memory["states"].to(x.dtype).unbind(1) if memory else [None] * len(self.blocks)
        states = []
        for block, old in zip(self.blocks, before, strict=True):
            states.append(self._remembered(x.detach() if old is None else torch.cat([old, x.detach()], 1)))
            x = run_unit(block, x, old, context)
        x = self.dropout(self.norm(x))
        if not self.memory_length:
            return x, {}
        return x, {"states": torch.stack(states, 1), "ids": self._remembered(every)}

    def scaled(self, embedded: Tensor) -> Tensor:
        """Map (rows, n, D) embeddings to what the first layer reads outside training."""
        return embedded if self.scale == 1 else embedded * self.scale

    def _remembered(self, positions: Tensor) -> Tensor:
        """Return the last M of the (rows, n, ...) positions of memory and segment."""
        return positions[:, max(positions.shape[1] - self.memory_length, 0) :]

    def relative(self, keys: int) -> "RelativePositions | None":
        """Return the paper's relative positions for distances below `keys`; None if positions are rotary.

        Distances above `clamp_length` have its encoding, as in the authors' code.
        """
        if self.content_bias is None or self.position_bias is None:
            return None
        distances = torch.arange(keys - 1, -1, -1, device=self.start.device)
        if self.clamp_length is not None:
            distances = distances.clamp(max=self.clamp_length)
        encoded = self.dropout(sinusoids(distances, self.width).to(self.start.dtype))
        return RelativePositions(encoded, self.content_bias, self.position_bias)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embedding table, and the biases of the head if it has them."""
        return self.embedding.weight, self.head_bias

    def head_norm(self) -> nn.Module | None:
        """Return the last norm; a pre-norm model may have none."""
        return last_norm(self.norm, self.blocks) if self.has_last_norm else None

    def table_factors(self) -> dict[str, float]:
        """Return the factor of the embeddings that the first layer reads."""
        return {"embedding.weight": self.scale}

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "TransformerXLDecoder":
        """Return a new decoder of `rows` rows."""
        return TransformerXLDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products with a full memory; see `ByteModel.flops`.

        Several rows share one projection of the distances.
        """
        D, keys = self.width, self.memory_length + length
        products = 2 if self.content_bias is None else 3  # with keys and with values; with distances
        of_memory = 2 * D * D  # weights that make keys and values
        of_distances = 0 if self.content_bias is None else D * D
        a_layer = products * length * keys * D + of_memory * self.memory_length + of_distances * self.memory_length
        return 2 * length * (linear_weights(self) + D * VOCABULARY) + 2 * len(self.blocks) * a_layer


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions of the paper."""

    distances: Tensor
    """(n, D) R: sinusoids of the distances n - 1 down to 0; n is at least the number of keys."""
    content_bias: Tensor
    """(heads, D / heads) u"""
    position_bias: Tensor
    """(heads, D / heads) v"""


@dataclass(frozen=True)
class SegmentContext:
    """Mask and positions that every layer's attention uses in one segment."""

    visible: Tensor
    """(rows, 1, queries, keys) booleans, true where a query sees a key."""
    relative: RelativePositions | None
    """Relative positions; None if positions are rotary."""


class SegmentCache(LayerCache):
    """Keys and values for decoding, and the keys of distances, which are the same for every byte."""

    def __init__(self) -> None:
        """Make an empty cache that keeps all positions."""
        super().__init__()
        self.distance_keys: Tensor | None = None
        """(heads, D / heads, n) W_k,R R, once it is computed."""


class SegmentAttention(MultiHead):
    """Attention of the positions of a segment over the memory and the segment."""

    def __init__(self, width: int, heads: int, dropout: float, rotary: Rotary | None = None) -> None:
        """Build the layer; see `MultiHead`.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            rotary: rotary positions; None means the paper's relative positions.
        """
        super().__init__(width, heads, dropout)
        self.rotary = rotary
        self.distance_key = nn.Linear(width, width, bias=False) if rotary is None else None
        """W_k,R of the paper."""

    def forward(
        self, x: Tensor, memory: Tensor | None, context: SegmentContext, cache: SegmentCache | None = None
    ) -> Tensor:
        """Attend over memory and segment (section 3.3).

        The score of position i for key j, times the root of a head's channels, is

            (q_i + u) · k_j  +  (q_i + v) · W_k,R R_{i-j}

        Args:
            x: (rows, queries, D) normalized input of the layer.
            memory: (rows, m, D) memory after the same norm; None if there is none.
            context: mask and positions.
            cache: keys and values before x, for decoding; it replaces the memory.

        Returns:
            (rows, queries, D)
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
        projected = F.linear(memory, whole_weight(self.query_key_value)[memory.shape[2] :])
        k, v = projected.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def _distance_keys(self, relative: "RelativePositions", cache: SegmentCache | None) -> Tensor:
        """Return W_k,R R, (heads, D / heads, n)."""
        if cache is not None and cache.distance_keys is not None:
            return cache.distance_keys
        assert self.distance_key is not None
        keys = self.distance_key(relative.distances).unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        if cache is not None:
            cache.distance_keys = keys
        return keys


class SegmentBlock(PreNorm):
    """Block over a segment and its memory. If it is pre-norm, the norm of its input is that of its memory too."""

    def __init__(
        self, width: int, attention: SegmentAttention, feed_forward: FeedForward, dropout: float, *, is_post: bool
    ) -> None:
        """Build the norms around the two layers; see `PreNorm`.

        Args:
            width: channels of the residual stream.
            attention: attention layer.
            feed_forward: feed-forward layer.
            dropout: share of the output of each layer that is dropped in training.
            is_post: whether the norms follow the sums, as in the paper.
        """
        super().__init__(width, attention, feed_forward, dropout)
        self.is_post = is_post

    def forward(
        self, x: Tensor, memory: Tensor | None, context: SegmentContext, cache: SegmentCache | None = None
    ) -> Tensor:
        """Map (rows, queries, D) to the same shape; see `SegmentAttention.forward`. The block applies the norms."""
        if self.is_post:
            x = self.attention_norm(x + self.dropout(self.attention(x, memory, context, cache)))
            return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        if memory is not None:
            memory = self.attention_norm(memory)
        return self.add(x, self.attention(self.attention_norm(x), memory, context, cache))


def visible_keys(documents: Tensor, queries: int, most: int | None = None) -> Tensor:
    """Return the mask of the last `queries` positions: each sees the earlier positions of its document, and itself.

    Args:
        documents: (rows, keys) document of every position of memory and segment. A position is in the document of the
            byte that it predicts, and a separator is the last id of its document.
        queries: positions that the mask is for.
        most: positions that a position sees at most; None for no limit.

    Returns:
        (rows, 1, queries, keys) booleans.
    """
    keys = documents.shape[1]
    past = torch.ones(queries, keys, dtype=torch.bool, device=documents.device).tril(keys - queries)
    if most is not None:
        past = past.triu(keys - queries - most + 1)
    same = documents[:, None, :] == documents[:, keys - queries :, None]
    return (past & same)[:, None]


def shift_left(scores: Tensor) -> Tensor:
    """Move scores from columns by distance to columns by key (appendix B).

    Args:
        scores: (..., queries, keys); column c belongs to the distance keys - 1 - c.

    Returns:
        (..., queries, keys): row i is moved left by queries - 1 - i. Column j then belongs to key j, for
        j <= i + keys - queries. Later columns hold wrapped values, which causal masks hide.
    """
    *outer, queries, keys = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*outer, keys + 1, queries)
    return padded[..., 1:, :].reshape(*outer, queries, keys)


class TransformerXLDecoder:
    """Decoder that keeps the last M positions at each segment's end. It is never full.

    It agrees with `forward_segment` over consecutive segments of sequence_length. It keeps keys and values, which are
    functions of the states in a memory, position by position.
    """

    def __init__(self, model: TransformerXL, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._relative = model.relative(model.memory_length + model.sequence_length)
        self._caches = [SegmentCache() for _ in model.blocks]
        self._documents = torch.empty(rows, 0, dtype=torch.long, device=model.start.device)
        """(rows, n) document of every position whose keys and values are kept."""
        self.states = model.start.new_empty(rows, 0, model.width)
        """Last hidden states of the last call; see `RewindingDecoder`."""
        self._position = 0
        """Next position to run. Position t reads byte t - 1 and predicts byte t."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self.length = ids.shape[1]
        T = self._model.sequence_length
        self._run(ids[:, : T - 1].long())
        for first in range(T, self.length + 1, T):
            self._run(ids[:, first - 1 : first + T - 1].long())
        self.states = self.states[:, -1:]
        return self._model.logits(self.states[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        return self.feed(ids[:, None])[:, -1]

    @property
    def most_fed(self) -> int:
        """Return the ids that `feed` takes, which are of one segment; see `RewindingDecoder`."""
        T = self._model.sequence_length
        return min(T - self._position % T, MOST_HEADS)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids in one pass; see `RewindingDecoder.feed`."""
        self.length += ids.shape[1]
        self._run(ids.long())
        return self._model.logits(self.states)

    def rewind(self, count: int) -> None:
        """Take back ids; see `RewindingDecoder.rewind`."""
        for cache in self._caches:
            cache.rewind(count)
        self.length -= count
        self._position -= count
        self.states = self.states[:, : self.states.shape[1] - count]
        self._documents = self._documents[:, : self._documents.shape[1] - count]

    def _run(self, before: Tensor) -> None:
        """Run the next positions, all of one segment, which read (rows, n) ids.

        The first call runs position 0 before them, which reads the learned start. Without memory, each segment begins
        with the learned start in place of its first id.
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
        x = model.scaled(x)
        self._position += x.shape[1]
        self._documents = torch.cat([self._documents, documents], 1)
        visible = visible_keys(self._documents, x.shape[1], model.visible_length)
        context = SegmentContext(visible, self._relative)
        for block, cache in zip(model.blocks, self._caches, strict=True):
            x = block(x, None, context, cache)
        self.states = model.norm(x)

    def _begin_segment(self, before: Tensor) -> Tensor:
        kept = self._model.memory_length
        for cache in self._caches:
            cache.keep_last(kept)
        self._documents = self._documents[:, max(self._documents.shape[1] - kept, 0) :]
        return before if kept else before[:, 1:]


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a Transformer-XL with a memory of one segment."""
    return {**size.stack(), "memory_length": size.sequence_length}


register_family(
    Family(
        name="transformer_xl",
        reference=REFERENCES / "transformer_xl.py",
        config=TransformerXLConfig,
        build=TransformerXL,
        free_fields=frozenset({"dropout", "attention_dropout", "dropout_places", "initial_std"}),
        usage_options=(
            UsageOption("memory", "memory_length", "Positions of the memory.", mode="memory"),
            UsageOption("clamp-length", "clamp_length", "Longest distance that attention tells from longer ones."),
            UsageOption("same-length", "same_length", "Let every position see the same number of positions."),
        ),
        carries_memory=lambda config: config.memory_length > 0,
        of_size=_of_size,
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
