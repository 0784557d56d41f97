"""Speech Commands v0.01 as 32x32 MFCC, 12 classes: ten words, "unknown" for all others, and silence (§4.1, A.5).

Silence is cut out of the background noises, one piece for every ten clips, at a random place and a random volume. The
folder `_silence_` of the official test set is not read. Shorter clips are padded with zeros at their end.

`root` is the folder that holds the folders of words, or the hub's parquet files. In these the background noises are
the rows with the label `_silence_`, and clips are dealt to the parts by the same rule as files, whichever split they
are in. The hub lacks most of the testing part: its test split is the authors' smaller, separate test set.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from zerofl.data.dataset import Dataset, DatasetError, Split
from zerofl.data.disk_cache import cached
from zerofl.data.files import reading, visible
from zerofl.data.hub import class_name, class_names, file_bytes, parquet_files, read_column, read_rows
from zerofl.data.sound import COEFFICIENTS, HOP, MELS, N_FFT, RATE, Sound, mfcc, noise, one_second
from zerofl.data.source import Published
from zerofl.errors import some
from zerofl.rng import rng

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = len(WORDS), len(WORDS) + 1
CLASSES = (*WORDS, "unknown", "silence")

# v0.01. The parts are the authors'; silence is a tenth of the clips, rounded down.
PUBLISHED = Published(
    (
        {
            "training samples": 51_088 + 5_108,
            "training samples of silence": 5_108,
            "test samples": 6_835 + 683,
            "test samples of silence": 683,
        },
    )
)
PUBLISHED_BY_SPEAKER = Published(({"samples without silence": 64_721},))
CLIPS_A_SILENCE = 10
NOISES = "_background_noise_"
HUB_SILENCE = "_silence_"  # the label of the noises on the hub, and the test set's folder of silence
OTHER_SOUNDS = {".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".webm", ".wma"}
FOLDERS = ("", "speech_commands", "speech_commands_v0.01")
CHUNK = 64  # clips whose MFCC are taken in one go
WORD_EVERY = 5_000  # sounds between two lines of progress, some ten seconds

_log = logging.getLogger("zerofl.data")


class Clip(NamedTuple):
    """A spoken clip: its sound, its word, and the name of its file in the data set, which tells who speaks."""

    sound: Sound
    word: str
    name: str

    @property
    def label(self) -> int:
        return WORDS.index(self.word) if self.word in WORDS else UNKNOWN

    @property
    def speaker(self) -> str:
        return _speaker(self.name)


def load_speech_commands(root: str) -> Dataset:
    """The official training and testing parts, 51,088 and 6,835 clips in v0.01, each with a tenth of silence.

    The official validation part is not used: clients hold out their own. The speakers are the natural clients.

    Raises:
        DatasetError: `root` (or its folder speech_commands/ or speech_commands_v0.01/) has no folders of words and no
            parquet files, or one is not a clip of one second at 16 kHz, or not a wav; it names the file, and the row.
    """
    return _load(root, "official", lambda clip: official_part(clip.name))


def load_speech_commands_by_speaker(root: str) -> Dataset:
    """All clips, a fifth of the speakers (by a hash of the name) in the test part: for copies that lack the official.

    Raises:
        DatasetError: as `load_speech_commands`.
    """
    return _load(root, "speaker", lambda clip: "testing" if _hash(hashlib.md5, clip.speaker) % 5 == 0 else "training")


def official_part(file_name: str) -> str:
    """The part, training, validation or testing, of a file: the rule that the data set's authors publish with it."""
    most = 2**27 - 1
    percentage = _hash(hashlib.sha1, _speaker(file_name)) % (most + 1) * (100 / most)
    return "validation" if percentage < 10 else "testing" if percentage < 20 else "training"


def _load(root: str, rule: str, part_of: Callable[[Clip], str]) -> Dataset:
    source = Path(root).expanduser()
    with reading("speech_commands", source):
        return _load_from(source, rule, part_of)


def _load_from(source: Path, rule: str, part_of: Callable[[Clip], str]) -> Dataset:
    purpose = f"speech-2-{COEFFICIENTS}-{N_FFT}-{HOP}-{MELS}"
    if folder := _find(source):
        clips, noises = _from_folders(folder)
    elif tables := [path for paths in parquet_files(source, FOLDERS).values() for path in paths]:
        folder, purpose = tables[0].parent, f"{purpose}-hub-{rule}"
        clips, noises = _from_tables(tables)
    else:
        raise DatasetError(_not_found(source))
    parts = {name: [clip for clip in clips if part_of(clip) == name] for name in ("training", "testing")}
    for name, members in parts.items():
        # By speaker, so that a natural client's samples are together.
        members.sort(key=lambda clip: (clip.speaker, clip.word, clip.name))
        if not members:
            raise DatasetError(
                f"speech_commands: {folder} has {len(clips)} clips, but none of them is in the {name} part. With a "
                "copy that lacks the official parts use dataset = 'speech_commands_by_speaker'"
            )
    splits, owners = {}, {}
    for name, members in parts.items():
        files = {sound.file for sound in (*(clip.sound for clip in members), *noises)}
        arrays = cached(f"{purpose}-{name}", files, functools.partial(_features, name, members, noises))
        splits[name], owners[name] = Split(arrays["features"], arrays["labels"]), arrays["owners"]
    mean = splits["training"].images.mean((0, 1, 3)).view(-1, 1)
    std = splits["training"].images.std((0, 1, 3)).view(-1, 1)
    train, test = (Split((split.images - mean) / std, split.labels) for split in splits.values())
    speakers = sorted({clip.speaker for clip in parts["training"]})
    owner = owners["training"]
    clients = {speaker: torch.nonzero(owner == i).flatten() for i, speaker in enumerate(speakers)}
    return Dataset(train, test, CLASSES, mean=(0.0,), std=(1.0,), clients=clients)


