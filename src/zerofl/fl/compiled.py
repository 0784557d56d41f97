"""Local training on a GPU: a step of SGD as one CUDA graph on static buffers, clients side by side on their streams.

It computes what `zerofl.fl.train.train_state` does. What differs is who launches: there Python launches the hundreds of
operations of a step one after another, which takes longer than the GPU needs for them; here they were recorded once for
each size of batch, and are launched as one. So the model, the batch and the learning rate are always in the same place
in memory, a `Slot`, and are copied there.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from queue import LifoQueue
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zerofl.data import Dataset, Split
from zerofl.data.augment import draw_places, shifted
from zerofl.exchange.update import State
from zerofl.experiment import Experiment
from zerofl.fl.precision import arithmetic
from zerofl.fl.train import TrainedModel, augmentation_of, empty_model, learning_rate
from zerofl.rng import rng
from zerofl.sparse.powerpropagation import powered_step_
from zerofl.sparse.sparsify import sparse_layers

GATHERED_BATCHES = 64
"""Of so many batches the images are gathered at once, which bounds the memory they take."""


MOST_SLOTS = 32
"""PyTorch has so many streams, which it gives in turn: one more slot would share another's, which may be recording."""


class _Step(NamedTuple):
    """A step on a batch of one size: where its images and labels are copied to, and what runs it."""

    images: Tensor
    labels: Tensor
    run: Callable[[], Any]


class Slot:
    """The place in memory where one client after another trains, on a stream of its own.

    On a CPU, for tests, a step is the same code without a graph.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset) -> None:
        self._experiment, self._dataset = experiment, dataset
        self._device = torch.device(experiment.device)
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        with torch.no_grad(), self._on_stream():
            model = empty_model(experiment, dataset).to_empty(device=self._device)
            # In this format cuDNN's kernels for tensor cores need no transposes. On a CPU with AVX2 alone, torch 2.13's
            # gradient of a convolution of four channels and four images crashes in it, or never returns.
            self._format = torch.channels_last if is_cuda else torch.contiguous_format
            self._model = model.to(memory_format=self._format).train()  # type: ignore[call-overload]
            self._layers = dict(sparse_layers(model))
            self._state = {name: tensor.detach().zero_() for name, tensor in model.state_dict().items()}
            self._parameters: list[Tensor] = list(model.parameters())
            self._velocity = [torch.zeros_like(p) for p in self._parameters] if experiment.momentum else []
            self._lr, self._loss = (torch.zeros((), device=self._device) for _ in range(2))
            self._active = torch.zeros(len(self._layers), dtype=torch.int64, device=self._device)
            self._pool = torch.cuda.graph_pool_handle() if self._stream else None
            self._steps = {experiment.batch_size: self._recorded(experiment.batch_size)}

    def train(self, received: State, split: Split, *, round: int, client: int) -> TrainedModel:
        """`zerofl.fl.train.train_state` with the slot's experiment and data set; the result is a copy."""
        e, samples = self._experiment, len(split.labels)
        augmentation = augmentation_of(e, self._dataset)
        order_rng, augment_rng = (rng(e.seed, round, client, purpose) for purpose in ("order", "augment"))
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # on which the samples are gathered
        with torch.no_grad(), self._on_stream():
            # Recording a step trains, so it comes before the state.
            for size in {min(e.batch_size, samples - start) for start in range(0, samples, e.batch_size)}:
                if size not in self._steps:
                    self._steps[size] = self._recorded(size)
            for name, tensor in received.items():
                self._state[name].copy_(tensor)
            for tensor in (self._loss, self._active, *self._velocity):
                tensor.zero_()
            self._lr.fill_(learning_rate(e.lr_start, e.lr_end, round, e.rounds))
            for _ in range(e.epochs):
                order = torch.from_numpy(order_rng.permutation(samples)).to(self._device)
                for part in torch.split(order, GATHERED_BATCHES * e.batch_size):
                    images, labels = split.images[part], split.labels[part]
                    batches = torch.split(images, e.batch_size)
                    if augmentation:
                        places = [draw_places(batch.shape, augmentation, augment_rng) for batch in batches]
                        batches = torch.split(shifted(images, augmentation, torch.cat(places)), e.batch_size)
                    for batch, of_batch in zip(batches, torch.split(labels, e.batch_size), strict=True):
                        step = self._steps[len(batch)]
                        step.images.copy_(batch)
                        step.labels.copy_(of_batch)
                        step.run()
            state = {name: tensor.clone() for name, tensor in self._state.items()}
            loss, active = self._loss.item(), self._active.tolist()  # waits for the stream: the copies are there too
        realised = {
            name: 1 - count / layer.weight.numel()
            for (name, layer), count in zip(self._layers.items(), active, strict=True)
        }
        return TrainedModel(state, loss / (e.epochs * samples), list(self._layers), realised)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _recorded(self, size: int) -> _Step:
        """The step for batches of a size, as a CUDA graph on a GPU. It runs, so the slot's state changes."""
        of_all = self._dataset.train.images
        images = torch.zeros((size, *of_all.shape[1:]), dtype=of_all.dtype, device=self._device)
        images = images.contiguous(memory_format=self._format)
        labels = torch.zeros(size, dtype=torch.int64, device=self._device)

        def step() -> None:
            self._step(images, labels)

        if self._stream is None:
            return _Step(images, labels, step)
        # A graph keeps the arithmetic that it was recorded with. One thread at a time, the first steps too: what
        # libraries do at their first use may wait for the whole device, which ends any recording on it.
        with arithmetic(self._experiment.precision, self._experiment.device), _recording:
            return self._graph(images, labels, step)

    def _graph(self, images: Tensor, labels: Tensor, step: Callable[[], None]) -> _Step:
        for _ in range(2):  # what happens in a first step alone, such as compiling, cannot be recorded
            step()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile. The slot's graphs never run at the same time and leave nothing in
            # their memory for each other, so they share it.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"a step cannot be recorded as a CUDA graph, and takes longer: {error}", stacklevel=2)
            return _Step(images, labels, step)
        return _Step(images, labels, graph.replay)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD with the loss of this batch, as `train` and SparseSGD take it, on the slot's memory."""
        e = self._experiment
        with torch.enable_grad():
            with torch.autocast(self._device.type, torch.bfloat16, enabled=e.precision == "bfloat16"):
                loss = F.cross_entropy(self._model(self._dataset.normalized(images)), labels)
            gradients = list(torch.autograd.grad(loss, self._parameters))
        parameters, velocity = self._parameters, self._velocity
        if e.powerpropagation != 1:
            weights = {id(layer.weight) for layer in self._layers.values()}
            of_all = list(zip_longest(parameters, gradients, velocity))  # without momentum there are no velocities
            for parameter, gradient, of in of_all:
                if id(parameter) in weights:
                    powered_step_(parameter, gradient, of, self._lr, e.momentum, e.weight_decay, e.powerpropagation)
            others = [each for each in of_all if id(each[0]) not in weights]
            parameters, gradients, velocity = map(list, zip(*others, strict=True))
        if e.weight_decay:
            torch._foreach_add_(gradients, parameters, alpha=e.weight_decay)
        if e.momentum:
            torch._foreach_mul_(velocity, e.momentum)
            torch._foreach_add_(velocity, gradients)
            gradients = velocity
        torch._foreach_sub_(parameters, list(torch._foreach_mul(gradients, self._lr)))
        self._loss += loss.detach() * len(labels)
        for i, layer in enumerate(self._layers.values()):
            self._active[i].copy_(torch.as_tensor(layer.active_weights))


