"""Reader of sound: 16-bit little-endian PCM, channels interleaved, nothing before or after the samples.

    WAV, FLAC, Ogg, MP3, … ─▶ float32 blocks ─▶ channels mixed ─▶ resampled ─▶ rounded to 16 bits ─▶ bytes

16-bit samples at their own rate, with their own channels, do not change by a bit: a float32 holds each exactly. Others
are rounded to the nearest of the 65,536 values, halves to even, without dither, and clipped to the largest and the
smallest value.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from byteloom.core.packages import needed_by
from data_pipeline.documents import READ_BYTES
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.remarks import Remarks
from data_pipeline.readers.streams import on_disk

if TYPE_CHECKING:
    import soundfile

MIN_UNKNOWN_LENGTH = 0x7FFF_F000
"""Programs that write WAV to a pipe do not know its length, and state this number of bytes or more."""


STATED = re.compile(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)")
"""Line of libsndfile's log about a WAV, AIFF, AU, W64 or RF64 that is shorter than it states: stated, found."""


def read_audio(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[bytes]:
    """Yield the samples of a sound in pieces. The format is any that libsndfile reads, whatever the file is called.

    Args:
        stream: the file.
        name: its name for errors.
        options: rate and channels.

    Raises:
        BadDocumentError: this is no sound; or it is damaged, or shorter than it states. Ogg and MP3 state no length, so
            an incomplete one is not noticed.
    """
    with needed_by("sound", "soundfile"):
        import soundfile  # noqa: PLC0415 - few corpora have sound

    remarks = Remarks(name)
    with on_disk(stream) as descriptor:
        try:
            with remarks.collected():
                sound = soundfile.SoundFile(descriptor, closefd=False)
            with sound:
                _refuse_cut(sound)
                for block in _blocks(sound, options, remarks):
                    yield _pcm(block)
        except (soundfile.SoundFileError, ValueError) as error:
            reason = str(error).partition("\n")[0].removeprefix(f"Error opening {descriptor}: ")
            detail = f"; {remarks}" if remarks else ""
            raise BadDocumentError(f"{name} cannot be decoded as sound: {reason}{detail}") from error
    remarks.log()


AUDIO_READER = register_reader(
    Reader(
        "audio",
        "Samples of sound.",
        read_file=read_audio,
        options=frozenset({"members", "audio_rate", "audio_channels"}),
        suffixes=frozenset(
            {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
        ),
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


def _blocks(sound: "soundfile.SoundFile", options: ReadOptions, remarks: Remarks) -> Iterator[NDArray[np.float32]]:
    """Yield samples (frames, channels) between -1 and 1, with the rate and channels of the options."""
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
    if read < sound.frames and sound.format != "MP3":  # an MP3's number of frames may be an estimate
        raise ValueError(f"it is cut short: its header states {sound.frames:,} samples, and it has {read:,}")
    if resampler:
        yield resampler.resample_chunk(np.empty((0, channels), np.float32), last=True)


def _pcm(block: NDArray[np.float32]) -> bytes:
    return np.rint(block * 32768).clip(-32768, 32767).astype("<i2").tobytes()
