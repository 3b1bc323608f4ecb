"""MEGABYTE: a global model over patches and a local model over the bytes of each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", arXiv:2305.07185, section
2.2. T bytes, patch size P, K = T/P patches, D_G = global width / P, D_L = local width:

    ids ─ eq. 1 ─▶ bytes (T, D_G) ─ eq. 2 ─▶ patches, one late (K, P·D_G) ─ eq. 3 ─▶ global model
                                                                                  │ w^GL, shared by positions
    ids ─ embedding of the byte before, pad at a patch's start (K, P, D_L) ─────▶ + ─ eq. 4, 5 ─▶ local model
                                                                                  │
                                             tied head, eq. 6: nats of every byte ◀

Row t of the output depends on x_<t alone: the global model on whole patches before its own, the local model on the
bytes before t in its patch. Linear maps have no bias.
"""

from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.models.byte_model import ByteModel
from pretrain.models.layers import Activation, Attention, LayerCache, Rotary, Stack, StackConfig


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
        return self


class Megabyte(ByteModel):
    def __init__(self, config: MegabyteConfig) -> None:
        super().__init__()
        self.sequence_length = config.sequence_length
        self.patch_size = config.patch_size
        self.initial_std = config.initial_std
        self.byte_width = config.global_model.width // config.patch_size
        rotary = Rotary() if config.positions == "rotary" else None
        attention = partial(Attention, rotary=rotary)

        self.global_embedding = nn.Embedding(VOCABULARY, self.byte_width)
        self.global_pad = nn.Parameter(torch.empty(config.global_model.width))
        self.global_stack = Stack(config.global_model, config.activation, config.dropout, attention)
        self.global_to_local = nn.Linear(self.byte_width, config.local_model.width, bias=False)
        self.local_embedding = nn.Embedding(VOCABULARY, config.local_model.width)
        self.local_pad = nn.Parameter(torch.empty(config.local_model.width))
        self.local_stack = Stack(config.local_model, config.activation, config.dropout, attention)
        self.global_positions: nn.Parameter | None = None
        self.local_positions: nn.Parameter | None = None
        if rotary is None:
            self.global_positions = nn.Parameter(torch.empty(config.sequence_length, self.byte_width))
            self.local_positions = nn.Parameter(torch.empty(config.patch_size, config.local_model.width))
        self.initialize()

    def initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                bound = 2 * self.initial_std
                nn.init.trunc_normal_(parameter, std=self.initial_std, a=-bound, b=bound)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        if length > self.sequence_length:
            raise ValueError(f"a row of {length} bytes is longer than the model's {self.sequence_length}")
        ids = F.pad(ids.long(), (0, -length % self.patch_size), value=PADDING)
        patches = self.embed_patches(ids[:, : -self.patch_size], first_position=0)
        global_in = torch.cat([self.global_pad.expand(rows, 1, -1), patches], 1)
        logits = self.decode_patches(ids, self.global_stack(global_in))
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        return nats.view(rows, -1)[:, :length]

    def embed_patches(self, ids: Tensor, first_position: int) -> Tensor:
        """Bytes to patches (equation 1, and the grouping of equation 2).

        Args:
            ids: (rows, n) whole patches; n may be 0.
            first_position: of ids[:, 0] in its row.
        Returns:
            (rows, n/P, P·D_G)
        """
        embedded = self.global_embedding(ids)
        if self.global_positions is not None:
            embedded = embedded + self.global_positions[first_position : first_position + ids.shape[1]]
        return embedded.view(ids.shape[0], -1, self.patch_size * self.byte_width)

    def decode_patches(self, ids: Tensor, global_out: Tensor) -> Tensor:
        """The local model on every patch at once (equations 4 to 6).

        Args:
            ids: (rows, K·P); the last byte of a patch is not read.
            global_out: (rows, K, P·D_G)
        Returns:
            (rows, K·P, VOCABULARY) logits
        """
        rows, length = ids.shape
        before = ids.view(-1, self.patch_size)[:, :-1]
        local_in = self.condition(global_out.flatten(0, 1)) + self.embed_locally(before)
        local_out = self.local_stack(local_in)
        return self.head(local_out).view(rows, length, VOCABULARY)

    def condition(self, global_out: Tensor) -> Tensor:
        """w^GL on each byte's slice of the global output, and local positions: (n, P·D_G) to (n, P, D_L)."""
        conditioned = self.global_to_local(global_out.view(-1, self.patch_size, self.byte_width))
        return conditioned if self.local_positions is None else conditioned + self.local_positions

    def embed_locally(self, before: Tensor) -> Tensor:
        """The local pad and the embeddings of a patch's first bytes: (n, p) ids to (n, p + 1, D_L)."""
        pad = self.local_pad.expand(before.shape[0], 1, -1)
        return torch.cat([pad, self.local_embedding(before)], 1)

    def head(self, local_out: Tensor) -> Tensor:
        """Logits from the local embedding table itself (equation 6)."""
        return F.linear(local_out, self.local_embedding.weight)

    def scored(self, length: int) -> slice:
        return slice(0, length)

    def decoder(self, rows: int) -> "MegabyteDecoder":
        return MegabyteDecoder(self, rows)

    def flops(self, length: int) -> int:
        patches = -(-length // self.patch_size)
        local_width = self.local_stack.width
        per_byte = 2 * local_width * (self.byte_width + VOCABULARY)
        per_patch = self.local_stack.flops(self.patch_size) + self.patch_size * per_byte
        return self.global_stack.flops(patches) + patches * per_patch


class MegabyteDecoder:
    """Byte by byte: the global model runs once a patch, the local model once a byte, both over cached keys and values.

    The local caches begin anew with each patch.
    """

    def __init__(self, model: Megabyte, rows: int) -> None:
        self.length = 0
        self._model = model
        self._global_caches = model.global_stack.empty_caches()
        device = model.global_pad.device
        self._patch = torch.empty(rows, 0, dtype=torch.long, device=device)
        """(rows, p) bytes of the patch under way."""
        self._conditioning: Tensor
        """(rows, P, D_L) what the global model says to each byte of the patch."""
        self._local_caches: list[LayerCache]

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        model, P = self._model, self._model.patch_size
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._check_room(ids.shape[1])
        rows, self.length = ids.shape
        whole = self.length // P * P
        patches = model.embed_patches(ids[:, :whole].long(), first_position=0)
        self._begin_patch(torch.cat([model.global_pad.expand(rows, 1, -1), patches], 1))
        self._patch = ids[:, whole:].long()
        return self._logits(self._conditioning[:, : self.length - whole + 1] + model.embed_locally(self._patch))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        model, P = self._model, self._model.patch_size
        self._check_room(self.length + 1)
        self.length += 1
        self._patch = torch.cat([self._patch, ids.long()[:, None]], 1)
        place = self._patch.shape[1]
        if place < P:
            return self._logits(self._conditioning[:, place : place + 1] + model.local_embedding(self._patch[:, -1:]))
        self._begin_patch(model.embed_patches(self._patch, first_position=self.length - P))
        self._patch = self._patch[:, :0]
        return self._logits(self._conditioning[:, :1] + model.embed_locally(self._patch))

    def _check_room(self, length: int) -> None:
        if length >= self._model.sequence_length:
            raise ValueError(
                f"the context is full: {length} bytes leave none to predict of {self._model.sequence_length}"
            )

    def _begin_patch(self, global_in: Tensor) -> None:
        global_out = self._model.global_stack(global_in, self._global_caches)
        self._conditioning = self._model.condition(global_out[:, -1])
        self._local_caches = self._model.local_stack.empty_caches()

    def _logits(self, local_in: Tensor) -> Tensor:
        return self._model.head(self._model.local_stack(local_in, self._local_caches)[:, -1])
