"""Every command that README.md and docs/ print is played somewhere, or at least understood by what it would start.

docs/deployment.md's `sh` blocks are played by tests/flower/test_deployment.py. All other commands, in blocks and within
sentences, are given to the argument parser of what they name; a command that nothing here knows is a failure.
"""

import argparse
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import torch
import typer.main
from flwr.clientapp import ClientApp
from flwr.common.config import parse_config_args
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.flower.test_deployment import free_port
from tests.running import experiment_of, run
from zerofl.cli import _parser, main
from zerofl.experiment import parse_setting
from zerofl.flower.flwr_app import read_run_config
from zerofl.models import LeafCNN
from zerofl.run.folder import read_summary
from zerofl.run.sweep import find_sweep, read_sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deployment"))
import play

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What the documents leave to the reader, and a value of it.
PLACEHOLDERS = {
    "FILE_OR_PRESET": "demo", "RUN_OR_SWEEP_DIR": "runs/demo", "NAME": "cifar10", "FILE.html": "page.html",
    "key=value": "rounds=5", "N": "10", "A": "1.0", "S": "1", "HOST:PORT": "127.0.0.1:6379",
}  # fmt: skip
OWN_FILE = "file.toml"
"""A file of the reader's: README's example."""

# Commands of the system, and where what they do is tested.
OF_THE_SYSTEM = {"kill -9": "tests/run/test_runs.py kills and resumes"}


FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SHELL = ("sh", "bash", "console")


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of a page's fenced blocks of these languages."""
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [content for language, content in found if language in languages]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: in blocks line by line, and in sentences what begins with a program and goes on."""
    text = page.read_text(encoding="utf-8")
    played = play.commands() if page == play.PAGE else []
    for language, block in FENCED.findall(text):
        if language not in ("", *SHELL) or block in played:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            # A block without a language may be a drawing, or what a command printed.
            if command and (language or command.partition(" ")[0] in CHECKS):
                yield command
    prose = FENCED.sub("", text)
    for span in re.findall(r"`([^`]+)`", prose):
        command = " ".join(span.split())
        if " " in command and command.partition(" ")[0] in CHECKS:
            yield command


def alternatives(command: str) -> Iterator[list[str]]:
    """The words of a command, for each way in which a synopsis can be read with all its options given.

    `[--x V]...` is an option, `a|b` a choice, `...` in a sentence what is left out, and capitals the reader's own.
    """
    command = re.sub(r"(?<=[\w\]])\.\.\.", "", command)
    if re.search(r"\[--", command):
        command = re.sub(r"[\[\]]", "", command)
    words = [PLACEHOLDERS.get(word, "demo" if word == "..." else word) for word in shlex.split(command)]
    return map(
        list, itertools.product(*(word.split("|") if re.fullmatch(r"[\w|-]+", word) else [word] for word in words))
    )


def check_zerofl(words: list[str], own_file: Path) -> None:
    """The command line's own parser takes it, and its file or preset is there and takes its settings."""
    if _is_mention(_parser(), words):
        return
    options = _parser().parse_args(words)
    if hasattr(options, "experiments"):
        experiments = options.experiments
        file = own_file if experiments == OWN_FILE else ROOT / experiments
        file = file if file.is_file() else find_sweep(experiments)
        read_sweep(file, dict(parse_setting(setting) for setting in options.settings))


def _is_mention(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    """Whether the words are subcommands only, as in "`zerofl data check` shows"."""
    for word in words:
        choices = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not choices or word not in choices[0]:
            return False
        parser = choices[0][word]
    return True


class _ParsedError(Exception):
    """Raised in the place of what a script would do after reading its arguments."""


def check_python(words: list[str], own_file: Path) -> None:
    """The script is there, and its own parser takes the arguments; without any it is only compiled."""
    script, arguments = ROOT / words[0], words[1:]
    source = script.read_text(encoding="utf-8")
    if "argparse" not in source:
        assert not arguments, f"{script} reads no arguments"
        compile(source, script, "exec")
        return
    real = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, given: None = None) -> None:
        real(parser, given)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(_ParsedError):
            runpy.run_path(str(script), run_name="__main__")


