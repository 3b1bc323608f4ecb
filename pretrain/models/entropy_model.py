"""Model of bytes whose uncertainty decides where the patches of another model start.

    export ─▶ config and weights, in fp32 ─▶ logits of every position ─▶ entropies ─▶ patching/entropy.py

The model is no module of the other one: it is not trained, sharded, cast or saved with it. Each process has a copy on
its device. Its weights are those of an export with a digest, which a run and its exports have copies of.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.vocabulary import PADDING
from pretrain.models.base import ByteModel, Decoder
from pretrain.models.blocks.nats import chunk_size
from pretrain.models.patching.config import ByteClassConfig, FixedConfig, build_patcher
from pretrain.models.patching.entropy import Entropy, EntropyConfig, entropy_of
from pretrain.models.patching.frozen import FrozenModelError, frozen_config, frozen_weights
from pretrain.models.patching.patcher import Patcher
from pretrain.models.registry import build_model, carries_memory, model_config


def patcher_of(
    config: ByteClassConfig | FixedConfig | EntropyConfig, capacity: int, length: int, *, across_documents: bool
) -> Patcher:
    """Return the rule of a config.

    Args:
        config: the rule.
        capacity: patches that a row may have.
        length: bytes of the longest row.
        across_documents: whether patches may depend on earlier documents of their row.

    Raises:
        FrozenModelError: the rule has a model that cannot be used.
    """
    if isinstance(config, EntropyConfig):
        return Entropy(capacity, config, EntropyModel(config, length, across_documents=across_documents))
    return build_patcher(config, capacity)


class EntropyModel:
    """Model of bytes that is not trained; see `Uncertainty`."""

    def __init__(self, config: EntropyConfig, length: int, *, across_documents: bool) -> None:
        """Read the model's config; its weights are read when they are needed.

        Args:
            config: names its export.
            length: bytes of the longest row.
            across_documents: whether entropies may depend on earlier documents of their row.

        Raises:
            FrozenModelError: the model cannot be used.
        """
        self._place = config.model
        self._tree = frozen_config(config.model, config.digest)
        if not across_documents and "attention_across_documents" in self._tree:
            self._tree = self._tree | {"attention_across_documents": False}
        self._models: dict[torch.device, ByteModel] = {}
        self._check(length, across_documents=across_documents)

    def entropies(self, read: Tensor) -> Tensor:
        """Map (rows, n) ids that positions of whole rows read to (rows, n) fp32 entropies of what follows, in nats."""
        with torch.no_grad():
            found: Tensor = self.on(read.device)(F.pad(read[:, 1:], (0, 1), value=PADDING))
        return found

    def decoder(self, rows: int, device: torch.device) -> Decoder:
        """Return a new decoder of `rows` rows."""
        return self.on(device).decoder(rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over one row."""
        return self.on(torch.device("meta")).flops(length)

    def weight_bytes(self) -> int:
        """Return the bytes of the weights on a device, in fp32."""
        return sum(parameter.nbytes for parameter in self.on(torch.device("meta")).parameters())

    def on(self, device: torch.device) -> ByteModel:
        """Return the model on a device, whose forward pass returns entropies in place of nats."""
        if device not in self._models:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):  # first values would be drawn
                model = build_model(model_config(self._tree))
            if device.type != "meta":
                model.to_empty(device=device)
                model.load_state_dict(frozen_weights(self._place))
            model.eval().requires_grad_(False)
            model.nats = _Entropies(model)  # type: ignore[method-assign]
            self._models[device] = model
        return self._models[device]

    def _check(self, length: int, *, across_documents: bool) -> None:
        """Check that entropies of every prefix of a row are exact.

        Raises:
            FrozenModelError: they are not.
        """
        try:
            config = model_config(self._tree)
        except ValidationError as error:
            raise FrozenModelError(f"{self._place} has a model that this version does not build: {error}") from error
        model = self.on(torch.device("meta"))
        if carries_memory(config) or model.scored(length) != slice(0, length) or not hasattr(model, "decoder"):
            raise FrozenModelError(f"{self._place} has a {config.family}, which does not predict every byte of a row")
        if config.sequence_length < length:
            raise FrozenModelError(
                f"{self._place} reads {config.sequence_length:,} bytes at most, and model.sequence_length is "
                f"{length:,}; train it with sequences of this length (a window keeps it small)"
            )
        if model.attends_across_documents and not across_documents:
            raise FrozenModelError(
                f"{self._place} has a {config.family} that sees earlier documents; set "
                "model.attention_across_documents=true, or take another model"
            )


class _Entropies:
    """Function in place of `ByteModel.nats` that returns the entropies of all predictions."""

    def __init__(self, model: ByteModel) -> None:
        self._logits = model.logits

    def __call__(self, states: Tensor, ids: Tensor) -> Tensor:
        """Map (rows, n, width) last hidden states to (rows, n) entropies."""
        parts: Any = states.flatten(0, 1).split(chunk_size(states.device))
        return torch.cat([entropy_of(self._logits(part).float()) for part in parts]).view(ids.shape)
