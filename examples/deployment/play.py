"""Play docs/deployment.md on this machine: its commands, in their order, in a new folder.

    python examples/deployment/play.py [FOLDER]          about a minute; HOST, PORT and DATA may be set

The page's blocks marked `sh` are the commands. Those that start a SuperLink or a SuperNode stay in the background,
with a log each, until the last one is done.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deployment.md"
SERVERS = {"flower-superlink": "Uvicorn running", "flower-supernode": "SuperNode ID"}
"""The commands that stay, and what they write when they are ready."""
READY_SECONDS = 120


def commands() -> list[str]:
    """The page's `sh` blocks."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prepare(folder: Path) -> None:
    """Make `folder` look like a checkout, as far as the page's commands go."""
    for example in ("deployment", "flower-app"):
        shutil.copytree(ROOT / "examples" / example, folder / "examples" / example)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with this Python's commands first in the path, and the settings."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **settings}


def run(exports: str, command: str, folder: Path, env: dict[str, str]) -> None:
    """Run a command after the exports. Raises CalledProcessError if it fails."""
    subprocess.run(["bash", "-ec", f"{exports}\n{command}"], cwd=folder, env=env, check=True)


def start(exports: str, command: str, folder: Path, env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a server in a process group of its own; returns when it is ready, or has ended, or raises TimeoutError."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-ec", f"{exports}\n{command}"],
            cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    ready = SERVERS[command.split()[0]]
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and ready not in log.read_text(errors="replace"):
        if time.monotonic() > deadline:
            stop(process)
            raise TimeoutError(f"not ready after {READY_SECONDS} s: {command}see {log}")
        time.sleep(0.2)
    return process


def stop(process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM) -> None:
    """End a server and the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_server(command: str) -> bool:
    """Whether a block starts a server."""
    return command.split()[0] in SERVERS


def main(arguments: Sequence[str] | None = None) -> None:
    """Play the page in the folder of the command line."""
    parser = argparse.ArgumentParser(description="Play docs/deployment.md on this machine.")
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, help="a new or empty one (default: a temporary one)"
    )
    folder: Path | None = parser.parse_args(arguments).folder
    if folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"{folder} is there already: the page starts from nothing, so give a new or an empty folder")
    play(folder.resolve() if folder else Path(tempfile.mkdtemp(prefix="zerofl-deployment-")))


def play(folder: Path) -> None:
    """Play all blocks, the first of which are the exports."""
    prepare(folder)
    env = environment({})
    exports, *rest = commands()
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(rest):
            print(f"\n$ {command}", end="", flush=True)
            if is_server(command):
                log = folder / f"{command.split()[0]}-{number}.log"
                servers.append(start(exports, command, folder, env, log))
                print(f"(log in {log})" if servers[-1].poll() is None else log.read_text(), flush=True)
                if servers[-1].poll() is not None:
                    sys.exit(f"it ended with status {servers[-1].returncode}")
            else:
                run(exports, command, folder, env)
    finally:
        for server in reversed(servers):
            stop(server)


if __name__ == "__main__":
    main()
