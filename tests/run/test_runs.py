"""Whole runs: every strategy, kill and resume, determinism, the engines."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.running import experiment_of, model_bytes, run, without_times
from zerofl.data import load_dataset
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import VALUES, encode_state, schema_of
from zerofl.experiment import SERVER_OPTIMIZERS, Experiment
from zerofl.fl.train import empty_model, evaluate, initial_model
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import ENGINES, EngineError, check_engine, run_in_process
from zerofl.flower.server_app import server_app
from zerofl.run.folder import read_lines, read_summary
from zerofl.run.resume import open_run
from zerofl.sparse.sparsify import sparse_layers

FIELDS = {
    "format", "round", "lr", "clients", "examples", "failures", "train_loss", "train_seconds", "train_cpu_seconds",
    "train_joules", "train_joules_estimate",
    "realised_sparsity", "test_loss", "test_accuracy", "validation_accuracy", "uplink_bytes", "refused_bytes",
    "downlink_bytes", "nonzero_ratio", "mask_overlap", "seconds",
}  # fmt: skip


@pytest.mark.parametrize("server_optimizer", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_every_uplink_with_every_server_optimiser(
    uplink: str, server_optimizer: str, cifar_root: Path, tmp_path: Path
) -> None:
    experiment = experiment_of(cifar_root, uplink=uplink, server_optimizer=server_optimizer, rounds=2)
    run(experiment, tmp_path / "run")
    first, last = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert last.keys() == FIELDS
    assert first.keys() == FIELDS - {"validation_accuracy"}
    assert last["failures"] == []
    assert len(last["nonzero_ratio"]) == 16
    assert all(0 < ratio <= 1 for ratio in last["nonzero_ratio"].values())
    assert math.isfinite(last["test_loss"])

    clients = read_lines(tmp_path / "run" / "clients.jsonl")
    assert [(c["round"], c["client"]) for c in clients] == [
        (r["round"], c) for r in (first, last) for c in r["clients"]
    ]
    assert all(c["num-examples"] == 36 for c in clients)  # 200 images / 5 clients, less 10 %
    for record in (first, last):
        sent = [c["uplink_bytes"] for c in clients if c["round"] == record["round"]]
        assert record["uplink_bytes"] == sum(sent)
        weighted = sum(c["train_loss"] for c in clients if c["round"] == record["round"]) / 3
        assert record["train_loss"] == pytest.approx(weighted)

    summary = read_summary(tmp_path / "run")
    assert summary.uplink_bytes == first["uplink_bytes"] + last["uplink_bytes"]
    dataset = load_dataset("cifar10", str(cifar_root))
    initial = initial_model(experiment, dataset).state_dict()
    schema = schema_of(initial)
    assert summary.full_model_bytes == schema.dense_bytes
    # The model goes to 3 clients in round 1, and in round 2 again for validation.
    assert first["downlink_bytes"] == 3 * len(encode_state(initial, schema))
    final = load_file(tmp_path / "run" / "model.safetensors")
    validation_bytes = 3 * len(encode_state({name: final[name] for name in initial}, schema))
    assert last["downlink_bytes"] > validation_bytes
    assert (last["downlink_bytes"] - validation_bytes) % 3 == 0
    assert summary.savings == pytest.approx(6 * summary.full_model_bytes / summary.uplink_bytes)
    assert summary.refused_bytes == 0
    assert 0 < summary.train_seconds == pytest.approx(sum(c["train_seconds"] for c in clients))
    assert summary.train_cpu_seconds is not None
    assert 0 < summary.train_cpu_seconds == pytest.approx(sum(c["train_cpu_seconds"] for c in clients))
    assert summary.train_cpu_seconds < 1.05 * summary.train_seconds + 0.1  # one thread; clocks tick in steps
    assert summary.savings > (1 if uplink == "full" else 4)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_top_k_weights_leaves_the_global_model_sparse(cifar_root: Path, tmp_path: Path) -> None:
    """Three clients with 10 % each: at most 30 % of a layer, K being rounded up, is non-zero (Figure 2)."""
    run(experiment_of(cifar_root, uplink="top_k_weights", rounds=1), tmp_path / "run")
    (record,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert all(0.1 <= ratio <= 3 * 15 / 144 for ratio in record["nonzero_ratio"].values())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(cifar_root: Path, tmp_path: Path) -> None:
    one, same = (run(experiment_of(cifar_root, augment=True), tmp_path / name) for name in ("one", "same"))
    other = run(experiment_of(cifar_root, augment=True, seed=2), tmp_path / "other")
    assert model_bytes(one) == model_bytes(same)
    assert without_times(one) == without_times(same)
    assert model_bytes(one) != model_bytes(other)
    assert [r["clients"] for r in without_times(one)] != [r["clients"] for r in without_times(other)]


@pytest.mark.parametrize("uplink", ["top_k_weights", "top_k_weights_diff"])
def test_this_wire_ends_in_the_weights_of_csr(uplink: str, cifar_root: Path, tmp_path: Path) -> None:
    csr, ours = (
        run(experiment_of(cifar_root, uplink=uplink, uplink_positions=positions), tmp_path / positions)
        for positions in ("csr", "cheapest")
    )
    assert model_bytes(csr) == model_bytes(ours)
    assert read_summary(ours).uplink_bytes < 0.7 * read_summary(csr).uplink_bytes


def test_fewer_bits_for_values_send_fewer_bytes_and_still_learn(cifar_root: Path, tmp_path: Path) -> None:
    sizes, losses = {}, {}
    for values in VALUES:
        experiment = experiment_of(cifar_root, uplink_values=values, uplink="diff_on_top_k_weights", mask_ratio=0.2)
        run(experiment, tmp_path / values)
        sizes[values] = read_summary(tmp_path / values).uplink_bytes
        losses[values] = read_lines(tmp_path / values / "rounds.jsonl")[-1]["train_loss"]
    assert sizes["int8"] < sizes["bfloat16"] < sizes["float16"] < sizes["float32"]
    for values in VALUES:  # the order of a sum alone moves so short a training by a fifth
        assert losses[values] < 1.25 * losses["float32"]


def test_both_engines_end_in_the_same_weights(cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, topk_period=2, momentum=0.9)
    for engine in ENGINES:
        run(experiment, tmp_path / engine, engine=engine)
    assert model_bytes(tmp_path / "ray") == model_bytes(tmp_path / "in-process")
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "in-process")


def test_each_reply_of_a_round_is_told_and_changes_nothing(cifar_root: Path, tmp_path: Path) -> None:
    """Three clients train and, in the second and last round, validate."""
    experiment = experiment_of(cifar_root, rounds=2)
    told: list[tuple[int, int]] = []
    directory = tmp_path / "told"
    app = server_app(experiment, directory, open_run(directory, experiment), on_round=lambda record: None)
    run_in_process(app, client_app, experiment, on_reply=lambda *replies: told.append(replies))
    assert told == [(1, 3), (2, 3), (3, 3)] * 3
    assert model_bytes(directory) == model_bytes(run(experiment, tmp_path / "untold"))


def test_an_existing_ray_cluster_ends_in_the_same_weights(cifar_root: Path, tmp_path: Path) -> None:
    """Two clients at once on one core, half a core each, on a cluster that was there before and is there after."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ray = str(Path(sys.executable).parent / "ray")
    port = address.partition(":")[2]
    start = [ray, "start", "--head", "--port", port, "--num-cpus", "1", "--include-dashboard", "false", "--block"]
    experiment = experiment_of(cifar_root, rounds=1)
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as short,  # the paths of Ray's sockets must not be long
        subprocess.Popen(
            [*start, "--temp-dir", short], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as head,
    ):
        try:
            assert head.stdout is not None
            assert any("Ray runtime started" in line for line in head.stdout)
            on_cluster = dataclasses.replace(experiment, ray_address=address, client_cpus=0.5)
            run(on_cluster, tmp_path / "cluster", engine="ray")
            assert model_bytes(tmp_path / "cluster") == model_bytes(run(experiment, tmp_path / "here"))
            with pytest.raises(EngineError, match=r"a client takes 2 cores and 0 GPUs, and no machine of the cluster"):
                run(dataclasses.replace(on_cluster, client_cpus=2), tmp_path / "two", engine="ray")
            assert head.poll() is None
        finally:
            os.killpg(head.pid, signal.SIGTERM)
    with pytest.raises(EngineError, match=r"no Ray cluster answers there"):
        run(on_cluster, tmp_path / "gone", engine="ray")


