"""Sounds of one second at most, read from wav files, and their MFCC as librosa computes them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zerofl.data.dataset import DatasetError
from zerofl.errors import install_hint

RATE = 16_000  # samples a second; a clip is one second at most
COEFFICIENTS, N_FFT, HOP, MELS, TOP_DB = 32, 2048, 512, 32, 80.0


class Sound(NamedTuple):
    """A sound that is yet to be read: where it is, for messages, the file that it is in, and what reads its bytes."""

    where: str
    file: Path
    read: Callable[[], bytes]


def mfcc(sounds: np.ndarray) -> np.ndarray:
    """Sounds float32 [n, 16000] -> their MFCC float32 [n, 32 coefficients, 32 frames]."""
    try:
        import librosa
    except ImportError as error:
        raise DatasetError(f"speech_commands needs librosa: {install_hint('speech')}") from error
    power = librosa.feature.melspectrogram(y=sounds, sr=RATE, n_fft=N_FFT, hop_length=HOP, n_mels=MELS)
    # librosa's own floor, 80 dB below the loudest, but of each clip: by itself it takes the loudest of all of them.
    decibels = librosa.power_to_db(power, top_db=None)
    decibels = np.maximum(decibels, decibels.max((1, 2), keepdims=True) - TOP_DB)
    features: np.ndarray = librosa.feature.mfcc(S=decibels, n_mfcc=COEFFICIENTS)
    return features.astype(np.float32)


def one_second(source: Sound) -> np.ndarray:
    """A clip float32 [16000], silence behind a shorter one. Raises DatasetError: it is longer, or no sound."""
    sound = _read(source)
    if not 1 <= len(sound) <= RATE:
        raise DatasetError(
            f"speech_commands: {source.where} has {len(sound)} samples, expected 1 to {RATE} (one second)"
        )
    return np.pad(sound, (0, RATE - len(sound)))


def noise(source: Sound) -> np.ndarray:
    """A recording float32 [samples] of a second or more. Raises DatasetError: it is shorter, or no sound."""
    sound = _read(source)
    if len(sound) < RATE:
        raise DatasetError(
            f"speech_commands: {source.where} has {len(sound)} samples, expected {RATE} or more to cut silence from"
        )
    return sound


def _read(source: Sound) -> np.ndarray:
    """A mono sound file at 16 kHz -> float32 [samples]."""
    try:
        import soundfile
    except ImportError as error:
        raise DatasetError(f"speech_commands needs soundfile: {install_hint('speech')}") from error
    try:
        data = source.read()
        _check_whole(data)
        sound, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except (RuntimeError, OSError, EOFError, UnicodeDecodeError, IndexError) as error:  # two of a damaged parquet file
        raise DatasetError(f"speech_commands: {source.where} is not a sound file, or is truncated: {error}") from error
    if rate != RATE or sound.ndim != 1:
        channels = 1 if sound.ndim == 1 else sound.shape[1]
        raise DatasetError(
            f"speech_commands: {source.where} has {channels} channels at {rate} Hz, expected 1 at {RATE} Hz"
        )
    if not np.isfinite(sound).all():
        raise DatasetError(f"speech_commands: {source.where} has samples that are infinite or not a number")
    return np.asarray(sound)


def _check_whole(wav: bytes) -> None:
    """A wav file that was cut off reads as a shorter sound: compare what its chunks say with what is there."""
    place = 12  # after "RIFF", the length and "WAVE"
    while wav[:4] == b"RIFF" and place + 8 <= len(wav):
        length = int.from_bytes(wav[place + 4 : place + 8], "little")
        if wav[place : place + 4] == b"data" and place + 8 + length > len(wav):
            raise EOFError(f"it has {len(wav) - place - 8} bytes of sound, expected {length}")
        place += 8 + length + length % 2
