"""Reader of sound."""

import wave
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import soxr

from data_pipeline.readers import ReadOptions, document_of
from data_pipeline.sources.listing import Selection, list_files
from tests.data_pipeline.conftest import Real
from tests.data_pipeline.readers.reading import read, reason_of


def wav_samples(path: Path) -> bytes:
    with wave.open(str(path)) as file:
        return file.readframes(file.getnframes())


def write_wav(path: Path, samples: bytes, rate: int = 8000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


def test_real_speech_is_decoded_bit_for_bit(real: Real):
    for path in [*real("audio/fsdd_0_")[:20], *real("audio/kerstin_de_rhasspy-1")[:10], *real("audio/picovoice")[:5]]:
        assert read(path) == wav_samples(path)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_16_bit_sample_is_decoded_bit_for_bit(tmp_path: Path, channels: int):
    samples = np.arange(-32768, 32768, dtype="<i2").repeat(channels).tobytes()
    path = write_wav(tmp_path / "a.wav", samples, channels=channels)
    assert read(path) == samples
    frames = np.frombuffer(samples, "<i2").reshape(-1, channels)
    for name in ("a.flac", "a.aiff", "a.w64", "a.caf", "a.au"):
        soundfile.write(tmp_path / name, frames, 8000, subtype="PCM_16")
        assert read(tmp_path / name) == samples


def test_other_samples_are_rounded_and_clipped(tmp_path: Path):
    exact = np.array([0, 0.4, 0.5, 1.5, -0.5, 32766.6, 32768, 40000, -32768, -40000]) / 32768
    expected = [0, 0, 0, 2, 0, 32767, 32767, 32767, -32768, -32768]
    soundfile.write(tmp_path / "a.wav", exact, 8000, subtype="FLOAT")
    assert np.frombuffer(read(tmp_path / "a.wav"), "<i2").tolist() == expected
    soundfile.write(
        tmp_path / "b.wav", np.array([0x7FFFFF00, 0x12347F00, 0x12348100], np.int32), 8000, subtype="PCM_24"
    )
    assert np.frombuffer(read(tmp_path / "b.wav"), "<i2").tolist() == [32767, 0x1234, 0x1235]


def test_channels_are_mixed_into_their_mean(tmp_path: Path):
    frames = np.array([[100, 200], [-1, -2], [32767, 32767], [-32768, 32767]], "<i2")
    path = write_wav(tmp_path / "a.wav", frames.tobytes(), channels=2)
    assert np.frombuffer(read(path, audio_channels=1), "<i2").tolist() == [150, -2, 32767, 0]  # halves to even


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44100, 16000), (48000, 44100), (16000, 16000)])
def test_streamed_resampling_equals_resampling_of_the_whole(tmp_path: Path, rate: int, to: int):
    """A file that is read in several pieces equals soxr's result for all samples at once."""
    noise = np.random.default_rng(0).normal(0, 0.1, (400_000, 2)).astype(np.float32)
    samples = np.rint(noise * 32768).astype("<i2")
    path = write_wav(tmp_path / "a.wav", samples.tobytes(), rate, channels=2)
    whole = soxr.resample(samples.astype(np.float32) / 32768, rate, to) if rate != to else samples / 32768
    assert read(path, audio_rate=to) == np.rint(whole * 32768).clip(-32768, 32767).astype("<i2").tobytes()
    assert len(whole) == pytest.approx(400_000 * to / rate, abs=1)


def test_a_tone_keeps_its_pitch(tmp_path: Path):
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000) * 10_000
    path = write_wav(tmp_path / "a.wav", tone.astype("<i2").tobytes(), 48_000)
    samples = np.frombuffer(read(path, audio_rate=16_000), "<i2")
    assert len(samples) == 16_000
    assert np.abs(np.fft.rfft(samples)).argmax() == 440


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".mp3"])
def test_compressed_sound_is_decoded(tmp_path: Path, suffix: str, real: Real):
    speech = real("audio/picovoice")[0]
    frames, rate = soundfile.read(speech)
    soundfile.write(tmp_path / f"a{suffix}", frames, rate)
    decoded = np.frombuffer(read(tmp_path / f"a{suffix}"), "<i2").astype(float)
    original = np.frombuffer(wav_samples(speech), "<i2")
    assert len(decoded) == len(original)
    assert np.corrcoef(decoded, original)[0, 1] > 0.99


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.au", "a.w64"])
def test_truncated_sound_is_found(tmp_path: Path, name: str):
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 20_000), 8000)
    whole = path.read_bytes()
    for length in (len(whole) - 2, len(whole) // 2, 20, 4):
        path.write_bytes(whole[:length])
        assert reason_of(path)[0] == "damaged"


def test_wav_without_a_stated_length_is_read(tmp_path: Path):
    samples = np.arange(1000, dtype="<i2").tobytes()
    path = write_wav(tmp_path / "a.wav", samples)
    whole = bytearray(path.read_bytes())
    whole[4:8] = whole[40:44] = b"\xff" * 4
    path.write_bytes(whole)
    assert read(path) == samples


def test_misnamed_and_empty_sound(tmp_path: Path, real: Real):
    (tmp_path / "text.wav").write_text("no sound at all\n" * 100)
    assert "cannot be decoded as sound" in reason_of(tmp_path / "text.wav")[1]
    assert reason_of(write_wav(tmp_path / "none.wav", b""))[0] == "empty"
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    assert "not finite numbers" in reason_of(tmp_path / "nan.wav")[1]
    speech = real("audio/fsdd_0_")[0]
    (tmp_path / "wav.mp3").write_bytes(speech.read_bytes())
    assert read(tmp_path / "wav.mp3") == wav_samples(speech)


def test_sound_at_a_url_without_a_suffix_is_decoded(real: Real):
    path = real("audio/fsdd_0_")[0]
    fsspec.filesystem("memory").pipe("/speech/a", path.read_bytes())
    [file] = list_files(["memory://speech"], Selection())
    assert b"".join(document_of(file, ReadOptions(reader="audio")).read()) == wav_samples(path)
