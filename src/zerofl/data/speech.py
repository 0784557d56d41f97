"""Speech Commands v0.01 as 32x32 MFCC, 12 classes: ten words, "unknown" for all others, and silence (§4.1, A.5).

Silence is cut out of the background noises, one piece for every ten clips, at a random place and a random volume. The
folder `_silence_` of the official test set is not read. Shorter clips are padded with zeros at their end.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from zerofl.data.dataset import Dataset, DatasetError, Split
from zerofl.data.disk_cache import cached
from zerofl.rng import rng

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = len(WORDS), len(WORDS) + 1
CLASSES = (*WORDS, "unknown", "silence")
RATE = 16_000  # samples a second; a clip is one second at most
COEFFICIENTS, N_FFT, HOP, MELS = 32, 2048, 512, 32
CLIPS_A_SILENCE = 10
NOISES = "_background_noise_"
FOLDERS = ("", "speech_commands", "speech_commands_v0.01")
CHUNK = 64  # clips whose MFCC are taken in one go


class Clip(NamedTuple):
    """A spoken clip: its file, its class, and who speaks."""

    path: Path
    label: int
    speaker: str


def load_speech_commands(root: str) -> Dataset:
    """The official training and testing parts, 51,088 and 6,835 clips in v0.01, each with a tenth of silence.

    The official validation part is not used: clients hold out their own. The speakers are the natural clients.

    Raises:
        DatasetError: `root` (or its folder speech_commands/ or speech_commands_v0.01/) has no folders of words, or a
            file is not a clip of one second at 16 kHz; it names the file.
    """
    return _load(root, lambda clip: official_part(clip.path.name))


def load_speech_commands_by_speaker(root: str) -> Dataset:
    """All clips, a fifth of the speakers (by a hash of the name) in the test part: for copies that lack the official.

    Raises:
        DatasetError: as `load_speech_commands`.
    """
    return _load(root, lambda clip: "testing" if _hash(hashlib.md5, clip.speaker) % 5 == 0 else "training")


def official_part(file_name: str) -> str:
    """The part, training, validation or testing, of a file: the rule that the data set's authors publish with it."""
    most = 2**27 - 1
    percentage = _hash(hashlib.sha1, _speaker(file_name)) % (most + 1) * (100 / most)
    return "validation" if percentage < 10 else "testing" if percentage < 20 else "training"


def _load(root: str, part_of: Callable[[Clip], str]) -> Dataset:
    folder = _find(Path(root).expanduser())
    noises = sorted((folder / NOISES).glob("*.wav"))
    words = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    clips = [
        Clip(path, WORDS.index(word.name) if word.name in WORDS else UNKNOWN, _speaker(path.name))
        for word in words
        for path in sorted(word.glob("*.wav"))
    ]
    parts = {name: [clip for clip in clips if part_of(clip) == name] for name in ("training", "testing")}
    for name, members in parts.items():
        # By speaker, so that a natural client's samples lie together.
        members.sort(key=lambda clip: (clip.speaker, clip.path.parent.name, clip.path.name))
        if not members:
            raise DatasetError(
                f"speech_commands: {folder} has {len(clips)} clips, but none of them is in the {name} part. With a "
                "copy that lacks the official parts use dataset = 'speech_commands_by_speaker'"
            )
    purpose = f"speech-1-{COEFFICIENTS}-{N_FFT}-{HOP}-{MELS}"
    splits, owners = {}, {}
    for name, members in parts.items():
        files = [clip.path for clip in members] + noises
        arrays = cached(f"{purpose}-{name}", files, functools.partial(_features, name, members, noises))
        splits[name], owners[name] = Split(arrays["features"], arrays["labels"]), arrays["owners"]
    mean = splits["training"].images.mean((0, 1, 3)).view(-1, 1)
    std = splits["training"].images.std((0, 1, 3)).view(-1, 1)
    train, test = (Split((split.images - mean) / std, split.labels) for split in splits.values())
    speakers = sorted({clip.speaker for clip in parts["training"]})
    owner = owners["training"]
    clients = {speaker: torch.nonzero(owner == i).flatten() for i, speaker in enumerate(speakers)}
    return Dataset(train, test, CLASSES, mean=(0.0,), std=(1.0,), clients=clients)


