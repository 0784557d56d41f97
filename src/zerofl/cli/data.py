"""`zerofl data`: check or download data sets."""

import argparse
import shlex
from typing import TYPE_CHECKING

from zerofl.cli.values import not_negative, positive

if TYPE_CHECKING:
    from zerofl.run.console import Output

DATASETS = ("cifar10", "femnist", "mnist5k", "speech_commands", "speech_commands_by_speaker")
FETCHED = ("cifar10", "femnist", "speech_commands")
PARTITIONS = ("lda", "natural")
"""The choices, without importing PyTorch; a test compares them with what there is."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    data = commands.add_parser("data", help="check or download data sets").add_subparsers(
        title="commands", required=True
    )
    check = data.add_parser(
        "check",
        help="what a local data set holds, and whether it is the complete published one",
        description="Show what a local data set and its clients hold. The exit status is 0 for the complete published "
        "data, 1 for any other, and 2 if it cannot be read.",
    )
    check.add_argument("name", metavar="NAME", choices=DATASETS, help=", ".join(DATASETS))
    check.add_argument("--root", metavar="DIR", default="", help="where the data set is")
    check.add_argument(
        "--partition", choices=PARTITIONS, help="default: natural where the data set has clients of its own"
    )
    check.add_argument("--clients", type=positive, metavar="N", help="default: 100, or all natural ones")
    check.add_argument("--alpha", type=float, default=1.0, metavar="A", help="of lda; default: %(default)s")
    check.add_argument("--seed", type=not_negative, default=1, metavar="S", help="of lda; default: %(default)s")
    check.set_defaults(command=_data_check)
    fetching = data.add_parser(
        "fetch",
        help="download a data set from the Hugging Face hub",
        description="Download a data set through flwr-datasets into DIR/NAME/. Nothing else here ever downloads.",
    )
    fetching.add_argument("name", metavar="NAME", choices=FETCHED, help=", ".join(FETCHED))
    fetching.add_argument("--root", metavar="DIR", required=True, help="where to put it; also the --root of a run")
    fetching.set_defaults(command=_data_fetch)


def _data_check(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.cli.tables import CLIENTS_SHOWN, classes_table, client_tables
    from zerofl.data import client_indices, load_dataset
    from zerofl.data.check import check_dataset, class_table

    name, root = options.name, options.root
    errors.print(f"reading {name} ...")
    report = check_dataset(name, root)
    partition = options.partition or ("natural" if report.natural_clients else "lda")
    clients = options.clients or (report.natural_clients if partition == "natural" else 100)
    try:
        parts = client_indices(name, root, partition, clients, options.alpha, options.seed) if sum(report.train) else []
    except ValueError as error:
        by_default_too_many = not options.clients and clients > sum(report.train)
        hint = "; give their number with --clients N" if by_default_too_many else ""
        errors.print(f"zerofl: {name}: {error}{hint}")
        return 2
    console.print_table(classes_table(report))
    console.print(f"natural clients: {report.natural_clients or 'none'}")
    console.print(f"checksum: {report.checksum}")
    if parts:
        how = partition if partition == "natural" else f"lda, alpha {options.alpha}, seed {options.seed}"
        console.print(f"\n{len(parts)} clients, {how}: training samples of each class")
        dataset = load_dataset(name, root)
        names = list(dataset.clients) if partition == "natural" else [str(client) for client in range(len(parts))]
        width = console.width if console.is_terminal else None
        for table in client_tables(names, class_table(dataset, parts), dataset.classes, width):
            console.print_table(table)
    if len(parts) > CLIENTS_SHOWN:
        console.print(f"and {len(parts) - CLIENTS_SHOWN} more clients")
    for remark in report.remarks:
        console.print(f"note: {remark}")
    for difference in report.differences:
        console.print(f"not as published: {difference}")
    console.print(f"{name}: {report.verdict}")
    return 1 if report.differences else 0


def _data_fetch(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.data.fetch import fetch

    fetch(options.name, options.root, errors.print)
    console.print(f"check it with: {shlex.join(['zerofl', 'data', 'check', options.name, '--root', options.root])}")
    return 0
