"""MEGABYTE: a global model over patches and a local model over the bytes of each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", arXiv:2305.07185, section
2.2. T bytes, patch size P, K = T/P patches, D_G = global width / P, D_L = local width:

    ids ─ eq. 1 ─▶ bytes (T, D_G) ─ eq. 2 ─▶ patches, shifted by one (K, P·D_G) ─ eq. 3 ─▶ global model
                                                                                  │ w^GL, the same at all positions
    ids ─ embedding of the previous byte, pad at a patch's start (K, P, D_L) ───▶ + ─ eq. 4, 5 ─▶ local model
                                                                                  │
                                    tied head, eq. 6: nats of every byte ◀────────┘

Output t depends only on the ids before t. The global model reads the whole patches before that of t, and the local
model reads the bytes before t in its patch. Linear maps have no bias. The two extensions of section 2.3 that change the
model are options: a convolutional patch encoder, and local attention that reaches into the previous patch.

If attention does not cross documents, a byte sees nothing before the separator that ends the previous document, even
where the separator (|) lies within a patch:

    patch            k - 1        k            k + 1
    bytes            a a a a      a | b b      b b b b
    global input     ...          a a a a      pad | b b
    conditioned by   k-1          k k 0 0      k+1

- The learned pad replaces the documents that end within a patch, when the patch enters the global model. A global
  position belongs to the document of its patch's first byte, and attends to the global positions of this document.
- A document that begins within a patch cannot use this patch's global output. It uses the output for patch 0 of the
  row, which depends on no byte.
- Local attention and the filters of the patch encoder stay within a document.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.distributed.context import Context
from pretrain.models.base import ByteModel, units_of
from pretrain.models.blocks.attention import attention, packs_patches, visible_after
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import set_context
from pretrain.models.blocks.documents import documents_of, visible_in_patches
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_byte import MOST_HEADS, PredictsFurther
from pretrain.models.blocks.multi_head import Attention, MultiHead
from pretrain.models.blocks.patch_encoder import PatchEncoder
from pretrain.models.blocks.positions import Rotary, rotate, rotate_alike
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.blocks.unit import Unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class MegabyteConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """MEGABYTE (arXiv:2305.07185)."""

    family: Literal["megabyte"] = "megabyte"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence, and the longest context. A multiple of the patch size."""
    patch_size: int = Field(default=8, ge=1)
    """P: bytes of a patch. The global model runs once a patch. The paper uses 8 for text, 192 for images and 32 for
    sound."""
    global_model: StackConfig
    """Model over patches. Its width is P times D_G, the width of a byte in it."""
    local_model: StackConfig
    """Model over the bytes of one patch. It runs for all patches at once."""
    positions: Literal["learned", "rotary"] = "learned"
    """Encoding of positions. learned: tables, of T positions for the global model (equation 1) and of P for the local
    model. rotary: rotary angles in every attention layer of both models."""
    patch_encoder: Literal["embedding", "convolution"] = "embedding"
    """Input of the global model. embedding: embeddings, as in equation 1. convolution: embeddings after causal
    convolutions with filters of 3, 5 and 7 bytes (section 2.3.1). The paper does not give their channels and
    activation; each one here has D_G channels, relu and a residual connection."""
    cross_patch_bytes: int = Field(default=0, ge=0)
    """r: last positions of the previous patch that local attention also sees. It sees them in every layer, unless their
    document has ended (section 2.3.2; the paper does not give its r). Local attention is then rotary, in addition to
    any learned tables. 0: a patch sees only itself."""
    attention_across_documents: bool = True
    """Whether a byte sees earlier documents of its row. If not, it sees nothing before the separator that ends the
    previous document. A document that begins within a patch then has no global context until the next patch. Positions
    do not restart at a document."""
    pack_patches: bool = True
    """Compute local attention over all small patches of a row at once. Only on CUDA and without dropout; FlexAttention
    does it. Otherwise each patch is computed alone. The numbers are the same."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers. The paper's is relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. Embeddings have no dropout."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations. The paper's is 0.006."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.sequence_length % self.patch_size:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) is not a multiple of patch_size ({self.patch_size})"
            )
        if self.global_model.width % self.patch_size:
            raise ValueError(
                f"global_model.width ({self.global_model.width}) is not a multiple of patch_size ({self.patch_size})"
            )
        if self.cross_patch_bytes > self.patch_size:
            raise ValueError(
                f"cross_patch_bytes ({self.cross_patch_bytes}) is more than patch_size ({self.patch_size}): local "
                "attention reaches one patch back"
            )
        return self


class Megabyte(ByteModel):
    """MEGABYTE: global model, local model and tied head."""

    patch_size: int
    rewinds = True
    evaluation_modes = ByteModel.evaluation_modes | {"strided", "sliding-strided"}

    def __init__(self, config: MegabyteConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.patch_size = config.patch_size
        self.cross_patch_bytes = config.cross_patch_bytes
        self.attends_across_documents = config.attention_across_documents
        self.pack_patches = config.pack_patches
        self.initial_std = config.initial_std
        self.byte_width = config.global_model.width // config.patch_size
        rotary = Rotary() if config.positions == "rotary" else None
        plain = partial(Attention, rotary=rotary)
        cross_patch = partial(CrossPatchAttention, reach=config.cross_patch_bytes)

        self.global_embedding = embedding(VOCABULARY, self.byte_width)
        self.patch_encoder = PatchEncoder(self.byte_width) if config.patch_encoder == "convolution" else None
        self.global_pad = nn.Parameter(torch.empty(config.global_model.width))
        self.global_stack = Stack(config.global_model, config.activation, config.dropout, plain)
        self.global_to_local = nn.Linear(self.byte_width, config.local_model.width, bias=False)
        self.local_embedding = embedding(VOCABULARY, config.local_model.width)
        self.local_pad = nn.Parameter(torch.empty(config.local_model.width))
        local_attention = cross_patch if config.cross_patch_bytes else plain
        self.local_stack = Stack(config.local_model, config.activation, config.dropout, local_attention)
        self.global_positions: nn.Parameter | None = None
        self.local_positions: nn.Parameter | None = None
        if rotary is None:
            self.global_positions = nn.Parameter(torch.empty(config.sequence_length, self.byte_width))
            self.local_positions = nn.Parameter(torch.empty(config.patch_size, config.local_model.width))
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config."""
        return Initial(self.initial_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`."""
        length = ids.shape[1]
        self.check_length(length)
        ids = F.pad(ids, (0, -length % (self.patch_size * self.context.size)), value=PADDING)
        own = self.context.own(ids.shape[1])
        global_in = self.shifted_patches(ids, own)
        if self.attends_across_documents:
            global_out = self.global_stack(global_in)
        else:
            documents = self.documents(ids)[:, :: self.patch_size]
            global_out = self.global_stack(global_in, None, self.global_stack.visible(documents, global_in))
        nats = self.nats(self.decode_patches(ids, global_out), ids[:, own].long())
        return self.context.placed(nats)[:, :length]

    def set_context(self, context: Context) -> None:
        """Set the part of the rows; the local model's tensors have a patch in each row."""
        self.context = context
        set_context(self, context)
        set_context(self.local_stack, context.over_patches(self.sequence_length // self.patch_size))

    def shifted_patches(self, ids: Tensor, own: slice) -> Tensor:
        """Return the inputs of the global model at its own positions: each is the patch before, and the pad is first.

        Args:
            ids: (rows, K·P)
            own: positions of this rank, whole patches.

        Returns:
            (rows, k, P·D_G)
        """
        # Patches before the first one that is needed, which the patch encoder's filters reach, are dropped again.
        # Ranks other than the first drop the pad too; its gradient is zero there.
        first = max(own.start - self.patch_size - self.encoder_context, 0)
        patches = self.embed_patches(ids[:, first : own.stop - self.patch_size].long(), first_position=first)
        with_pad = torch.cat([self.global_pad.expand(len(ids), 1, -1), patches], 1)
        return with_pad[:, -((own.stop - own.start) // self.patch_size) :]

    @property
    def encoder_context(self) -> int:
        """Bytes of the whole patches that the patch encoder's filters reach before a patch."""
        return 0 if self.patch_encoder is None else -(-self.patch_encoder.reach // self.patch_size) * self.patch_size

    def documents(self, ids: Tensor) -> Tensor:
        """Map (rows, n) ids to the document of each position, (rows, n); a separator is the last id of its document."""
        return F.pad(documents_of(ids[:, :-1]), (1, 0))

    def embed_patches(self, ids: Tensor, first_position: int) -> Tensor:
        """Embed bytes and group them to patches (equation 1, the patch encoder, and the grouping of equation 2).

        If attention does not cross documents, the pad replaces bytes before the last separator of their patch.

        Args:
            ids: (rows, n) whole patches; n may be 0. A patch encoder's filters see zeros before them.
            first_position: position of ids[:, 0] in its row.

        Returns:
            (rows, n/P, P·D_G)
        """
        embedded = self.global_embedding(ids)
        if self.global_positions is not None:
            embedded = embedded + self.global_positions[first_position : first_position + ids.shape[1]]
        if self.attends_across_documents:
            if self.patch_encoder is not None:
                embedded = self.patch_encoder(embedded)
            return embedded.reshape(ids.shape[0], -1, self.patch_size * self.byte_width)
        begun = documents_of(ids)  # a separator counts as the first byte of the next document, as when it is read
        if self.patch_encoder is not None:
            embedded = self.patch_encoder(embedded, begun)
        begun = begun.unflatten(1, (-1, self.patch_size))
        patches = embedded.unflatten(1, (-1, self.patch_size))
        pad = self.global_pad.view(self.patch_size, self.byte_width)
        return torch.where((begun == begun[..., -1:])[..., None], patches, pad).flatten(2)

    def decode_patches(self, ids: Tensor, global_out: Tensor) -> Tensor:
        """Run the local model on every patch at once (equations 4 and 5).

        Args:
            ids: (rows, K·P); the last byte of a patch is not read.
            global_out: (rows, k, P·D_G) outputs of the global model for the patches of this rank.

        Returns:
            (rows, k·P, D_L) last hidden states.
        """
        rows, length = ids.shape
        before = ids[:, self.context.own(length)].reshape(-1, self.patch_size)[:, :-1].long()
        conditioned = self.condition(global_out.flatten(0, 1))
        if not self.attends_across_documents:
            documents = self.documents(ids)[:, self.context.own(length)].unflatten(1, (-1, self.patch_size))
            conditioned = conditioned.unflatten(0, (rows, -1))
            of_first = self.context.of_first(conditioned[:, :1])
            begins_within = documents != documents[..., :1]
            conditioned = torch.where(begins_within[..., None], of_first, conditioned).flatten(0, 1)
        local_in = conditioned + self.embed_locally(before)
        if self.packs(local_in, length):
            local_out = self.local_stack(local_in.view(rows, length, -1), None, self.visible_in_patches(ids))
        elif self.masks_locally:
            local_out = self.local_stack(local_in, None, self.visible_locally(ids))
        else:
            local_out = self.local_stack(local_in)
        return local_out.view(rows, -1, local_out.shape[-1])

    def packs(self, local_in: Tensor, length: int) -> bool:
        """Return whether the local model reads all patches of a row of `length` bytes at once."""
        stack, reach = self.local_stack, self.patch_size + self.cross_patch_bytes
        dropout = stack.attention_dropout if self.training else 0.0
        is_whole = self.pack_patches and self.context.size == 1
        return is_whole and packs_patches(local_in, stack.head_width, length, reach, dropout)

    def visible_in_patches(self, ids: Tensor) -> "BlockMask":
        """Return the mask of `local_mask` for all patches of (rows, K·P) ids at once."""
        return visible_in_patches(
            self.documents(ids),
            self.patch_size,
            self.cross_patch_bytes,
            across_documents=self.attends_across_documents,
        )

    @property
    def masks_locally(self) -> bool:
        """Whether local attention depends on documents."""
        return bool(self.cross_patch_bytes) or not self.attends_across_documents

    def visible_locally(self, ids: Tensor) -> Tensor:
        """Return the mask of local attention over this rank's patches of (rows, K·P) ids; see `local_mask`."""
        documents = self.documents(ids).unflatten(1, (-1, self.patch_size))
        before = F.pad(documents[:, :-1, self.patch_size - self.cross_patch_bytes :], (0, 0, 1, 0), value=-1)
        own = self.context.own(documents.shape[1])
        return self.local_mask(before[:, own], documents[:, own], self.patch_size)

    def local_mask(self, before: Tensor, own: Tensor, count: int) -> Tensor:
        """Return the mask of the last `count` positions of each patch, as the local attention layers take it.

        They see the earlier positions of their patch, and those positions of the previous patch that are in their
        document. If attention does not cross documents, all that they see is in their document.

        Args:
            before: (rows, K, r) document of each position of the previous patch. A position is in the document of the
                byte that it predicts, and a separator is the last id of its document.
            own: (rows, K, n) document of each position of the patch.
            count: positions that the mask is for.

        Returns:
            (rows, K, count, r + n) booleans for `CrossPatchAttention`; (rows·K, 1, count, n) for `Attention` if r is 0.
        """
        positions = own.shape[-1]
        queries = own[..., positions - count :, None]
        past = torch.ones(count, positions, dtype=torch.bool, device=own.device).tril(positions - count)
        past = past.expand(*queries.shape[:-1], positions)
        if not self.attends_across_documents:
            past = past & (own[..., None, :] == queries)
        if not self.cross_patch_bytes:
            return past.flatten(0, 1)[:, None]
        return torch.cat([before[..., None, :] == queries, past], -1)

    def condition(self, global_out: Tensor) -> Tensor:
        """Map (n, P·D_G) global outputs to (n, P, D_L): w^GL on each byte's slice, plus local positions."""
        conditioned = self.global_to_local(global_out.view(-1, self.patch_size, self.byte_width))
        return conditioned if self.local_positions is None else conditioned + self.local_positions

    def embed_locally(self, before: Tensor) -> Tensor:
        """Map the (n, p) first ids of patches to (n, p + 1, D_L): the local pad, then their embeddings."""
        pad = self.local_pad.expand(before.shape[0], 1, -1)
        return torch.cat([pad, self.local_embedding(before)], 1)

    def head_weights(self) -> tuple[Tensor, None]:
        """Return the local embedding table (equation 6)."""
        return self.local_embedding.weight, None

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks of the global and of the local model."""
        return {"global": units_of(self.global_stack), "local": units_of(self.local_stack)}

    def head_norm(self) -> nn.Module | None:
        """Return the norm after the last block of the local model."""
        return self.local_stack.norm

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "MegabyteDecoder":
        """Return a new decoder of `rows` rows."""
        return MegabyteDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        patches, P = -(-length // self.patch_size), self.patch_size
        local_width = self.local_stack.width
        per_byte = 2 * local_width * (self.byte_width + VOCABULARY)
        per_patch = self.local_stack.flops(P, pairs=P * (self.cross_patch_bytes + P)) + P * per_byte
        encoder = self.patch_encoder.flops((patches - 1) * P) if self.patch_encoder is not None else 0
        return self.global_stack.flops(patches) + patches * per_patch + encoder


class CrossPatchAttention(MultiHead):
    """Local attention over a patch and the last `reach` positions of the previous patch (section 2.3.2).

    Positions are rotary and counted from the start of the patch, so angles stay small however long the sequence is. A
    cache therefore holds keys before their rotation. Masked zeros precede patch 0.
    """

    def __init__(self, width: int, heads: int, dropout: float, reach: int) -> None:
        """Build the layer; see `MultiHead`.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            reach: r, the positions of the previous patch that are seen.
        """
        super().__init__(width, heads, dropout)
        self.rotary, self.reach = Rotary(), reach

    def forward(self, x: Tensor, cache: LayerCache | None, visible: "Tensor | BlockMask") -> Tensor:
        """Map (rows·K, n, width) to the same shape: K whole patches of each row, or with a cache a part of one patch.

        A block mask is for (rows, K·P, width). Only differences of positions matter, so they need not begin at a patch.

        Args:
            x: input of the layer.
            cache: kept positions of the previous patch, and the earlier positions of this patch.
            visible: (rows, K, n, keys) booleans, true where a position sees a key; K = 1 with a cache. Or blocks.
        """
        q, k, v = self.project(x)
        if not isinstance(visible, Tensor):
            q, k = rotate_alike((q, k), torch.arange(x.shape[1], device=x.device), self.rotary)
            return self.merge(attention(q, k, v, visible))
        if cache is None:
            k, v = self._after_patch_before(k, visible.shape[1]), self._after_patch_before(v, visible.shape[1])
        else:
            if cache.length == 0:
                nothing = k.new_zeros(*k.shape[:2], self.reach, k.shape[3])
                cache.append(nothing, nothing)
            k, v = cache.append(k, v)
        places = torch.arange(-self.reach, k.shape[2] - self.reach, device=x.device)
        q, k = rotate(q, places[-q.shape[2] :], self.rotary), rotate(k, places, self.rotary)
        return self.merge(attention(q, k, v, visible.flatten(0, 1)[:, None], self.dropout_now, self.context))

    def _after_patch_before(self, x: Tensor, patches: int) -> Tensor:
        """Put the last r positions of the previous patch, of any rank, before each patch; zeros before patch 0.

        Args:
            x: (rows·K, heads, P, d) keys or values.
            patches: K.

        Returns:
            (rows·K, heads, r + P, d)
        """
        x = x.unflatten(0, (-1, patches))
        last = x[:, :, :, -self.reach :]
        before = torch.cat([self.context.halo(last[:, -1:]), last[:, :-1]], 1)
        return torch.cat([before, x], 3).flatten(0, 1)


class MegabyteDecoder:
    """Decoder: the global model runs once a patch, the local model once a byte, both over cached keys and values.

    It rewinds within a patch.

    At the start of a patch, the local caches hold the r last positions of the previous patch; they are empty if r is 0.
    """

    def __init__(self, model: Megabyte, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._global_caches = model.global_stack.empty_caches()
        self._local_caches = model.local_stack.empty_caches()
        nothing = torch.empty(rows, 0, dtype=torch.long, device=model.global_pad.device)
        self._patch = nothing
        """(rows, p) bytes of the current patch."""
        self._patches_before = nothing
        """(rows, n) bytes of the last whole patches that the patch encoder's filters reach."""
        self._conditioning: Tensor
        """(rows, P, D_L) output of the global model for each byte of the patch."""
        self._positions = 0
        """Positions of the current patch that the local model has run over: 0, or p + 1."""
        self._documents_before = nothing
        """(rows, r) document of each last position of the previous patch; 0 is the one in which this patch begins."""
        self._first_conditioning: Tensor
        """(rows, P, D_L) output of the global model for the row's first patch."""
        self._patch_documents = torch.zeros(rows, 1, dtype=torch.long, device=nothing.device)
        """(rows, k) document in which each patch begins, this patch included."""
        self.states = model.local_pad.new_empty(rows, 0, len(model.local_pad))
        """Last hidden states of the last call; see `RewindingDecoder`."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        model, P = self._model, self._model.patch_size
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        model.check_room(ids.shape[1])
        rows, self.length = ids.shape
        patches = self.length // P
        whole, rest = ids[:, : patches * P].long(), ids[:, patches * P :].long()
        global_in = torch.cat([model.global_pad.expand(rows, 1, -1), model.embed_patches(whole, first_position=0)], 1)
        global_out = self._run_globally(global_in, whole)
        self._first_conditioning = model.condition(global_out[:, 0])
        self._remember(whole)
        # Each local layer reaches one patch further back, so only as many patches as layers matter.
        depth = len(model.local_stack.blocks) if model.cross_patch_bytes else 0
        for k in range(max(patches - depth, 0), patches):
            self._begin_patch(global_out[:, k])
            self._read(whole[:, k * P : (k + 1) * P - 1])
            self._patch = whole[:, k * P : (k + 1) * P]
        self._begin_patch(global_out[:, -1])
        self._read(rest)
        self.states = self.states[:, -1:]
        return model.logits(self.states[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        return self.feed(ids[:, None])[:, -1]

    @property
    def most_fed(self) -> int:
        """Return the ids that `feed` takes: those that do not end the patch, or one; see `RewindingDecoder`."""
        return max(min(self._model.patch_size - self._patch.shape[1] - 1, MOST_HEADS), 1)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids in one pass; see `RewindingDecoder.feed`."""
        count = ids.shape[1]
        self._model.check_room(self.length + count)
        self.length += count
        if self._patch.shape[1] + count < self._model.patch_size:
            self._read(ids.long())
        else:
            self._end_patch(ids.long())
        return self._model.logits(self.states)

    def rewind(self, count: int) -> None:
        """Take back ids; see `RewindingDecoder.rewind`."""
        for cache in self._local_caches:
            cache.rewind(count)
        self.length -= count
        self._positions -= count
        self._patch = self._patch[:, : self._patch.shape[1] - count]
        self.states = self.states[:, : self.states.shape[1] - count]

    def _end_patch(self, byte: Tensor) -> None:
        """Read the (rows, 1) last byte of a patch, and the pad of the next patch."""
        model = self._model
        self._patch = torch.cat([self._patch, byte], 1)
        context = torch.cat([self._patches_before, self._patch], 1)
        embedded = model.embed_patches(context, first_position=self.length - context.shape[1])
        self._remember(context)
        self._begin_patch(self._run_globally(embedded[:, -1:], self._patch)[:, 0])
        self._read(byte[:, :0])

    def _run_globally(self, global_in: Tensor, patches: Tensor) -> Tensor:
        """Run the next positions of the global model, which read the (rows, n) bytes of the next whole patches."""
        stack = self._model.global_stack
        if self._model.attends_across_documents:
            return stack(global_in, self._global_caches)
        ends = documents_of(patches)[:, self._model.patch_size - 1 :: self._model.patch_size]
        self._patch_documents = torch.cat([self._patch_documents, self._patch_documents[:, -1:] + ends], 1)
        return stack(global_in, self._global_caches, stack.visible(self._patch_documents, global_in))

    def _remember(self, patches: Tensor) -> None:
        """Keep the bytes of (rows, n) whole patches on which the encoding of the next patch depends."""
        self._patches_before = patches[:, max(patches.shape[1] - self._model.encoder_context, 0) :]

    def _begin_patch(self, global_out: Tensor) -> None:
        """Begin the patch of a (rows, P·D_G) output of the global model."""
        model, reach = self._model, self._model.cross_patch_bytes
        self._conditioning = model.condition(global_out)
        if reach:
            ends = (self._patch == SEPARATOR).long()
            before = (ends.cumsum(1) - ends - ends.sum(1, keepdim=True))[:, -reach:]
            self._documents_before = F.pad(before, (reach - before.shape[1], 0), value=-1)
            for cache in self._local_caches:
                cache.keep_last(reach)
        else:
            self._local_caches = model.local_stack.empty_caches()
        self._patch, self._positions = self._patch[:, :0], 0

    def _read(self, ids: Tensor) -> None:
        """Run the local model over the next (rows, n) bytes of the current patch.

        The first call of a patch reads the local pad before them. In this call n may be 0.
        """
        model, first = self._model, self._positions
        embedded = model.local_embedding(ids) if first else model.embed_locally(ids)
        self._patch = torch.cat([self._patch, ids], 1)
        self._positions += embedded.shape[1]
        conditioning = self._conditioning[:, first : self._positions]
        if not model.masks_locally:
            visible = visible_after(first, embedded.shape[1], None, ids.device)
            self.states = model.local_stack(conditioning + embedded, self._local_caches, visible)
            return
        own = F.pad(documents_of(self._patch), (1, 0))
        if not model.attends_across_documents:
            of_first = self._first_conditioning[:, first : self._positions]
            conditioning = torch.where((own[:, first:] > 0)[..., None], of_first, conditioning)
        visible = model.local_mask(self._documents_before[:, None], own[:, None], embedded.shape[1])
        self.states = model.local_stack(conditioning + embedded, self._local_caches, visible)


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a MEGABYTE with a local model of half the width and depth."""
    return {"global_model": size.stack(), "local_model": size.stack(2), "initial_std": 0.02}


register_family(
    Family(
        name="megabyte",
        reference=REFERENCES / "megabyte.py",
        config=MegabyteConfig,
        build=Megabyte,
        free_fields=frozenset({"dropout", "initial_std", "pack_patches"}),
        row_parts=lambda config: config.sequence_length // config.patch_size,
        is_default=True,
        of_size=_of_size,
        small={
            "sequence_length": 32,
            "patch_size": 4,
            "global_model": {"width": 32, "layers": 2, "heads": 2},
            "local_model": {"width": 16, "layers": 2, "heads": 2},
            "activation": "gelu",
            "dropout": 0.1,
            "initial_std": 0.05,
        },
    )
)
