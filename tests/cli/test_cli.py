import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import run_until
from zerofl.bench.step import ISAS
from zerofl.bench.workload import MODELS
from zerofl.cli import bench, data, main
from zerofl.cli.importing import INTERRUPTED
from zerofl.data import DATASETS, PARTITIONS
from zerofl.run.checkpoint import load_checkpoint, save_checkpoint
from zerofl.run.files import CHECKPOINT
from zerofl.run.folder import read_lines, read_summary
from zerofl.run.resume import locked, open_run
from zerofl.run.sweep import read_sweep
from zerofl.sparse import dispatch, kernels


@pytest.fixture
def file(cifar_root: Path, tmp_path: Path) -> str:
    path = tmp_path / "pair.toml"
    path.write_text(f"""
[base]
root = "{cifar_root}"
clients = 4
clients_per_round = 2
width = 4
rounds = 2
threads = 1
[[run]]
name = "full"
uplink = "full"
[[run]]
name = "sparse"
uplink = "top_k_weights"
""")
    return str(path)


def test_a_file_runs_whole_and_prints_plain_lines_and_a_table(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", file, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 runs, one after another, with 4 rounds in all\n")
    assert "full: 2 rounds, 2 of 4 clients a round; resnet18 with " in printed
    assert "full  round 1/2  accuracy" in printed
    assert "sparse  round 2/2  accuracy" in printed
    assert "left" in printed
    heading, *table, where = printed[printed.index("run  ") :].splitlines()
    assert heading.split()[:4] == ["run", "test", "accuracy", "savings"]
    assert where == f"results in {tmp_path / 'out'}/"
    for name, row in zip(("full", "sparse"), table, strict=True):
        summary = read_summary(tmp_path / "out" / name)
        assert row.split()[:3] == [name, f"{summary.test_accuracy:.1%}", f"{summary.savings:.1f}x"]
    assert "\x1b" not in printed


