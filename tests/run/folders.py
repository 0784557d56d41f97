"""A run's folder, saved by hand and killed in the middle."""

from pathlib import Path

import torch

from tests.running import client_record, round_record
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.folder import save_round

STATE = {"w": torch.randn(3, 2), "n": torch.tensor(7)}
MOMENTS = {"m.w": torch.randn(3, 2), "v.w": torch.rand(3, 2)}


def save(directory: Path, round: int) -> None:
    clients = [client_record(round, client, 30) for client in (1, 2)]
    save_round(directory, round_record(round, examples=2 * 30), clients, Checkpoint(round, STATE, MOMENTS, "0123"), {})


def killed(*_: object) -> None:
    raise KeyboardInterrupt
