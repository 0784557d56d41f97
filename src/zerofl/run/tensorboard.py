"""A run's rounds as TensorBoard events, written as it goes."""

from pathlib import Path

from zerofl.fl.records import RoundRecord

FOLDER = "tensorboard"


class RoundEvents:
    """Writes the scalar figures of each round's record below `directory`; call it with each. Use as a context manager.

    The events of rounds from `first_round` on that an earlier, killed process left are hidden.
    """

    def __init__(self, directory: Path, first_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / FOLDER), purge_step=first_round)

    def __enter__(self) -> "RoundEvents":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def __call__(self, record: RoundRecord) -> None:
        """Write one round's figures: those of layers under the figure's name."""
        for key, value in record.to_json().items():
            for name, scalar in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(scalar, int | float) and key not in ("format", "round"):
                    tag = f"{key}/{name}" if name else key
                    self._writer.add_scalar(tag, scalar, record.round)
        self._writer.flush()
