"""What a run is: one flat, frozen record, read from TOML."""

import dataclasses
import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

from zerofl.data import DATASETS, PARTITIONS
from zerofl.data.partition import ALPHAS, LEAST_ALPHA, MOST_ALPHA
from zerofl.errors import ZeroFLError
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import POSITIONS, VALUES
from zerofl.models import DEFAULT_INITIALIZATION, INITIALIZATIONS
from zerofl.sparse.distribution import DISTRIBUTIONS
from zerofl.sparse.layout import STORAGE

SERVER_OPTIMIZERS = ("fedavg", "fedavgm", "fedadam", "fedadam_sparse")
DEFAULT_SERVER_LR = {"fedavgm": 1.0}
"""Of others it is 0.01."""
PRECISIONS = ("float32", "tf32", "bfloat16")
MOST_THREADS = 1024


class ExperimentError(ZeroFLError, ValueError):
    """An experiment file, key or value that cannot be used; the message names it and what would be valid."""


class _Rule(NamedTuple):
    """What a value must be, for the check and for its message."""

    holds: Callable[[Any], bool]
    expected: str


def _one_of(choices: Collection[str]) -> _Rule:
    return _Rule(lambda value: value in choices, f"one of {', '.join(sorted(choices))}")


_NUMBER = _Rule(lambda value: value >= 0, "0 or more")
_COUNT = _Rule(lambda value: value >= 1, "1 or more")
_FRACTION = _Rule(lambda value: 0 <= value < 1, "a fraction in [0, 1)")
_DECAY = _Rule(lambda value: 0 <= value < 1, "a decay rate in [0, 1)")
_SHARE = _Rule(lambda value: 0 <= value <= 1, "a fraction in [0, 1]")
_POSITIVE = _Rule(lambda value: 0 < value <= sys.float_info.max, "a positive number")
_AMOUNT = _Rule(lambda value: 0 <= value <= sys.float_info.max, "0 or a positive number")
_ALPHA = _Rule(lambda value: LEAST_ALPHA <= value <= MOST_ALPHA, ALPHAS)
_THREADS = _Rule(lambda value: 0 <= value <= MOST_THREADS, f"0 to {MOST_THREADS}")
_EXPONENT = _Rule(lambda value: 1 <= value <= 2, "1 to 2")
_DEVICE = _Rule(lambda value: bool(re.fullmatch(r"cpu|cuda(:\d+)?", value)), "cpu, cuda, or cuda:1 and so on")
_NAME = _Rule(
    lambda value: bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", value)),
    "letters, digits, '.', '_' and '-', up to 255: it names a folder",
)
_ANY = _Rule(lambda value: True, "")


