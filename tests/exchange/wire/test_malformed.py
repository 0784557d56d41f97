"""Payloads that no encoder writes are refused, and named."""

import math
import struct

import pytest
import torch
import zstandard

from tests.exchange.wire.payloads import SCHEMA, STATE, C, G, back, changed, one_tensor, random_weights
from zerofl.exchange.update import Update
from zerofl.exchange.wire import (
    Schema,
    WireError,
    decode,
    decode_state,
    encode,
    schema_of,
)

CODED_X = random_weights(4000, 0.1).view(40, 100)
CODED = one_tensor(CODED_X)  # coded positions, float32 values in planes of which the first is compressed
CODED_SCHEMA = schema_of({"x": CODED_X})
WORDS = struct.unpack("<I", CODED[18:22])[0]
VALUES_AT = 22 + 4 * WORDS
COUNT = int((CODED_X != 0).sum())


def with_frame(frame: bytes) -> bytes:
    """The coded payload with another zstd frame for its first plane."""
    (length,) = struct.unpack("<I", CODED[VALUES_AT + 2 : VALUES_AT + 6])
    return CODED[: VALUES_AT + 2] + struct.pack("<I", len(frame)) + frame + CODED[VALUES_AT + 6 + length :]


# A frame header that declares the size, empty raw blocks without end, and then the real one, the last.
PADDED = (
    b"\x28\xb5\x2f\xfd\x60"
    + struct.pack("<H", COUNT - 256)
    + bytes(3) * 500
    + struct.pack("<I", COUNT << 3 | 3)[:3]
    + b"\0"
)

UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(COUNT))
MALFORMED_CODED = [
    (changed(CODED, 14, struct.pack("<I", 0)), r"claims 0 entries, expected 1 to 3999 of its 4000"),
    (changed(CODED, 14, struct.pack("<I", 4000)), r"claims 4000 entries, expected 1 to 3999"),
    (
        changed(CODED, 14, struct.pack("<I", COUNT + 1)),
        r"has words that hold more than its bitmap of 500 bytes",
    ),
    (changed(CODED, 18, b"\xff\xff\xff\xff"), r"the payload ends within tensor 'x': 17179869180 bytes expected"),
    (CODED[:18] + struct.pack("<I", 0) + CODED[VALUES_AT:], rf"claims {COUNT} entries, its positions are 0"),
    (CODED[: VALUES_AT - 4] + bytes(4) + CODED[VALUES_AT:], r"has words that end in 0, which no encoder writes"),
    (
        CODED[:18] + struct.pack("<I", WORDS + 1) + b"\x07\0\0\0" + CODED[22:],
        r"has words that hold more than its bitmap of 500 bytes",
    ),
    (changed(CODED, VALUES_AT + 1, b"\x11"), r"marks planes 0x11 as compressed, it has only 4"),
    (changed(CODED, VALUES_AT + 2, b"\xff" * 4), r"the payload ends within tensor 'x': 4294967295 bytes expected"),
    (changed(CODED, VALUES_AT + 6, b"\0"), r"has a damaged zstd frame"),
    (with_frame(zstandard.compress(bytes(COUNT + 1))), r"has a zstd frame that declares \d+ bytes, expected"),
    (
        with_frame(zstandard.compress(bytes(10**8))),
        rf"has a zstd frame of \d+ bytes for {COUNT}, which no encoder writes",
    ),
    (with_frame(zstandard.compress(bytes(COUNT)) + b"x"), r"has a damaged zstd frame"),
    (with_frame(zstandard.compress(bytes(COUNT))[:-1]), r"has a damaged zstd frame"),
    (with_frame(PADDED), r"has a zstd frame of \d+ bytes for \d+, which no encoder writes"),
    (with_frame(UNSIZED), r"has a zstd frame that declares -1 bytes, expected"),
    (changed(CODED, VALUES_AT, bytes([4]) + struct.pack("<f", math.nan)), r"has an int8 scale of nan"),
    (changed(CODED, VALUES_AT, bytes([4]) + struct.pack("<f", -1.0)), r"has an int8 scale of -1"),
]


