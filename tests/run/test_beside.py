"""What is written beside a round: its errors are told, and a kill in between loses nothing."""

import errno
import signal
import threading
from pathlib import Path

import pytest
import torch

from tests.run.folders import MOMENTS, STATE, killed
from tests.running import round_record
from zerofl.run import folder
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.files import CHECKPOINT
from zerofl.run.folder import save_round
from zerofl.run.rounds import _background


def test_what_is_written_beside_a_round_is_asked_for_also_where_that_fails() -> None:
    done: list[int] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def a_round_fails() -> None:
        with _background() as write:
            write(done.append, 1)
            write(full)
            raise RuntimeError("the next round")

    def the_disk_is_full() -> None:
        with _background() as write:
            write(full)
            write(done.append, 2)

    for fails in (a_round_fails, the_disk_is_full):
        with pytest.raises(OSError, match="No space left"):
            fails()
    assert done == [1]


@pytest.mark.parametrize("waits", ["next", "end"])
def test_an_interrupt_while_a_write_is_waited_for_does_not_hide_its_error(waits: str) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def full() -> None:
        begun.set()
        may_end.wait(5)
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted() -> None:
        with _background() as write:
            write(full)
            begun.wait()
            threading.Timer(0.3, may_end.set).start()
            threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
            if waits == "next":
                write(print)

    with pytest.raises((OSError, KeyboardInterrupt), match="No space left") as raised:
        interrupted()
    assert isinstance(raised.value.__context__, KeyboardInterrupt)


def test_weights_are_kept_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it they would not be made again."""
    monkeypatch.setattr(folder, "save_snapshot", killed)
    with pytest.raises(KeyboardInterrupt):
        save_round(tmp_path, round_record(1), [], Checkpoint(1, STATE, MOMENTS, "0123"), {"w": torch.ones(1)})
    assert not (tmp_path / CHECKPOINT).exists()