def check_flwr(words: list[str], own_file: Path) -> None:
    """Flower's own parser takes it; for a run the app is there and takes the settings, with a node for each client."""
    (program,) = entry_points(group="console_scripts", name="flwr")
    command = typer.main.get_command(program.load())
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, f"flwr has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if not words:
        return  # a mention
    given = command.make_context("flwr", words).params
    if "app" not in given:
        return
    app = tomllib.loads((ROOT / given["app"] / "pyproject.toml").read_text(encoding="utf-8"))
    config, overrides = app["tool"]["flwr"]["app"]["config"], parse_config_args(given["run_config_overrides"])
    assert overrides.keys() <= config.keys(), "Flower takes no keys but the app's"
    experiment, _, _ = read_run_config(config | overrides)
    nodes = parse_config_args(given["federation_config_overrides"]).get("num-supernodes")
    assert nodes == experiment.clients, f"{nodes} nodes for {experiment.clients} clients: they would be waited for"


def check_make(words: list[str], own_file: Path) -> None:
    """The target is there, and the parser takes what it runs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(rf"^{words[0]}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
    for command in re.findall(r"\$\(BIN\)/zerofl (.*)", recipe):
        check_zerofl(command.split(), own_file)


def check_pip(words: list[str], own_file: Path) -> None:
    """It installs this folder, with extras that there are."""
    assert words[0] == "install"
    (folder,) = words[1:]
    match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", folder)
    assert match, f"{folder}: not this folder"
    assert {*(match[1] or "test").split(",")} <= PYPROJECT["project"]["optional-dependencies"].keys()


def check_system(words: list[str], own_file: Path) -> None:
    """Each one has its test."""
    raise AssertionError("a command of the system: play it in a test, and name that in OF_THE_SYSTEM")


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "zerofl": check_zerofl, "python": check_python, "flwr": check_flwr, "make": check_make, "pip": check_pip,
    **dict.fromkeys(
        ("bash", "cat", "cd", "cp", "curl", "docker", "export", "flower-superlink", "flower-supernode", "git", "kill",
         "mkdir", "mv", "ray", "rm", "sh", "ssh", "sudo", "systemctl", "tar", "unzip", "uv", "wget"), check_system
    ),
}  # fmt: skip
"""By the program: what understands its arguments."""


@pytest.fixture(scope="session")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's example of a file."""
    (example,) = blocks(ROOT / "README.md", "toml")
    path = tmp_path_factory.mktemp("own") / OWN_FILE
    path.write_text(example)
    return path


