"""Prompts and continuations of a model of media: whole samples, whole pictures, files that programs open.

prompt file ─▶ read_prompt ─▶ Continuations.begin ─▶ generate_rows ─▶ Continuations.file_of ─▶ .bin, .wav, .png
"""

from enum import StrEnum
from pathlib import Path

from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.media import MediaCard
from data_pipeline.readers import document_of
from data_pipeline.readers.kinds import modality_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.restoring import options_of, png_of, wav_of
from data_pipeline.sources.source_file import SourceFile
from pretrain.evaluation.generation import SamplingError

MOST_BYTES = 256
"""Most bytes of a continuation, unless the user or a picture's size says otherwise."""


class OutputFormat(StrEnum):
    """Formats of continuations."""

    auto = "auto"
    raw = "raw"
    wav = "wav"
    png = "png"


def read_prompt(path: Path, card: MediaCard | None) -> bytes:
    """Return the bytes of a prompt file. Media are decoded as the documents of the card were.

    Raises:
        CorpusError: the file cannot be read.
        SamplingError: it holds other media than the model was trained on.
    """
    if card is None or modality_of(path.name, ReadOptions()) not in ("image", "audio"):
        try:
            return path.read_bytes()
        except IsADirectoryError as error:
            raise CorpusError(f"{path} is a folder; name a file in it") from error
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    document = document_of(SourceFile(0, str(path.absolute()), path.name, None, None), options_of(card))
    content = b"".join(document.read())
    asked, found = card.as_json(), document.media.as_json() if document.media is not None else {}
    if "height" in asked:  # the upper rows of a picture are a prompt
        asked["height"] = min(asked["height"], found.get("height", 0))
    if differences := [name for name, value in asked.items() if found.get(name) != value]:
        raise SamplingError(f"{path} holds {document.media}, and the model reads {card}: {', '.join(differences)}")
    return content


class Continuations:
    """Prompts of a model, with the number of bytes to draw after each, and the files of the results.

    Attributes:
        prompts: the prompts. A whole picture is without the bytes that are drawn again.
        counts: most bytes to draw after each prompt.
        format: format of the files, never auto.

    Args:
        card: layout of the documents that the model was trained on; None for other documents.
        prompts: the prompts, as the user gave them.
        most_bytes: most bytes of a continuation; None: MOST_BYTES, or the rest of a picture.
        wanted: format that the user asked for.
        to_files: whether the results are files; auto is raw otherwise.

    Raises:
        SamplingError: the model has no card for the format, or no byte can be drawn.
    """

    def __init__(
        self,
        card: MediaCard | None,
        prompts: list[bytes],
        most_bytes: int | None,
        wanted: OutputFormat,
        to_files: bool,
    ) -> None:
        self._card = card
        self.format = self._format(wanted, to_files)
        self._picture = None if card is None else card.image_bytes
        self._frame = 1 if card is None else card.frame_bytes or 1
        if self._picture is not None and most_bytes is not None:
            kept = max(0, self._picture - most_bytes)
            prompts = [prompt[:kept] if len(prompt) == self._picture else prompt for prompt in prompts]
        self.prompts = prompts
        self.counts = [self._count(len(prompt), most_bytes) for prompt in prompts]
        self.file_of(b"", b"")  # a missing package is an error before the bytes are drawn

    def _format(self, wanted: OutputFormat, to_files: bool) -> OutputFormat:
        card = self._card
        is_sound = card is not None and card.kind == "audio" and None not in (card.rate, card.channels)
        is_image = card is not None and None not in (card.image_bytes, card.scan)
        if wanted is OutputFormat.auto:
            possible = OutputFormat.wav if is_sound else OutputFormat.png if is_image else OutputFormat.raw
            return possible if to_files else OutputFormat.raw
        if (wanted is OutputFormat.wav and not is_sound) or (wanted is OutputFormat.png and not is_image):
            needed = "sound of one rate" if wanted is OutputFormat.wav else "images of one size"
            raise SamplingError(
                f"--as {wanted} needs a model of {needed}, and the training data of this one has "
                f"{f'the card: {card}' if card is not None else 'no card of media'}; take --as raw"
            )
        return wanted

    def _count(self, length: int, most_bytes: int | None) -> int:
        if self._picture is not None:
            if length >= self._picture:
                raise SamplingError(
                    f"a prompt has {count(length, 'byte')}, and a picture has {self._picture:,}; name fewer, or add "
                    "--bytes with the number of its last bytes to draw again"
                )
            return min(self._picture - length, most_bytes or self._picture)
        most_bytes = most_bytes or MOST_BYTES
        whole = most_bytes - (length + most_bytes) % self._frame
        if whole < 1:
            raise SamplingError(f"--bytes is {most_bytes}; a frame of the model's sound has {self._frame}")
        return whole

    def whole(self, prompt: bytes, continuation: bytes | bytearray) -> int:
        """Return the number of bytes of a continuation up to the end of its last whole frame of sound."""
        return max(0, len(continuation) - (len(prompt) + len(continuation)) % self._frame)

    def file_of(self, prompt: bytes, continuation: bytes | bytearray) -> bytes:
        """Return the content of the file of a continuation: its whole frames; in a PNG, the prompt's pixels as well."""
        continuation = bytes(continuation[: self.whole(prompt, continuation)])
        if self._card is None or self.format is OutputFormat.raw:
            return continuation
        if self.format is OutputFormat.png:
            return png_of(prompt + continuation, self._card)
        return wav_of(continuation[-len(prompt) % self._frame :], self._card)

    @property
    def suffix(self) -> str:
        """Suffix of the files."""
        return "bin" if self.format is OutputFormat.raw else self.format.value
