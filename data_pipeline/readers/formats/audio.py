"""Reader of sound: 16-bit little-endian PCM, channels interleaved, nothing before or after the samples.

    WAV, FLAC, Ogg, MP3, … ─▶ float32 blocks ─▶ channels mixed ─▶ resampled ─▶ rounded to 16 bits ─▶ bytes

16-bit samples at their own rate, with their own channels, do not change by a bit: a float32 holds each exactly. Others
are rounded to the nearest of the 65,536 values, halves to even, without dither, and clipped to the largest and the
smallest value.
"""

import io
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from byteloom.core.packages import needed_by
from data_pipeline.documents import READ_BYTES
from data_pipeline.errors import BadDocumentError
from data_pipeline.media import MediaCard
from data_pipeline.readers.ogg import ogg_fault
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import MediaPieces, Reader, register_reader
from data_pipeline.readers.remarks import Remarks
from data_pipeline.readers.streams import on_disk

if TYPE_CHECKING:
    import soundfile

MIN_UNKNOWN_LENGTH = 0x7FFF_F000
"""Programs that write WAV to a pipe do not know its length, and state this number of bytes or more."""
UNKNOWN_FRAMES = (1 << 63) - 1
"""libsndfile's number of samples of a FLAC that does not state it, as programs write it to a pipe."""

SOUND_SUFFIXES = {
    **{".au": "AU", ".caf": "CAF", ".flac": "FLAC", ".mp3": "MP3", ".w64": "W64", ".wav": "WAV"},
    **dict.fromkeys((".oga", ".ogg", ".opus"), "OGG"),
    **dict.fromkeys((".aif", ".aifc", ".aiff"), "AIFF"),
}
"""Format of the files with each suffix."""
WAVS = frozenset({"RF64", "WAVEX"})
"""Formats of other kinds of WAV files."""

STATED = re.compile(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)")
"""Line of libsndfile's log about a WAV, AIFF, AU, W64 or RF64 that is shorter than it states: stated, found."""
UNUSED = ("Ogg: Junk after the last page", "Corrupted bitstream", "Exiting parser")
"""Parts of lines of libsndfile's log about a file with bytes that it did not decode."""
AU_SIZES = re.compile(r"Length : (\d+)\n\.snd\n *Data Offset : (\d+)\n *Data Size *: (\d+)\n")
"""Lines of libsndfile's log about an AU, which may be followed by bytes that no line is about."""


def read_audio(stream: BinaryIO, name: str, options: ReadOptions) -> MediaPieces:
    """Yield the samples of a sound in pieces, and return their layout.

    The format is any that libsndfile reads, whatever the file is called.

    Args:
        stream: the file.
        name: its name for errors.
        options: rate and channels.

    Raises:
        BadDocumentError: this is no sound; or it is damaged, shorter than it states, or followed by bytes that are not
            decoded, such as a second sound. An incomplete MP3 is not noticed.
    """
    with needed_by("sound", "soundfile"):
        import soundfile  # noqa: PLC0415 - few corpora have sound

    remarks = Remarks(name)
    with on_disk(stream) as descriptor:
        try:
            with remarks.collected():
                source = FlacWithoutTotal.of(descriptor) or descriptor
                sound = _one_way(source)
            with sound:
                frames = source.total if isinstance(source, FlacWithoutTotal) else sound.frames
                _refuse_cut(sound)
                remarks.compare(SOUND_SUFFIXES, "WAV" if sound.format in WAVS else sound.format)
                for block in _blocks(sound, frames, options, remarks):
                    yield _pcm(block)
                _refuse_unused(sound)
                if sound.format == "OGG" and (fault := ogg_fault(descriptor)):
                    raise ValueError(fault)
                channels, rate = options.audio_channels or sound.channels, options.audio_rate or sound.samplerate
        except (soundfile.SoundFileError, ValueError) as error:
            reason = getattr(error, "error_string", str(error)).partition("\n")[0]
            detail = f"; {remarks}" if remarks else ""
            raise BadDocumentError(f"{name} cannot be decoded as sound: {reason}{detail}") from error
    remarks.log()
    return MediaCard("audio", "s16le", channels, rate)


AUDIO_READER = register_reader(
    Reader(
        "audio",
        "Samples of sound.",
        read_file=read_audio,
        options=frozenset({"members", "audio_rate", "audio_channels"}),
        suffixes=frozenset(SOUND_SUFFIXES),
        modality="audio",
    )
)


def _refuse_cut(sound: "soundfile.SoundFile") -> None:
    """Raise a ValueError for a file that is cut short. libsndfile reads the rest, and only its log mentions it."""
    for stated, found in STATED.findall(sound.extra_info):
        if int(found) < int(stated) < MIN_UNKNOWN_LENGTH:
            raise ValueError(
                f"it is cut short: its header states {int(stated):,} bytes of samples, and it has {int(found):,}"
            )


