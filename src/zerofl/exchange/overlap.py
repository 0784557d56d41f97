"""How far the clients agree about which weights matter (§4.3): the overlap of the masks they send."""

import numpy as np

from zerofl.exchange.update import Sparse, Update


class MaskCounts:
    """Counts, for every entry of every sparse tensor, the clients of a round that sent it."""

    def __init__(self) -> None:
        self._clients = 0
        self._counts: dict[str, np.ndarray] = {}

    def add(self, update: Update) -> None:
        """Count one client's update."""
        self._clients += 1
        for name, tensor in update.tensors.items():
            if isinstance(tensor, Sparse):
                counts = self._counts.setdefault(name, np.zeros(tensor.shape.numel(), np.uint16))
                counts += tensor.mask()

    def overlap(self) -> dict[str, float]:
        """For each sparse tensor the mean number of entries that two clients share, over the mean that one sends.

        1 is all clients sending the same positions; of positions drawn at random each two would share the fraction that
        is sent. Empty with fewer than two clients.
        """
        if self._clients < 2:
            return {}
        # An entry that c clients sent is shared by c (c - 1) of the m (m - 1) ordered pairs of clients.
        sums = {name: np.bincount(counts) for name, counts in self._counts.items()}
        overlap = {}
        for name, entries in sums.items():
            c = np.arange(len(entries))
            sent = int(entries @ c)
            overlap[name] = float(entries @ (c * (c - 1)) / ((self._clients - 1) * sent)) if sent else 0.0
        return overlap
