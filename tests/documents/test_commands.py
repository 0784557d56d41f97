"""Every command that the documents print is played somewhere, or at least understood by what it would start.

The `sh` blocks of docs/deployment.md are played by tests/flower/test_deployment.py, those of the tutorial by
test_tutorial.py. All other commands, in blocks and within
sentences, are given to the argument parser of what they name; a command that nothing here knows is a failure.
"""

import argparse
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import typer.main
from flwr.common.config import parse_config_args

from tests.documents.reading import FENCED, PAGES, ROOT, SHELL, blocks
from zerofl.cli import _parser
from zerofl.experiment import parse_setting
from zerofl.flower.flwr_app import read_run_config
from zerofl.run.sweep import find_sweep, read_sweep

sys.path.insert(0, str(ROOT / "examples" / "deployment"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import play
import wheels

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What the documents leave to the reader, and a value of it.
PLACEHOLDERS = {
    "FILE_OR_PRESET": "demo", "RUN_OR_SWEEP_DIR": "runs/demo", "NAME": "cifar10", "FILE.html": "page.html",
    "key=value": "rounds=5", "N": "10", "A": "1.0", "S": "1", "HOST:PORT": "127.0.0.1:6379",
}  # fmt: skip
OWN_FILE = "file.toml"
"""A file of the reader's: the example in docs/experiments.md."""

PLAYED = (play.PAGE.name, "tutorial.md")
"""The pages whose `sh` blocks are played by a test of their own."""

# Commands of the system, and where what they do is tested.
OF_THE_SYSTEM = {
    "kill -9": "tests/run/test_runs.py kills and resumes",
    "sudo chmod a+r /sys/class/powercap/*/energy_uj": "tests/fl/test_energy.py, of the same words in a message",
}


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: in blocks line by line, and in sentences what begins with a program and is longer."""
    text = page.read_text(encoding="utf-8")
    played = blocks(page, "sh") if page.name in PLAYED else []
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
    """The target is there, the parser takes what it runs, and it reads each variable; what TESTS names is there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(rf"^{words[0]}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
    for command in re.findall(r"\$\(BIN\)/zerofl (.*)", recipe):
        check_zerofl(command.split(), own_file)
    for variable in words[1:]:
        name, _, value = variable.partition("=")
        assert f"$({name})" in recipe
        assert name != "JOBS" or value.isdecimal()
        assert name != "TESTS" or all((ROOT / test).exists() for test in value.split())


def check_pip(words: list[str], own_file: Path) -> None:
    """It installs this folder, with extras that there are, or torch from PyTorch's own index."""
    assert words[0] == "install"
    if words[1:] == ["torch", "--index-url", wheels.CPU_BUILDS]:
        return
    (folder,) = words[1:]
    match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", folder)
    assert match, f"{folder}: not this folder"
    assert {*(match[1] or "test").split(",")} <= PYPROJECT["project"]["optional-dependencies"].keys()


def check_export(words: list[str], own_file: Path) -> None:
    """It names PyTorch's own index to pip."""
    assert words == [f"PIP_EXTRA_INDEX_URL={wheels.CPU_BUILDS}"]


def check_system(words: list[str], own_file: Path) -> None:
    """Each one has its test."""
    raise AssertionError("a command of the system: play it in a test, and name that in OF_THE_SYSTEM")


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "zerofl": check_zerofl, "python": check_python, "flwr": check_flwr, "make": check_make, "pip": check_pip,
    "export": check_export,
    **dict.fromkeys(
        ("bash", "cat", "cd", "cp", "curl", "docker", "flower-superlink", "flower-supernode", "git", "kill",
         "mkdir", "mv", "ray", "rm", "sh", "ssh", "sudo", "systemctl", "tar", "unzip", "uv", "wget"), check_system
    ),
}  # fmt: skip
"""By the program: what understands its arguments."""


@pytest.fixture(scope="session")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of a file in docs/experiments.md."""
    (example,) = blocks(ROOT / "docs" / "experiments.md", "toml")
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
        "python benchmarks/adoption.py --sedes 3", "make nothing", "make test JOB=8",
        "make test JOBS=many", "make wheel TESTS=tests/nothing", "pip install zerofl", "pip install '.[nothing]'",
        "flwr runn examples/flower-app", "flwr run examples/nothing", "curl example.org", "docker-compose up",
        "flwr run examples/flower-app -c 'out=\"/data/runs\"'",  # two nodes for ten clients
        "flwr run examples/flower-app -c 'out=\"/data/runs\" runds=5' --federation-config num-supernodes=10",
        "flwr run examples/flower-app -c 'out=\"runs\"' --federation-config num-supernodes=10",
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_found(command: str, own_file: Path) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):  # of each checker's own kind
        test_a_printed_command_is_understood(command, own_file, own_file.parent)
