"""A Byteloom model for transformers, whose forward pass is the plain torch of model.py.

    input_ids ─▶ windows that the model can read ─▶ model.py ─▶ logits of the next id at every position

The forward pass has no cache: `generate` reads the whole context for each byte.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pretrain.models.references.transformer import Model

from .configuration_byteloom import ByteloomConfig

PADDING = 257
IGNORED = -100
"""Label of a position that does not count in the loss."""


@dataclass
class ByteloomOutput(CausalLMOutput):
    """Output of the model."""

    prompt_length: int | None = None
    """Argument of the same name, which `generate` passes to the next step."""


class ByteloomForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model of bytes 0 to 255, the separator of documents (256) and padding (257).

    Args:
        config: of the model.
    """

    config_class = ByteloomConfig
    main_input_name = "input_ids"

    def __init__(self, config: ByteloomConfig) -> None:
        super().__init__(config)
        for name, shape in config.parameter_shapes.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(last, nn.Parameter(torch.empty(shape)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Set parameters that no file holds: weights of norms to 1, biases to 0, all others to N(0, 0.02)."""
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if name == "weight" and parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name.endswith("bias") and parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        prompt_length: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ByteloomOutput | tuple[Tensor, ...]:
        """Return the logits of the next id at each position, and the loss.

        Args:
            input_ids: (rows, T). A row that is longer than the model can read is read in windows: each begins with the
                last half of the one before it.
            attention_mask: (rows, T), 0 at padding on either side.
            labels: (rows, T) ids, mostly `input_ids` itself; -100 and padding do not count. The loss is that of
                Byteloom's training: the first id is predicted too, from the learned start, and a Perceiver AR scores
                its last latents. In training mode only the loss is computed.
            logits_to_keep: positions at the end whose logits are returned; 0 for all.
            prompt_length: ids before those that `generate` has drawn; `generate` sets it.
            num_items_in_batch: ids that the sum of the losses is divided by; None for those of this batch.
            return_dict: False for a tuple.

        Returns:
            `loss`, if there are labels; `logits`, (rows, T or logits_to_keep, 258).

        Raises:
            ValueError: a row with labels is longer than the model can read.
        """
        loss = None if labels is None else self._loss(input_ids, attention_mask, labels, num_items_in_batch)
        logits = None
        if prompt_length is not None:
            parts = self._by_mask(input_ids, attention_mask)
            pads = input_ids.shape[1]
            nexts = [self._next(ids, prompt_length - (pads - ids.shape[1])) for _, _, ids in parts]
            logits = torch.cat(nexts)[:, None]
        elif loss is None or not self.training:
            logits = self._all_logits(input_ids, attention_mask)[:, -logits_to_keep:]
        if return_dict is False:
            return tuple(value for value in (loss, logits) if value is not None)
        return ByteloomOutput(loss=loss, logits=logits, prompt_length=prompt_length)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next id: the whole context."""
        prompt_length = input_ids.shape[1] if prompt_length is None else prompt_length
        return {"input_ids": input_ids, "attention_mask": attention_mask, "prompt_length": prompt_length}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        """Keep the length of the prompt, besides what transformers keeps."""
        model_kwargs["prompt_length"] = outputs.prompt_length
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **options)

    def _by_mask(self, ids: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return rows without their padding: the numbers of rows, their columns, and their (rows, n) ids."""
        rows, columns = (torch.arange(size, device=ids.device) for size in ids.shape)
        if mask is None or bool(mask.all()):
            return [(rows, columns, ids)]
        chosen = [(row, columns[mask[row].bool()]) for row in rows]
        return [(row[None], own, ids[row, own][None]) for row, own in chosen]

    def _all_logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return (rows, T, 258) logits of the next id; 0 at padding."""
        parts = [(rows, columns, self._predictions(own)) for rows, columns, own in self._by_mask(ids, mask)]
        if len(parts) == 1 and len(parts[0][1]) == ids.shape[1]:
            return parts[0][2]
        logits = parts[0][2].new_zeros(*ids.shape, parts[0][2].shape[-1])
        for rows, columns, own in parts:
            logits[rows[:, None], columns] = own
        return logits

    def _loss(self, ids: Tensor, mask: Tensor | None, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Return the mean negative log-likelihood of the labels, in nats."""
        total, count = ids.new_zeros((), dtype=torch.float32), 0
        for rows, columns, own in self._by_mask(ids, mask):
            logits = self._row_logits(own).float()
            targets = labels[rows[:, None], columns[-logits.shape[1] :]]
            targets = targets.masked_fill(targets == PADDING, IGNORED)
            total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            count += int((targets != IGNORED).sum())
        return total / (max(count, 1) if items is None else items)

    def _row_logits(self, ids: Tensor) -> Tensor:
        """Return the (rows, n, 258) logits of the last n ids, given the ids before them: those that training scores."""
        with ids.device:
            reference = self._reference()
            if hasattr(reference, "segment"):
                return self._segments(reference, ids)
            if ids.shape[1] > self._length:
                raise ValueError(
                    f"a row with labels has {ids.shape[1]} ids, and the model reads {self._length}; cut it into rows"
                )
            return reference.logits(ids)

    def _predictions(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to the (rows, T, 258) logits of the ids that follow them."""
        with ids.device:
            reference = self._reference()
            padded = F.pad(ids, (0, 1), value=PADDING)  # the last id is predicted, and not read
            if hasattr(reference, "segment"):
                return self._segments(reference, padded)[:, 1:]
            if "latents" not in self.config.byteloom:
                return torch.cat(self._windows(reference, padded), 1)
            # The id after the row has latents of its own, or it would shift those of the row.
            return torch.cat([*self._windows(reference, ids), self._next(ids, ids.shape[1])[:, None]], 1)

    def _windows(self, reference: Any, ids: Tensor) -> list[Tensor]:
        """Return the logits of all ids but the first, in parts along the row."""
        length, kept = self._length, self._length // 2
        parts = self._window(reference, ids[:, :length], 1)
        for begin in range(length - kept, ids.shape[1] - kept, length - kept):
            parts += self._window(reference, ids[:, begin : begin + length], kept)
        return parts

    def _window(self, reference: Any, ids: Tensor, first: int) -> list[Tensor]:
        """Return the logits of the ids of a row from `first` on, in parts: a model with latents scores N ids a pass."""
        step = self.config.byteloom.get("latents", ids.shape[1])
        ends = [min(begin + step, ids.shape[1]) for begin in range(first, ids.shape[1], step)]
        begins = [first, *ends[:-1]]
        return [reference.logits(ids[:, :end])[:, begin - end :] for begin, end in zip(begins, ends, strict=True)]

    def _segments(self, reference: Any, ids: Tensor) -> Tensor:
        """Return the logits of all ids of rows whose segments carry a memory."""
        memory, parts = reference.empty_memory(len(ids)), []
        for segment in ids.split(self._length, 1):
            logits, memory = reference.segment(segment, memory)
            parts.append(logits)
        return torch.cat(parts, 1)

    def _next(self, ids: Tensor, prompt_length: int) -> Tensor:
        """Return the (rows, 258) logits of the id after a context, as Byteloom's decoder computes them."""
        with ids.device:
            reference = self._reference()
            if hasattr(reference, "segment"):
                return self._segments(reference, F.pad(ids, (0, 1), value=PADDING))[:, -1]
            context, latents = self._decoder_state(ids.shape[1], prompt_length)
            reference = self._reference(latents)
            return reference.logits(F.pad(ids[:, ids.shape[1] - context :], (0, 1), value=PADDING))[:, -1]

    def _decoder_state(self, length: int, prompt_length: int) -> tuple[int, int]:
        """Return how many ids Byteloom's decoder has read, and its latents, after a prompt and drawn ids.

        A full context begins again with its last half. Full latents begin again with half of them.
        """
        most = self.config.byteloom.get("latents", 1)
        half = self._length // 2
        context = prompt_length if prompt_length < self._length else half
        latents = min(most, context + 1)
        for _ in range(length - prompt_length):
            if context + 1 < self._length:
                context += 1
                latents = latents + 1 if latents < most else max(1, most // 2)
            else:
                context = half
                latents = min(most, context + 1)
        return context, latents

    def _reference(self, latents: int | None = None) -> Model:
        """Return the forward pass of model.py with this model's parameters."""
        config = self.config.byteloom
        if latents is not None and "latents" in config:
            config = {**config, "latents": latents}
        return Model(config, dict(self.named_parameters()))

    @property
    def _length(self) -> int:
        """Longest row, in ids."""
        return int(self.config.byteloom["sequence_length"])
