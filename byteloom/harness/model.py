"""Model class of lm_eval: log-likelihoods and continuations of text, byte by byte.

    (context, continuation) ─▶ windows that end with the continuation ─▶ nats of its bytes ─▶ their sum
    text                    ─▶ windows of `byteloom eval`             ─▶ nats of all bytes ─▶ their sum

Text is UTF-8; surrogate escapes are the bytes that they stand for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from byteloom.model import ROWS, Device, Model, Precision, load
from pretrain.evaluation.generation import Sampling
from pretrain.evaluation.modes import Mode

MOST_BYTES = 256
"""Most bytes of a continuation, unless the task says otherwise."""
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
CANNOT_BE_LARGEST = math.log(258)
"""Nats above which an id is not the likeliest of 258."""


class ByteloomLM(LM):
    """A run, a checkpoint or an export.

    Args:
        run: folder or URL, as of `byteloom eval`.
        device: cpu, or auto: a GPU if there is one.
        precision: fp32 or bf16; None: as in the run.
        begin: context of a first byte: auto, separator or start.
        mode: the bytes that each byte is predicted from in `loglikelihood_rolling`, as of `byteloom eval --mode`.
        stride: bytes scored at the end of each window there; None: as of the mode.
        batch_size: rows that are computed at once; auto is 16.
        max_batch_size: not used.
        usage: options of the model's family, such as `latents=256` for Perceiver AR.

    Raises:
        CheckpointError: there is no valid checkpoint.
        EvaluationError: an option is none of the choices.
    """

    def __init__(
        self,
        run: str,
        device: str | None = None,
        precision: str | None = None,
        *,
        begin: str = "auto",
        mode: str = Mode.windows,
        stride: int | None = None,
        batch_size: int | str = ROWS,
        max_batch_size: int | None = None,
        **usage: Any,
    ) -> None:
        super().__init__()
        # lm_eval says cuda:0 where nobody named a device. The model refuses the names of other devices.
        own = cast(Device, "auto" if device in (None, "cuda", "cuda:0") else device)
        self.model: Model = load(run, own, cast(Precision | None, precision), begin=begin, **usage)
        self.mode, self.stride = mode, stride
        self.rows = ROWS if str(batch_size).startswith("auto") else int(batch_size)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in caches of requests."""
        return "bytes"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding gives it.

        A context that is too long loses its first bytes.
        """
        pairs = [(_bytes(request.args[0]), _bytes(request.args[1])) for request in requests]
        nats = self.model.continuation_nats(pairs, rows=self.rows)
        return [
            (-float(own.sum()), self._is_greedy(context, continuation, own))
            for (context, continuation), own in zip(pairs, nats, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text in nats: that of `byteloom eval`."""
        texts = [_bytes(request.args[0]) for request in requests]
        bits = self.model.bits_of_documents(texts, mode=self.mode, stride=self.stride, rows=self.rows)
        return [-float(own.sum()) * math.log(2) for own in bits]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the continuation of each context, up to the first stop sequence or the end of the document."""
        by_options: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, options = request.args
            by_options[(len(_bytes(context)), *_generation_options(options))].append(number)
        texts = dict[int, str]()
        for (_, most_bytes, sampling, stops), numbers in by_options.items():
            for some in _chunks(numbers, self.rows):
                prompts = [_bytes(requests[number].args[0]) for number in some]
                texts |= zip(some, self._continue(prompts, most_bytes, sampling, stops), strict=True)
        return [texts[number] for number in range(len(requests))]

    def _continue(
        self, prompts: Sequence[bytes], most_bytes: int, sampling: Sampling, stops: Sequence[bytes]
    ) -> Iterator[str]:
        """Yield the continuations of prompts of one length, which are decoded together."""
        drawn = [bytearray() for _ in prompts]
        running = set(range(len(prompts)))
        for row, byte in self.model.generate_rows(prompts, [most_bytes] * len(prompts), sampling):
            drawn[row].append(byte)
            if row in running and any(drawn[row].endswith(stop) for stop in stops):
                running.discard(row)
            if not running:
                break
        for own in drawn:
            ends = [place for stop in stops if (place := own.find(stop)) >= 0]
            yield own[: min(ends, default=len(own))].decode("utf-8", "replace")

    def _is_greedy(self, context: bytes, continuation: bytes, nats: np.ndarray) -> bool:
        """Return whether greedy decoding continues a context with these bytes.

        A byte of more than half of the probability is the likeliest. Bytes in between need the decoder.
        """
        if bool((nats < math.log(2)).all()):
            return True
        if bool((nats > CANNOT_BE_LARGEST).any()):
            return False
        drawn = self.model.generate(context, bytes=len(continuation), temperature=0)
        return all(next(drawn, b"") == bytes([byte]) for byte in continuation)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _generation_options(options: dict[str, Any]) -> tuple[int, Sampling, tuple[bytes, ...]]:
    """Return the most bytes, the sampling and the stop sequences of a request."""
    most_bytes = next((int(options[name]) for name in LIMIT_NAMES if options.get(name) is not None), MOST_BYTES)
    until = options.get("until") or []
    stops = tuple(_bytes(stop) for stop in ([until] if isinstance(until, str) else until) if stop)
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") and "temperature" not in options:
        temperature = 1.0
    if options.get("do_sample") is False:
        temperature = 0.0
    top_k = options.get("top_k") or None
    sampling = Sampling(temperature, top_k, float(options.get("top_p") or 1.0), int(options.get("seed") or 0))
    return most_bytes, sampling, stops


def _chunks(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[begin : begin + size] for begin in range(0, len(numbers), size))
