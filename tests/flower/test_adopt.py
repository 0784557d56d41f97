"""Somebody else's Flower app with ZeroFL's uplink: a two-layer model, stock strategies, the in-process grid."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
    Result,
    Strategy,
)  # fmt: skip
from torch import nn

from zerofl import sparsify_
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.adopt_client import sparse_by_shape
from zerofl.flower.engines import InProcessGrid
from zerofl.sparse.sparsify import sparse_layers
from zerofl.sparse.topk import count_top_k

CLIENTS = 4


def make_model(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(4, 8, 3),
        nn.Flatten(), nn.Linear(8 * 16, 16),
        nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def client_app(*mods: Any, norm: bool = True) -> ClientApp:
    """An app as Flower's own quickstart has it; a client's data is drawn from its number."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make_model(norm)
        sparsify_(model, 0.5, backend="reference")
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        client = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(client)
        images = torch.randn(16, 1, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        metrics = MetricRecord({"num-examples": 10 + client, "train_loss": loss.item(), "train_loss_before": 1.0})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        make_model(norm).load_state_dict(state)
        content = RecordDict({"metrics": MetricRecord({"num-examples": 5, "eval_acc": 0.25, "eval_loss": 1.0})})
        return Message(content, reply_to=message)

    return app


def start(strategy: Strategy, app: ClientApp, rounds: int = 2, norm: bool = True) -> Result:
    random.seed(0)  # Flower's strategies draw the order of the clients from it, and Krum's choice depends on that
    grid = InProcessGrid(app, CLIENTS)
    return strategy.start(grid, ArrayRecord(make_model(norm).state_dict()), num_rounds=rounds)


def parameters(result: Result) -> dict[str, torch.Tensor]:
    """The final arrays but BatchNorm's counter, of which Flower's strategies make a float."""
    state = result.arrays.to_torch_state_dict()
    return {name: tensor.float() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg, "FedAvgM": lambda: FedAvgM(server_momentum=0.5), "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedMedian": FedMedian, "FedTrimmedAvg": FedTrimmedAvg, "FedAdam": FedAdam, "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi, "Krum": lambda: Krum(num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="train_loss"),
    "server-side clipping": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 1.0, CLIENTS),
}  # fmt: skip


