"""A trained model, as Python code uses it.

RUN, CHECKPOINT or EXPORT ─▶ load ─▶ Model ─▶ bits, bits_per_byte, next, generate

The commands `eval` and `generate` use this class.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byteloom.core.progress import Progress, ignore
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.storage import RemoteConfig
from data_pipeline.documents import Piece
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers.restoring import options_of
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import SEPARATOR
from pretrain.checkpoint import Metadata
from pretrain.distributed.fragments import MODEL, fragment_name, whole
from pretrain.engines import choose_device, compute_dtype, scoring_precision
from pretrain.evaluation.answers import answer_rows
from pretrain.evaluation.answers import beam_search as search_beams
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.evaluate import Scored, add_up, score_windows, scorer
from pretrain.evaluation.generation import Sampling, SamplingError, generate_rows
from pretrain.evaluation.modes import Mode, check_usage, score_documents, stride_of
from pretrain.evaluation.objective_scores import Guessed, score_objective
from pretrain.evaluation.patches.finding import PatchedText, patches_of_model
from pretrain.evaluation.scores import Evaluation, EvaluationError, GroupOf, Score
from pretrain.evaluation.speculation import Speculation, check_speculates, speculate_rows
from pretrain.evaluation.window_entropies import EntropyScorer, NatsOf
from pretrain.evaluation.windows import ScoredWindow
from pretrain.models import ByteModel, build_model, form_of, model_config, with_usage_options
from pretrain.models.bidirectional import BidirectionalModel
from pretrain.objectives import Visibility
from pretrain.training.weights import (
    find_checkpoint,
    trained_card,
    trained_objective,
    trained_precision,
    trained_separators,
)
from pretrain.training.weights.merging import read_merged

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
Source = bytes | str | os.PathLike[str]
"""Bytes of one document, or the path or URL of a file or corpus."""

ROWS = 16
"""Windows scored at once, by default."""


def load(
    path: str | os.PathLike[str],
    device: Device = "auto",
    precision: Precision | None = None,
    *,
    begin: str = Beginning.auto,
    **usage: Any,
) -> "Model":
    """Load the model of a run, a checkpoint or an export.

    Args:
        path: folder or URL. A run means its newest valid checkpoint.
        device: where the model computes; auto is a GPU if there is one.
        precision: of the computation. None: as in the run, or fp32 where bf16 is emulated.
        begin: context of the first byte of a document, as of `byteloom eval --begin`: auto, separator or start.
        usage: options of the model's family, such as `latents=256` for Perceiver AR; `byteloom eval --help` lists them.

    Raises:
        CheckpointError: there is no valid checkpoint.
        EvaluationError: device, precision or begin is none of the choices.
        FamilyError: the family does not take an option, or a value is wrong.
    """
    options = {name.replace("_", "-"): value for name, value in usage.items()}
    return Model(find_checkpoint(os.fspath(path)), device, precision, options, begin=begin)


class Model:
    """A trained model on one device.

    Attributes:
        module: the PyTorch module, in evaluation mode.
        config: config of the model, with the usage options.
        checkpoint: the verified checkpoint that the weights come from.
        card: layout of the media that the model was trained on; None for other documents.
        begin: context of the first byte of a document: a separator, or the start of a row.
        objective: objective that trained the model, which decides what its loss counts.

    Args:
        checkpoint: a verified checkpoint.
        device: as of `load`.
        precision: as of `load`.
        usage: values by the names of usage options.
        progress: called with bytes read and bytes in all.
        begin: as of `load`.

    Raises:
        EvaluationError: device, precision or begin is none of the choices.
        FamilyError: the family does not take an option, or a value is wrong.
    """

    def __init__(
        self,
        checkpoint: Metadata,
        device: Device = "auto",
        precision: Precision | None = None,
        usage: Mapping[str, Any] | None = None,
        progress: Progress = ignore,
        *,
        begin: str = Beginning.auto,
    ) -> None:
        _check_choice("device", device, get_args(Device))
        if precision is not None:
            _check_choice("precision", precision, get_args(Precision))
        _check_choice("begin", begin, list(Beginning))
        self.checkpoint = checkpoint
        self.begin = Beginning(begin).resolved(checkpoint.state["config"]["data"])
        self._usage = dict(usage or {})
        self.config = with_usage_options(model_config(checkpoint.state["config"]["model"]), self._usage)
        self.card = trained_card(checkpoint)
        self.objective = trained_objective(checkpoint)
        self.form = form_of(self.config, self.objective)
        module = build_model(self.config).eval()
        module.reads_prompts_whole = self.form.visibility is Visibility.prefix
        weights = [whole(fragment_name(MODEL, name), own) for name, own in module.named_parameters()]
        read_merged(checkpoint, weights, progress)
        place = choose_device(device)
        self.module = module.to(
            place, compute_dtype(precision or scoring_precision(trained_precision(checkpoint), place))
        )

    @property
    def sequence_length(self) -> int:
        """Longest context, in bytes."""
        return self.module.sequence_length

    def bits(self, data: bytes, *, mode: str = Mode.windows, stride: int | None = None) -> NDArray[np.float64]:
        """Return the negative log-likelihood of each byte of a document, in bits.

        Args:
            data: the document.
            mode: the bytes that each byte is predicted from, as of `byteloom eval --mode`.
            stride: bytes scored at the end of each window, as of `byteloom eval --stride`.

        Returns:
            (len(data),) bits. Their mean is `bits_per_byte(data)`.

        Raises:
            EvaluationError: the model does not support the mode or the stride.
            TypeError: the document is text and not bytes.
        """
        _check_bytes("data", data)
        return self.bits_of_documents([data], mode=mode, stride=stride)[0]

    def bits_of_documents(
        self,
        documents: Sequence[bytes],
        *,
        mode: str = Mode.windows,
        stride: int | None = None,
        rows: int = ROWS,
    ) -> list[NDArray[np.float64]]:
        """Return what `bits` returns of each of several documents, which are scored side by side.

        Args:
            documents: documents of any length.
            mode: as of `bits`.
            stride: as of `bits`.
            rows: windows scored at once.

        Raises:
            EvaluationError: the model does not support the mode or the stride.
        """
        found = [np.empty(len(document)) for document in documents]
        by_length = sorted(range(len(documents)), key=lambda number: len(documents[number]))
        pieces = (Piece(str(number), "binary", 0, documents[number], ends=True) for number in by_length)
        for windows, nats in self._score(pieces, mode, rows, stride):
            for window, row in zip(windows, nats.double().numpy(), strict=True):
                begin, end = window.offset + window.context, window.offset + len(window.ids)
                found[int(window.key)][begin:end] = row[window.context : len(window.ids)] / math.log(2)
        return found

    def patches(
        self,
        data: bytes,
        *,
        mode: str = Mode.sliding,
        rows: int = ROWS,
        progress: Callable[[int], None] = lambda done: None,
    ) -> PatchedText:
        """Return a document with its patches, of a model that has patches, and with its bits.

        Args:
            data: the document, at least one byte.
            mode: the bytes that each byte is predicted from: windows or sliding.
            rows: windows read at once.
            progress: called with the bytes scored since the last call.

        Raises:
            EvaluationError: the model has no patches, or the mode is another one.
            TypeError: the document is text and not bytes.
        """
        _check_bytes("data", data)
        _check_choice("mode", mode, list(Mode))
        return patches_of_model(self.module, data, Mode(mode), rows, progress, after_separator=self._after_separator)

    def continuation_nats(self, pairs: Sequence[tuple[bytes, bytes]], *, rows: int = ROWS) -> list[NDArray[np.float64]]:
        """Return the negative log-likelihood of each byte of continuations, in nats, given their contexts.

        A model with a memory reads the whole context. Another one scores a continuation in one window if it can, with
        the longest context that fits. A longer continuation is scored in windows that move by at most half of it.

        Args:
            pairs: (context, continuation) each; the context is the beginning of a document, or empty.
            rows: windows scored at once.

        Returns:
            (len(continuation),) nats of each pair.
        """
        if self.module.empty_memory(1):
            whole = self.bits_of_documents([context + own for context, own in pairs], mode=Mode.memory, rows=rows)
            return [bits[len(context) :] * math.log(2) for (context, _), bits in zip(pairs, whole, strict=True)]
        found = [np.empty(len(continuation)) for _, continuation in pairs]
        separator = [SEPARATOR] * self._after_separator
        nats_of = scorer(self.module)
        windows = list[tuple[int, ScoredWindow]]()
        for number, (context, continuation) in enumerate(pairs):
            ids = np.array([*separator, *context, *continuation], np.int16)
            at_end = _windows_at_end(self.module, ids, len(continuation), nats_of)
            windows += [(number, window) for window in at_end]
        windows.sort(key=lambda each: len(each[1].ids))
        scored = score_windows(nats_of, (window for _, window in windows), rows)
        numbers = (number for number, _ in windows)
        for batch, nats in scored:
            for window, row in zip(batch, nats.double().numpy(), strict=True):
                own = row[window.context : len(window.ids)]
                found[next(numbers)][window.offset : window.offset + len(own)] = own
        return found

    def bits_per_byte(
        self, source: Source, *, mode: str = Mode.windows, stride: int | None = None, rows: int = ROWS
    ) -> float:
        """Return the mean negative log-likelihood of the bytes of documents, in bits.

        Args:
            source: bytes of one document; a file of any kind, read as `byteloom prepare` reads it; or a corpus.
            mode: the bytes that each byte is predicted from, as of `byteloom eval --mode`.
            stride: bytes scored at the end of each window, as of `byteloom eval --stride`.
            rows: windows scored at once.

        Raises:
            CorpusError: the source cannot be read.
            EvaluationError: the model does not support the mode or the stride, or there is no byte.
        """
        if isinstance(source, bytes):
            if not source:
                raise EvaluationError("there is no byte to score")
            return add_up(self._score(_document(source), mode, rows, stride)).total.bits_per_byte
        with self.open_corpus(source) as corpus:
            return self.evaluate(corpus, mode=mode, stride=stride, rows=rows).total.bits_per_byte

    def evaluate(
        self,
        corpus: Corpus,
        *,
        mode: str = Mode.windows,
        stride: int | None = None,
        rows: int = ROWS,
        group_of: GroupOf = lambda key: "all",
        progress: Callable[[int], None] = lambda done: None,
    ) -> Evaluation:
        """Return the scores of a corpus: by group, by position in the window, and in all.

        Args:
            corpus: an open corpus.
            mode: the bytes that each byte is predicted from, as of `byteloom eval --mode`.
            stride: bytes scored at the end of each window, as of `byteloom eval --stride`.
            rows: windows scored at once.
            group_of: maps a document's key to its group.
            progress: called with the bytes scored since the last call.

        Raises:
            EvaluationError: the model does not support the mode or the stride.
        """
        return add_up(self._score(corpus.pieces(), mode, rows, stride), group_of, progress)

    def loss(self, corpus: Corpus, *, rows: int = ROWS, progress: Callable[[int], None] = lambda done: None) -> Score:
        """Return the loss of the model's objective on a corpus, in bits per byte that counts; see `objective.metric`.

        What is hidden of each document is the same in every call.

        Args:
            corpus: an open corpus.
            rows: rows scored at once.
            progress: called with the bytes scored since the last call.

        Raises:
            EvaluationError: the objective is causal, whose bits per byte depend on a mode; call `evaluate`.
        """
        if self.objective.entry.show is None:
            raise EvaluationError(f"objective.name {self.objective.name} is scored in a mode; call evaluate")
        device, module = next(self.module.parameters()).device, self.module

        @torch.no_grad()
        def nats_of(ids: Ids, given: NDArray[np.number] | None) -> Tensor | Guessed:
            further = [] if given is None else [torch.from_numpy(given).to(device)]
            own = torch.from_numpy(ids).to(device)
            if not (self.objective.entry.has_accuracy and isinstance(module, BidirectionalModel)):
                nats: Tensor = module(own, *further)
                return nats.cpu()
            states = module.encode(*further)

            @torch.no_grad()
            def likeliest(places: NDArray[np.bool_]) -> NDArray[np.integer]:
                logits = module.logits(states[torch.from_numpy(places).to(device)])
                return logits[:, :SEPARATOR].argmax(1).cpu().numpy()

            return Guessed(module.nats(states, own.long()).cpu(), likeliest)

        return score_objective(
            nats_of,
            corpus,
            self.objective,
            self.form,
            rows,
            length=self.sequence_length,
            scored=self.module.scored,
            progress=progress,
        )

    @contextmanager
    def open_corpus(self, source: str | os.PathLike[str], digest: str | None = None) -> Iterator[Corpus]:
        """Open a corpus for this model. A file becomes one, in a temporary folder.

        Media in the file are decoded as the training data was.

        Args:
            source: path or URL of a corpus, or path of a file.
            digest: digest that the corpus must have; None accepts any.

        Raises:
            CorpusError: the source cannot be read.
        """
        location = os.fspath(source)
        if not Path(location).is_file():
            remote = RemoteConfig.model_validate(self.checkpoint.state["config"]["data"]["remote"])
            with Corpus(location, remote=remote, digest=digest) as corpus:
                yield corpus
            return
        with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
            prepare([location], Path(folder) / "corpus", PrepareOptions(reading=options_of(self.card)))
            with Corpus(Path(folder) / "corpus") as corpus:
                yield corpus

    def next(self, context: bytes) -> NDArray[np.float64]:
        """Return the distribution of the byte after a context.

        Args:
            context: the document so far. Of a longer one, the last bytes that the model can read.

        Returns:
            (258,) probabilities: of each byte; at 256, that the document ends; at 257, of padding, which is almost 0.

        Raises:
            SamplingError: the model predicts no next byte.
            TypeError: the context is text and not bytes.
        """
        _check_bytes("context", context)
        self._check_generates()
        if self.form.visibility is Visibility.encoder_decoder:
            raise SamplingError(f"{self.checkpoint.folder} predicts a target from a source; use `generate`")
        ids = [SEPARATOR] * self._after_separator + list(context)
        if not self.module.decodes_without_end:
            ids = ids[max(0, len(ids) - self.sequence_length + 1) :]
        read = torch.tensor([ids], dtype=torch.long, device=next(self.module.parameters()).device)
        with torch.no_grad():
            logits = self.module.decoder(1).prime(read)
        return logits[0].double().softmax(0).cpu().numpy()

    def generate(
        self,
        prompt: bytes = b"",
        *,
        bytes: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        speculate: bool = False,
    ) -> Iterator[bytes]:
        """Return an iterator over the bytes with which the model continues a prompt, one by one.

        It ends early if the model ends the document. `b"".join(...)` has all of them.

        Args:
            prompt: the document so far.
            bytes: most bytes to draw.
            temperature: divisor of the logits; 0 takes the likeliest byte.
            top_k: number of likeliest bytes to draw from; None: all.
            top_p: probability that the likeliest bytes to draw from must add up to.
            seed: of the draws.
            speculate: let further heads of the model (`model.multi_byte`) draft bytes. It changes the time and not the
                bytes.

        Raises:
            SamplingError: an argument is out of bounds, or the model does not speculate.
            TypeError: the prompt is text and not bytes.
        """
        _check_bytes("prompt", prompt)
        if bytes < 1:
            raise SamplingError(f"bytes is {bytes}; it must be at least 1")
        how, speculation = Sampling(temperature, top_k, top_p, seed), Speculation() if speculate else None
        drawn = self.generate_rows([prompt], [bytes], how, speculation)
        return (byte.to_bytes() for _, byte in drawn)

    def generate_rows(
        self,
        prompts: Sequence[bytes],
        counts: Sequence[int],
        sampling: Sampling,
        speculation: Speculation | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Return an iterator over (row, byte) of the continuations of several prompts, which are decoded side by side.

        Args:
            prompts: one a row: the document so far, or the source of a model that was trained on pairs.
            counts: most bytes of each continuation.
            sampling: how to draw. A model that saw no separator in training does not end a document.
            speculation: counts of self-speculation, which changes the time and not the bytes; None: do not speculate.

        Raises:
            SamplingError: the model predicts no next byte, or does not speculate.
        """
        self._check_generates()
        if speculation is not None:
            check_speculates(self.module)
        if self.form.visibility is Visibility.encoder_decoder:
            return answer_rows(self.module, prompts, counts, sampling)
        separators = sampling.separators and trained_separators(self.checkpoint)
        how = replace(sampling, separators=separators)
        begin = {
            "after_separator": self._after_separator,
            "before_separator": self.objective.entry.reads_pairs,
        }
        if speculation is not None:
            return speculate_rows(self.module, prompts, counts, how, speculation, **begin)
        return generate_rows(self.module, prompts, counts, how, **begin)

    def beam_search(self, source: bytes, *, beams: int = 4, bytes: int = 256) -> bytes:
        """Return the likeliest answer to a source that a beam search finds.

        Args:
            source: what the encoder reads.
            beams: answers that are followed at a time; 1 takes the likeliest byte each time.
            bytes: most bytes of the answer.

        Raises:
            SamplingError: the model has no encoder with a decoder, or an argument is out of bounds.
        """
        if self.form.visibility is not Visibility.encoder_decoder:
            raise SamplingError(f"{self.checkpoint.folder} is a {self.config.family}; beams need an encoder_decoder")
        if min(beams, bytes) < 1:
            raise SamplingError(f"beams is {beams}, and bytes is {bytes}; both must be at least 1")
        with torch.no_grad():
            return search_beams(self.module, source, beams, bytes)

    def _check_generates(self) -> None:
        if self.form.visibility is Visibility.bidirectional:
            raise SamplingError(
                f"{self.checkpoint.folder} is a {self.config.family} of objective.name {self.objective.name}: it "
                "predicts hidden bytes, and no next one, so it does not generate"
            )

    @property
    def _after_separator(self) -> bool:
        return self.begin is Beginning.separator

    def _score(self, pieces: Iterable[Piece], mode: str, rows: int, stride: int | None) -> Scored:
        _check_choice("mode", mode, list(Mode))
        if self.form.visibility in (Visibility.bidirectional, Visibility.encoder_decoder):
            raise EvaluationError(
                f"{self.checkpoint.folder} was trained with objective.name {self.objective.name}, and has no bits per "
                f"byte; its loss is {self.objective.metric}, which `loss` and `byteloom eval` measure"
            )
        check_usage(self.config, self._usage, Mode(mode))
        return score_documents(self.module, pieces, Mode(mode), rows, stride, after_separator=self._after_separator)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise EvaluationError(f"{name} is {value}; it must be one of {', '.join(choices)}")


def _windows_at_end(
    module: ByteModel, ids: NDArray[np.int16], count: int, nats_of: NatsOf | EntropyScorer
) -> Iterator[ScoredWindow]:
    """Yield the windows that score the last `count` ids of a document. Their offset is that of the first scored id."""
    length = len(ids)
    whole = len(range(min(length, module.sequence_length))[module.scored(min(length, module.sequence_length))])
    step = count if count <= whole else stride_of(module, Mode.sliding)
    for begin in range(length - count, length, step or 1):
        end = min(begin + step, length)
        first = max(0, end - module.sequence_length)
        part = nats_of.part_of(ids, first, end) if isinstance(nats_of, EntropyScorer) else None
        yield ScoredWindow("", "binary", ids[first:end], begin - (length - count), begin - first, part)


def _check_bytes(name: str, value: object) -> None:
    if not isinstance(value, bytes):
        advice = f"encode it: {name}.encode()" if isinstance(value, str) else f"convert it: bytes({name})"
        raise TypeError(f"{name} is of the type {type(value).__name__}, and a model reads bytes; {advice}")


def _document(data: bytes) -> list[Piece]:
    return [Piece("bytes", "binary", 0, data, ends=True)]
