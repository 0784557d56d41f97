"""The kernels' module, built from cpp/. Tensors are contiguous, float32, on the CPU, [channels, height, width, batch].

Every function writes into tensors that the caller has allocated, and raises ValueError or TypeError for one that does
not have the type or the shape expected. `zerofl.sparse.dispatch` loads it.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

def use_openmp_of(path: str) -> bool:
    """Run on the threads of the OpenMP runtime that the loaded library `path` is linked to; whether it has one."""

def isa() -> str:
    """The instruction set in use: "baseline", "avx2" or "avx512"."""

def sources() -> str:
    """SHA-256 of the sources this was built from."""

def isas() -> list[str]:
    """Those this processor has, from the slowest to the fastest."""

def set_isa(name: str) -> None:
    """Use another one from now on, for measurements and tests."""

def empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor in memory that is kept and used again once it is freed."""

def top_k_threshold(x: Tensor, k: int, threads: int) -> float:
    """The k-th largest magnitude; NaN counts as the largest, and k = 0 gives infinity."""

def seconds() -> dict[str, float]:
    """What each part of the kernels has taken since the last call, by all threads that called them."""

class Geometry:
    """A convolution's sizes: input [C, H, W, N], weight [O, C, kH, kW] -> output [O, H', W', N]."""

    def __init__(
        self,
        input: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None: ...
    @property
    def output(self) -> tuple[int, int, int, int]: ...

class TopK:
    """The k entries that are largest in magnitude are active, and all that equal the k-th.

    They begin near `near`, if that is above 0: then finding them takes one pass over the tensor. The result does not
    depend on it.
    """

    def __init__(self, k: int, near: float = 0.0) -> None: ...

class AtLeast:
    """All entries from `threshold` on in magnitude are active, about `expected` of them: the work is cut for these."""

    def __init__(self, threshold: float, expected: int = 0) -> None: ...

class Candidates:
    """Entries of a linear layer's weight, of which the next step's active ones will be a part, almost surely."""

    def __init__(self) -> None: ...

class Sgd:
    """A step of SGD on a weight, and on its velocity if it has momentum, in the place of the weight's gradient.

    A linear layer's backward pass on a small batch fills `candidates` too. With `power` above 1 the step is
    Powerpropagation's (`zerofl.sparse.powerpropagation`).
    """

    def __init__(
        self,
        weight: Tensor,
        velocity: Tensor | None,
        rate: float,
        momentum: float,
        weight_decay: float,
        candidates: Candidates | None = None,
        power: float = 1.0,
    ) -> None: ...
    @property
    def candidates(self) -> Candidates | None: ...

class Convolution:
    """A convolution of one training step: makes the output, and keeps the active entries for the backward pass.

    Without a choice for the input there is no grad_weight.
    """

    def __init__(
        self,
        geometry: Geometry,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        weight_choice: TopK | AtLeast,
        input_choice: TopK | AtLeast | None,
        for_grad_input: bool,
        threads: int,
    ) -> None: ...
    @property
    def weight_threshold(self) -> float: ...
    @property
    def active_weights(self) -> int: ...
    @property
    def input_threshold(self) -> float | None: ...
    def backward(
        self,
        grad_output: Tensor,
        addend: Tensor | None,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
        threads: int,
        sgd: Sgd | None = None,
    ) -> None:
        """Makes the gradients that are given, or takes the step of `sgd`; adds `addend` to grad_input, of its shape."""

class Linear:
    """A linear layer of one training step, as `Convolution`: input [I, N], weight [O, I] -> output [O, N].

    With the weight's candidates, which are used up, it need not be read again to find what is active in it.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        weight_choice: TopK | AtLeast,
        input_choice: TopK | AtLeast | None,
        for_grad_input: bool,
        threads: int,
        candidates: Candidates | None = None,
    ) -> None: ...
    @property
    def weight_threshold(self) -> float: ...
    @property
    def active_weights(self) -> int: ...
    @property
    def input_threshold(self) -> float | None: ...
    def backward(
        self,
        grad_output: Tensor,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
        threads: int,
        sgd: Sgd | None = None,
    ) -> None:
        """Makes the gradients that are given, or takes the step of `sgd`."""

class ConvNorm:
    """relu(norm(convolution) + residual) of one training step; `storage` 0, 1, 2: float32, float16, bfloat16.

    It keeps what the norm reads, and the active entries, for the backward pass.
    """

    def __init__(
        self,
        geometry: Geometry,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_choice: TopK | AtLeast,
        input_choice: TopK | AtLeast | None,
        for_grad_input: bool,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        momentum: float,
        epsilon: float,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        storage: int,
        y: Tensor,
        threads: int,
    ) -> None: ...
    @property
    def weight_threshold(self) -> float: ...
    @property
    def active_weights(self) -> int: ...
    @property
    def input_threshold(self) -> float | None: ...
    def backward(
        self,
        grad_y: Tensor,
        norm_weight: Tensor | None,
        addend: Tensor | None,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
        grad_output: Tensor | None,
        grad_norm_weight: Tensor,
        grad_norm_bias: Tensor,
        grad_residual: Tensor | None,
        threads: int,
        sgd: Sgd | None = None,
    ) -> None:
        """Makes the gradients that are given, or takes the step of `sgd`."""

def batch_norm(
    x: Tensor,
    of_batch: bool,
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    momentum: float,
    epsilon: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    positive: Tensor | None,
    threads: int,
) -> None:
    """`of_batch` computes mean and variance first, and moves the running ones towards them.

    `positive`, uint8 [channels, ceil(numbers per channel / 8)], gets a bit for each y > 0 or NaN.
    """

def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    positive: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    weight: Tensor | None,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_residual: Tensor | None,
    threads: int,
) -> None: ...
def max_pool(x: Tensor, size: int, relu: bool, y: Tensor, place: Tensor, threads: int) -> None:
    """`place`, uint8 of y's shape, gets the position of each maximum in its square."""

def max_pool_backward(grad_y: Tensor, place: Tensor, size: int, grad_x: Tensor, threads: int) -> None: ...
def ans_decode(cumulative: np.ndarray, sizes: np.ndarray, words: np.ndarray, bytes: np.ndarray) -> bool:
    """Whether the words, uint32, hold just as many bytes, uint8, as there is room for: of each model its size, int64.

    `cumulative` is uint32 [257 models], for each model from 0 to 2^24 and rising at each step.
    """

def active_bits(x: Tensor, by: Tensor, threshold: float, bits: Tensor) -> int:
    """`bits`, uint8 [ceil(n / 8)], gets a bit for each entry that is active, whose number is returned."""

def take_bits(x: Tensor, bits: Tensor, values: Tensor) -> None:
    """`values` gets the entries of x that have a bit; it has room for just these."""

def add_entries(x: Tensor, bits: Tensor, values: Tensor, weight: float) -> None:
    """The entries of x that have a bit get weight times a value each, of which there are just so many."""

def split_planes(numbers: np.ndarray, planes: np.ndarray) -> None:
    """uint32 [n] -> uint8 [4 n]: see `zerofl.exchange.wire.values`."""

def merge_planes(planes: np.ndarray, numbers: np.ndarray) -> None:
    """The other way."""

def largest_magnitude(x: np.ndarray) -> int:
    """The bits of the largest magnitude in x, float32 [n]; 0 if it is empty."""

def magnitude_classes(x: np.ndarray, largest: int, classes: np.ndarray) -> None:
    """float32 [n] -> uint8 [n]: see `zerofl.exchange.wire.classes`, as for the rest below."""

def count_classes(classes: np.ndarray, sizes: np.ndarray) -> None:
    """uint8 [n] -> int64 [24]."""

def deal_bits(classes: np.ndarray, sizes: np.ndarray, bits: np.ndarray, dealt: np.ndarray) -> None:
    """A bitmap, uint8 -> those of the classes, uint8, one after another."""

def gather_bits(classes: np.ndarray, sizes: np.ndarray, dealt: np.ndarray, bits: np.ndarray) -> None:
    """The other way."""

def deal(classes: np.ndarray, numbers: np.ndarray, dealt: np.ndarray) -> None:
    """uint8, 16 or 32 [n] -> the same numbers, class after class."""

def gather(classes: np.ndarray, dealt: np.ndarray, numbers: np.ndarray) -> None:
    """The other way."""

def subtract(numbers: np.ndarray, received: np.ndarray, differences: np.ndarray) -> None:
    """Bits of floats, uint16 or 32 [n], as steps from others."""

def add(received: np.ndarray, differences: np.ndarray, numbers: np.ndarray) -> None:
    """The other way."""