COMMANDS = [pytest.param(c, id=f"{page.name}: {c}") for page in PAGES for c in dict.fromkeys(commands(page))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_is_understood(command: str, own_file: Path, tmp_path: Path) -> None:
    if command in OF_THE_SYSTEM:
        return
    command = command.replace("$PWD", str(tmp_path))
    assert "$" not in command, "no variable stands for something here"
    for program, *words in alternatives(command):
        try:
            CHECKS[program](words, own_file)
        except SystemExit as error:
            pytest.fail(f"{program} does not take {words}: status {error.code}")


def test_commands_are_found_where_they_stand(tmp_path: Path) -> None:
    """In blocks of several lines, in lists, and broken over lines of a sentence; not what only looks like one."""
    page = tmp_path / "page.md"
    page.write_text(
        "`zerofl` and `zerofl.x y`, `mask_ratio = 2`; `zerofl run\ndemo`:\n\n"
        "```\nmake demo   # does it\n┏━ make\n```\n\n"
        "- so:\n\n  ```sh\n  flwr run a \\\n    --stream\n  ```\n```python\nmake = 1\n```\n"
    )
    assert list(commands(page)) == ["make demo", "flwr run a --stream", "zerofl run demo"]


@pytest.mark.parametrize(
    "command",
    [
        "zerofl run nowhere", "zerofl run demo --sett rounds=5", "zerofl run demo --set runds=5",
        "zerofl run FILE_OR_PRESET [--onyl RUN]", "zerofl data chek", "zerofl data fetch mnist5k --root DIR",
        "python benchmarks/nothing.py", "python benchmarks/engines.py overhead-0.3", "python benchmarks/positions.py 3",
        "python benchmarks/adoption.py --sedes 3", "make nothing", "pip install zerofl", "pip install '.[nothing]'",
        "flwr runn examples/flower-app", "flwr run examples/nothing", "curl example.org", "docker-compose up",
        "flwr run examples/flower-app -c 'out=\"/data/runs\"'",  # two nodes for ten clients
        "flwr run examples/flower-app -c 'out=\"/data/runs\" runds=5' --federation-config num-supernodes=10",
        "flwr run examples/flower-app -c 'out=\"runs\"' --federation-config num-supernodes=10",
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_found(command: str, own_file: Path) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):  # of each checker's own kind
        test_a_printed_command_is_understood(command, own_file, own_file.parent)


def test_the_readmes_own_file_runs(
    own_file: Path, cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`zerofl run file.toml --root DIR`, at the size of the fixture."""
    assert "zerofl run file.toml --root DIR" in (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    small = {"clients": 4, "clients_per_round": 2, "width": 4, "rounds": 1, "threads": 1}
    settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", str(own_file), "--root", str(cifar_root), *settings]) == 0
    assert read_summary(tmp_path / "runs" / "file" / "zerofl").rounds == 1


def test_the_readmes_python_runs(cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model, an app and a run of the reader's; the run stands where README says."""
    monkeypatch.chdir(tmp_path)
    run(experiment_of(cifar_root, rounds=1), tmp_path / "runs" / "demo" / "zerofl")
    names = {
        "ClientApp": ClientApp,
        "FedAvg": FedAvg,
        "model": LeafCNN(),
        "torch": torch,
        "x": torch.zeros(2, 3, 32, 32),  # for the model of that run
    }
    for block in blocks(ROOT / "README.md", "python"):
        exec(block, names)
    assert isinstance(names["model"], nn.Module)


def test_the_readmes_flower_app_runs(tmp_path: Path) -> None:
    """README's `flwr run`, really: Flower's simulation on ports of its own, with two clients and one round."""
    (command,) = [c for c in commands(ROOT / "README.md") if c.startswith("flwr run")]
    for printed, small in (
        ('out="/data/runs"', f'out="{tmp_path}/runs" clients=2 clients_per_round=2 rounds=1 threads=1'),
        ("num-supernodes=10", "num-supernodes=2"),
        (" --stream", ""),
    ):
        assert printed in command
        command = command.replace(printed, small)
    port = free_port()
    env = play.environment({
        "FLWR_HOME": str(tmp_path / "flwr home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
    })  # fmt: skip
    superlink = f"flower-superlink --insecure --simulation --host 127.0.0.1 --port {port}\n"
    config = f'[superlink]\ndefault = "mine"\n[superlink.mine]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (tmp_path / "flwr home").mkdir()
    (tmp_path / "flwr home" / "config.toml").write_text(config)
    server = play.start("", superlink, tmp_path, env, tmp_path / "superlink.log")
    try:
        subprocess.run(["bash", "-ec", f"{command} --stream"], cwd=ROOT, env=env, check=True, timeout=180)
        assert read_summary(tmp_path / "runs" / "run").updates == 2
    finally:
        play.stop(server)


def test_the_page_is_played_in_a_new_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as refused:
        play.main([str(tmp_path)])
    assert refused.value.code == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]
    with pytest.raises(SystemExit):
        play.main([str(tmp_path / "mine")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shell_understands_the_blocks_and_variables_are_quoted(page: Path) -> None:
    """A path with a space would fall apart: every `$NAME` of a command stands within quotes."""
    for block in blocks(page, *SHELL):
        subprocess.run(["bash", "-n", "-c", block], check=True)
        code = re.sub(r"<<END\n.*?^END$", "", block, flags=re.DOTALL | re.MULTILINE)
        code = re.sub(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*', "", code)
        assert "$" not in code, f"{page.name}: {code}"
