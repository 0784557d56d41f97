import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zerofl.uplink import Sparse, Update, sparsified
from zerofl.wire import Schema, WireError, decode, decode_state, encode, encode_state, schema_of

STATE = {"w": torch.zeros(2, 8), "b": torch.zeros(2), "n": torch.tensor(0)}
SCHEMA = schema_of(STATE)
W = torch.zeros(16)
W[3], W[10] = 1.5, -2.0
UPDATE = Update(True, {"w": sparsified(W.view(2, 8)), "b": torch.tensor([0.5, 1.0]), "n": torch.tensor(5)})

# Written out by hand from the format's description.
GOLDEN = (
    b"ZFL\x01"  # magic and version
    b"\x01"  # changes
    + SCHEMA.digest
    + b"\x01" + struct.pack("<I", 2) + struct.pack("<2i", 3, 10) + struct.pack("<2f", 1.5, -2.0)  # w, CSR
    + b"\x00" + struct.pack("<2f", 0.5, 1.0)  # b, dense
    + b"\x00" + struct.pack("<q", 5)  # n, dense
)  # fmt: skip


def same(one: Update, other: Update) -> bool:
    return one.adds == other.adds and all(
        torch.equal(dense(one, name), dense(other, name)) for name in one.tensors | other.tensors
    )


def dense(update: Update, name: str) -> torch.Tensor:
    tensor = update.tensors[name]
    return tensor.to_dense() if isinstance(tensor, Sparse) else tensor


def test_golden_bytes() -> None:
    assert encode(UPDATE, SCHEMA) == GOLDEN
    assert len(GOLDEN) == 13 + (1 + 4 + 2 * 8) + (1 + 8) + (1 + 8)
    assert same(decode(GOLDEN, SCHEMA), UPDATE)


def test_the_schemas_digest_is_fixed() -> None:
    """SHA-256 of "w (2, 8) torch.float32\\nb (2,) torch.float32\\nn () torch.int64\\n"."""
    assert SCHEMA.digest.hex() == "130283e56610ace1"


def test_a_sparse_tensor_is_sent_dense_where_that_is_shorter() -> None:
    # 16 entries are 64 bytes dense; CSR takes 4 + 8 an entry, so 7 entries (60) are CSR and 8 (68) are dense.
    for count, encoding in ((7, 1), (8, 0)):
        w = torch.zeros(16)
        w[:count] = 1.0
        payload = encode(Update(True, {**UPDATE.tensors, "w": sparsified(w.view(2, 8))}), SCHEMA)
        assert payload[13] == encoding
        assert torch.equal(dense(decode(payload, SCHEMA), "w"), w.view(2, 8))


def test_dense_bytes_is_the_length_of_the_whole_model() -> None:
    assert len(encode_state(STATE, SCHEMA)) == SCHEMA.dense_bytes == 13 + 3 + 4 * 16 + 4 * 2 + 8


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 9)), elements=finite), st.booleans())
def test_round_trip(array: np.ndarray, adds: bool) -> None:
    tensor = torch.from_numpy(array)
    schema = schema_of({"x": tensor})
    for sent in (tensor, sparsified(tensor)):
        payload = encode(Update(adds, {"x": sent}), schema)
        assert same(decode(payload, schema), Update(adds, {"x": tensor}))
        assert encode(decode(payload, schema), schema) == payload


def test_decoded_tensors_are_writable_and_our_own() -> None:
    state = decode_state(encode_state(STATE, SCHEMA), SCHEMA)
    state["w"] += 1
    assert not STATE["w"].any()


def changed(offset: int, replacement: bytes) -> bytes:
    return GOLDEN[:offset] + replacement + GOLDEN[offset + len(replacement) :]


W_AT, B_AT = 13, 13 + 21


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", r"ends within the header: 13 bytes expected, 0 left"),
        (b"PK\x03\x04" + GOLDEN[4:], r"starts with b'PK\\x03\\x04', expected b'ZFL\\x01'"),
        (changed(3, b"\x02"), r"starts with b'ZFL\\x02'"),
        (changed(4, b"\x02"), r"kind 2 in the header"),
        (changed(5, b"\xff" * 8), r"is for schema ffffffffffffffff, this model's is"),
        (changed(W_AT, b"\x07"), r"tensor 'w' has encoding 7"),
        (changed(W_AT + 1, struct.pack("<I", 17)), r"tensor 'w' claims 17 entries, it has only 16"),
        (changed(W_AT + 1, struct.pack("<I", 9)), r"the payload ends within tensor 'w': 36 bytes expected"),
        (changed(W_AT + 5, struct.pack("<i", -1)), r"tensor 'w' has positions -1 to 10, expected 0 to 15"),
        (changed(W_AT + 9, struct.pack("<i", 16)), r"tensor 'w' has positions 3 to 16, expected 0 to 15"),
        (changed(W_AT + 5, struct.pack("<2i", 10, 3)), r"tensor 'w' has positions that do not rise strictly"),
        (changed(W_AT + 5, struct.pack("<2i", 3, 3)), r"tensor 'w' has positions that do not rise strictly"),
        (changed(W_AT + 13, struct.pack("<f", math.nan)), r"tensor 'w' holds 1 non-finite values"),
        (changed(B_AT + 1, struct.pack("<f", math.inf)), r"tensor 'b' holds 1 non-finite values"),
        (changed(B_AT + 9, b"\x01"), r"tensor 'n' has encoding 1, expected 0 \(dense\) or, for float32, 1"),
        (GOLDEN[:-1], r"the payload ends within tensor 'n': 8 bytes expected, 7 left"),
        (GOLDEN + b"\x00", r"1 bytes follow the last tensor"),
    ],
)
def test_a_malformed_payload_is_named(payload: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(payload, SCHEMA)


def test_every_truncation_is_refused() -> None:
    for end in range(len(GOLDEN)):
        with pytest.raises(WireError, match="ends within"):
            decode(GOLDEN[:end], SCHEMA)


def test_changes_are_not_taken_for_a_model() -> None:
    with pytest.raises(WireError, match="holds changes, expected a model's weights"):
        decode_state(GOLDEN, SCHEMA)


def test_another_models_update_is_refused() -> None:
    with pytest.raises(WireError, match="schema"):
        decode(GOLDEN, Schema((*SCHEMA.tensors[:2], SCHEMA.tensors[2]._replace(name="m"))))


def test_only_float32_and_int64_can_be_sent() -> None:
    with pytest.raises(ValueError, match=r"tensor 'h' is torch.float16: only float32 and int64 can be sent"):
        schema_of({"h": torch.zeros(2, dtype=torch.float16)})


def test_an_update_of_another_shape_is_not_encoded() -> None:
    with pytest.raises(ValueError, match=r"tensor 'b' has shape \(3,\), the schema says \(2,\)"):
        encode(Update(False, {**STATE, "b": torch.zeros(3)}), SCHEMA)
