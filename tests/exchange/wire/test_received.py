"""Updates that refer to the model that the client received: shorter, the same to the bit, and never read without it."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.exchange.wire.payloads import changed, dense
from zerofl.exchange.update import State, Update, sparsified
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.exchange.wire import (
    VALUES,
    WireError,
    decode,
    decode_state,
    encode,
    positions_size,
    received_model,
    schema_of,
)
from zerofl.exchange.wire.entropy import encode_bitmaps
from zerofl.sparse import dispatch


def trained_state(numel: int = 40_000, step: float = 0.01) -> tuple[State, State]:
    """A model as it is received, a fifth of it zeros, and after a training that moves each weight a little."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, numel // 40, generator=generator)
    received = {"w": torch.where(w.abs() < 0.25, 0.0, w), "b": torch.randn(9, generator=generator)}
    trained = {name: t + step * torch.randn(t.shape, generator=generator) for name, t in received.items()}
    return received | {"n": torch.tensor(5)}, trained | {"n": torch.tensor(7)}


RECEIVED, TRAINED = trained_state()
SCHEMA = schema_of(RECEIVED)
REFERENCE = received_model(RECEIVED, SCHEMA)
AT = 13 + 4  # behind the header and the checksum


def update_of(uplink: str = "top_k_weights") -> Update:
    return make_update(uplink, RECEIVED, TRAINED, ["w"], 0.9, 0.1)


def sizes_and_decoded(update: Update, values: str) -> tuple[int, int, Update, Update]:
    """The bytes without and with the received model, and what each decodes to."""
    payloads = [
        encode(update, SCHEMA, values=values, received=received, generator=np.random.default_rng(0))
        for received in (None, REFERENCE)
    ]
    return len(payloads[0]), len(payloads[1]), decode(payloads[0], SCHEMA), decode(payloads[1], SCHEMA, REFERENCE)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_the_update_is_the_same_and_shorter(uplink: str, values: str) -> None:
    """Its values too, whatever they are rounded to; of changes only the positions of the weights' are shorter."""
    before, after, plain, referring = sizes_and_decoded(update_of(uplink), values)
    assert plain.adds == referring.adds
    for name in RECEIVED:
        assert dense(plain, name).numpy().tobytes() == dense(referring, name).numpy().tobytes()
    assert after < {"top_k_weights_diff": 1.001, "diff_on_top_k_weights": 0.95}.get(uplink, 0.9) * before


def test_bfloat16_of_small_changes_takes_half() -> None:
    before, after, _, _ = sizes_and_decoded(update_of(), "bfloat16")
    assert after < 0.6 * before


def test_without_a_received_model_nothing_is_other_than_before() -> None:
    payload = encode(update_of(), SCHEMA)
    assert payload[4] == 0
    assert decode(payload, SCHEMA, REFERENCE).tensors.keys() == RECEIVED.keys()  # which it does not refer to
    assert encode(update_of(), SCHEMA, positions="csr") == encode(
        update_of(), SCHEMA, positions="csr", received=REFERENCE
    )


def test_bytes_written_by_hand_are_read() -> None:
    """From docs/wire-format.md. An encoder would send so few entries in the other ways."""
    received = torch.tensor([[1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    crc = 0xFFFFFFFF
    for byte in received.numpy().tobytes():  # CRC-32, bit by bit
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    schema = schema_of({"x": received})
    head = b"ZFL\x01\x02" + schema.digest + struct.pack("<I", crc ^ 0xFFFFFFFF)
    # 2 is of class 23, 1 an octave below of class 21, 0 of class 0: all of the first two are sent, none of the last,
    # and of classes without entries there are no counts. So there are no words.
    positions = b"\x04" + b"\x00\x02\x02" + bytes(4)
    # Class 21: a step up, none. Class 23: none, a step down. The sign is the last bit, and -1 is 0 with it.
    values = b"\x05\x00" + bytes(3 * 4) + b"\x02\x00\x00\x01"
    decoded = decode(head + positions + values, schema, received_model({"x": received}, schema))
    expected = torch.tensor([[1.0 + 2**-23, 2.0, 1.0, 2.0 - 2**-23], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(dense(decoded, "x"), expected)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # 3 * 2^13 is a half float of bits 0x7600; 0x7602 is two steps above it: 2 << 1.
        (b"\x06\x0d", [3.0 + 2 * 2.0**-9]),
        # bfloat16 of 3 is 0x4040; two steps above it 0x4042.
        (b"\x07", [3.0 + 2 * 2.0**-6]),
    ],
)
def test_differences_of_16_bits_written_by_hand_are_read(kind: bytes, values: list[float]) -> None:
    state = {"x": torch.tensor([[3.0]])}
    schema = schema_of(state)
    reference = received_model(state, schema)
    head = b"ZFL\x01\x02" + schema.digest + struct.pack("<I", reference.checksum)
    decoded = decode(head + b"\x00" + kind + b"\x00" + b"\x00\x04", schema, reference)
    assert dense(decoded, "x").flatten().tolist() == values


def test_differences_of_int8_written_by_hand_are_read() -> None:
    """3 is six levels of 1/2; seven less, modulo 256, is -1."""
    state = {"x": torch.tensor([[3.0]])}
    schema = schema_of(state)
    reference = received_model(state, schema)
    head = b"ZFL\x01\x02" + schema.digest + struct.pack("<I", reference.checksum)
    decoded = decode(head + b"\x00\x08" + struct.pack("<f", 0.5) + b"\x00\xf9", schema, reference)
    assert dense(decoded, "x").item() == -0.5


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
PAIRS = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-40]) | st.floats(width=32)),
        hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-40]) | FLOATS),
    )
)


