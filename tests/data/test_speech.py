import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from zerofl.cli import main
from zerofl.data import DatasetError, load_dataset
from zerofl.data.check import check_dataset
from zerofl.data.sound import mfcc
from zerofl.data.speech import (
    CLASSES,
    SILENCE,
    UNKNOWN,
    load_speech_commands,
    load_speech_commands_by_speaker,
    official_part,
)

SPEAKERS = [f"{i:08x}" for i in range(40)]
WORDS = ("yes", "go", "bed")
NO_CHECKSUM = ("there is no published checksum to compare with: only the counts were",)


def write_wav(path: Path, samples: int, rate: int = 16_000, channels: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, (samples, channels)).astype(np.float32)
    soundfile.write(path, noise, rate, subtype="PCM_16")


@pytest.fixture
def speech_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 speakers with three words each, a clip as long as its speaker's number."""
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "speech"
    write_wav(root / "_background_noise_" / "hum.wav", 40_000)
    write_wav(root / "_silence_" / "1.wav", 16_000)  # of the official test set; not read
    for number, speaker in enumerate(SPEAKERS):
        for word in WORDS:
            write_wav(root / word / f"{speaker}_nohash_0.wav", 12_000 + 100 * number, seed=number)
    return root


def test_parts_labels_silence_and_speakers(speech_root: Path) -> None:
    for _ in range(2):  # the second time from the cache
        dataset = load_speech_commands(str(speech_root))
        parts = {speaker: official_part(f"{speaker}_nohash_0.wav") for speaker in SPEAKERS}
        training = [speaker for speaker, part in parts.items() if part == "training"]
        testing = [speaker for speaker, part in parts.items() if part == "testing"]
        assert 0 < len(testing) < len(training) < len(SPEAKERS)
        spoken = 3 * len(training)
        counts = dataset.train.labels.bincount(minlength=12).tolist()
        expected = dict.fromkeys(range(12), 0) | {
            CLASSES.index("yes"): len(training), CLASSES.index("go"): len(training), UNKNOWN: len(training),
            SILENCE: spoken // 10,
        }  # fmt: skip
        assert counts == list(expected.values())
        assert len(dataset.test.labels) == 3 * len(testing) + 3 * len(testing) // 10
        assert sorted(dataset.clients) == sorted(training)
        assert sum(len(indices) for indices in dataset.clients.values()) == len(dataset.train.labels)
        for indices in dataset.clients.values():
            labels = dataset.train.labels[indices]
            assert sorted(labels[labels != SILENCE].tolist()) == sorted([0, CLASSES.index("go"), UNKNOWN])
        # Every coefficient has zero mean and unit deviation on the training part.
        images = dataset.train.images
        assert images.shape[1:] == (1, 32, 32)
        assert dataset.augmentation is None
        torch.testing.assert_close(images.mean((0, 1, 3)), torch.zeros(32), atol=1e-4, rtol=0)
        torch.testing.assert_close(images.std((0, 1, 3)), torch.ones(32), atol=1e-4, rtol=0)


def test_it_says_how_far_it_has_come(
    speech_root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(speech_root / "nothing is cached here"))
    with caplog.at_level("INFO", "zerofl.data"):
        dataset = load_speech_commands(str(speech_root))
    total = len(dataset.train.labels)
    assert f"MFCC of the training part: 0 of {total} sounds" in caplog.messages


