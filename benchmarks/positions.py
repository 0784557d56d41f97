"""What a random mask's positions cost: this wire's coding beside zstd and Huffman coding, in bytes and in time.

python benchmarks/positions.py > benchmarks/results/positions.txt
"""

import math
import time
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import zstandard

from zerofl.exchange.wire.entropy import decode_natively, decode_with_constriction, encode_bitmaps
from zerofl.run.origin import origin


def nanoseconds(numel: int, call: Callable[[], object]) -> float:
    """The least of five times, for each byte of a bitmap of `numel` entries."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 8e9 * min(seconds) / numel


DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
LARGEST, SMALLEST = 2_359_296, 36_864  # ResNet-18's sparse layers

print(origin())
print("\nbytes / entropy")
print("entries  density  this wire  zstd 1  zstd 19  Huffman (zlib)")
for numel in (LARGEST, SMALLEST):
    for density in DENSITIES:
        mask = np.random.default_rng(0).random(numel) < density
        bitmap, p = np.packbits(mask), mask.mean()
        entropy_bytes = -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
        huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        sizes = [
            9 + len(encode_bitmaps(bitmap, np.array([mask.sum()]), np.array([numel]))),
            *(len(zstandard.ZstdCompressor(level=level).compress(bitmap.tobytes())) for level in (1, 19)),
            len(huffman.compress(bitmap.tobytes()) + huffman.flush()),
        ]
        print(f"{numel:7}  {density:7.2f}", *(f"{size / entropy_bytes:8.4f}" for size in sizes))

print("\nnanoseconds for each byte of the bitmap")
print("entries  density        encode  decode, native  constriction  zstd 1 encode  decode")
for density in DENSITIES:
    mask = np.random.default_rng(0).random(LARGEST) < density
    bitmap, count = np.packbits(mask), int(mask.sum())
    of_one = np.array([count]), np.array([LARGEST])
    coded = encode_bitmaps(bitmap, *of_one)
    words = np.frombuffer(coded[4:], np.uint32)
    frame = zstandard.ZstdCompressor(level=1).compress(bitmap.tobytes())
    calls: list[Callable[[], object]] = [
        partial(encode_bitmaps, bitmap, *of_one),
        partial(decode_natively, words, *of_one),
        partial(decode_with_constriction, words, *of_one),
        partial(zstandard.ZstdCompressor(level=1).compress, bitmap.tobytes()),
        partial(zstandard.ZstdDecompressor().decompress, frame),
    ]
    print(f"{LARGEST:7}  {density:7.2f}", *(f"{nanoseconds(LARGEST, call):12.1f}" for call in calls))
