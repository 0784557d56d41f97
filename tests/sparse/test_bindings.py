"""What the bindings refuse: no shape, type or size from Python may reach a kernel that does not expect it."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sparse.operands import Geometry, _native

INT_MAX = 2**31 - 1
SIZES = Geometry(batch=3, in_channels=4, out_channels=8, size=(6, 5))

FORWARD: dict[str, Any] = {
    "geometry": SIZES.native, "input": torch.ones(SIZES.input), "weight": torch.ones(SIZES.weight),
    "bias": torch.ones(8), "output": torch.ones(SIZES.output), "weight_choice": _native.TopK(9),
    "input_choice": _native.TopK(9), "for_grad_input": True, "threads": 2,
}  # fmt: skip

X = torch.ones(2, 3, 3, 3)
BITS = torch.ones(2, 4, dtype=torch.uint8)  # one for each of 27 entries of two channels
PLACES = torch.ones(2, 3, 3, 3, dtype=torch.uint8)


def backward(**arguments: Any) -> None:
    _native.Convolution(**FORWARD).backward(**arguments)


# Calls that are right, to be spoilt in one argument at a time.
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "Geometry": (
        _native.Geometry,
        {"input": (4, 6, 5, 3), "weight": (8, 4, 3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    ),
    "Convolution": (_native.Convolution, FORWARD),
    "Linear": (
        _native.Linear,
        {"input": torch.ones(5, 3), "weight": torch.ones(8, 5), "bias": torch.ones(8), "output": torch.ones(8, 3),
         "weight_choice": _native.TopK(9), "input_choice": _native.AtLeast(0.5), "for_grad_input": True, "threads": 2},
    ),
    "linear_backward": (
        lambda **arguments: _native.Linear(**CALLS["Linear"][1]).backward(**arguments),
        {"grad_output": torch.ones(8, 3), "grad_input": torch.ones(5, 3), "grad_weight": torch.ones(8, 5),
         "threads": 2},
    ),
    "backward": (
        backward,
        {"grad_output": torch.ones(SIZES.output), "addend": torch.ones(SIZES.samples),
         "grad_input": torch.ones(SIZES.input), "grad_weight": torch.ones(SIZES.weight), "threads": 2},
    ),
    "top_k_threshold": (_native.top_k_threshold, {"x": torch.ones(7), "k": 3, "threads": 2}),
    "batch_norm": (
        _native.batch_norm,
        {"x": X, "of_batch": True, "mean": torch.ones(2), "variance": torch.ones(2), "running_mean": torch.ones(2),
         "running_variance": torch.ones(2), "momentum": 0.1, "epsilon": 1e-5,
         "weight": torch.ones(2), "bias": torch.ones(2), "residual": X, "relu": True, "y": X.clone(), "positive": BITS,
         "threads": 2},
    ),
    "batch_norm_backward": (
        _native.batch_norm_backward,
        {"grad_y": X, "x": X, "positive": BITS, "mean": torch.ones(2), "variance": torch.ones(2), "epsilon": 1e-5,
         "weight": torch.ones(2), "grad_x": X.clone(), "grad_weight": torch.ones(2), "grad_bias": torch.ones(2),
         "grad_residual": X.clone(), "threads": 2},
    ),
    "max_pool": (
        _native.max_pool,
        {"x": X, "size": 1, "relu": True, "y": X.clone(), "place": PLACES, "threads": 2},
    ),
    "max_pool_backward": (
        _native.max_pool_backward,
        {"grad_y": X, "place": PLACES, "size": 1, "grad_x": X.clone(), "threads": 2},
    ),
}  # fmt: skip

OF_ANOTHER_SHAPE = "does not have the shape that the other arguments give it"
ARGUMENTS = [(call, name) for call, (_, good) in CALLS.items() for name in good]


def call(name: str, **spoilt: Any) -> object:
    function, good = CALLS[name]
    return function(**(good | spoilt))


def refuses(name: str, message: str, **spoilt: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(name, **spoilt)


def does_not_fit(name: str, **spoilt: Any) -> None:
    """It is no argument for this function: of another type, number of dimensions, or out of a C++ int."""
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(name, **spoilt)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_but_for_what_is_spoilt(name: str) -> None:
    call(name)


@pytest.mark.parametrize(("name", "argument"), [a for a in ARGUMENTS if isinstance(CALLS[a[0]][1][a[1]], Tensor)])
def test_a_tensor_of_another_kind_or_shape_is_refused(name: str, argument: str) -> None:
    good: Tensor = CALLS[name][1][argument]
    others = [good.double(), good.int(), good.to("meta"), good.tolist(), good.to_sparse(), 1.0, "x"]
    others += [good.float()] if good.dtype == torch.uint8 else [good.byte()]
    others += [good.new_ones(*good.shape[:-1], 2 * good.shape[-1])[..., ::2]]  # strided
    if good.dim() == 4:
        others.append(good.to(memory_format=torch.channels_last))
    for other in others:
        does_not_fit(name, **{argument: other})
    if name == "top_k_threshold":  # which takes any shape
        return
    for other in (good[None], good[0], good.new_empty(0), good.expand(2, *good.shape)):
        # Bytes may have any number of dimensions up to four, floats only their own.
        any_number = good.dtype == torch.uint8 and other.dim() <= 4 and other.is_contiguous()
        if any_number or other.dim() == good.dim():
            refuses(name, OF_ANOTHER_SHAPE, **{argument: other})
        else:
            does_not_fit(name, **{argument: other})
    for dim in range(good.dim()):
        for change in (1, -1):
            other = good.new_ones([size + change * (d == dim) for d, size in enumerate(good.shape)])
            refuses(name, OF_ANOTHER_SHAPE, **{argument: other})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_nonsense_is_refused(name: str, argument: str) -> None:
    for nonsense in ("x", object(), [None], 1 + 1j, b"", {}):
        does_not_fit(name, **{argument: nonsense})


@pytest.mark.parametrize("k", [-1, 4 * 6 * 5 * 3 + 1, 2**40])
def test_a_k_that_no_tensor_has_is_refused(k: int) -> None:
    refuses("top_k_threshold", "k is out of range", k=k)
    for name in ("Convolution", "Linear"):
        refuses(name, "k is out of range", weight_choice=_native.TopK(k))
        refuses(name, "k is out of range", input_choice=_native.TopK(k))


@pytest.mark.parametrize("k", [2**70, 1.5, math.nan, None])
def test_a_k_that_is_no_number_is_refused(k: Any) -> None:
    does_not_fit("top_k_threshold", k=k)
    for choice in (_native.TopK, lambda k: _native.AtLeast(0.5, k)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            choice(k)


@pytest.mark.parametrize("choice", [(), (1, 0.0), 1, 0.5])
def test_a_choice_is_the_top_k_or_what_is_at_least_a_threshold(choice: Any) -> None:
    for name in ("Convolution", "Linear"):
        does_not_fit(name, weight_choice=choice)
        does_not_fit(name, input_choice=choice)


def with_side(shape: tuple[int, ...], place: int, side: int) -> tuple[int, ...]:
    return (*shape[:place], side, *shape[place + 1 :])


NUMBERS = "expected input and weight sizes of 4 numbers, and stride, padding and dilation of 2"
POSITIVE = "sizes, strides and dilations have to be 1 or more"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *(({of: (bad, bad)}, POSITIVE) for of in ("stride", "dilation") for bad in (0, -1, -INT_MAX)),
        *(({"padding": (bad, 0)}, "paddings have to be 0 or more") for bad in (-1, -INT_MAX)),
        *(({of: sizes}, NUMBERS) for of in ("stride", "padding", "dilation") for sizes in ((), (1,), (1, 1, 1))),
        *(({"input": with_side((4, 6, 5, 3), i, bad)}, POSITIVE) for i in range(4) for bad in (0, -1)),
        *(({"weight": with_side((8, 4, 3, 3), i, bad)}, POSITIVE) for i in (0, 2, 3) for bad in (0, -1)),
        *(({"weight": (8, bad, 3, 3)}, "another number of input channels") for bad in (-1, 0, 3)),
        ({"input": (4, 6, 5)}, NUMBERS),
        ({"weight": (8, 4, 3)}, NUMBERS),
        ({"weight": (8, 4, 7, 3)}, "the kernel is larger than the padded input"),
        ({"dilation": (1, 3)}, "the kernel is larger than the padded input"),
        # What would overflow an int, or take more memory than there is, on its way to a result of a few numbers.
        ({"dilation": (INT_MAX, INT_MAX)}, "a padding or kernel of more than"),
        ({"padding": (INT_MAX, 0), "stride": (2**30, 1)}, "a padding or kernel of more than"),
        ({"padding": (2**30, 2**30), "stride": (2**30, 2**30)}, "a padding or kernel of more than"),
        ({"padding": (2**30, 2**30), "dilation": (2**30, 2**30)}, "a padding or kernel of more than"),
        ({"padding": (0, 2**25), "dilation": (1, 2**25), "stride": (1, 2**25)}, "a padding or kernel of more than"),
        ({"stride": (2**15, 2**15)}, "a stride of more than"),
        ({"stride": (INT_MAX, INT_MAX)}, "a stride of more than"),
    ],
    ids=str,
)
def test_sizes_that_make_no_convolution_are_refused(sizes: dict[str, Any], message: str) -> None:
    refuses("Geometry", message, **sizes)


@pytest.mark.parametrize("argument", ["input", "weight", "stride", "padding", "dilation"])
@pytest.mark.parametrize("bad", [2**31, 1.5, 0.5, "1"])
def test_sizes_that_are_no_ints_are_refused(argument: str, bad: Any) -> None:
    good = CALLS["Geometry"][1][argument]
    does_not_fit("Geometry", **{argument: (bad, *good[1:])})
    does_not_fit("Geometry", **{argument: bad})


@pytest.mark.parametrize("side", [0, 1])
def test_a_kernel_that_spans_more_memory_than_an_offset_can_is_refused(side: int) -> None:
    def along(value: int, other: int) -> tuple[int, int]:
        return (other, value) if side else (value, other)

    reach = 2**23
    wide = Geometry(64, 64, 1, (3, 3), along(2, 1), along(2**20, 1), along(reach, 0), along(reach, 1))
    refuses(
        "Convolution",
        "a kernel that spans more than 2\\^31 bytes of its input",
        geometry=wide.native,
        input=torch.ones(wide.input),
        weight=torch.ones(wide.weight),
        bias=None,
        output=torch.ones(wide.output),
    )


@pytest.mark.parametrize("threads", [0, -1, -INT_MAX, INT_MAX])
def test_any_number_of_threads_does(threads: int) -> None:
    outputs = []
    for count in (1, threads):
        output = torch.full(SIZES.output, math.nan)
        call("Convolution", output=output, threads=count)
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


def test_what_was_not_packed_has_no_gradient() -> None:
    gradients = CALLS["backward"][1]
    for packed, wanted in (({"for_grad_input": False}, "grad_input"), ({"input_choice": None}, "grad_weight")):
        convolution = _native.Convolution(**(FORWARD | packed))
        with pytest.raises(ValueError, match="packed"):
            convolution.backward(**gradients)
        others = {"grad_input": None, "grad_weight": None, "addend": None} | {wanted: gradients[wanted]}
        with pytest.raises(ValueError, match="packed"):
            convolution.backward(**(gradients | others))
        convolution.backward(**(gradients | {wanted: None}))


def test_a_backward_pass_can_be_repeated() -> None:
    convolution = _native.Convolution(**FORWARD)
    results = []
    for _ in range(2):
        gradients = {"grad_input": torch.full(SIZES.input, math.nan), "grad_weight": torch.full(SIZES.weight, math.nan)}
        convolution.backward(**(CALLS["backward"][1] | gradients))
        results.append(gradients)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Exception ignored")
def test_objects_that_hold_no_convolution_do_nothing() -> None:
    empty = _native.Convolution.__new__(_native.Convolution)
    with pytest.raises(TypeError):
        _ = empty.weight_threshold
    with pytest.raises(TypeError):
        empty.backward(**CALLS["backward"][1])
    with pytest.raises(TypeError):
        call("Convolution", geometry=_native.Geometry.__new__(_native.Geometry))
    convolution = _native.Convolution(**FORWARD)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(convolution)


@pytest.mark.parametrize("size", [0, -1, 16])
def test_a_pool_has_between_1_and_15_positions_a_side(size: int) -> None:
    refuses("max_pool", "size has to be 1 to 15", size=size)
    refuses("max_pool_backward", "size has to be 1 to 15", size=size)


def test_a_pool_without_entries_touches_nothing() -> None:
    for shape in [(2, 4, 0, 3), (2, 4, 4, 0), (2, 1, 1, 3)]:
        pooled = shape[0], shape[1] // 2, shape[2] // 2, shape[3]
        place = torch.empty(pooled, dtype=torch.uint8)
        call("max_pool", size=2, x=torch.ones(shape), y=torch.ones(pooled), place=place)
        grad_x = torch.full(shape, math.nan)
        call("max_pool_backward", size=2, grad_y=torch.ones(pooled), place=place, grad_x=grad_x)
        assert not grad_x.isnan().any()
    refuses(
        "max_pool",
        "no channels",
        x=torch.ones(0, 4, 4, 3),
        y=torch.ones(0, 4, 4, 3),
        place=torch.ones(0, 4, 4, 3).byte(),
    )


def test_a_normalisation_without_entries_is_refused() -> None:
    for name in ("batch_norm", "batch_norm_backward"):
        refuses(name, "^expected a tensor with entries$", x=torch.ones(2, 0, 4, 3))
