"""`zerofl report`: runs and sweeps as one page."""

import argparse
import importlib.util
import lzma
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from zerofl.cli.importing import importing

if TYPE_CHECKING:
    from zerofl.run.console import Output


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    report = commands.add_parser(
        "report",
        help="runs and sweeps as one page, beside the paper's figures",
        description="Make one page, and its tables as Markdown and CSV, of runs' folders or folders of runs.",
    )
    report.add_argument(
        "directories", metavar="RUN_OR_SWEEP_DIR", nargs="+", type=Path, help="for example runs/demo, or a .zip of it"
    )
    report.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.errors import ZeroFLError, install_hint
    from zerofl.run.files import ResultsError

    if importlib.util.find_spec("matplotlib") is None:
        raise ResultsError(f"the report's figures need matplotlib: {install_hint('report')}")
    with importing():
        from zerofl.report.collect import collect
        from zerofl.report.page import check_out, write_report

    check_out(options.out)
    given = {path.resolve(): path for path in options.directories}  # each once
    archives: dict[Path, Path] = {}
    with tempfile.TemporaryDirectory() as unpacked:
        folders = []
        for number, path in enumerate(given.values()):
            if zipfile.is_zipfile(path):
                into = Path(unpacked, str(number))
                archives[into] = path
                folders.append(_unpack(path, into))
            elif path.is_file():  # of a shell's *, beside the folders
                errors.print(f"zerofl: {path} is a file, not the folder of a run or of runs: it is left out")
            else:
                folders.append(path)
        if not folders:
            raise ResultsError("there is no folder to report on: expected those of runs, for example runs/demo")
        try:
            for path in write_report([collect(folder) for folder in folders], options.out):
                console.print(f"wrote {path}")
        except (ZeroFLError, OSError) as error:
            said = str(error)
            for folder, archive in archives.items():  # the folder will be gone
                said = said.replace(f"{folder}/", f"{archive}/")
            raise ResultsError(said) from error
    return 0


def _unpack(path: Path, into: Path) -> Path:
    """Unpack an archive; returns what is at its top, or the one folder there that holds it."""
    from zerofl.run.files import EXPERIMENT, ResultsError

    top = into / path.stem
    top.mkdir(parents=True)
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(top)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted; OSError: bzip2's, or a full disk; ValueError: a name that is no text
        raise ResultsError(f"{path} cannot be unpacked: {error}; unpack it yourself, and give the folder") from error
    while len(inside := [entry for entry in top.iterdir() if entry.name != "__MACOSX"]) == 1:
        if not inside[0].is_dir() or (inside[0] / EXPERIMENT).exists():
            break
        (top,) = inside
    return top