def takes(experiment: Experiment) -> bool:
    """Whether a GPU trains this experiment in slots.

    A graph repeats one step. With `topk_period` above 1 the steps differ: then each operation is launched by itself.
    """
    return experiment.device != "cpu" and experiment.topk_period == 1


@contextmanager
def slot(experiment: Experiment, dataset: Dataset, most: int) -> Iterator[Slot]:
    """A free slot of this process; a new one where there are fewer than `most` and the GPU has room. Else it waits."""
    slots = _slots_of(experiment, dataset)
    mine = slots.take(most)
    try:
        yield mine
    finally:
        slots.give_back(mine)


class _Slots:
    """The slots of an experiment: those that are free, and how much memory one takes."""

    def __init__(self, experiment: Experiment, dataset: Dataset) -> None:
        self._experiment, self._dataset = experiment, dataset
        self._lock = threading.Lock()
        self._made, self._bytes_each = 0, 0
        self._free: LifoQueue[Slot] = LifoQueue()

    def take(self, most: int) -> Slot:
        with self._lock:
            before = self._free_bytes()
            # Room for one, and for what the others still record for batches of other sizes.
            if (
                self._free.empty()
                and self._made < min(most, MOST_SLOTS)
                and (not self._made or before >= 3 * self._bytes_each)
            ):
                try:
                    made = Slot(self._experiment, self._dataset)
                    self._made += 1
                    self._bytes_each = max(self._bytes_each, before - self._free_bytes())
                    return made
                except torch.OutOfMemoryError:
                    if not self._made:  # else those that are there do, in turn
                        raise
        return self._free.get()

    def give_back(self, mine: Slot) -> None:
        self._free.put(mine)

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._experiment.device)[0] if takes(self._experiment) else 0


_recording, _looking = threading.Lock(), threading.Lock()
_latest: list[tuple[Any, _Slots]] = []


def _slots_of(experiment: Experiment, dataset: Dataset) -> _Slots:
    """Those of this experiment and data; another one's are let go with their memory."""
    key = (experiment, dataset.classes, dataset.train.images.shape[1:], dataset.mean, dataset.std)
    with _looking:
        if not _latest or _latest[0][0] != key:
            _latest[:] = [(key, _Slots(experiment, dataset))]
        return _latest[0][1]