def _from_folders(folder: Path) -> tuple[list[Clip], list[Sound]]:
    """The clips and background noises of folders of words."""
    _refuse_other_sounds([*_word_folders(folder), folder / NOISES])
    clips = [
        Clip(Sound(str(path), path, path.read_bytes), word.name, path.name)
        for word in _word_folders(folder)
        for path in _wav_files(word)
    ]
    for clip in clips:
        if not clip.name.isprintable():  # nor could it be in a message or a checksum
            raise DatasetError(f"speech_commands: {clip.sound.where!a} has a name that is no text; rename it")
    return clips, [Sound(str(path), path, path.read_bytes) for path in _wav_files(folder / NOISES)]


def _word_folders(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir() and not path.name.startswith("_")]


def _wav_files(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.suffix.lower() == ".wav"]


def _refuse_other_sounds(folders: list[Path]) -> None:
    """Clips in another format would be missing without a word, and with them maybe a whole class."""
    others = [path for folder in folders for path in visible(folder) if path.suffix.lower() in OTHER_SOUNDS]
    if others:
        raise DatasetError(
            f"speech_commands: {some(others)}: expected .wav files only, 1 channel at {RATE} Hz. Convert them, or take "
            "them out of the folder"
        )


def stray_files(root: str) -> list[Path]:
    """What is in the folders of words and is no clip; nothing of parquet files."""
    folder = _find(Path(root).expanduser())
    if folder is None:
        return []
    clips = {path for word in _word_folders(folder) for path in _wav_files(word)}
    return [path for word in _word_folders(folder) for path in visible(word) if path not in clips]


def _from_tables(tables: list[Path]) -> tuple[list[Clip], list[Sound]]:
    """The clips and background noises of the hub's parquet files; a file's sounds are read when one is asked for."""

    @functools.cache
    def audio(table: Path) -> Any:
        return read_column(table, "audio", "speech_commands: ")

    def read(table: Path, row: int) -> bytes:
        return file_bytes(audio(table)[row].as_py(), "audio", f"speech_commands: {table}, row {row}")

    clips: dict[tuple[str, str], Clip] = {}
    noises: dict[str, Sound] = {}
    for table in tables:
        names = class_names(table, "label", "speech_commands: ")
        rows = read_rows(table, ["file", "label", "speaker_id", "utterance_id"], "speech_commands: ")
        for row, (where, (file, label, speaker, take)) in enumerate(rows):
            word, path = class_name(label, names, "label", where), PurePosixPath(str(file))
            sound = Sound(where.removeprefix("speech_commands: "), table, functools.partial(read, table, row))
            if word != HUB_SILENCE:
                # Not the file's own name: those of the test split's unknown words have the word before the speaker.
                name = path.name if speaker is None else f"{speaker}_nohash_{take}.wav"
                clips.setdefault((word, name), Clip(sound, word, name))
            elif path.parent.name != HUB_SILENCE:
                noises.setdefault(path.name, sound)
    if not noises:
        raise DatasetError(
            f"speech_commands: {tables[0].parent} has no background noises, rows with the label {HUB_SILENCE}, in "
            f"{', '.join(table.name for table in tables)}. Put all splits of the data set there"
        )
    return list(clips.values()), [noises[name] for name in sorted(noises)]


def _features(part: str, clips: list[Clip], noises: list[Sound]) -> dict[str, torch.Tensor]:
    """The MFCC [n, 1, 32, 32] of clips and their silences, labels [n], and each one's speaker as a number [n]."""
    generator = rng(0, 0, 0, f"silence {part}")
    recordings = [noise(sound) for sound in noises]
    speakers = {speaker: i for i, speaker in enumerate(sorted({clip.speaker for clip in clips}))}
    sounds: list[np.ndarray] = []
    features: list[np.ndarray] = []
    labels: list[int] = []
    owners: list[int] = []

    def samples() -> Iterator[tuple[np.ndarray, int, int]]:
        for number, clip in enumerate(clips, start=1):
            owner = speakers[clip.speaker]
            yield one_second(clip.sound), clip.label, owner
            if number % CLIPS_A_SILENCE == 0:
                source = recordings[generator.integers(len(recordings))]
                start = generator.integers(len(source) - RATE + 1)
                yield source[start : start + RATE] * np.float32(generator.random()), SILENCE, owner

    total = len(clips) + len(clips) // CLIPS_A_SILENCE
    for sound, label, owner in samples():
        if len(labels) % WORD_EVERY == 0:
            _log.info("MFCC of the %s part: %d of %d sounds", part, len(labels), total)
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


def _find(source: Path) -> Path | None:
    """The folder that holds the folders of words."""
    for name in FOLDERS:
        if _wav_files(source / name / NOISES):
            return source / name
    return None


def _not_found(source: Path) -> str:
    archive = f"{source} is a file: unpack the archive, and give the folder" if source.is_file() else ""
    return (
        f"speech_commands: found no {NOISES}/*.wav in {source.absolute()} or its folders "
        f"{', '.join(name for name in FOLDERS if name)}. "
        + (
            archive
            or "Get speech_commands_v0.01.tar.gz from http://download.tensorflow.org/data/, unpack it, and give "
            "the folder with --root, or download parquet files with: zerofl data fetch speech_commands --root DIR"
        )
    )


def _speaker(file_name: str) -> str:
    return re.sub(r"_nohash_.*$", "", Path(file_name).stem)


def _hash(function: Any, text: str) -> int:
    return int(function(text.encode()).hexdigest(), 16)