def _features(part: str, clips: list[Clip], noises: list[Path]) -> dict[str, torch.Tensor]:
    """The MFCC [n, 1, 32, 32] of clips and their silences, labels [n], and each one's speaker as a number [n]."""
    generator = rng(0, 0, 0, f"silence {part}")
    noise = [_noise(path) for path in noises]
    speakers = {speaker: i for i, speaker in enumerate(sorted({clip.speaker for clip in clips}))}
    sounds: list[np.ndarray] = []
    features: list[np.ndarray] = []
    labels: list[int] = []
    owners: list[int] = []

    def samples() -> Iterator[tuple[np.ndarray, int, int]]:
        for number, clip in enumerate(clips, start=1):
            owner = speakers[clip.speaker]
            yield _one_second(clip.path), clip.label, owner
            if number % CLIPS_A_SILENCE == 0:
                source = noise[generator.integers(len(noise))]
                start = generator.integers(len(source) - RATE + 1)
                yield source[start : start + RATE] * np.float32(generator.random()), SILENCE, owner

    shown = track(
        samples(), f"MFCC of the {part} part", total=len(clips) + len(clips) // CLIPS_A_SILENCE,
        console=Console(stderr=True),
    )  # fmt: skip
    for sound, label, owner in shown:
        sounds.append(sound)
        labels.append(label)
        owners.append(owner)
        if len(sounds) == CHUNK:
            features.append(mfcc(np.stack(sounds)))
            sounds = []
    if sounds:
        features.append(mfcc(np.stack(sounds)))
    return {
        "features": torch.from_numpy(np.concatenate(features)).unsqueeze(1),
        "labels": torch.tensor(labels),
        "owners": torch.tensor(owners),
    }


def mfcc(sounds: np.ndarray) -> np.ndarray:
    """Sounds float32 [n, 16000] -> their MFCC float32 [n, 32 coefficients, 32 frames]."""
    try:
        import librosa
    except ImportError as error:
        raise DatasetError("speech_commands needs librosa: pip install 'zerofl[speech]'") from error
    features: np.ndarray = librosa.feature.mfcc(
        y=sounds, sr=RATE, n_mfcc=COEFFICIENTS, n_fft=N_FFT, hop_length=HOP, n_mels=MELS
    )
    return features.astype(np.float32)


def _one_second(path: Path) -> np.ndarray:
    sound = _read(path)
    if not 1 <= len(sound) <= RATE:
        raise DatasetError(f"speech_commands: {path} has {len(sound)} samples, expected 1 to {RATE} (one second)")
    return np.pad(sound, (0, RATE - len(sound)))


def _noise(path: Path) -> np.ndarray:
    sound = _read(path)
    if len(sound) < RATE:
        raise DatasetError(
            f"speech_commands: {path} has {len(sound)} samples, expected {RATE} or more to cut silence from"
        )
    return sound


def _read(path: Path) -> np.ndarray:
    """A mono sound file at 16 kHz -> float32 [samples]."""
    try:
        import soundfile
    except ImportError as error:
        raise DatasetError("speech_commands needs soundfile: pip install 'zerofl[speech]'") from error
    try:
        sound, rate = soundfile.read(path, dtype="float32")
    except (RuntimeError, OSError) as error:
        raise DatasetError(f"speech_commands: {path} is not a sound file, or is truncated: {error}") from error
    if rate != RATE or sound.ndim != 1:
        channels = 1 if sound.ndim == 1 else sound.shape[1]
        raise DatasetError(f"speech_commands: {path} has {channels} channels at {rate} Hz, expected 1 at {RATE} Hz")
    return np.asarray(sound)


def _find(source: Path) -> Path:
    for name in FOLDERS:
        if any((source / name / NOISES).glob("*.wav")):
            return source / name
    archive = f"{source} is a file: unpack the archive, and give the folder" if source.is_file() else ""
    raise DatasetError(
        f"speech_commands: found no {NOISES}/*.wav in {source.absolute()} or its folders "
        f"{', '.join(name for name in FOLDERS if name)}. "
        + (
            archive
            or "Get speech_commands_v0.01.tar.gz from http://download.tensorflow.org/data/, unpack it, and give "
            "the folder with --root"
        )
    )


def _speaker(file_name: str) -> str:
    return re.sub(r"_nohash_.*$", "", Path(file_name).stem)


def _hash(function: Any, text: str) -> int:
    return int(function(text.encode()).hexdigest(), 16)
