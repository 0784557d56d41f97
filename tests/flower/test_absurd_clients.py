"""Clients whose updates are well-formed and absurd, in whole runs and in adopted apps whose server clips or trims."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg, Strategy

from tests.flower.adopted import start
from tests.flower.test_bad_clients import misbehaving
from tests.running import experiment_of, model_bytes, run, run_until, without_times
from zerofl.data import load_dataset
from zerofl.exchange.robust import scaled
from zerofl.exchange.wire import decode, decode_state, encode, received_model, schema_of
from zerofl.fl.train import empty_model
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.messages import payload_record, read_instruction, read_payload
from zerofl.run.folder import read_lines


def absurd(message: Message, reply: Message) -> Message:
    """The reply with 1e6 times its change."""
    payload, e, *_ = read_instruction(message)
    schema = schema_of(empty_model(e, load_dataset(e.dataset, e.root)).state_dict())
    received = decode_state(payload, schema)
    update = decode(read_payload(reply), schema, received_model(received, schema))
    larger = scaled(received, update, dict.fromkeys(update.tensors, 1e6))
    (metrics,) = reply.content.metric_records.values()
    content = RecordDict({"update": payload_record(encode(larger, schema)), "metrics": metrics})
    return Message(content, reply_to=message)


@pytest.mark.parametrize(
    "settings",
    [
        {"uplink": "top_k_weights", "clip_median": 1.5, "clip_norm": 1e4},
        {"uplink": "full", "trim_clients": 1, "min_replies": 3},
    ],
    ids=lambda settings: settings["uplink"],
)
def test_an_absurd_update_does_not_move_the_model_far(
    settings: dict[str, Any], cifar_root: Path, tmp_path: Path
) -> None:
    """In steps of the undisturbed model from where it began: under a half, and without the guard ten thousand."""
    small: dict[str, Any] = {"rounds": 1, "clients_per_round": 5, "validate_every": 0, "lr_start": 0.01, "lr_end": 0.01}
    experiment = experiment_of(cifar_root, **small, **settings)
    plain = experiment_of(cifar_root, **small, uplink=settings["uplink"])
    models = {
        "honest": run(plain, tmp_path / "honest"),
        "guarded": run(experiment, tmp_path / "guarded", misbehaving({3}, absurd)),
        "unguarded": run(plain, tmp_path / "unguarded", misbehaving({3}, absurd)),
    }
    vectors = {name: weights_of(directory) for name, directory in models.items()}
    first = torch.cat([p.flatten() for p in initial(experiment).values() if p.is_floating_point()])
    step = (vectors["honest"] - first).norm().item()
    far = {name: (vectors[name] - vectors["honest"]).norm().item() / step for name in ("guarded", "unguarded")}
    assert far["guarded"] < 0.5
    assert far["unguarded"] > 1e4
    clients = read_lines(models["guarded"] / "clients.jsonl")
    if "trim_clients" in settings:
        assert all("clip_factor" not in client for client in clients)
        return
    factors = {client["client"]: client["clip_factor"] for client in clients}
    assert factors.pop(3) < 1e-4
    assert min(factors.values()) > 0.05
    assert all("update_norm" not in client for client in read_lines(models["honest"] / "clients.jsonl"))


def weights_of(directory: Path) -> torch.Tensor:
    import safetensors.torch

    state = safetensors.torch.load_file(directory / "model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state) if state[name].is_floating_point()])


def initial(experiment: Any) -> dict[str, torch.Tensor]:
    from zerofl.fl.server import initial_state

    return dict(sorted(initial_state(experiment, load_dataset("cifar10", experiment.root)).model.items()))


def test_a_clipped_and_trimmed_run_is_the_same_on_ray_and_after_a_stop(cifar_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    guards = {"uplink": "full", "trim_clients": 1, "min_replies": 3, "clip_median": 0.5, "clip_norm": 2.0}
    experiment = experiment_of(cifar_root, clients_per_round=4, rounds=2, **guards)
    whole = run(experiment, tmp_path / "whole")
    run_until(experiment, tmp_path / "stopped", 1)
    stopped = run(experiment, tmp_path / "stopped")
    ray = run(experiment, tmp_path / "ray", engine="ray")
    figures = ("client", "update_norm", "clip_factor")
    for other in (stopped, ray):
        assert model_bytes(other) == model_bytes(whole)
        assert without_times(other) == without_times(whole)
        ours, theirs = ([[c[f] for f in figures] for c in read_lines(d / "clients.jsonl")] for d in (whole, other))
        assert ours == theirs
    assert any(factor < 1 for *_, factor in ours)


def three_clients(strategy: Strategy, uplink: str = "full") -> list[float]:
    """The model [1, 1] after a round in which it changes by 3, 1 and 1e6 in its first entry; samples are 1, 2 and 3."""

    def train(arrays: ArrayRecord, client: int) -> ArrayRecord:
        weight = arrays.to_torch_state_dict()["weight"]
        return ArrayRecord({"weight": weight + torch.tensor([[(3.0, 1.0, 1e6)[client], 0.0]])})

    arrays = ArrayRecord({"weight": torch.ones(1, 2)})
    mod = uplink_mod(uplink, sparsity=0.5, layers=["weight"])
    (weight,) = start(strategy, arrays, train, mod, rounds=1).to_torch_state_dict().values()
    return [float(x) for x in weight.flatten()]


@pytest.mark.parametrize("uplink", ["full", "top_k_weights_diff"])
def test_an_adopted_strategy_gets_clipped_models(uplink: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flwr")
    assert three_clients(SparseUplink(FedAvg(), clip_median=1.0), uplink) == pytest.approx(
        [1 + (1 * 3 + 2 * 1 + 3 * 3) / 6, 1]
    )
    assert "round 1: the change of node 4, of norm 1e+06, is clipped to 3e-06 of it" in caplog.text
    assert "node 2, of norm" not in caplog.text
    assert three_clients(SparseUplink(FedAvg(), clip_norm=2.0), uplink) == pytest.approx(
        [1 + (1 * 2 + 2 * 1 + 3 * 2) / 6, 1]
    )
    assert three_clients(SparseUplink(FedAvg()), uplink)[0] > 1e5


def test_flowers_trimmed_average_is_that_of_the_adopted_path() -> None:
    assert three_clients(SparseUplink(FedTrimmedAvg(beta=0.34))) == [1 + 3, 1]


@pytest.mark.parametrize(
    "bound", [{"clip_norm": -1.0}, {"clip_median": float("nan")}, {"clip_norm": "1"}, {"clip_norm": 10**400}]
)
def test_a_bound_that_is_none_is_named(bound: dict[str, Any]) -> None:
    (name,) = bound
    with pytest.raises(ValueError, match=f"{name} = .*: expected 0 or a positive number"):
        SparseUplink(FedAvg(), **bound)