def _refuse_unused(sound: "soundfile.SoundFile") -> None:
    """Raise a ValueError for a file with bytes that libsndfile did not decode. Only its log mentions them."""
    if any(part in sound.extra_info for part in UNUSED):
        raise ValueError("it has bytes that are not decoded: it is damaged, or several sounds in one file")
    if sizes := AU_SIZES.search(sound.extra_info):
        length, offset, size = map(int, sizes.groups())
        if offset + size < length:
            raise ValueError(f"its header states {size:,} bytes of samples, and it has {length - offset:,}")


def _one_way(source: "int | FlacWithoutTotal") -> "soundfile.SoundFile":
    """Open a sound that is read from its start to its end. soundfile's own seeks fail where the length is unknown."""
    import soundfile  # noqa: PLC0415 - few corpora have sound

    class OneWay(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return OneWay(source, closefd=False)


class FlacWithoutTotal(io.FileIO):
    """A FLAC whose header does not state the number of samples.

    libFLAC stops at that number, so it does not notice that more samples or another sound follow.
    """

    TOTAL = slice(21, 26)
    """Place of the number's 36 bits, which share the first byte with the size of a sample (RFC 9639, 8.2)."""
    TAG_BYTES = 128
    """Bytes of an ID3v1 tag, which other programs append."""

    def __init__(self, descriptor: int, head: bytes) -> None:
        super().__init__(descriptor, closefd=False)
        stated = int.from_bytes(head[self.TOTAL]) & (1 << 36) - 1
        self.total = stated or UNKNOWN_FRAMES
        """Number of samples that the header states."""
        self._head = bytearray(head)
        self._head[self.TOTAL] = bytes((head[self.TOTAL.start] & 0xF0, 0, 0, 0, 0))
        self._end = self.seek(0, io.SEEK_END)
        if os.pread(descriptor, 3, max(0, self._end - self.TAG_BYTES)) == b"TAG":
            self._end -= self.TAG_BYTES
        self.seek(0)

    @classmethod
    def of(cls, descriptor: int) -> "FlacWithoutTotal | None":
        """Return the file, at its start; None if it is no FLAC."""
        head = os.pread(descriptor, cls.TOTAL.stop, 0)
        return cls(descriptor, head) if head.startswith(b"fLaC") and len(head) == cls.TOTAL.stop else None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the file; its end is before a tag."""
        if whence == io.SEEK_END and hasattr(self, "_end"):
            return super().seek(self._end + offset)
        return super().seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer, and return their number."""
        at = self.tell()
        view = memoryview(buffer)[: max(0, self._end - at)]
        count = super().readinto(view) or 0
        own = self._head[at : at + count]
        view[: len(own)] = own
        return count

    def read(self, size: int | None = -1) -> bytes:
        """Return at most `size` bytes."""
        content = bytearray(self._end if size is None or size < 0 else size)
        return bytes(content[: self.readinto(content)])


def _blocks(
    sound: "soundfile.SoundFile", stated: int, options: ReadOptions, remarks: Remarks
) -> Iterator[NDArray[np.float32]]:
    """Yield samples (frames, channels) between -1 and 1, with the rate and channels of the options.

    Args:
        sound: the sound.
        stated: number of frames that its header states, or UNKNOWN_FRAMES.
        options: rate and channels.
        remarks: collects warnings.
    """
    with needed_by("sound", "soxr"):
        import soxr  # noqa: PLC0415 - few corpora have sound

    channels = options.audio_channels or sound.channels
    rate = options.audio_rate or sound.samplerate
    # A block is about as large as a piece, before and after resampling to a higher rate.
    frames = max(1, int(READ_BYTES / (4 * sound.channels) * min(1.0, sound.samplerate / rate)))
    resampler = soxr.ResampleStream(sound.samplerate, rate, channels) if rate != sound.samplerate else None
    read = 0
    while True:
        with remarks.collected():
            block = sound.read(frames, dtype="float32", always_2d=True)
        if not len(block):
            break
        read += len(block)
        if not np.isfinite(block).all():
            raise ValueError("it has samples that are not finite numbers")
        if channels < sound.channels:
            block = block.mean(axis=1, keepdims=True)
        yield resampler.resample_chunk(block) if resampler else block
    if read != stated != UNKNOWN_FRAMES and sound.format != "MP3":  # an MP3's number of frames may be an estimate
        raise ValueError(f"its header states {stated:,} samples, and it has {read:,}")
    if resampler:
        yield resampler.resample_chunk(np.empty((0, channels), np.float32), last=True)


def _pcm(block: NDArray[np.float32]) -> bytes:
    return np.rint(block * 32768).clip(-32768, 32767).astype("<i2").tobytes()