def _key(default: Any, rule: _Rule = _ANY) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's result. The defaults are the paper's CIFAR-10 protocol (§4.1, A.6).

    Where: `name` of the run and its folder; `seed` of all randomness.

    Data: `dataset` from the folder or archive `root`; dealt to `clients` by `partition`: "lda" with `alpha` (1 is the
    paper's non-IID, 1000 its IID; 1e-6 to 1e6), "natural", a client for each writer or speaker, or in a deployment
    "node", a client for each node, with all that is in a folder of its own; `validation_fraction` of each client's
    samples is held out. One client is centralised training.

    Model: `model`, with `width` stem channels (ResNet-18 only); `initialization`, unless given the model's
    own default.

    SWAT: `sparsity`, the fraction of zeros in each sparse layer's weights (the paper: 0.7 to 0.95; 0 is dense
    training), and `activation_sparsity`, the same unless given; `topk_period` steps between thresholds; `storage` of
    what a sparse model's batch normalisation reads in training, float32 or in 16 bits float16 or bfloat16. With another
    `sparsity_distribution` than "uniform" the layers have other sparsities, and send other parts, at the same total.

    Local training: `epochs` of SGD on batches of `batch_size`, with `momentum` and `weight_decay`; `augment` crops
    images, and mirrors those of CIFAR-10; the learning rate decays exponentially from `lr_start` to `lr_end` over the
    rounds. With `powerpropagation` above 1 the sparse layers' steps are on v, of which a weight is v |v|^(that - 1), up
    to 2. `precision` is that of the products, for GPUs; weights and losses are float32 in any case. float32 leaves a
    GPU's fastest units unused; tf32 rounds their factors to 10 bits (on a CPU it is float32), bfloat16 in PyTorch's
    autocast to 7, on the CPU without the native kernels.

    Uplink: the strategy `uplink`; the top (1 - sparsity + `mask_ratio`) of each sparse layer is sent, with
    `uplink_values` as float32 (lossless), float16, bfloat16 or int8, and `uplink_positions` in the cheapest way or, for
    comparison, in the paper's csr form.

    Downlink: the model goes to the clients with `downlink_values`, of which all but float32 round it for them; the
    server keeps its own as it is.

    Server: `rounds` with `clients_per_round`; `server_optimizer`, where FedAvgM has `server_lr` (1 unless given or
    0) and `server_beta_1`, FedAdam these (0.01), `server_beta_2` and `server_tau`; a round with fewer than
    `min_replies` usable updates after `reply_timeout_seconds` stops the run. In one process nobody is waited for.

    Absurd updates, against which nothing is done unless asked for: the norm of an update's change is clipped to
    `clip_norm`, and that of each tensor to `clip_median` times the round's median (0: not); of whole models the largest
    and the smallest `trim_clients` values of each entry are left out of the average, in which all clients count alike.

    Evaluation: of the global model, or with `average_decay` above 0 of its exponential mean over the rounds with that
    decay, which is the final model then and changes nothing that the clients get; on the test set every
    `evaluate_every` rounds, and on the validation samples of the round's clients every `validate_every` rounds (0:
    never); after the last round in any case. Every `snapshot_every` rounds (0: never) the sparse layers' aggregated
    weights are kept, for Figure 3.

    Machine: `device`, on which clients train and the server averages and evaluates, cpu or cuda (with masks on dense
    kernels; cuda:1 is the second GPU); `threads` of PyTorch, up to 1024 (0: as many as it chooses, which is then
    recorded). The results are bitwise reproducible for a given number of them, or on the same kind of GPU. In one
    process `clients_at_once` are trained side by side (0: as many as the cores have room for, with so many threads
    each, or a GPU's memory); that changes no result.

    Ray: the existing cluster at `ray_address` (empty: a new one on this machine); each client takes `client_cpus` cores
    (0: as many as `threads`) and `client_gpus`, of which 0.25 lets four clients share a GPU. None of this changes a
    result.

    Energy: `watts_per_core`, what a busy core takes on the clients (0: not known), for an estimate of their energy.
    """

    name: str = _key("run", _NAME)
    seed: int = _key(1, _NUMBER)

    dataset: str = _key("cifar10", _one_of(DATASETS))
    root: str = _key("")
    partition: str = _key("lda", _one_of(PARTITIONS))
    clients: int = _key(100, _COUNT)
    alpha: float = _key(1.0, _ALPHA)
    validation_fraction: float = _key(0.1, _FRACTION)

    model: str = _key("resnet18", _one_of(DEFAULT_INITIALIZATION))
    width: int = _key(64, _COUNT)
    initialization: str = _key("", _one_of(INITIALIZATIONS))

    sparsity: float = _key(0.95, _FRACTION)
    activation_sparsity: float | None = _key(None, _FRACTION)
    topk_period: int = _key(1, _COUNT)
    storage: str = _key("float32", _one_of(STORAGE))
    sparsity_distribution: str = _key("uniform", _one_of(DISTRIBUTIONS))

    epochs: int = _key(1, _COUNT)
    batch_size: int = _key(32, _COUNT)
    lr_start: float = _key(0.1, _POSITIVE)
    lr_end: float = _key(0.01, _POSITIVE)
    momentum: float = _key(0.0, _FRACTION)
    weight_decay: float = _key(0.0, _AMOUNT)
    powerpropagation: float = _key(1.0, _EXPONENT)
    augment: bool = _key(False)
    precision: str = _key("float32", _one_of(PRECISIONS))

    uplink: str = _key("top_k_weights", _one_of(UPLINKS))
    mask_ratio: float = _key(0.0, _SHARE)
    uplink_values: str = _key("float32", _one_of(VALUES))
    uplink_positions: str = _key("cheapest", _one_of(POSITIONS))
    downlink_values: str = _key("float32", _one_of(VALUES))

    rounds: int = _key(700, _COUNT)
    clients_per_round: int = _key(10, _COUNT)
    min_replies: int = _key(1, _COUNT)
    reply_timeout_seconds: float = _key(3600.0, _POSITIVE)
    server_optimizer: str = _key("fedavg", _one_of(SERVER_OPTIMIZERS))
    server_lr: float | None = _key(None, _POSITIVE)
    server_beta_1: float = _key(0.9, _DECAY)
    server_beta_2: float = _key(0.99, _DECAY)
    server_tau: float = _key(0.001, _POSITIVE)
    clip_norm: float = _key(0.0, _AMOUNT)
    clip_median: float = _key(0.0, _AMOUNT)
    trim_clients: int = _key(0, _NUMBER)

    average_decay: float = _key(0.0, _DECAY)
    evaluate_every: int = _key(1, _COUNT)
    validate_every: int = _key(0, _NUMBER)
    snapshot_every: int = _key(0, _NUMBER)

    device: str = _key("cpu", _DEVICE)
    threads: int = _key(0, _THREADS)
    clients_at_once: int = _key(0, _NUMBER)
    ray_address: str = _key("")
    client_cpus: float = _key(0.0, _AMOUNT)
    client_gpus: float = _key(0.0, _AMOUNT)
    watts_per_core: float = _key(0.0, _AMOUNT)

    def __post_init__(self) -> None:
        """Check every value, and settle the ones whose default depends on another.

        Raises:
            ExperimentError: a value out of range; it says which and what is expected.
        """
        if not self.initialization:
            object.__setattr__(self, "initialization", DEFAULT_INITIALIZATION.get(self.model, ""))
        if self.activation_sparsity is None:
            object.__setattr__(self, "activation_sparsity", self.sparsity)
        if not self.server_lr:
            object.__setattr__(self, "server_lr", DEFAULT_SERVER_LR.get(self.server_optimizer, 0.01))
        for field in dataclasses.fields(self):
            rule = field.metadata["rule"]
            self._expect(field.name, rule.holds(getattr(self, field.name)), rule.expected)
        is_sparse = bool(self.sparsity or self.activation_sparsity)
        self._expect("powerpropagation", is_sparse or self.powerpropagation == 1, "1 where no layer is sparse")
        stores = self.model == "resnet18" and is_sparse
        self._expect("storage", stores or self.storage == "float32", "float32 where no sparse model normalises batches")
        if self.precision == "bfloat16":
            self._expect(
                "storage", self.storage == "float32", "float32 with precision = 'bfloat16', which stores 16 bits"
            )
        if self.uplink_positions == "csr":
            self._expect("uplink_values", self.uplink_values == "float32", "float32 with uplink_positions = 'csr'")
        if self.trim_clients:
            few = f"more than 2 * trim_clients = {2 * self.trim_clients}: with so few replies nothing would be left"
            self._expect("uplink", self.uplink == "full", "full with trim_clients, which averages whole models")
            self._expect("min_replies", self.min_replies > 2 * self.trim_clients, few)
        for key, most in (("clients_per_round", "clients"), ("min_replies", "clients_per_round")):
            value = getattr(self, most)
            self._expect(key, getattr(self, key) <= value, f"1 to {most} = {value}")

    def _expect(self, key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ExperimentError(f"{key} = {getattr(self, key)!r}: expected {expected}")


_TYPES = get_type_hints(Experiment)

FORMER = {"overlap_normalization": 0.0}
"""Keys that are gone, with the value at which they did nothing: files of before have them."""


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """An experiment from plain values, as TOML or a Flower run config gives them.

    Raises:
        ExperimentError: an unknown key (the valid ones are named), a value of the wrong type, or one out of range.
    """
    kept = {key: value for key, value in values.items() if key not in FORMER or value != FORMER[key]}
    return Experiment(**{key: _typed(key, value) for key, value in kept.items()})


def parse_setting(setting: str) -> tuple[str, Any]:
    """`key=value` from the command line -> the key and its typed value. Raises ExperimentError as `make_experiment`.

    Values are TOML's, and a text may also stand without its quotes.
    """
    key, equals, text = setting.partition("=")
    if not equals:
        raise ExperimentError(f"--set {setting}: expected key=value, for example --set rounds=5")
    _check_known(key)
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        document = {"value": text}
    if _TYPES[key] is str:
        quoted = text[:1] in ('"', "'") and text[-1:] == text[:1]
        return key, document["value"] if quoted and len(document) == 1 else text
    return key, _typed(key, document["value"] if len(document) == 1 else text)


WHERE = ("root", "clients_at_once", "ray_address", "client_cpus", "client_gpus", "watts_per_core")
"""The keys that say where a run finds its data, how it uses its machine and what that takes; they change no result."""


def differing_keys(one: Experiment, other: Experiment) -> list[str]:
    """The keys in which two experiments differ, with both values, for messages; those of WHERE do not count."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Experiment))
    return [f"{key} = {a!r} and {b!r}" for key, a, b in pairs if a != b and key not in WHERE]


def _check_known(key: str) -> None:
    if key in FORMER:
        raise ExperimentError(
            f"the key {key!r} is gone, since it did not help; leave it out, as with {FORMER[key]}, or use zerofl 0.2.0"
        )
    if key not in _TYPES:
        close = difflib.get_close_matches(key, _TYPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ExperimentError(f"unknown key {key!r}{hint} The valid keys are {', '.join(_TYPES)}")


def _typed(key: str, value: Any) -> Any:
    _check_known(key)
    expected = float if _TYPES[key] == float | None else _TYPES[key]
    if expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not expected:
        words = "true or false" if expected is bool else expected.__name__
        hint = "; leave the key out for its default" if value in (None, "None", "null") else ""
        raise ExperimentError(f"{key} = {value!r}: expected {words}, got {type(value).__name__}{hint}")
    return value