@settings(deadline=None)
@given(PAIRS, st.booleans(), st.sampled_from([*VALUES]))
def test_any_numbers_come_back_with_and_without_the_kernels(
    pair: tuple[np.ndarray, np.ndarray], adds: bool, values: str
) -> None:
    """NaN and infinity received, other signs, zeros of both signs, overflow in each type."""
    before, after = map(torch.from_numpy, pair)
    schema = schema_of({"x": before})
    with pytest.MonkeyPatch.context() as patch:
        payloads = set()
        for unavailable in (dispatch.UNAVAILABLE, "no compiler"):
            patch.setattr(dispatch, "UNAVAILABLE", unavailable)
            reference = received_model({"x": before}, schema)
            for sent in (after, sparsified(after)):
                generators = np.random.default_rng(0), np.random.default_rng(0)
                update = Update(adds, {"x": sent})
                payload = encode(update, schema, values=values, received=reference, generator=generators[0])
                plain = encode(update, schema, values=values, generator=generators[1])
                decoded = dense(decode(payload, schema, reference), "x")
                assert decoded.numpy().tobytes() == dense(decode(plain, schema), "x").numpy().tobytes()
                assert len(payload) <= len(plain) + 4
                payloads.add((sent is after, payload))
        assert len(payloads) == 2


