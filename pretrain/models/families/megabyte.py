"""MEGABYTE: a global model over patches and a local model over the bytes of each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", arXiv:2305.07185, section
2.2. T bytes, patch size P, K = T/P patches, D_G = global width / P, D_L = local width:

    ids ─ eq. 1 ─▶ bytes (T, D_G) ─ eq. 2 ─▶ patches, one late (K, P·D_G) ─ eq. 3 ─▶ global model
                                                                                  │ w^GL, shared by positions
    ids ─ embedding of the byte before, pad at a patch's start (K, P, D_L) ─────▶ + ─ eq. 4, 5 ─▶ local model
                                                                                  │
                                             tied head, eq. 6: nats of every byte ◀

Row t of the output depends on x_<t alone: the global model on whole patches before its own, the local model on the
bytes before t in its patch. Linear maps have no bias. The two extensions of section 2.3 that change the model are
options: a convolutional patch encoder, and local attention that reaches into the patch before.
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
"""Of the convolutional patch encoder, in order (section 2.3.1)."""


class MegabyteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """MEGABYTE (arXiv:2305.07185)."""

    family: Literal["megabyte"] = "megabyte"
    """Which model; each family has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context; a multiple of the patch size."""
    patch_size: int = Field(default=8, ge=1)
    """P: bytes of a patch. The global model works once a patch; the paper uses 8 for text, 192 for images, 32 for
    sound."""
    global_model: StackConfig
    """The model over patches. Its width is P times the width D_G of a byte in it."""
    local_model: StackConfig
    """The model over the bytes of one patch; runs for all patches at once."""
    positions: Literal["learned", "rotary"] = "learned"
    """How places are told: learned tables (T of them for the global model as in equation 1, P for the local one), or
    rotary angles in every attention layer of both."""
    patch_encoder: Literal["embedding", "convolution"] = "embedding"
    """How bytes enter the global model: embeddings as in equation 1, or those after causal convolutions with filters of
    3, 5 and 7 bytes (section 2.3.1). The paper gives neither channels nor activation: each here has D_G channels, relu,
    and a residual connection."""
    cross_patch_bytes: int = Field(default=0, ge=0)
    """r: last positions of the patch before that local attention sees too, in every layer, unless their document has
    ended (section 2.3.2; the paper does not give its r). Local attention is then rotary, beside learned tables if there
    are any. 0: a patch sees itself alone."""
    activation: Activation = "relu"
    """Of the feed-forward layers; the paper's is relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of attention weights and of what each layer adds to the residual stream; embeddings have none."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights, a normal distribution cut at two deviations (the paper's 0.006)."""

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
    """MEGABYTE over bytes."""

    patch_size: int

    def __init__(self, config: MegabyteConfig) -> None:
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
        return Initial(self.initial_std)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        self.check_length(length)
        ids = F.pad(ids.long(), (0, -length % self.patch_size), value=PADDING)
        patches = self.embed_patches(ids[:, : -self.patch_size], first_position=0)
        global_in = torch.cat([self.global_pad.expand(rows, 1, -1), patches], 1)
        states = self.decode_patches(ids, self.global_stack(global_in))
        return self.nats(states, ids)[:, :length]

    def embed_patches(self, ids: Tensor, first_position: int) -> Tensor:
        """Bytes to patches (equation 1, the patch encoder, and the grouping of equation 2).

        Args:
            ids: (rows, n) whole patches; n may be 0. A patch encoder's filters see zeros before them.
            first_position: of ids[:, 0] in its row.
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
        """The local model on every patch at once (equations 4 and 5).

        Args:
            ids: (rows, K·P); the last byte of a patch is not read.
            global_out: (rows, K, P·D_G)
        Returns:
            (rows, K·P, D_L) what the logits are a linear map of
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
        """(rows, K·P) ids to the (rows, K, P, r + P) mask of `CrossPatchAttention`."""
        ended = (ids[:, :-1] == SEPARATOR).cumsum(1)
        documents = F.pad(ended, (1, 0)).unflatten(1, (-1, self.patch_size))
        before = documents[:, :-1, -self.cross_patch_bytes :]
        return visible_positions(F.pad(before, (0, 0, 1, 0), value=-1), documents, self.patch_size)

    def condition(self, global_out: Tensor) -> Tensor:
        """w^GL on each byte's slice of the global output, and local positions: (n, P·D_G) to (n, P, D_L)."""
        conditioned = self.global_to_local(global_out.view(-1, self.patch_size, self.byte_width))
        return conditioned if self.local_positions is None else conditioned + self.local_positions

    def embed_locally(self, before: Tensor) -> Tensor:
        """The local pad and the embeddings of a patch's first bytes: (n, p) ids to (n, p + 1, D_L)."""
        pad = self.local_pad.expand(before.shape[0], 1, -1)
        return torch.cat([pad, self.local_embedding(before)], 1)

    def head_weights(self) -> tuple[Tensor, None]:
        """The local embedding table itself (equation 6)."""
        return self.local_embedding.weight, None

    def stacks(self) -> dict[str, list[Unit]]:
        return {"global": units_of(self.global_stack), "local": units_of(self.local_stack)}

    def scored(self, length: int) -> slice:
        return slice(0, length)

    def decoder(self, rows: int) -> "MegabyteDecoder":
        return MegabyteDecoder(self, rows)

    def flops(self, length: int) -> int:
        patches, P = -(-length // self.patch_size), self.patch_size
        local_width = self.local_stack.width
        per_byte = 2 * local_width * (self.byte_width + VOCABULARY)
        per_patch = self.local_stack.flops(P, pairs=P * (self.cross_patch_bytes + P)) + P * per_byte
        encoder = self.patch_encoder.flops((patches - 1) * P) if self.patch_encoder is not None else 0
        return self.global_stack.flops(patches) + patches * per_patch + encoder


class PatchEncoder(nn.Module):
    """x + relu(convolution(x)) for causal filters of growing size (section 2.3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv1d(width, width, size, bias=False) for size in FILTER_SIZES)

    @property
    def reach(self) -> int:
        """Positions before its own that an output depends on."""
        return sum(size - 1 for size in FILTER_SIZES)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, n, width) to the same; row t depends on x up to t."""
        if not x.shape[1]:
            return x
        x = x.transpose(1, 2)
        for size, causal_filter in zip(FILTER_SIZES, self.filters, strict=True):
            x = x + F.relu(causal_filter(F.pad(x, (size - 1, 0))))
        return x.transpose(1, 2)

    def flops(self, length: int) -> int:
        return 2 * length * sum(p.numel() for p in self.parameters())


class CrossPatchAttention(MultiHead):
    """Local attention over a patch's own positions and the last `reach` of the patch before (section 2.3.2).

    Rotary, with positions counted from the patch's first, so that angles stay small however long the sequence is. Keys
    are therefore unrotated in a cache. Before patch 0 there are zeros, which are masked.
    """

    def __init__(self, width: int, heads: int, dropout: float, reach: int) -> None:
        super().__init__(width, heads, dropout)
        self.rotary, self.reach = Rotary(), reach

    def forward(self, x: Tensor, cache: LayerCache | None, visible: Tensor) -> Tensor:
        """(rows·K, n, width) to the same: K whole patches of each row, or with a cache a part of one patch.

        Args:
            cache: what was kept of the patch before, and this patch's positions so far.
            visible: (rows, K, n, keys) which keys each position sees; K = 1 with a cache.
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
        """(rows·K, heads, P, d) to (rows·K, heads, r + P, d); zeros before patch 0."""
        x = x.unflatten(0, (-1, patches))
        before = F.pad(x[:, :-1, :, -self.reach :], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([before, x], 3).flatten(0, 1)


def visible_positions(before: Tensor, own: Tensor, count: int) -> Tensor:
    """What the last `count` positions of a patch see: their own patch's past, and of the patch before their document.

    Args:
        before: (rows, K, r) the document that each position of the patch before is in.
        own: (rows, K, n) the same of the patch itself. A position is in the document of the byte it predicts, and a
            separator is the last id of its own.
    Returns:
        (rows, K, count, r + n) booleans
    """
    positions = own.shape[-1]
    same_document = before[..., None, :] == own[..., positions - count :, None]
    past = torch.ones(count, positions, dtype=torch.bool, device=own.device).tril(positions - count)
    return torch.cat([same_document, past.expand(*same_document.shape[:-1], positions)], -1)


class MegabyteDecoder:
    """Byte by byte: the global model runs once a patch, the local model once a byte, both over cached keys and values.

    The local caches begin each patch with the r positions that they keep of the patch before, and anew if r is 0.
    """

    def __init__(self, model: Megabyte, rows: int) -> None:
        self.length = 0
        self._model = model
        self._global_caches = model.global_stack.empty_caches()
        self._local_caches = model.local_stack.empty_caches()
        nothing = torch.empty(rows, 0, dtype=torch.long, device=model.global_pad.device)
        self._patch = nothing
        """(rows, p) bytes of the patch under way."""
        self._patches_before = nothing
        """(rows, n) bytes of the last patches, as far as the patch encoder's filters reach."""
        self._conditioning: Tensor
        """(rows, P, D_L) what the global model says to each byte of the patch."""
        self._positions = 0
        """Of the patch under way that the local model has run over: none, or p + 1."""
        self._documents_before = nothing
        """(rows, r) documents of the patch before's last positions; the one that this patch begins in is 0."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
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
        # Each layer takes keys and values one patch further back, so no more patches than layers have a say.
        depth = len(model.local_stack.blocks) if model.cross_patch_bytes else 0
        for k in range(max(patches - depth, 0), patches):
            self._begin_patch(global_out[:, k])
            self._read(whole[:, k * P : (k + 1) * P - 1])
            self._patch = whole[:, k * P : (k + 1) * P]
        self._begin_patch(global_out[:, -1])
        return self._read(rest)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
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
        """Of (rows, n) bytes of whole patches, those that the next patch's encoding depends on."""
        P, encoder = self._model.patch_size, self._model.patch_encoder
        kept = -(-encoder.reach // P) * P if encoder is not None else 0
        self._patches_before = patches[:, max(patches.shape[1] - kept, 0) :]

    def _begin_patch(self, global_out: Tensor) -> None:
        """Takes up the patch that (rows, P·D_G) of the global model's output is for."""
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
        """The local model over the next (rows, n) bytes of the patch under way; logits of the id after them.

        The first call of a patch, in which n may be 0, reads the local pad before them.
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