@pytest.mark.parametrize("uplink", ["full", "top_k_weights_diff"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_sending_everything_changes_nothing(name: str, uplink: str) -> None:
    """With mask ratio 1 all weights are sent: every stock strategy gives what it gives without the uplink."""
    norm = name != "QFedAvg"  # which cannot scale integers
    plain = start(STRATEGIES[name](), client_app(norm=norm), norm=norm)
    adopted = SparseUplink(STRATEGIES[name]())
    result = start(adopted, client_app(uplink_mod(uplink, sparsity=0.5, mask_ratio=1.0), norm=norm), norm=norm)
    torch.testing.assert_close(parameters(result), parameters(plain), atol=1e-5, rtol=1e-4)
    for record in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        ours, theirs = getattr(result, record), getattr(plain, record)
        assert {n: {k: pytest.approx(v, rel=1e-3) for k, v in metrics.items()} for n, metrics in theirs.items()} == ours
    assert set(adopted.uplink_bytes) == {1, 2}


def test_the_part_that_is_sent_is_the_one_that_moves() -> None:
    initial, result = make_model().state_dict(), start(
        SparseUplink(FedAvg()), client_app(uplink_mod(sparsity=0.9, mask_ratio=0.1)), rounds=1
    )  # fmt: skip
    after = result.arrays.to_torch_state_dict()
    moved = {name: int((after[name] != initial[name]).sum()) for name in ("3.weight", "5.weight", "7.weight")}
    # Each of four clients sends the top 20 % of the change of the two sparse layers; the last layer travels whole.
    assert 0.2 * 288 <= moved["3.weight"] <= 4 * 0.2 * 288 + 4
    assert 0.2 * 2048 <= moved["5.weight"] <= 4 * 0.2 * 2048 + 4
    assert moved["7.weight"] == 48


def test_by_layer_each_layer_sends_what_it_trains_with() -> None:
    model = make_model()
    names = sparsify_(model, 0.9, distribution="erdos_renyi_kernel")
    layers = dict(sparse_layers(model))
    kept = {n: count_top_k(layers[n].weight.numel(), layers[n].sparsity) for n in names}
    assert kept["3"] < count_top_k(288, 0.9) < kept["5"]  # other parts of them than the paper's
    mod = uplink_mod("top_k_weights", sparsity=0.9, distribution="erdos_renyi_kernel")
    after = start(
        SparseUplink(FedAvg(fraction_train=0.25, min_train_nodes=1)), client_app(mod), rounds=1
    ).arrays.to_torch_state_dict()
    assert {n: int(after[f"{n}.weight"].count_nonzero()) for n in names} == kept


def test_fewer_bytes_come_up() -> None:
    whole, part = SparseUplink(FedAvg()), SparseUplink(FedAvg())
    start(whole, client_app(uplink_mod("full", sparsity=0.9)))
    start(part, client_app(uplink_mod(sparsity=0.9)))
    assert 0 < 2 * part.uplink_bytes[1] < whole.uplink_bytes[1]


def test_types_are_kept_over_the_rounds() -> None:
    """Averaging makes floats of BatchNorm's counter; each round of two counts one batch."""
    result = start(SparseUplink(FedAvg()), client_app(uplink_mod(sparsity=0.9)), rounds=2)
    counter = result.arrays.to_torch_state_dict()["1.num_batches_tracked"]
    assert (counter.dtype, counter.item()) == (torch.int64, 2)


def test_the_default_layers_are_those_of_sparsify() -> None:
    model = make_model()
    sparsify_(model, 0.9, backend="reference")
    assert sparse_by_shape(model.state_dict()) == [f"{name}.weight" for name, _ in sparse_layers(model)]


def test_client_side_clipping_comes_before_the_uplink() -> None:
    """The clipped change has a norm of 0.01 at most, and so has the part of it that is sent."""
    strategy = SparseUplink(DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.0, 0.01, CLIENTS))
    result = start(strategy, client_app(uplink_mod(sparsity=0.9), fixedclipping_mod), rounds=1)
    initial, after = make_model().state_dict(), result.arrays.to_torch_state_dict()
    change = torch.cat([(after[name] - tensor).flatten() for name, tensor in initial.items() if tensor.dim() > 1])
    assert 0 < change.norm() <= 0.01 * 1.001


@pytest.mark.parametrize("settings", [{"uplink": "top_k_weights"}, {"values": "int8"}])
def test_an_uplink_that_would_break_the_clipping_bound_is_refused(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    strategy = SparseUplink(DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.0, 0.01, CLIENTS))
    result = start(strategy, client_app(uplink_mod(sparsity=0.9, **settings), fixedclipping_mod), rounds=1)
    assert caplog.text.count("would change a clipped update beyond its bound") == CLIENTS
    assert not result.train_metrics_clientapp


def test_a_client_without_the_mod_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    plain, sparse = client_app(), client_app(uplink_mod(sparsity=0.9))
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return (plain if context.node_config["partition-id"] == 0 else sparse)(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return plain(message, context)

    result = start(SparseUplink(FedAvg()), app, rounds=1)
    assert "round 1: the update of node 2 is left out" in caplog.text
    assert result.train_metrics_clientapp[1]


@pytest.mark.parametrize(
    "strategy", [FedAvg(), DifferentialPrivacyServerSideFixedClipping(SparseUplink(FedAvg()), 0.0, 1.0, CLIENTS)]
)
def test_a_strategy_that_cannot_read_updates_says_what_to_do(strategy: Strategy) -> None:
    with pytest.raises(TypeError, match=r"put zerofl\.flower\.SparseUplink around all other strategies, privacy's too"):
        start(strategy, client_app(uplink_mod(sparsity=0.9)), rounds=1)


def test_the_uplink_is_there_once_on_each_side(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="SparseUplink around SparseUplink"):
        SparseUplink(SparseUplink(FedAvg()))
    start(SparseUplink(FedAvg()), client_app(uplink_mod(sparsity=0.9), uplink_mod(sparsity=0.9)), rounds=1)
    assert caplog.text.count("list uplink_mod once") == CLIENTS


def test_a_round_without_any_update_says_what_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    start(SparseUplink(FedAvg()), client_app(), rounds=1)
    assert "round 1: no reply holds an update" in caplog.text
    assert "uplink_mod" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uplink": "topk", "sparsity": 0.9}, "uplink = 'topk'"),
        ({"sparsity": 1.0}, r"sparsity = 1.0, mask_ratio = 0.0: expected fractions"),
        ({"sparsity": 0.9, "mask_ratio": -0.1}, r"mask_ratio = -0.1: expected fractions"),
        ({"sparsity": 0.9, "values": "float8"}, "values = 'float8'"),
        ({"sparsity": 0.9, "distribution": "global"}, "distribution = 'global': expected of"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uplink_mod(**arguments)