@pytest.mark.parametrize("values", VALUES)
def test_payloads_are_the_same_without_the_kernels(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that refer and those that do not."""

    def outcome() -> list[bytes]:
        reference, payloads = received_model(RECEIVED, SCHEMA), []
        for received in (None, reference):
            generator = np.random.default_rng(0)
            payload = encode(update_of(), SCHEMA, values=values, received=received, generator=generator)
            payloads += [payload, encode(decode(payload, SCHEMA, received), SCHEMA)]
        return payloads

    with_kernels = outcome()
    monkeypatch.setattr(dispatch, "UNAVAILABLE", "no compiler")
    assert outcome() == with_kernels


def test_tied_tensors_that_were_received_differently_stay_apart() -> None:
    """One sent tensor of two names, of which the received ones are -0 and 0 in one place, or are not equal at all."""
    x = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    for other in (torch.where(x < 0, -0.0, 0.0) + x, x + 1):
        state = {"a": x * 1.01, "b": other * 1.01}
        schema, sent = schema_of(state), sparsified(x)
        reference = received_model(state, schema)
        decoded = decode(encode(Update(False, {"a": sent, "b": sent}), schema, received=reference), schema, reference)
        assert torch.equal(dense(decoded, "a"), x)
        assert torch.equal(dense(decoded, "b"), x)


def test_positions_that_follow_the_received_weights_cost_a_third() -> None:
    tensor = update_of().tensors["w"]
    assert not isinstance(tensor, torch.Tensor)
    assert positions_size(tensor, received=REFERENCE.tensors["w"]) < positions_size(tensor) / 3


def test_another_model_is_refused() -> None:
    payload = encode(update_of(), SCHEMA, received=REFERENCE)
    with pytest.raises(WireError, match=r"refers to the model that the client received; give it"):
        decode(payload, SCHEMA)
    with pytest.raises(WireError, match=r"refers to the model that the client received; give it"):
        decode_state(payload, SCHEMA)
    w = RECEIVED["w"].clone()
    w.view(-1)[-1] = math.nextafter(float(w.view(-1)[-1]), 9)
    w.view(torch.int32).view(-1)[-1] += 1
    with pytest.raises(WireError, match=r"of checksum [0-9a-f]{8}, the one here has [0-9a-f]{8}: it answers another"):
        decode(payload, SCHEMA, received_model(RECEIVED | {"w": w}, SCHEMA))


@pytest.mark.parametrize("missing", [{"w": torch.zeros(2)}, {"w": RECEIVED["w"].double()}, {}])
def test_a_received_model_of_another_schema_is_named(missing: State) -> None:
    state = {name: tensor for name, tensor in RECEIVED.items() if name != "w"} | missing
    with pytest.raises(ValueError, match=r"the received model's 'w' is .*, the schema says torch.float32 \(40, 1000\)"):
        received_model(state, SCHEMA)


PAYLOAD = encode(update_of(), SCHEMA, received=REFERENCE)
SIZES = REFERENCE.tensors["w"].sizes
WIDTHS = [-(-int(size).bit_length() // 8) for size in SIZES]
WORDS_AT = AT + 1 + sum(WIDTHS)
WORDS = struct.unpack("<I", PAYLOAD[WORDS_AT : WORDS_AT + 4])[0]
VALUES_AT = WORDS_AT + 4 + 4 * WORDS
LAST = int(np.flatnonzero(SIZES)[-1])
LARGEST_AT = WORDS_AT - WIDTHS[LAST]


def without_reference(payload: bytes) -> bytes:
    """The same, said not to refer to anything."""
    return payload[:4] + b"\x00" + payload[5:13] + payload[AT:]


MALFORMED = [
    (without_reference(PAYLOAD), r"'w' has encoding 4, by a received tensor, and there is none that it could refer to"),
    (
        without_reference(encode(Update(False, dict(TRAINED)), SCHEMA, received=REFERENCE)),
        r"'w' has values of kind 5, differences, and there is nothing that they could refer to",
    ),
    (
        changed(encode(Update(False, dict(TRAINED)), SCHEMA, received=REFERENCE), 4, b"\x03"),
        r"'w' has values of kind 5, differences, and there is nothing that they could refer to",
    ),
    (changed(PAYLOAD, 4, b"\x04"), r"kind 4 in the header"),
    (changed(PAYLOAD, 13, bytes(4)), r"refers to a received model of checksum 00000000"),
    (changed(PAYLOAD, AT, b"\x05"), r"tensor 'w' has encoding 5, expected 0 \(dense\) or, for float32, 1 to 4"),
    (
        changed(PAYLOAD, LARGEST_AT, b"\xff" * WIDTHS[LAST]),
        rf"claims \d+ entries of class {LAST}, which has only {SIZES[LAST]}",
    ),
    (changed(PAYLOAD, WORDS_AT, struct.pack("<I", WORDS + 2**30)), r"the payload ends within tensor 'w'"),
    (PAYLOAD[:WORDS_AT] + bytes(4) + PAYLOAD[VALUES_AT:], r"claims \d+ entries of class \d+, its positions are 0"),
    (
        PAYLOAD[:WORDS_AT] + struct.pack("<I", WORDS + 1) + b"\x07\0\0\0" + PAYLOAD[WORDS_AT + 4 :],
        r"has words that hold more than its bitmap of \d+ bytes",
    ),
    (changed(PAYLOAD, VALUES_AT, b"\x09"), r"values of kind 9, expected 0 \(plain\) or, for float32, 1 to 8"),
    (changed(PAYLOAD, VALUES_AT + 1, b"\x10"), r"marks planes 0x10 as compressed, it has only 4"),
    (changed(PAYLOAD, len(PAYLOAD) - 10, b"\x04"), r"tensor 'n' has encoding 4, expected 0 \(dense\)"),
    (changed(PAYLOAD, len(PAYLOAD) - 9, b"\x05"), r"tensor 'n' has values of kind 5, expected 0 \(plain\)"),
]


@pytest.mark.parametrize(("payload", "message"), MALFORMED)
def test_a_malformed_payload_is_named(payload: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(payload, SCHEMA, REFERENCE)


def test_bits_beyond_the_last_entry_of_a_class_are_refused() -> None:
    """Twelve of one class, two to the byte's end: a word of their own is put together for the bits that nobody has."""
    state = {"x": torch.ones(1, 12)}
    schema = schema_of(state)
    reference = received_model(state, schema)
    bitmap = np.array([0b10000000, 0b00000001], np.uint8)
    words = encode_bitmaps(bitmap, np.array([2]), np.array([12]))
    head = b"ZFL\x01\x02" + schema.digest + struct.pack("<I", reference.checksum)
    payload = head + b"\x04\x02" + words + b"\x00" + struct.pack("<2f", 1.0, 2.0)
    with pytest.raises(WireError, match="has positions beyond the 12 entries of class 23"):
        decode(payload, schema, reference)


def test_differences_that_lead_to_infinity_are_refused() -> None:
    largest = torch.full((1, 4), torch.finfo(torch.float32).max)
    state = {"x": largest}
    schema = schema_of(state)
    reference = received_model(state, schema)
    head = b"ZFL\x01\x02" + schema.digest + struct.pack("<I", reference.checksum)
    with pytest.raises(WireError, match="holds 4 non-finite values"):
        decode(head + b"\x00\x05\x00" + bytes(12) + b"\x02" * 4, schema, reference)


def test_every_truncation_is_refused() -> None:
    for end in range(len(PAYLOAD)):
        if end % 97 == 0 or end < VALUES_AT:
            with pytest.raises(WireError, match="ends within"):
                decode(PAYLOAD[:end], SCHEMA, REFERENCE)
