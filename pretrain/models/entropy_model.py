r"""Model of bytes whose uncertainty decides where the patches of another model start.

    export ─▶ config and weights, in fp32 ─▶ logits of every position ─▶ entropies ─▶ patching/entropy.py

The model is no module of the other one: it is not trained, sharded, cast or saved with it. Each process has a copy on
its device. Its weights are those of an export with a digest, which a run and its exports have copies of.

With contexts, which are documents or lines, the model reads SEPARATOR before each context, also before the first one of
a row. An entropy then depends on its context alone, and not on the row around it:

    positions of the row     start  T  h  e  \n  c  a  t
    the model reads          SEP    T  h  e  SEP c  a  t        reset_at_newlines
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.corpus.entropies import EntropiesKey
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.base import ByteModel, Decoder
from pretrain.models.blocks.nats import chunk_size
from pretrain.models.patching.config import ByteClassConfig, FixedConfig, build_patcher
from pretrain.models.patching.entropy import ByteDecoder, Entropy, EntropyConfig, entropy_of
from pretrain.models.patching.frozen import FrozenModelError, frozen_config, frozen_weights
from pretrain.models.patching.patcher import Patcher
from pretrain.models.registry import build_model, carries_memory, model_config

NEWLINE = 10
"""Byte that ends a line."""
BEFORE_CONTEXT = 2
"""Ids that rows may have beyond the model's length: SEPARATOR before them, and one more if the length is odd."""


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


def stored_entropies_of(config: object) -> EntropiesKey | None:
    """Return which entropies beside its corpora a model reads in training, given its config; None if it reads none."""
    patcher = getattr(config, "patcher", None)
    return stored_key(patcher) if isinstance(patcher, EntropyConfig) and patcher.entropies == "corpus" else None


def stored_key(config: EntropyConfig) -> EntropiesKey:
    """Return what names the entropies of a model of bytes beside a corpus.

    Raises:
        FrozenModelError: its export is gone.
    """
    if config.digest is None:
        frozen_config(config.model, None)
    return EntropiesKey(str(config.digest), config.reset_at_newlines)


def example_of(patcher: Patcher, ids: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return made-up arguments of a forward pass, with made-up entropies if a model reads those beside its corpora."""
    is_stored = isinstance(patcher, Entropy) and patcher.config.entropies == "corpus"
    return ids, torch.zeros(ids.shape, dtype=torch.float16, device=ids.device) if is_stored else given


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
        self._has_contexts, self.resets = config.has_contexts, config.reset_at_newlines
        across_documents = across_documents and not self._has_contexts
        self._tree = frozen_config(config.model, config.digest)
        patcher = self._tree.get("patcher")
        if isinstance(patcher, dict) and "model" in patcher:
            raise FrozenModelError(
                f"{self._place} has patches by entropy itself, and a model whose entropies decide cannot have such "
                "patches; name a model of bytes without them, such as a small transformer"
            )
        if not across_documents and "attention_across_documents" in self._tree:
            self._tree = self._tree | {"attention_across_documents": False}
        self.longest = int(self._tree["sequence_length"])
        """Bytes that the model reads at once."""
        self._models: dict[torch.device, ByteModel] = {}
        self._check(length, across_documents=across_documents)
        if self._has_contexts:
            self._check_places()
            self._tree = self._tree | {"sequence_length": self.longest + BEFORE_CONTEXT}
            self._models.clear()

    @property
    def reach(self) -> int | None:
        """Bytes before a byte that the prediction of it depends on; None: all. The model has contexts."""
        window = self._tree.get("window")
        return None if window is None else int(self._tree["layers"] * (window - 1) + 1)

    def entropies(self, read: Tensor) -> Tensor:
        """Map (rows, n) ids that positions of whole rows read to (rows, n) fp32 entropies of what follows, in nats."""
        if self._has_contexts:
            return self.of_ids(F.pad(self._in_contexts(read), (0, 1), value=PADDING))[:, 1:]
        return self.of_ids(F.pad(read[:, 1:], (0, 1), value=PADDING))

    def of_ids(self, ids: Tensor) -> Tensor:
        """Map (rows, n) ids to (rows, n) fp32 entropies of their predictions, each from the ids before it, in nats."""
        with torch.no_grad():
            found: Tensor = self.on(ids.device)(ids)
        return found

    def decoder(self, rows: int, device: torch.device) -> ByteDecoder:
        """Return a new decoder of `rows` rows."""
        decoder = self.on(device).decoder(rows)
        return _ContextDecoder(decoder, self._in_contexts) if self._has_contexts else decoder

    def _in_contexts(self, ids: Tensor) -> Tensor:
        """Return ids in which SEPARATOR begins every context."""
        return ids.masked_fill(ids == NEWLINE, SEPARATOR) if self.resets else ids

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over one row."""
        return self.on(torch.device("meta")).flops(length)

    def weight_bytes(self) -> int:
        """Return the bytes of the weights on a device, in fp32."""
        return sum(parameter.nbytes for parameter in self.on(torch.device("meta")).parameters())

    def on(self, device: torch.device) -> ByteModel:
        """Return the model on a device, whose forward pass returns entropies in place of nats; see `Uncertainty`."""
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

    def _check_places(self) -> None:
        """Check that predictions do not depend on the place of a context in its row.

        Raises:
            FrozenModelError: they do.
        """
        tree = self._tree
        by_distance = tree.get("positions") == "rotary" and tree.get("attention") == "full"
        if tree["family"] == "mamba" or (tree["family"] == "transformer" and by_distance):
            return
        raise FrozenModelError(
            f"{self._place} has a {tree['family']} whose predictions depend on the place in a row, and patcher."
            "reset_at_newlines and patcher.entropies: corpus need a model that begins again anywhere; take a "
            "transformer with positions: rotary and attention: full, or a mamba"
        )


class _ContextDecoder:
    """Decoder that reads SEPARATOR before each context."""

    def __init__(self, decoder: Decoder, in_contexts: Callable[[Tensor], Tensor]) -> None:
        self._decoder, self._in_contexts = decoder, in_contexts

    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; return the logits of the next id."""
        return self._decoder.prime(F.pad(self._in_contexts(ids), (1, 0), value=SEPARATOR))

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; return the logits of the next id."""
        return self._decoder.step(self._in_contexts(ids))


class _Entropies:
    """Function in place of `ByteModel.nats` that returns the entropies of all predictions."""

    def __init__(self, model: ByteModel) -> None:
        self._logits = model.logits

    def __call__(self, states: Tensor, ids: Tensor) -> Tensor:
        """Map (rows, n, width) last hidden states to (rows, n) entropies."""
        parts: Any = states.flatten(0, 1).split(chunk_size(states.device))
        return torch.cat([entropy_of(self._logits(part).float()) for part in parts]).view(ids.shape)
