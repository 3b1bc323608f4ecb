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
"""

from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.models.base import ByteModel, units_of
from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_head import Attention, MultiHead
from pretrain.models.blocks.positions import Rotary, rotate
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.blocks.unit import Unit
from pretrain.models.initial import Initial
from pretrain.models.registry import Family, register_family

FILTER_SIZES = (3, 5, 7)
"""Filter sizes of the convolutional patch encoder, in order (section 2.3.1)."""


class MegabyteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """MEGABYTE (arXiv:2305.07185)."""

    family: Literal["megabyte"] = "megabyte"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context; a multiple of the patch size."""
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
    """r: last positions of the previous patch that local attention also sees, in every layer, unless their document has
    ended (section 2.3.2; the paper does not give its r). Local attention is then rotary, in addition to any learned
    tables. 0: a patch sees only itself."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers; the paper's is relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights, and of the output of each layer, that is dropped in training. Embeddings have no
    dropout."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights, a normal distribution cut at two deviations. The paper's is 0.006."""

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
    evaluation_modes = ByteModel.evaluation_modes | {"strided", "sliding-strided"}

    def __init__(self, config: MegabyteConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.patch_size = config.patch_size
        self.cross_patch_bytes = config.cross_patch_bytes
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
        rows, length = ids.shape
        self.check_length(length)
        ids = F.pad(ids.long(), (0, -length % self.patch_size), value=PADDING)
        patches = self.embed_patches(ids[:, : -self.patch_size], first_position=0)
        global_in = torch.cat([self.global_pad.expand(rows, 1, -1), patches], 1)
        states = self.decode_patches(ids, self.global_stack(global_in))
        return self.nats(states, ids)[:, :length]

    def embed_patches(self, ids: Tensor, first_position: int) -> Tensor:
        """Embed bytes and group them to patches (equation 1, the patch encoder, and the grouping of equation 2).

        Args:
            ids: (rows, n) whole patches; n may be 0. A patch encoder's filters see zeros before them.
            first_position: position of ids[:, 0] in its row.

        Returns:
            (rows, n/P, P·D_G)
        """
        embedded = self.global_embedding(ids)
        if self.global_positions is not None:
            embedded = embedded + self.global_positions[first_position : first_position + ids.shape[1]]
        if self.patch_encoder is not None:
            embedded = self.patch_encoder(embedded)
        return embedded.reshape(ids.shape[0], -1, self.patch_size * self.byte_width)

    def decode_patches(self, ids: Tensor, global_out: Tensor) -> Tensor:
        """Run the local model on every patch at once (equations 4 and 5).

        Args:
            ids: (rows, K·P); the last byte of a patch is not read.
            global_out: (rows, K, P·D_G) outputs of the global model.

        Returns:
            (rows, K·P, D_L) last hidden states.
        """
        rows, length = ids.shape
        before = ids.view(-1, self.patch_size)[:, :-1]
        local_in = self.condition(global_out.flatten(0, 1)) + self.embed_locally(before)
        if self.cross_patch_bytes:
            local_out = self.local_stack(local_in, None, self._visible_across_patches(ids))
        else:
            local_out = self.local_stack(local_in)
        return local_out.view(rows, length, -1)

    def _visible_across_patches(self, ids: Tensor) -> Tensor:
        """Map (rows, K·P) ids to the (rows, K, P, r + P) mask of `CrossPatchAttention`."""
        ended = (ids[:, :-1] == SEPARATOR).cumsum(1)
        documents = F.pad(ended, (1, 0)).unflatten(1, (-1, self.patch_size))
        before = documents[:, :-1, -self.cross_patch_bytes :]
        return visible_positions(F.pad(before, (0, 0, 1, 0), value=-1), documents, self.patch_size)

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

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, n, width) to the same shape; output t depends on x up to position t."""
        if not x.shape[1]:
            return x
        x = x.transpose(1, 2)
        for size, causal_filter in zip(FILTER_SIZES, self.filters, strict=True):
            x = x + F.relu(causal_filter(F.pad(x, (size - 1, 0))))
        return x.transpose(1, 2)

    def flops(self, length: int) -> int:
        """Return the operations of the convolutions over one row of `length` positions."""
        return 2 * length * sum(p.numel() for p in self.parameters())


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

    def forward(self, x: Tensor, cache: LayerCache | None, visible: Tensor) -> Tensor:
        """Map (rows·K, n, width) to the same shape: K whole patches of each row, or with a cache a part of one patch.

        Args:
            x: input of the layer.
            cache: kept positions of the previous patch, and the earlier positions of this patch.
            visible: (rows, K, n, keys) booleans, true where a position sees a key; K = 1 with a cache.
        """
        q, k, v = self.project(x)
        if cache is None:
            k, v = self._after_patch_before(k, visible.shape[1]), self._after_patch_before(v, visible.shape[1])
        else:
            if cache.length == 0:
                nothing = k.new_zeros(*k.shape[:2], self.reach, k.shape[3])
                cache.append(nothing, nothing)
            k, v = cache.append(k, v)
        places = torch.arange(-self.reach, k.shape[2] - self.reach, device=x.device)
        q, k = rotate(q, places[-q.shape[2] :], self.rotary), rotate(k, places, self.rotary)
        return self.merge(attention(q, k, v, visible.flatten(0, 1)[:, None], self.dropout_now))

    def _after_patch_before(self, x: Tensor, patches: int) -> Tensor:
        """Put the last r positions of the previous patch before each patch; zeros before patch 0.

        Args:
            x: (rows·K, heads, P, d) keys or values.
            patches: K.

        Returns:
            (rows·K, heads, r + P, d)
        """
        x = x.unflatten(0, (-1, patches))
        before = F.pad(x[:, :-1, :, -self.reach :], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([before, x], 3).flatten(0, 1)


def visible_positions(before: Tensor, own: Tensor, count: int) -> Tensor:
    """Return the mask of the last `count` positions of a patch.

    They see the earlier positions of their patch, and those positions of the previous patch that are in their document.

    Args:
        before: (rows, K, r) document of each position of the previous patch. A position is in the document of the byte
            that it predicts, and a separator is the last id of its document.
        own: (rows, K, n) document of each position of the patch.
        count: positions that the mask is for.

    Returns:
        (rows, K, count, r + n) booleans.
    """
    positions = own.shape[-1]
    same_document = before[..., None, :] == own[..., positions - count :, None]
    past = torch.ones(count, positions, dtype=torch.bool, device=own.device).tril(positions - count)
    return torch.cat([same_document, past.expand(*same_document.shape[:-1], positions)], -1)


class MegabyteDecoder:
    """Decoder: the global model runs once a patch, the local model once a byte, both over cached keys and values.

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
        global_out = model.global_stack(global_in, self._global_caches)
        self._remember(whole)
        # Each local layer reaches one patch further back, so only as many patches as layers matter.
        depth = len(model.local_stack.blocks) if model.cross_patch_bytes else 0
        for k in range(max(patches - depth, 0), patches):
            self._begin_patch(global_out[:, k])
            self._read(whole[:, k * P : (k + 1) * P - 1])
            self._patch = whole[:, k * P : (k + 1) * P]
        self._begin_patch(global_out[:, -1])
        return self._read(rest)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        model, P = self._model, self._model.patch_size
        model.check_room(self.length + 1)
        self.length += 1
        byte = ids.long()[:, None]
        if self._patch.shape[1] + 1 < P:
            return self._read(byte)
        self._patch = torch.cat([self._patch, byte], 1)
        context = torch.cat([self._patches_before, self._patch], 1)
        embedded = model.embed_patches(context, first_position=self.length - context.shape[1])
        self._remember(context)
        self._begin_patch(model.global_stack(embedded[:, -1:], self._global_caches)[:, 0])
        return self._read(byte[:, :0])

    def _remember(self, patches: Tensor) -> None:
        """Keep the bytes of (rows, n) whole patches on which the encoding of the next patch depends."""
        P, encoder = self._model.patch_size, self._model.patch_encoder
        kept = -(-encoder.reach // P) * P if encoder is not None else 0
        self._patches_before = patches[:, max(patches.shape[1] - kept, 0) :]

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

    def _read(self, ids: Tensor) -> Tensor:
        """Run the local model over the next (rows, n) bytes of the current patch; return the logits of the next id.

        The first call of a patch reads the local pad before them. In this call n may be 0.
        """
        model, first = self._model, self._positions
        embedded = model.local_embedding(ids) if first else model.embed_locally(ids)
        self._patch = torch.cat([self._patch, ids], 1)
        self._positions += embedded.shape[1]
        local_in = self._conditioning[:, first : self._positions] + embedded
        if model.cross_patch_bytes:
            own = F.pad((self._patch == SEPARATOR).cumsum(1), (1, 0))
            visible = visible_positions(self._documents_before[:, None], own[:, None], embedded.shape[1])
            local_out = model.local_stack(local_in, self._local_caches, visible)
        else:
            local_out = model.local_stack(local_in, self._local_caches)
        return model.logits(local_out[:, -1])


register_family(
    Family(
        name="megabyte",
        config=MegabyteConfig,
        build=Megabyte,
        free_fields=frozenset({"dropout", "initial_std"}),
        is_default=True,
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
