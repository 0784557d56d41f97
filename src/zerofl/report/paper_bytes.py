"""The paper's own accounting of communication (Table 1's "File Size"), for the tables beside the measured bytes only.

It counts every entry that is sent, of dense layers and BatchNorm's running statistics too, as a float32 with an int32
index; the full model counts 4 bytes an entry. Integer counters do not count. With these rules ResNet-18 gives
the printed sizes: 10.1 18.7 27.3 and 5.9 14.4 23.0 against a full model of 43.7.
"""

from collections.abc import Iterable

import torch

from zerofl.exchange.wire import Schema

PAPER_MB = 1_024_000
"""The bytes of one of the paper's "MB": 1024 x 1000, which is what its tables' figures come out as."""


def paper_csr_bytes(schema: Schema, sparse: Iterable[str], sparsity: float, mask_ratio: float) -> float:
    """What the paper counts for one sparse update: [(1 - sp + r) * sparse entries + the other entries] * 8 bytes."""
    sparse = set(sparse)
    sizes = _float_sizes(schema)
    sparse_entries = sum(size for name, size in sizes.items() if name in sparse)
    return ((1 - sparsity + mask_ratio) * sparse_entries + sum(sizes.values()) - sparse_entries) * 8


def paper_full_bytes(schema: Schema) -> int:
    """What the paper counts for the full model: 4 bytes an entry."""
    return 4 * sum(_float_sizes(schema).values())


def _float_sizes(schema: Schema) -> dict[str, int]:
    return {name: shape.numel() for name, shape, dtype in schema.tensors if dtype == torch.float32}