def test_a_port_that_is_not_rays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerofl.flower.engines.CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(EngineError, match="something answers there, but it is no Ray cluster"):
            check_engine("ray", Experiment(ray_address=address))


def test_ray_gives_clients_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_engine("ray", Experiment(threads=1, device="cuda", client_gpus=0.5))
    with pytest.raises(EngineError, match="device = 'cuda:1': Ray gives each client its GPU"):
        check_engine("ray", Experiment(threads=1, device="cuda:1", client_gpus=0.5))


def test_experiment_toml_records_every_value(cifar_root: Path, tmp_path: Path) -> None:
    run(experiment_of(cifar_root, rounds=1), tmp_path / "run")
    recorded = tomllib.loads((tmp_path / "run" / "experiment.toml").read_text())
    assert recorded.keys() == set(Experiment.__dataclass_fields__)
    assert recorded["initialization"] == "pytorch"
    assert recorded["activation_sparsity"] == 0.9


def test_the_final_model_is_the_last_state(cifar_root: Path, tmp_path: Path) -> None:

    experiment = experiment_of(cifar_root)
    run(experiment, tmp_path / "run")
    dataset = load_dataset("cifar10", str(cifar_root))
    model = empty_model(experiment, dataset)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), assign=True)
    assert len(list(sparse_layers(model))) == 16
    assert evaluate(model, dataset.test, dataset)[1] == read_summary(tmp_path / "run").test_accuracy
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])["round"] == 3
