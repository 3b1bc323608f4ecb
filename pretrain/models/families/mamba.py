"""Mamba-2 over bytes: the recurrent baseline, as MambaByte (arXiv:2401.13660) is with Mamba-1.

    learned start, then ids shifted by one (T, D) ─▶ x + mamba2(norm(x)), layer by layer ─▶ norm ─▶ tied head

A layer keeps a state of fixed size instead of keys and values, so a step of generation costs the same at any length,
and a decoder has no end. Layers: Dao and Gu, arXiv:2405.21060.
"""

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.kernels.mamba2 import Kernel
from pretrain.models.base import ByteModel
from pretrain.models.blocks.context import Dropout
from pretrain.models.blocks.documents import documents_of
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.mamba2 import TAPS, Mamba2, MambaState
from pretrain.models.blocks.multi_byte import MOST_HEADS, PredictsFurther
from pretrain.models.blocks.norms import RMSNorm
from pretrain.models.blocks.transformer import linear_weights
from pretrain.models.blocks.unit import Unit, run_unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family


class MambaConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Mamba-2 over bytes."""

    family: Literal["mamba"] = "mamba"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence. Generation continues past it."""
    width: int = Field(ge=1)
    """Channels of the residual stream."""
    layers: int = Field(ge=0)
    """Mamba-2 layers. Two have about as many weights as one Transformer block of the same width."""
    head_width: int = Field(default=64, ge=1)
    """Channels of a head, which share a decay; divides expansion x width."""
    state: int = Field(default=128, ge=1)
    """Numbers that the state has for each inner channel."""
    expansion: int = Field(default=2, ge=1)
    """Inner channels by channel of the residual stream."""
    chunk: int = Field(default=64, ge=1)
    """Positions that training computes by products, between two steps of the recurrence. It changes the work, not the
    result."""
    attention_across_documents: bool = True
    """Whether the state passes into the next document of its row. If not, it is 0 again after a separator. Other
    families have the field for attention."""
    kernel: Kernel = "plain"
    """Kernels of whole rows on CUDA. fused: those of mamba-ssm and causal-conv1d, without which training is refused.
    auto: fused where possible. The result is the same except for rounding. fused has not been run on a GPU yet."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each layer's output that training drops. The authors' code has no dropout."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial embeddings and linear maps. They are normal, cut at two deviations. Maps into
    the residual stream have it divided by the square root of the number of layers."""

    @model_validator(mode="after")
    def _heads_divide_inner(self) -> Self:
        if self.expansion * self.width % self.head_width:
            raise ValueError(
                f"head_width ({self.head_width}) does not divide expansion x width ({self.expansion * self.width})"
            )
        return self


class MambaBlock(Unit):
    """Pre-norm block: x + mamba2(norm(x))."""

    def __init__(self, config: MambaConfig) -> None:
        """Build the norm and the layer."""
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.mixer = Mamba2(
            config.width, config.head_width, config.state, config.expansion, config.chunk, config.kernel
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, state: MambaState | None = None, documents: Tensor | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape; see `Mamba2.forward` for the arguments."""
        return x + self.dropout(self.mixer(self.norm(x), state, documents))


class Mamba(ByteModel):
    """Mamba-2 over bytes with a tied head."""

    decodes_without_end = True
    rewinds = True

    def __init__(self, config: MambaConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.attends_across_documents = config.attention_across_documents
        self.initial_std = config.initial_std
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution for maps and tables, and PyTorch's default for the convolutions."""
        if ".convolution." in name:
            return Initial(quantile=lambda numbers: (2 * numbers - 1) / math.sqrt(TAPS))
        if name.endswith("contract.weight"):
            return Initial(self.initial_std / math.sqrt(len(self.blocks)))
        return Initial(self.initial_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`."""
        self.check_length(ids.shape[1])
        start = self.start.expand(len(ids), 1, -1)
        x = torch.cat([start, self.embedding(ids[:, :-1].long())], 1)
        documents = None
        if not self.attends_across_documents:
            documents = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.long), documents_of(ids[:, :-1])], 1)
        return self.nats(self.run(x, [None] * len(self.blocks), documents), ids.long())

    def run(self, x: Tensor, states: "list[None] | list[MambaState]", documents: Tensor | None) -> Tensor:
        """Map what positions read to their last hidden states, (rows, n, width) each.

        Args:
            x: input of the first block.
            states: of each block, which it updates; None computes whole rows.
            documents: (rows, n) document of each position; None if states cross documents.
        """
        for block, state in zip(self.blocks, states, strict=True):
            x = run_unit(block, x, state, documents)
        return self.norm(x)

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embedding table, without biases."""
        return self.embedding.weight, None

    def head_norm(self) -> nn.Module | None:
        """Return the norm after the last block."""
        return self.norm

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "MambaDecoder":
        """Return a new decoder of `rows` rows."""
        return MambaDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        scans = sum(layer.scan_flops(length) for layer in self.modules() if isinstance(layer, Mamba2))
        head = 2 * length * self.norm.weight.numel() * VOCABULARY
        return 2 * length * linear_weights(self) + scans + head


class MambaDecoder:
    """Decoder over the states of the layers. It keeps those of the last call, so that it rewinds."""

    def __init__(self, model: Mamba, rows: int) -> None:
        """Make a decoder of `rows` rows before the first byte."""
        self.length = 0
        self._model = model
        self._states = [MambaState() for _ in model.blocks]
        self._documents = torch.zeros(rows, 1, dtype=torch.long, device=model.start.device)
        """(rows, n) document of each position of the last call."""
        self.states = model.start.new_empty(rows, 0, len(model.start))
        """Last hidden states of the last call; see `RewindingDecoder`."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        start = self._model.start.expand(len(ids), 1, -1)
        x = torch.cat([start, self._model.embedding(ids.long())], 1)
        self._run(x, torch.cat([self._documents, documents_of(ids)], 1), ids.shape[1])
        self.states = self.states[:, -1:]
        return self._model.logits(self.states[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        return self.feed(ids[:, None])[:, -1]

    @property
    def most_fed(self) -> int:
        """Return the ids that `feed` takes; see `RewindingDecoder`."""
        return MOST_HEADS

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids in one pass; see `RewindingDecoder.feed`."""
        read = ids.long()
        self._run(self._model.embedding(read), self._documents[:, -1:] + documents_of(read), read.shape[1])
        return self._model.logits(self.states)

    def rewind(self, count: int) -> None:
        """Take back ids; see `RewindingDecoder.rewind`."""
        for state in self._states:
            state.rewind(count)
        self.length -= count
        self.states = self.states[:, : self.states.shape[1] - count]
        self._documents = self._documents[:, : self._documents.shape[1] - count]

    def _run(self, x: Tensor, documents: Tensor, count: int) -> None:
        self.length += count
        self._documents = documents
        within = None if self._model.attends_across_documents else documents
        self.states = self._model.run(x, self._states, within)


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a Mamba-2, two layers for each block."""
    return {"width": size.width, "layers": 2 * size.layers}


register_family(
    Family(
        name="mamba",
        reference=REFERENCES / "mamba.py",
        config=MambaConfig,
        build=Mamba,
        free_fields=frozenset({"chunk", "dropout", "initial_std", "kernel"}),
        of_size=_of_size,
        small={
            "sequence_length": 32,
            "width": 16,
            "layers": 2,
            "head_width": 8,
            "state": 4,
            "chunk": 8,
            "dropout": 0.1,
        },
    )
)
