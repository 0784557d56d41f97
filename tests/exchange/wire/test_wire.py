import math
import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.exchange.wire.payloads import GOLDEN, SCHEMA, STATE, C, G, back, changed, dense, one_tensor, random_weights
from zerofl.exchange.update import Sparse, Update, sparsified
from zerofl.exchange.wire import (
    POSITIONS,
    VALUES,
    WireError,
    decode,
    decode_state,
    encode,
    encode_state,
    positions_size,
    schema_of,
)

W = torch.zeros(16)
W[3], W[10] = 1.5, -2.0
UPDATE = Update(True, {"w": sparsified(W.view(2, 8)), "b": torch.tensor([0.5, 1.0]), "n": torch.tensor(5)})


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("positions", POSITIONS)
def test_golden_bytes(positions: str) -> None:
    assert encode(UPDATE, SCHEMA, positions=positions) == GOLDEN[positions]
    decoded = decode(GOLDEN[positions], SCHEMA)
    assert decoded.adds
    assert all(same_bits(dense(decoded, name), dense(UPDATE, name)) for name in STATE)


def test_golden_bytes_of_coded_positions() -> None:
    """Taken once; with other bytes here, payloads of before could no longer be read."""
    x = torch.zeros(400)
    x[::40] = 1.0
    payload = one_tensor(x, positions="cheapest")
    words = "0e944f065decf98f2e0f1400"
    coded = b"\x03" + struct.pack("<II", 10, 3) + bytes.fromhex(words)
    assert payload[13:] == coded + b"\x00" + struct.pack("<10f", *[1.0] * 10)
    assert same_bits(back(payload, x), x)


def raw_planes(values: np.ndarray) -> bytes:
    """By the format's words: no plane compressed; each value's bits rotated left by one, its highest byte first."""
    bits = 8 * values.itemsize
    words = [int.from_bytes(value.tobytes(), "little") for value in values]
    rotated = [(word << 1 | word >> bits - 1) & (1 << bits) - 1 for word in words]
    planes = [bytes(word >> 8 * plane & 255 for word in rotated) for plane in reversed(range(values.itemsize))]
    return b"\x00" + b"".join(planes)


X = torch.tensor([[1.5, -0.375], [3.0, 0.0078125]])  # exact in every type but int8

TRUE_BFLOAT16 = np.array([0x3FC0, 0xBEC0, 0x4040, 0x3C00], np.uint16)

HAND_CODED = {
    "float32": b"\x01" + raw_planes(X.numpy().ravel()),
    # 3 is 0.75 * 2^2: the shift to [2^14, 2^15) is 15 - 2 = 13.
    "float16": b"\x02" + struct.pack("<b", 13) + raw_planes((X.numpy().ravel() * 2**13).astype(np.float16)),
    "bfloat16": b"\x03" + raw_planes(TRUE_BFLOAT16),
    "int8": b"\x04" + struct.pack("<f", 0.0078125) + b"\x00" + np.array([127, -48, 64, 1], np.int8).tobytes(),
}

INT8_X = torch.tensor([[127.0, -48.0], [64.0, 1.0]]) * 0.0078125


@pytest.mark.parametrize("values", VALUES)
def test_golden_bytes_of_each_kind_of_value(values: str) -> None:
    header = b"ZFL\x01\x00" + schema_of({"x": X}).digest + b"\x00"  # weights, dense
    expected = INT8_X if values == "int8" else X
    assert same_bits(back(header + HAND_CODED[values], X), expected)
    if values in ("float16", "bfloat16"):  # four values are too few for compression, and float32 goes plain
        update = Update(False, {"x": X})
        assert encode(update, schema_of({"x": X}), values=values) == header + HAND_CODED[values]


def test_a_zstd_plane_is_read_as_the_raw_one() -> None:
    x = torch.full((10, 10), 1.5)  # 0x3fc0, rotated by one 7f 80
    frame = zstandard.compress(b"\x7f" * 100)
    header = b"ZFL\x01\x00" + schema_of({"x": x}).digest + b"\x00\x03\x01"  # dense, bfloat16, plane 0 compressed
    assert same_bits(back(header + struct.pack("<I", len(frame)) + frame + b"\x80" * 100, x), x)


def test_the_schemas_digest_is_fixed() -> None:
    """SHA-256 of "w (2, 8) torch.float32\\nb (2,) torch.float32\\nn () torch.int64\\n"."""
    assert SCHEMA.digest.hex() == "130283e56610ace1"


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)

arrays = hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.integers(1, 40)), elements=st.just(0.0) | finite)


@given(arrays, st.booleans(), st.sampled_from(POSITIONS))
def test_float32_comes_back_to_the_bit_and_is_canonical(array: np.ndarray, adds: bool, positions: str) -> None:
    tensor = torch.from_numpy(array)
    schema = schema_of({"x": tensor})
    for sent in (tensor, sparsified(tensor)):
        payload = encode(Update(adds, {"x": sent}), schema, positions=positions)
        decoded = decode(payload, schema)
        assert decoded.adds == adds
        assert same_bits(dense(decoded, "x"), tensor)
        assert encode(decoded, schema, positions=positions) == payload


