"""Mutated payloads against the reader: python -m tests.exchange.wire.fuzz [COUNT] [SEED]

Each payload must be read, or refused with a WireError, in little time and memory. Anything else ends the program with
the number of the payload.
"""

import random
import resource
import struct
import sys
import time
import tracemalloc

import numpy as np
import torch

from zerofl.exchange.update import Update, sparsified
from zerofl.exchange.wire import POSITIONS, VALUES, WireError, decode, encode, received_model, schema_of

SECONDS, PEAK_BYTES = 1.0, 2**20  # the model has 4,110 numbers: 16 kB
# What tracemalloc does not see, because the libraries allocate it themselves, shows in the whole process.
PROCESS_PEAK_KIB = 64 * 1024


def payloads_of_every_form() -> list[bytes]:
    """Small updates that use every encoding of positions and values, with a received model and without."""
    payloads = []
    for density in (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0):
        state = state_of(density)
        update = Update(True, {**state, "w": sparsified(state["w"])})
        for values in VALUES:
            for positions in POSITIONS:
                generator = np.random.default_rng(0)
                payloads.append(encode(update, SCHEMA, values=values, positions=positions, generator=generator))
        for values in VALUES:
            for adds in (False, True):
                trained = {name: t * 1.001 if t.is_floating_point() else t for name, t in state.items()}
                update = Update(adds, {**trained, "w": sparsified(trained["w"])})
                generator = np.random.default_rng(0)
                payloads.append(encode(update, SCHEMA, values=values, received=RECEIVED, generator=generator))
    return payloads


def state_of(density: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 100, generator=generator)
    w = torch.where(torch.rand(40, 100, generator=generator) < density, w, 0.0)
    return {"w": w, "fc": torch.randn(9, 11, generator=generator), "b": torch.randn(9), "n": torch.tensor(7)}


SCHEMA = schema_of(state_of(0.1))
RECEIVED = received_model(state_of(0.9), SCHEMA)
INTERESTING = [0, 1, 7, 8, 127, 128, 255, 4000, 4001, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def mutated(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four of: a flipped bit, a changed byte or number, a piece cut, doubled or taken from another payload."""
    data = bytearray(payload)
    for _ in range(chance.randint(1, 4)):
        # Half of the changes leave the header alone: it refuses nearly everything.
        start = chance.randrange(13 if chance.random() < 0.5 and len(data) > 13 else 0, max(len(data), 1))
        kind = chance.randrange(7)
        if not data:
            break
        if kind == 0:
            data[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[start] = chance.randrange(256)
        elif kind == 2:
            data[start : start + 4] = struct.pack("<I", chance.choice(INTERESTING))
        elif kind == 3:
            del data[start : start + chance.choice([1, 4, 100])]
        elif kind == 4:
            data[start:start] = data[start : start + chance.choice([1, 4, 100])]
        elif kind == 5:
            other = chance.choice(others)
            data[start:] = other[min(start, len(other)) :]
        else:
            data[start:] = b""
    return bytes(data)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Read `count` mutated payloads; returns how many were read and how many refused."""
    chance = random.Random(seed)
    bases = payloads_of_every_form()
    outcomes = {"read": 0, "refused": 0}
    process_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for number in range(count):
            payload = mutated(chance.choice(bases), bases, chance)
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                decode(payload, SCHEMA, RECEIVED)
                outcomes["read"] += 1
            except WireError:
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"payload {number} of seed {seed}: {error!r}") from error
            seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1] - before
            if seconds > SECONDS or peak > PEAK_BYTES:
                raise AssertionError(f"payload {number} of seed {seed}: {seconds:.2f} s and {peak} bytes")
    finally:
        tracemalloc.stop()
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - process_before
    if process_peak > PROCESS_PEAK_KIB:
        raise AssertionError(f"the process grew by {process_peak} KiB over {count} payloads")
    return outcomes


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    print(fuzz(*arguments[:1] or [100_000], *arguments[1:] or [0]))
