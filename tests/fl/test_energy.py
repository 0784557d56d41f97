"""The energy of training: the processors' counters, on a made-up /sys/class/powercap, and the estimate."""

import os
import re
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.running import client_record, experiment_of, model_bytes, round_record, run, run_until, without_times
from zerofl.data import load_dataset
from zerofl.experiment import Experiment
from zerofl.fl import client, energy
from zerofl.fl.records import ClientRecord, RoundRecord, Summary
from zerofl.fl.server import initial_state
from zerofl.run.checkpoint import Checkpoint, load_tensors
from zerofl.run.folder import read_clients, read_rounds, read_summary, save_round, summarize
from zerofl.run.resume import check_run, open_run

TICKS = os.sysconf("SC_CLK_TCK")
MOST = 262_143_328_850  # microjoules, as a real package has it


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, one of whose zones is the memory's; and what would count a part of them once more."""
    zones = {
        "intel-rapl": "intel-rapl", "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram", "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    for zone, name in zones.items():
        (tmp_path / "powercap" / zone).mkdir(parents=True)
        (tmp_path / "powercap" / zone / "name").write_text(f"{name}\n")
        (tmp_path / "powercap" / zone / "max_energy_range_uj").write_text(f"{MOST}\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "STAT", tmp_path / "stat")
    show(tmp_path, 0.0, 0.0)
    return tmp_path


def show(machine: Path, joules: float, busy_seconds: float, **others: float) -> None:
    """Let every counter that is read stand at `joules`, or at what its zone has in `others`; the rest at nonsense."""
    for zone in ("intel-rapl:0", "intel-rapl:0:2", "intel-rapl:1"):
        microjoules = round(1e6 * others.get(zone, joules))
        (machine / "powercap" / zone / "energy_uj").write_text(f"{microjoules}\n")
    for zone in ("intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:2", "intel-rapl-mmio:0"):
        (machine / "powercap" / zone / "energy_uj").write_text(f"{hash((zone, joules)) % MOST}\n")
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    ticks = round(busy_seconds * TICKS)
    (machine / "stat").write_text(f"cpu  {ticks - 5} 1 2 {9 * ticks} 77 1 1 55 {ticks} 0\ncpu0 1 2 3 4 5 6 7 0 0 0\n")


def readings(machine: Path, *shown: tuple[float, float], seconds: float = 10.0) -> Iterator[energy.Reading]:
    for number, (joules, busy_seconds) in enumerate(shown):
        show(machine, joules, busy_seconds)
        reading = energy.read()
        assert reading is not None
        yield reading._replace(at_seconds=number * seconds)


def test_packages_and_memory_are_counted_once(machine: Path) -> None:
    before, after = readings(machine, (100.0, 50.0), (140.0, 60.0))
    assert [counter.name for counter in before.counters] == ["package-0", "dram", "package-1"]
    assert before.busy_seconds == pytest.approx(50.0)
    # Three counters went up by 40 J each while 10 s of CPU time were spent: all by the training, or a quarter of it.
    assert energy.joules(before, after, 10.0) == pytest.approx(120.0)
    assert energy.joules(before, after, 2.5) == pytest.approx(30.0)
    assert energy.joules(before, after, 10.02) == pytest.approx(120.0)  # a clock of hundredths ticks late
    assert energy.joules(before, after, None) is None
    assert energy.joules(before, None, 10.0) is None


def test_a_counter_comes_round(machine: Path) -> None:
    before, after = readings(machine, (MOST / 1e6 - 1.0, 50.0), (2.0, 60.0))
    assert energy.joules(before, after, 10.0) == pytest.approx(9.0)  # 1 J up to the end, and 2 J from 0, three times


def test_counters_that_are_not_the_same_ones_tell_nothing(machine: Path) -> None:
    before, after = readings(machine, (100.0, 50.0), (140.0, 60.0))
    assert energy.joules(before, after._replace(counters=after.counters[:2]), 10.0) is None
    assert energy.joules(before._replace(counters=before.counters[1:]), after, 10.0) is None


def test_a_counter_that_could_have_come_round_twice_tells_nothing(machine: Path) -> None:
    longest = MOST / 1e6 / energy.MOST_WATTS
    for seconds, known in ((longest - 1, True), (longest + 1, False)):
        before, after = readings(machine, (100.0, 50.0), (140.0, 60.0), seconds=seconds)
        assert (energy.joules(before, after, 10.0) is not None) == known


def test_why_there_are_no_counters(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.why_not() == ""

    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as root_only:
        root_only.setattr(Path, "read_text", refuse)
        assert energy.read() is None
        reason = energy.why_not()
    assert reason.startswith(f"only root may read {machine}")
    (command,) = re.findall("sudo (chmod .*) lets everybody", reason)
    files = list(machine.glob("powercap/*/energy_uj"))
    for file in files:
        file.chmod(0o600)
    subprocess.run(command, shell=True, check=True)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    (machine / "powercap" / "intel-rapl:1" / "energy_uj").write_text("a lot")
    assert energy.read() is None
    assert "a lot" in energy.why_not()
    monkeypatch.setattr(energy, "POWERCAP", machine / "nowhere")
    assert energy.read() is None
    assert "nowhere" in energy.why_not()


@pytest.mark.parametrize("values", [{}, {"clients_at_once": 3}])
def test_a_run_records_what_the_counters_say(
    values: dict[str, int], machine: Path, cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading finds 1 J more in each of the three counters, and 1,000 s of CPU time."""
    numbers = count(1)

    def read() -> energy.Reading:
        number = next(numbers)
        counters = tuple(energy.Counter(name, number * 10**6, MOST) for name in ("package-0", "dram", "package-1"))
        return energy.Reading(counters, 1000.0 * number, float(number))

    experiment = experiment_of(cifar_root, rounds=2, **values)
    run(experiment, tmp_path / "without")
    monkeypatch.setattr(energy, "read", read)
    run(experiment, tmp_path / "with")

    clients = read_clients(tmp_path / "with")
    for record in clients:
        assert record.train_cpu_seconds is not None
        assert record.train_joules is not None
        assert record.train_joules > 0
        assert record.train_joules == pytest.approx(3 * record.train_cpu_seconds / 1000)
        assert record.train_joules_estimate is None
    summary = read_summary(tmp_path / "with")
    assert summary.train_joules == pytest.approx(sum(record.train_joules or 0.0 for record in clients))
    assert summary.energy == f"{energy.MEASURED}; {energy.NOT_COVERED}"
    # Energy is no result: nothing else differs from a run where nothing was counted.
    assert model_bytes(tmp_path / "with") == model_bytes(tmp_path / "without")
    assert without_times(tmp_path / "with") == without_times(tmp_path / "without")


def test_an_estimate_is_cpu_seconds_times_watts_and_is_called_one(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    run(experiment_of(cifar_root, rounds=2), tmp_path / "without")
    run(experiment_of(cifar_root, rounds=2, watts_per_core=2.5), tmp_path / "with")
    clients, rounds = read_clients(tmp_path / "with"), read_rounds(tmp_path / "with")
    records: list[ClientRecord | RoundRecord | Summary] = [*clients, *rounds, read_summary(tmp_path / "with")]
    for record in records:
        assert record.train_joules is None
        assert record.train_cpu_seconds is not None
        assert record.train_joules_estimate == pytest.approx(2.5 * record.train_cpu_seconds)
    assert (read_summary(tmp_path / "with").energy or "").startswith(
        "estimate, not measured: CPU seconds of training x 2.5 W"
    )
    run_until(experiment_of(cifar_root, rounds=3, watts_per_core=2.5), tmp_path / "resumed", 2)
    run(
        check_run(tmp_path / "resumed", experiment_of(cifar_root, rounds=3, watts_per_core=40.0), resume=True),
        tmp_path / "resumed",
    )
    summary = read_summary(tmp_path / "resumed")
    assert "CPU seconds of training x 40 W" in (summary.energy or "")
    assert summary.train_joules_estimate == pytest.approx(40.0 * (summary.train_cpu_seconds or 0.0))
    without = read_summary(tmp_path / "without")
    assert without.train_joules_estimate is None
    assert "nowhere; watts_per_core gives an estimate" in (without.energy or "")
    with_, without_ = (load_tensors(tmp_path / name / "model.safetensors", "a model") for name in ("with", "without"))
    assert with_[1] == without_[1]  # what the model says of itself
    assert model_bytes(tmp_path / "with") == model_bytes(tmp_path / "without")


def test_clients_that_cannot_be_told_apart_have_no_energy(machine: Path, cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, rounds=1, threads=2, clients_at_once=3, watts_per_core=2.5)
    summary = read_summary(run(experiment, tmp_path / "run"))
    assert (summary.train_joules, summary.train_joules_estimate) == (None, None)
    assert "cannot be told apart" in (summary.energy or "")


def test_a_client_alone_in_its_process_knows_its_seconds_however_many_cores_there_are(cifar_root: Path) -> None:
    """As on Ray and in a deployment, where the other cores are other processes'."""
    experiment = experiment_of(cifar_root, threads=2, clients_at_once=3)
    dataset = load_dataset(experiment.dataset, experiment.root)
    received = initial_state(experiment, dataset).model
    for side_by_side, known in ((False, True), (True, False)):
        _, record = client.train_client(received, dataset, experiment, 1, 0, side_by_side=side_by_side)
        assert (record.train_cpu_seconds is not None) == known


def test_a_summary_has_no_joules_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerofl.sparse.dispatch.name", lambda *_: "a card")
    open_run(tmp_path, Experiment(device="cuda", watts_per_core=10.0, rounds=1))
    clients = [client_record(1, client, 30) for client in (1, 2)]
    record = round_record(1, examples=60, train_cpu_seconds=5.0)
    save_round(tmp_path, record, clients, Checkpoint(1, {}, {}, ""), {})
    summary = summarize(tmp_path, 100)
    assert (summary.train_cpu_seconds, summary.train_joules_estimate) == (5.0, None)
    assert summary.energy == "not measured: nothing here counts what cuda takes"


def test_the_counters_of_the_processors_are_not_read_for_a_gpu() -> None:
    on_gpu = Experiment(device="cuda", watts_per_core=4.0)
    assert energy.why_not_of_run(on_gpu, 1.0) == "nothing here counts what cuda takes"
    assert client.joules_of(on_gpu, None, 1.0) == (None, None)
