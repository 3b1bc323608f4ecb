"""Bytes out of a model, one at a time, through its cached decoder."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.byte_model import ByteModel


class SamplingError(Exception):
    """A sampling option is out of its bounds."""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest byte."""
    top_k: int | None = None
    """Draw from the k likeliest only."""
    top_p: float = 1.0
    """Draw from the likeliest whose probabilities first add up to p."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SamplingError(f"temperature is {self.temperature}; it is at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"top_k is {self.top_k}; it is at least 1")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}; it is more than 0 and at most 1")


def generate(model: ByteModel, prompt: bytes, count: int, sampling: Sampling) -> Iterator[int]:
    """At most `count` bytes that follow the prompt; fewer when the model ends the document.

    When the context is full, decoding goes on with its last half as the prompt of a fresh decoder. A prompt longer than
    the context is cut to its last part in the same way. Neither happens to a model that decodes without end.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    history = list(prompt)
    half = model.sequence_length // 2
    if len(history) >= model.sequence_length and not model.decodes_without_end:
        history = history[len(history) - half :]
    decoder = model.decoder(rows=1)
    logits = decoder.prime(torch.tensor([history], dtype=torch.long, device=device))
    for produced in range(1, count + 1):
        drawn = sample(logits[0], sampling, generator)
        if drawn == SEPARATOR:
            return
        yield drawn
        if produced == count:
            return
        history.append(drawn)
        if model.decodes_without_end or decoder.length + 1 < model.sequence_length:
            logits = decoder.step(torch.tensor([drawn], device=device))
        else:
            history = history[len(history) - half :]
            decoder = model.decoder(rows=1)
            logits = decoder.prime(torch.tensor([history], dtype=torch.long, device=device))


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from (VOCABULARY,) logits: a byte or the separator."""
    logits = logits.detach().float().cpu().clone()
    logits[PADDING] = float("-inf")
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities, order = logits.softmax(0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
