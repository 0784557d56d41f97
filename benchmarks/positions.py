"""What a random mask's positions cost in bytes, over its entropy: this wire's coding beside zstd and Huffman coding.

python benchmarks/positions.py > benchmarks/results/positions.txt
"""

import math
import zlib

import numpy as np
import zstandard

from zerofl.results import machine, versions
from zerofl.wire.entropy import encode_bitmap

print(machine(), versions())
print("entries  density  this wire  zstd 1  zstd 19  Huffman (zlib)   bytes / entropy")
for numel in (2_359_296, 36_864):  # ResNet-18's largest and smallest sparse layer
    for density in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        mask = np.random.default_rng(0).random(numel) < density
        bitmap, p = np.packbits(mask), mask.mean()
        entropy_bytes = -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
        huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        sizes = [
            9 + len(encode_bitmap(bitmap, int(mask.sum()), numel)),
            *(len(zstandard.ZstdCompressor(level=level).compress(bitmap.tobytes())) for level in (1, 19)),
            len(huffman.compress(bitmap.tobytes()) + huffman.flush()),
        ]
        print(f"{numel:7}  {density:7.2f}", *(f"{size / entropy_bytes:8.4f}" for size in sizes))