@pytest.mark.parametrize(("payload", "message"), MALFORMED_CODED)
def test_a_malformed_coded_payload_is_named(payload: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(payload, CODED_SCHEMA)


def test_bits_beyond_the_last_entry_are_refused() -> None:
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0, 3.0]])
    payload = one_tensor(x)
    assert payload[13:15] == b"\x02" + bytes([0b10101000])
    with pytest.raises(WireError, match="has positions beyond its 5 entries"):
        back(changed(payload, 14, bytes([0b10101001])) + bytes(4), x)


def test_a_compressed_plane_of_no_values_is_refused() -> None:
    """It could hold anything, and nobody would read it."""
    x = torch.zeros(3, 8)
    frame = zstandard.compress(b"") + b"J" * 1000
    planes = (struct.pack("<I", len(frame)) + frame) * 4
    payload = b"ZFL\x01\x00" + schema_of({"x": x}).digest + b"\x02" + bytes(3) + b"\x01\x0f" + planes
    with pytest.raises(WireError, match="has a zstd frame of 1009 bytes for 0, which no encoder writes"):
        back(payload, x)


def test_the_padded_frame_is_a_valid_one() -> None:
    """So that its refusal is for the padding."""
    assert zstandard.decompress(PADDED) == bytes(COUNT)


@pytest.mark.parametrize("counter", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)])
def test_absurd_counters_are_refused(counter: int) -> None:
    n = torch.tensor(counter)
    payload = encode(Update(False, {"n": n}), schema_of({"n": n}))
    with pytest.raises(WireError, match=r"tensor 'n' holds counters from .* expected at most 2\^53"):
        decode(payload, schema_of({"n": n}))


def test_infinity_in_half_precision_is_refused() -> None:
    x = torch.ones(2, 2)
    payload = one_tensor(x, "float16")
    infinite = payload[:16] + b"\x00" + b"\xf8" * 4 + b"\x00" * 4  # planes of 0x7c00, rotated by one: f8 00
    with pytest.raises(WireError, match="holds 4 non-finite values"):
        back(infinite, x)


@pytest.mark.parametrize(("payload", "schema"), [(G, SCHEMA), (C, SCHEMA), (CODED, CODED_SCHEMA)])
def test_every_truncation_is_refused(payload: bytes, schema: Schema) -> None:
    for end in range(len(payload)):
        with pytest.raises(WireError, match="ends within"):
            decode(payload[:end], schema)


def test_changes_are_not_taken_for_a_model() -> None:
    with pytest.raises(WireError, match="holds changes, expected a model's weights"):
        decode_state(G, SCHEMA)


def test_another_models_update_is_refused() -> None:
    with pytest.raises(WireError, match="schema"):
        decode(G, Schema((*SCHEMA.tensors[:2], SCHEMA.tensors[2]._replace(name="m"))))


def test_only_float32_and_int64_can_be_sent() -> None:
    with pytest.raises(ValueError, match=r"tensor 'h' is torch.float16: only float32 and int64 can be sent"):
        schema_of({"h": torch.zeros(2, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"b": torch.zeros(3)}, {}, r"tensor 'b' is torch.float32 \(3,\), the schema says torch.float32 \(2,\)"),
        ({"b": torch.zeros(2).double()}, {}, r"tensor 'b' is torch.float64 \(2,\), the schema says torch.float32"),
        ({"b": torch.tensor([1.0, math.nan])}, {}, r"tensor 'b' holds non-finite values .*: training has diverged"),
        ({"b": None}, {}, r"the update has no tensor 'b', which the schema names"),
        ({}, {"values": "float8"}, r"values = 'float8' .* expected of \['float32', 'float16', 'bfloat16', 'int8'\]"),
        ({}, {"positions": "coo"}, r"positions = 'coo': expected of"),
    ],
)
def test_what_cannot_be_encoded_is_named(
    tensors: dict[str, torch.Tensor], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(Update(False, {**STATE, **tensors}), SCHEMA, **options)  # type: ignore[arg-type]