def test_the_command_prints_it_and_leaves_the_logger_as_it_was(
    speech_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("zerofl.data")
    before = logger.level, list(logger.handlers)
    main(["data", "check", "speech_commands", "--root", str(speech_root)])
    assert "MFCC of the training part: 0 of " in capsys.readouterr().err
    assert (logger.level, logger.handlers) == before


def test_no_speaker_is_in_both_parts_of_the_split_by_speaker(speech_root: Path) -> None:
    dataset = load_speech_commands_by_speaker(str(speech_root))
    in_test = {s for s in SPEAKERS if int(hashlib.md5(s.encode()).hexdigest(), 16) % 5 == 0}
    assert in_test
    assert set(dataset.clients) == set(SPEAKERS) - in_test
    assert (dataset.test.labels != SILENCE).sum() == 3 * len(in_test)


def test_the_official_rule_puts_the_published_names_where_they_are() -> None:
    """Names from the data set and the part that its authors' lists have them in."""
    parts = {"bed/62581901_nohash_0.wav": "training", "bed/6d818f6c_nohash_2.wav": "validation"}
    assert {name: official_part(name) for name in parts} == parts
    # All clips of a speaker are in one part.
    assert official_part("62581901_nohash_7.wav") == "training"


def test_a_clips_mfcc_is_librosas_own_and_does_not_depend_on_the_others() -> None:
    import librosa

    generator = np.random.default_rng(0)
    sounds = generator.normal(0, [[0.5], [1e-5], [0.01]], (3, 16_000)).astype(np.float32)
    sounds[:, 8_000:] *= 1e-4  # quieter by 80 dB
    alone = [librosa.feature.mfcc(y=x, sr=16_000, n_mfcc=32, n_fft=2048, hop_length=512, n_mels=32) for x in sounds]
    np.testing.assert_allclose(mfcc(sounds), np.stack(alone), atol=1e-3)


def test_mfcc_of_silence() -> None:
    """The floor of the logarithm is in the first coefficient, and nothing in the others."""
    features = mfcc(np.zeros((2, 16_000), np.float32))
    assert features.shape == (2, 32, 32)
    np.testing.assert_allclose(features[:, 1:], 0, atol=1e-3)
    # 32 mels at -100 dB: the orthonormal DCT's first coefficient is their sum over sqrt(32).
    np.testing.assert_allclose(features[:, 0], -100 * np.sqrt(32), rtol=1e-5)


@pytest.mark.parametrize(
    ("samples", "rate", "channels", "message"),
    [
        (16_000, 8_000, 1, "has 1 channels at 8000 Hz, expected 1 at 16000 Hz"),
        (16_000, 16_000, 2, "has 2 channels at 16000 Hz, expected 1 at 16000 Hz"),
        (16_001, 16_000, 1, r"has 16001 samples, expected 1 to 16000 \(one second\)"),
        (0, 16_000, 1, r"has 0 samples, expected 1 to 16000 \(one second\)"),
    ],
)
def test_a_clip_of_another_kind_is_named(
    speech_root: Path, samples: int, rate: int, channels: int, message: str
) -> None:
    write_wav(speech_root / "yes" / "00000001_nohash_0.wav", samples, rate, channels)
    with pytest.raises(DatasetError, match=message) as raised:
        load_speech_commands_by_speaker(str(speech_root))
    assert "yes/00000001_nohash_0.wav" in str(raised.value)


def test_what_is_not_a_sound_file_is_named(speech_root: Path) -> None:
    (speech_root / "yes" / "00000001_nohash_0.wav").write_bytes(b"RIFF")
    with pytest.raises(DatasetError, match=r"yes/00000001_nohash_0.wav is not a sound file, or is truncated"):
        load_speech_commands_by_speaker(str(speech_root))


def test_a_noise_shorter_than_a_second_is_named(speech_root: Path) -> None:
    write_wav(speech_root / "_background_noise_" / "hum.wav", 15_999)
    with pytest.raises(DatasetError, match=r"hum.wav has 15999 samples, expected 16000 or more to cut silence from"):
        load_speech_commands_by_speaker(str(speech_root))


def test_a_wrong_folder_and_an_archive_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"found no _background_noise_/\*.wav in .*Get speech_commands_v0.01.tar.gz"):
        load_speech_commands(str(tmp_path))
    archive = tmp_path / "speech_commands_v0.01.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(DatasetError, match="is a file: unpack the archive, and give the folder"):
        load_speech_commands(str(archive))


def test_a_copy_without_the_official_parts_names_the_other_split(speech_root: Path) -> None:
    for path in speech_root.glob("[a-z]*/*.wav"):
        if official_part(path.name) == "testing":
            path.unlink()
    with pytest.raises(DatasetError, match="none of them is in the testing part.*speech_commands_by_speaker"):
        load_speech_commands(str(speech_root))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_clip_with_samples_that_are_no_numbers_is_named(speech_root: Path, value: float) -> None:
    path = speech_root / "yes" / "00000001_nohash_0.wav"
    sound = np.zeros(16_000, np.float32)
    sound[7] = value
    soundfile.write(path, sound, 16_000, subtype="FLOAT")
    with pytest.raises(DatasetError, match=r"yes/00000001_nohash_0.wav has samples that are infinite or not a number"):
        load_speech_commands_by_speaker(str(speech_root))


def test_a_suffix_in_capitals_is_the_same(speech_root: Path) -> None:
    before = load_speech_commands_by_speaker(str(speech_root))
    for path in speech_root.glob("[a-z_]*/*.wav"):
        path.rename(path.with_suffix(".WAV"))
    after = load_speech_commands_by_speaker(str(speech_root))
    assert torch.equal(after.train.images, before.train.images)
    assert after.clients.keys() == before.clients.keys()


@pytest.mark.parametrize("folder", ["yes", "_background_noise_"])
def test_sounds_in_another_format_are_refused(speech_root: Path, folder: str) -> None:
    for name in ("a.flac", "b.MP3", "c.ogg", "d.m4a"):
        (speech_root / folder / name).touch()
    message = rf"{folder}/a\.flac, .*b\.MP3, .*c\.ogg and 1 more: expected \.wav files only"
    with pytest.raises(DatasetError, match=message):
        load_speech_commands_by_speaker(str(speech_root))


def test_other_files_are_left_out_and_remarked_on(speech_root: Path) -> None:
    assert check_dataset("speech_commands", str(speech_root)).remarks == NO_CHECKSUM
    load_dataset.cache_clear()
    for name in ("notes.txt", ".DS_Store", "._a.wav"):
        (speech_root / "yes" / name).touch()
    remarks = check_dataset("speech_commands", str(speech_root)).remarks
    assert remarks == (*NO_CHECKSUM, f"not read, as they are no clips: {speech_root / 'yes' / 'notes.txt'}")