def test_finished_runs_are_skipped_on_resume_and_kept_otherwise(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", file, "--only", "sparse", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert not (tmp_path / "out" / "full").exists()
    before = (tmp_path / "out" / "sparse" / "rounds.jsonl").read_text()
    assert main(arguments) == 2
    assert "holds a run already: resume it with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "sparse: finished before" in capsys.readouterr().out
    assert (tmp_path / "out" / "sparse" / "rounds.jsonl").read_text() == before


def test_going_on_with_other_code_is_told(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "out" / "full"
    run_until(read_sweep(Path(file)).experiments()["full"], directory, 1)
    checkpoint = load_checkpoint(directory / CHECKPOINT)
    save_checkpoint(directory / CHECKPOINT, checkpoint._replace(sources_sha256=("f" * 64,)))
    assert main(["run", file, "--only", "full", "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert "\nfull: round 1 was made by other code: its sources have SHA-256 ffff" in f"\n{capsys.readouterr().out}"


def test_two_processes_do_not_run_into_one_folder(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even while the first one is in its first round: nothing is begun, and its sweep.toml stays."""
    open_run((out := tmp_path / "out") / "full", read_sweep(Path(file)).experiments()["full"])
    (out / "sweep.toml").write_text("its own")
    with locked(out / "full"):
        assert main(["run", file, "--out", str(out)]) == 2
    assert f"{out / 'full'} is in use by another process" in capsys.readouterr().err
    assert (out / "sweep.toml").read_text() == "its own"
    assert not (out / "sparse").exists()


def test_a_run_that_is_named_twice_is_run_once(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", file, "--only", "full", "--only", "full", "--set", "rounds=1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert len(re.findall(r"^full +\d+\.\d%", capsys.readouterr().out, re.MULTILINE)) == 1


def test_the_default_folder_is_runs_and_the_files_name(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", file, "--only", "full", "--set", "rounds=1"]) == 0
    assert len(read_lines(tmp_path / "runs" / "pair" / "full" / "rounds.jsonl")) == 1


def test_a_failed_run_lets_the_others_go_on(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(file).read_text().replace('uplink = "full"', 'uplink = "full"\nlr_start = 1e30')
    Path(file).write_text(text)
    assert main(["run", file, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "zerofl: run full: round 1: 0 of 2 clients sent a usable update, min_replies = 1 are needed." in captured.err
    assert "holds non-finite values (NaN or infinity): training has diverged" in captured.err
    assert f"failed: full; try again with: zerofl run {file} --out {tmp_path / 'out'} --resume" in captured.err
    assert (tmp_path / "out" / "sparse" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "--only nope: no such run; the runs are full, sparse"),
        (["--set", "sparsty=0.9"], "unknown key 'sparsty'; did you mean sparsity?"),
        (
            ["--set", "clients=1000000000"],
            "cifar10: clients = 1000000000: expected 1 to 200, the number of training samples",
        ),
        (["--set", "model=leaf_cnn"], "model = 'leaf_cnn' does not take images of (3, 32, 32), which cifar10 has"),
        (
            ["--engine", "ray", "--set", "threads=1024"],
            "each client on Ray takes 1024 cores, and",
        ),
        (["--set", "partition=node"], "partition = 'node': here all clients share one folder"),
        (["--engine", "ray", "--set", "client_cpus=9999"], "client_cpus = 9999: each client on Ray takes 9999 cores"),
        (["--engine", "ray", "--set", "ray_address=bogus"], "ray_address = 'bogus': expected host:port"),
        (["--engine", "ray", "--set", "ray_address=127.0.0.1:1"], "no Ray cluster answers there"),
        (["--set", "client_gpus=-1"], "client_gpus = -1.0: expected 0 or a positive number"),
        (["--set", "sparsity=2"], "sparsity = 2.0: expected a fraction in [0, 1)"),
        (["--root", "/nowhere/at/all"], "found neither data_batch_1, nor data_batch_1.bin"),
    ],
)
def test_what_cannot_be_started_says_why_and_leaves_nothing(
    arguments: list[str], message: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", file, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_importing_zerofl_does_not_import_flower() -> None:
    code = "import sys, zerofl; sys.exit(any(name.split('.')[0] in ('flwr', 'ray') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensorboard_gets_every_round(file: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["run", file, "--only", "sparse", "--out", str(tmp_path / "out"), "--tensorboard"]
    assert main(arguments) == 0
    folder = tmp_path / "out" / "sparse"
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in ("uplink_bytes", "train_loss", "test_accuracy"):
        recorded = [(record["round"], record[key]) for record in read_lines(folder / "rounds.jsonl")]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(key)] == recorded
    assert any(tag.startswith("nonzero_ratio/layer1") for tag in events.Tags()["scalars"])


@pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no kernels")
def test_an_instruction_set_that_is_not_there_is_told_where_the_kernels_are_used(file: str, tmp_path: Path) -> None:
    code = """if True:
        import sys, torch, zerofl, zerofl.cli
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
        zerofl.sparsify_(layer, 0.5, layers=["0"])
        try:
            layer(torch.ones(1, 8))
        except ValueError as error:
            print(error)
        sys.exit(zerofl.cli.main(sys.argv[1:]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "run", file, "--out", str(tmp_path / "out")],
        env=os.environ | {"ZEROFL_ISA": "foo"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    message = "ZEROFL_ISA=foo: expected one that this processor has: baseline"
    assert done.stdout.startswith(message)
    assert done.stderr.splitlines()[-1].startswith(f"zerofl: {message}")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no kernels")
def test_refused_kernels_are_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "native", dispatch.RefusedKernels("ZEROFL_ISA=foo: expected another"))
    assert main(["bench", "uplink"]) == 2
    assert capsys.readouterr().err.endswith("\nzerofl: ZEROFL_ISA=foo: expected another\n")


def test_a_folder_with_brackets_is_printed_as_it_is(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x[/b]" / "runs[a]"
    arguments = ["run", file, "--only", "full", "--set", "rounds=1", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"results in {out}/\n")
    assert main([*arguments, "--resume"]) == 0
    assert f"full: finished before, in {out / 'full'}\n" in capsys.readouterr().out


def test_a_run_goes_on_without_its_reader(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind `| head -1`, or a pager that was left: what it computes is in its folder."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["run", file, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "sparse" / "summary.json").exists()
    told = "zerofl: the output can no longer be written (Broken pipe); the run continues, with its results in"
    assert capsys.readouterr().err.count(told) == 1


def test_a_terminal_of_ascii_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["data", "check", "mnist5k"]) == 0
    assert raw.getvalue().endswith(b"mnist5k: complete, as published\n")


@pytest.mark.parametrize(
    ("arguments", "interrupted"),
    [
        (["run", "demo"], "zerofl.run.preflight.check_fits"),
        (["report", "runs"], "zerofl.report.collect.collect"),
        (["data", "check", "mnist5k"], "zerofl.data.check.check_dataset"),
        (["data", "fetch", "cifar10", "--root", "data"], "zerofl.data.fetch.fetch"),
        (["bench", "step"], "zerofl.bench.step.bench_step"),
        (["bench", "layers"], "zerofl.bench.step.bench_step"),
        (["bench", "uplink"], "zerofl.bench.uplink.bench_uplink"),
    ],
)
def test_an_interrupted_command_says_so_in_a_line(
    arguments: list[str],
    interrupted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt(*arguments: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    assert main(arguments) == INTERRUPTED
    assert capfd.readouterr().err.splitlines()[-1] == "zerofl: interrupted"


def test_an_interrupt_while_pytorch_is_loaded_ends_in_a_line() -> None:
    """Not in an exception, of which NumPy and PyTorch make others."""
    command = [sys.executable, "-m", "zerofl.cli", "data", "check", "mnist5k"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "loading PyTorch ...\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "zerofl: interrupted\n")
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("arguments", ["['--version']", "['--help']", "['data', 'check', '--help']"])
def test_help_does_not_wait_for_pytorch_nor_mind_a_missing_reader(arguments: str) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from zerofl.cli import main
main({arguments})
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_the_choices_are_those_there_are() -> None:
    assert set(data.DATASETS) == set(DATASETS)
    assert set(data.FETCHED) == {name for name, source in DATASETS.items() if source.hub}
    assert {*data.PARTITIONS, "node"} == set(PARTITIONS)
    assert set(bench.BENCH_MODELS) == set(MODELS)
    assert set(bench.BENCH_ISAS) == set(ISAS)