@given(arrays)
def test_a_broadcast_model_comes_back_to_the_bit(array: np.ndarray) -> None:
    state = {"x": torch.from_numpy(array), "n": torch.tensor(3)}
    schema = schema_of(state)
    decoded = decode_state(encode_state(state, schema), schema)
    assert all(same_bits(decoded[name], state[name]) for name in state)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, 36_864])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_every_density_comes_back(numel: int, density: float) -> None:
    x = random_weights(numel, density).view(1, -1)
    payload = one_tensor(x)
    assert same_bits(back(payload, x), x)
    assert len(payload) <= 13 + 2 + 4 * numel + numel / 8 + 1  # never more than dense values with a bitmap


@pytest.mark.parametrize("density", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("numel", [36_864, 2_359_296])  # ResNet-18's smallest and largest sparse layer
def test_positions_cost_little_more_than_their_entropy(numel: int, density: float) -> None:
    sparse = sparsified(random_weights(numel, density))
    p = sparse.values.numel() / numel
    entropy_bytes = -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert positions_size(sparse) <= 1.015 * entropy_bytes


def test_the_cheapest_positions_are_taken() -> None:
    first_byte = {}
    for name, density in (("csr", 1e-6), ("coded", 0.1), ("bitmap", 0.5), ("dense", 1.0)):
        x = random_weights(100_000, density)
        x[0] = 1.0
        first_byte[name] = one_tensor(x.view(10, -1))[13]
    assert first_byte == {"csr": 1, "coded": 3, "bitmap": 2, "dense": 0}


def test_exponents_shrink() -> None:
    """The largest tenth of a normal distribution has three exponents or so, of 256."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[x.abs() < 1.645] = 0
    payload, sparse = one_tensor(x), sparsified(x)
    value_bytes = len(payload) - positions_size(sparse)
    assert value_bytes < 0.82 * 4 * sparse.values.numel()


@pytest.mark.parametrize(("values", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_half_precisions_round_to_nearest_at_any_scale(values: str, tolerance: float, scale: float) -> None:
    x = (torch.randn(50, 60, generator=torch.Generator().manual_seed(0)).clamp(min=0.1) * scale).contiguous()
    decoded = back(one_tensor(x, values), x)
    torch.testing.assert_close(decoded, x, rtol=tolerance, atol=0)


@given(hnp.arrays(np.float32, (3, 5), elements=finite), st.sampled_from(["float16", "bfloat16", "int8"]))
def test_lossy_values_stay_finite_and_keep_their_sign(array: np.ndarray, values: str) -> None:
    x = torch.from_numpy(array)
    decoded = back(one_tensor(x, values), x)
    assert decoded.isfinite().all()
    assert ((decoded == 0) | (decoded.sign() == x.sign())).all()


def test_bfloat16_equals_pytorchs_rounding() -> None:
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back(one_tensor(x, "bfloat16"), x), x.bfloat16().float())


def test_int8_is_unbiased_and_within_a_step() -> None:
    x = torch.linspace(-3, 3, 301).view(7, 43)
    decoded = torch.stack([back(one_tensor(x, "int8", seed=seed), x) for seed in range(400)])
    step = 3 / 127
    assert (decoded - x).abs().max() <= step * 1.0001
    # Each mean of 400 has a deviation of at most step / 2 / 20; five of them for 301 entries.
    assert (decoded.mean(0) - x).abs().max() < 5 * step / 40


def test_lossy_values_leave_vectors_and_counters_alone() -> None:
    """Biases, BatchNorm's parameters and statistics cost little and matter much."""
    state = {"w": torch.full((2, 2), 1 / 3), "running_var": torch.full((4,), 1 / 3), "n": torch.tensor(2**40 + 1)}
    schema = schema_of(state)
    decoded = decode(encode(Update(False, dict(state)), schema, values="bfloat16"), schema)
    assert not torch.equal(dense(decoded, "w"), state["w"])
    assert torch.equal(dense(decoded, "running_var"), state["running_var"])
    assert torch.equal(dense(decoded, "n"), state["n"])


def test_a_sparse_model_is_broadcast_sparse() -> None:
    state = {"w": random_weights(100_000, 0.2).view(100, -1)}
    schema = schema_of(state)
    assert len(encode_state(state, schema)) < 0.3 * schema.dense_bytes


@pytest.mark.parametrize("values", VALUES)
def test_a_model_is_broadcast_in_the_values_asked_for(values: str) -> None:
    state = {"w": random_weights(100_000, 0.2).view(100, -1), "b": random_weights(100, 1.0)}
    schema = schema_of(state)
    payload = encode_state(state, schema, values)
    decoded = decode_state(payload, schema)
    assert same_bits(decoded["b"], state["b"])
    assert same_bits(decoded["w"], state["w"]) == (values == "float32")
    plain = decode(encode(Update(False, dict(state)), schema, values=values), schema)
    assert torch.equal(decoded["w"], dense(plain, "w"))  # what is left out is zero
    with pytest.raises(ValueError, match=r"values = 'int4' and positions = 'cheapest': expected of"):
        encode_state(state, schema, "int4")


def test_int8_without_a_generator_rounds_to_nearest_and_leaves_zeros_out() -> None:
    """A level is a step below 1/127; 0.4 and -0.4 of one are zero, which with the zeros themselves are left out."""
    w = torch.zeros(1, 1000)
    w[0, :6] = torch.tensor([1.0, 0.4 / 127, -0.4 / 127, 0.6 / 127, -2.4 / 127, -1.0])
    schema = schema_of({"w": w})
    payload = encode_state({"w": w}, schema, "int8")
    decoded = decode_state(payload, schema)["w"]
    torch.testing.assert_close(127 * decoded[0, :7], torch.tensor([127.0, 0, 0, 1, -2, -127, 0]), rtol=1e-6, atol=0)
    (sent,) = decode(payload, schema).tensors.values()
    assert isinstance(sent, Sparse)
    assert len(sent.values) == 4


def test_zeros_are_left_out_if_their_positions_take_less_than_they_do() -> None:
    """Of half a percent of zeros the positions take 570 bytes: fewer than the zeros as float32, more than as int8."""
    x = random_weights(100_000, 0.995).view(100, -1).sign()
    for values, encoding in (("float32", 3), ("int8", 0)):
        assert encode_state({"x": x}, schema_of({"x": x}), values)[13] == encoding


def test_decoded_tensors_are_writable_and_our_own() -> None:
    state = decode_state(encode_state(STATE, SCHEMA), SCHEMA)
    state["w"] += 1
    state["b"] += 1
    assert not STATE["w"].any()


W_AT = 13
MALFORMED = [
    (b"", r"ends within the header: 13 bytes expected, 0 left"),
    (b"PK\x03\x04" + G[4:], r"starts with b'PK\\x03\\x04', expected b'ZFL\\x01'"),
    (changed(G, 3, b"\x02"), r"starts with b'ZFL\\x02'"),
    (changed(G, 4, b"\x04"), r"kind 4 in the header"),
    (changed(G, 5, b"\xff" * 8), r"is for schema ffffffffffffffff, this model's is"),
    (changed(G, W_AT, b"\x07"), r"tensor 'w' has encoding 7, expected 0 \(dense\) or, for float32, 1 to 4"),
    (changed(G, W_AT + 1, struct.pack("<I", 17)), r"tensor 'w' claims 17 entries, it has only 16"),
    (changed(G, W_AT + 1, b"\xff" * 4), r"tensor 'w' claims 4294967295 entries"),
    (changed(G, W_AT + 1, struct.pack("<I", 16)), r"the payload ends within tensor 'w': 64 bytes expected"),
    (changed(G, W_AT + 5, struct.pack("<i", -1)), r"tensor 'w' has positions -1 to 10, expected 0 to 15"),
    (changed(G, W_AT + 9, struct.pack("<i", 16)), r"tensor 'w' has positions 3 to 16, expected 0 to 15"),
    (changed(G, W_AT + 5, struct.pack("<2i", 10, 3)), r"tensor 'w' has positions that do not rise strictly"),
    (changed(G, W_AT + 5, struct.pack("<2i", 3, 3)), r"tensor 'w' has positions that do not rise strictly"),
    (changed(G, W_AT + 14, struct.pack("<f", math.nan)), r"tensor 'w' holds 1 non-finite values"),
    (changed(G, W_AT + 24, struct.pack("<f", math.inf)), r"tensor 'b' holds 1 non-finite values"),
    (changed(C, W_AT + 3, b"\x09"), r"tensor 'w' has values of kind 9, expected 0 \(plain\) or, for float32, 1 to 8"),
    (changed(C, len(C) - 10, b"\x01"), r"tensor 'n' has encoding 1, expected 0"),
    (changed(C, len(C) - 9, b"\x01"), r"tensor 'n' has values of kind 1, expected 0"),
    (G[:-1], r"the payload ends within tensor 'n': 8 bytes expected, 7 left"),
    (G + b"\x00", r"1 bytes follow the last tensor"),
]


@pytest.mark.parametrize(("payload", "message"), MALFORMED)
def test_a_malformed_payload_is_named(payload: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(payload, SCHEMA)


@pytest.mark.parametrize("values", VALUES)
def test_tensors_with_gaps_are_sent_as_their_copies(values: str) -> None:
    gaps = {"v": torch.arange(2000.0)[::2], "w": torch.randn(40, 20)[:, ::2], "e": torch.ones(1).expand(1000)}
    whole = {name: tensor.contiguous() for name, tensor in gaps.items()}
    assert encode_state(gaps, schema_of(gaps), values) == encode_state(whole, schema_of(whole), values)
