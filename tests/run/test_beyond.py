"""Whole runs with what is beyond the paper: the same on both engines, and when they are resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.running import experiment_of, model_bytes, run, run_until, without_times
from zerofl import load_model
from zerofl.data import load_dataset
from zerofl.exchange.wire import decode_state, encode_state, schema_of
from zerofl.fl.train import evaluate, initial_model
from zerofl.flower.engines import ENGINES
from zerofl.run.folder import read_clients, read_rounds, read_summary

OPTIONS: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_optimizer": "fedavgm", "server_beta_1": 0.5, "momentum": 0.5},
    "fedadam_sparse": {"server_optimizer": "fedadam_sparse", "uplink": "top_k_weights", "mask_ratio": 0.1},
    "average_decay": {"average_decay": 0.5, "server_optimizer": "fedadam"},
    "erdos_renyi_kernel": {"sparsity_distribution": "erdos_renyi_kernel", "mask_ratio": 0.1},
    "powerpropagation": {"powerpropagation": 1.25, "weight_decay": 0.01},
    "downlink_values": {"downlink_values": "int8", "uplink": "top_k_weights", "mask_ratio": 0.1, "clip_norm": 9.0},
}


WITHOUT: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_optimizer": "fedavg"},
    "fedadam_sparse": {"server_optimizer": "fedadam"},
    "average_decay": {"average_decay": 0.0},
    "erdos_renyi_kernel": {"sparsity_distribution": "uniform"},
    "powerpropagation": {"powerpropagation": 1.0},
    "downlink_values": {"downlink_values": "float32"},
}
"""The same settings but for the one option."""


@pytest.mark.parametrize("option", OPTIONS)
def test_both_engines_and_a_resumed_run_end_in_the_same_weights(option: str, cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, **OPTIONS[option])
    for engine in ENGINES:
        run(experiment, tmp_path / engine, engine=engine)
    run_until(experiment, tmp_path / "resumed", 2)
    run(experiment, tmp_path / "resumed")
    for other in ("ray", "resumed"):
        assert model_bytes(tmp_path / other) == model_bytes(tmp_path / "in-process")
        assert without_times(tmp_path / other) == without_times(tmp_path / "in-process")
    without = experiment_of(cifar_root, **OPTIONS[option] | WITHOUT[option])
    assert model_bytes(run(without, tmp_path / "without")) != model_bytes(tmp_path / "resumed")


def test_sparse_fedadam_sends_less_down(cifar_root: Path, tmp_path: Path) -> None:
    down, nonzero = {}, {}
    for server_optimizer in ("fedadam", "fedadam_sparse"):
        settings = OPTIONS["fedadam_sparse"] | {"server_optimizer": server_optimizer}
        directory = run(experiment_of(cifar_root, **settings), tmp_path / server_optimizer)
        last = read_rounds(directory)[-1]
        down[server_optimizer] = last.downlink_bytes
        nonzero[server_optimizer] = max(last.nonzero_ratio.values())
    assert nonzero["fedadam"] > 0.99
    assert nonzero["fedadam_sparse"] < 0.9
    assert down["fedadam_sparse"] < 0.8 * down["fedadam"]


def test_the_mean_over_rounds_is_evaluated_and_kept_and_clients_do_not_get_it(cifar_root: Path, tmp_path: Path) -> None:
    with_mean, plain = (
        run(experiment_of(cifar_root, average_decay=decay, validate_every=3), tmp_path / str(decay))
        for decay in (0.5, 0.0)
    )
    # The clients' rounds are those of a run without it; the first mean is the first model.
    rounds = [read_rounds(directory) for directory in (with_mean, plain)]
    for ours, theirs in zip(*rounds, strict=True):
        same = ("clients", "train_loss", "uplink_bytes", "nonzero_ratio")
        assert [getattr(ours, key) for key in same] == [getattr(theirs, key) for key in same]
    assert rounds[0][0].test_loss == rounds[1][0].test_loss
    assert rounds[0][2].test_loss != rounds[1][2].test_loss
    # In the last round the clients validate the mean, which goes down once more, and is not as long.
    assert [a.downlink_bytes - b.downlink_bytes for a, b in zip(*rounds, strict=True)][:2] == [0, 0]
    assert rounds[0][2].downlink_bytes != rounds[1][2].downlink_bytes
    # The final model is the mean of those after each round: 1/7, 2/7, 4/7.
    models = []
    for last in (1, 2, 3):
        directory = tmp_path / f"until {last}"
        run(experiment_of(cifar_root, rounds=last, lr_start=0.1, lr_end=0.1), directory)
        models.append(load_file(directory / "model.safetensors"))
    directory = run(experiment_of(cifar_root, lr_start=0.1, lr_end=0.1, average_decay=0.5), tmp_path / "mean")
    for name, tensor in load_file(directory / "model.safetensors").items():
        by_hand = sum(share / 7 * model[name].double() for share, model in zip((1, 2, 4), models, strict=True))
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, models[-1][name])
    dataset = load_dataset("cifar10", str(cifar_root))
    assert evaluate(load_model(directory), dataset.test, dataset)[1] == read_summary(directory).test_accuracy


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
def test_clients_get_the_model_rounded_and_the_server_keeps_its_own(
    values: str, cifar_root: Path, tmp_path: Path
) -> None:
    """With a learning rate that moves no weight, whether weights come back or changes."""
    settings: dict[str, Any] = {
        "downlink_values": values, "rounds": 1, "clients_per_round": 1, "lr_start": 1e-30, "lr_end": 1e-30,
        "validate_every": 0,
    }  # fmt: skip
    experiment = experiment_of(cifar_root, uplink="full", clip_norm=1e9, **settings)
    first = initial_model(experiment, load_dataset("cifar10", str(cifar_root)))
    initial, weights = first.state_dict(), [name for name, _ in first.named_parameters()]
    schema = schema_of(initial)
    payload = encode_state(initial, schema, values)
    rounded = decode_state(payload, schema)
    assert any(not torch.equal(rounded[name], initial[name]) for name in weights)

    whole = run(experiment, tmp_path / "whole")
    changes = run(experiment_of(cifar_root, uplink="top_k_weights_diff", **settings), tmp_path / "changes")
    final, kept = (load_file(directory / "model.safetensors") for directory in (whole, changes))
    for name in weights:
        for model in (final, kept):
            torch.testing.assert_close(model[name], initial[name], rtol=1e-6, atol=1e-29)
    assert [read_rounds(directory)[0].downlink_bytes for directory in (whole, changes)] == [len(payload)] * 2
    # What is clipped is the change of what the client received, which moved BatchNorm's statistics alone.
    (client,) = read_clients(whole)
    statistics = [name for name in initial if name.endswith(("mean", "var"))]
    moved = [(final[name].double() - rounded[name].double()).flatten() for name in statistics]
    assert client.update_norm == pytest.approx(torch.cat(moved).norm().item(), rel=1e-6)
