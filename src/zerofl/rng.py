"""All randomness of a run: a function of the experiment's seed and of what it is for, never of what ran before."""

import zlib

import numpy as np


def rng(seed: int, round: int, client: int, purpose: str) -> np.random.Generator:
    """The generator for one purpose of one client in one round; 0 stands for "no round" and for the server's client."""
    return np.random.default_rng([seed, round, client, zlib.crc32(purpose.encode())])


def cohort(seed: int, round: int, clients: int, clients_per_round: int) -> list[int]:
    """A round's clients in rising order, drawn without replacement (Algorithm 1: "randomly selects K devices")."""
    chosen = rng(seed, round, 0, "cohort").choice(clients, clients_per_round, replace=False)
    return sorted(int(client) for client in chosen)
