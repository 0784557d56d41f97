"""`zerofl data check`."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import hub_data
from zerofl.cli import main
from zerofl.cli.tables import client_tables
from zerofl.data import DATASETS, Dataset, Split, client_indices, femnist, load_dataset
from zerofl.data.check import (
    check_dataset,
    class_table,
    content_checksum,
    figures_of,
    report,
)
from zerofl.data.dataset import checksum
from zerofl.data.source import Published
from zerofl.run.console import Output


def small(images: int = 12, clients: int = 3) -> Dataset:
    """Images of 2 pixels, of 4 classes in turn; the last class is in no client but the last."""
    pixels = torch.arange(2 * images, dtype=torch.uint8).view(images, 1, 1, 2)
    labels = torch.arange(images) % 4
    owners = {f"w{n}": torch.arange(n, images, clients) for n in range(clients)}
    test = Split(pixels[:2] + 100, labels[:2])
    return Dataset(Split(pixels, labels), test, ("a", "b", "c", "d"), (0.0,), (1.0,), owners)


def shuffled(dataset: Dataset, order: torch.Tensor) -> Dataset:
    return dataclasses.replace(dataset, train=dataset.train.take(order))


def test_every_data_set_has_figures_that_can_be_compared() -> None:
    for source in DATASETS.values():
        versions = source.published.figures
        assert all(figures.keys() == versions[0].keys() for figures in versions)
    known = figures_of(load_dataset("mnist5k", ""))
    for name in ("femnist", "mnist5k", "speech_commands_by_speaker"):
        assert DATASETS[name].published.figures[0].keys() <= known.keys()


def test_figures_are_counts() -> None:
    figures = figures_of(small())
    assert figures["samples"] == figures["training samples"] + figures["test samples"] == 14
    assert [figures[f"training samples of {name}"] for name in "abcd"] == [3, 3, 3, 3]
    assert [figures[f"test samples of {name}"] for name in "abcd"] == [1, 1, 0, 0]
    assert figures["natural clients"] == 3
    with_silence = dataclasses.replace(small(), classes=("a", "b", "c", "silence"))
    assert figures_of(with_silence)["samples without silence"] == 14 - 3


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)))
def test_the_checksum_of_the_content_does_not_know_the_order(order: list[int]) -> None:
    dataset = small()
    assert content_checksum(shuffled(dataset, torch.tensor(order))) == content_checksum(dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: dataclasses.replace(d, train=Split(d.train.images, d.train.labels.roll(1))),
        lambda d: dataclasses.replace(d, train=Split(d.train.images ^ 1, d.train.labels)),
        lambda d: dataclasses.replace(d, train=d.test, test=d.train),
        lambda d: shuffled(d, torch.tensor([0, *range(11)])),
    ],
)
def test_the_checksum_of_the_content_knows_every_sample(change: Callable[[Dataset], Dataset]) -> None:
    assert content_checksum(change(small())) != content_checksum(small())


def test_another_order_is_as_published_and_another_pixel_is_not() -> None:
    dataset = small()
    published = Published((figures_of(dataset),), checksum(dataset), content_checksum(dataset))
    whole = report("small", dataset, checksum(dataset), published)
    assert (whole.differences, whole.remarks) == ((), ())
    turned = shuffled(dataset, torch.arange(12).flip(0))
    other_order = report("small", turned, checksum(turned), published)
    assert other_order.differences == ()
    assert "in another order" in other_order.remarks[0]
    damaged = dataclasses.replace(dataset, test=Split(dataset.test.images ^ 1, dataset.test.labels))
    (difference,) = report("small", damaged, checksum(damaged), published).differences
    assert f"checksum {checksum(damaged)}, published {checksum(dataset)}" in difference


def test_any_published_version_is_complete_and_else_each_figure_is_named() -> None:
    dataset = small()
    versions = ({"natural clients": 5, "samples": 14}, {"natural clients": 3, "samples": 14})
    whole = report("small", dataset, "", Published(versions))
    assert whole.differences == ()
    assert "no published checksum" in whole.remarks[0]
    versions = ({"natural clients": 5, "samples": 2_000}, {"natural clients": 6, "samples": 14})
    # It is nearer to the second version, which has as many samples.
    assert report("small", dataset, "", Published(versions)).differences == ("3 natural clients, published 5 or 6",)
    versions = ({"natural clients": 3, "samples": 2_000}, {"natural clients": 6, "samples": 14})
    assert report("small", dataset, "", Published(versions)).differences == ("14 samples, published 2,000",)


def test_data_that_nobody_published_are_not_called_published() -> None:
    own = report("own", small(), "", Published(()))
    assert (own.differences, own.remarks) == ((), ())
    assert own.verdict == "usable; nothing was published to compare it with"


def femnist_of(writers: int, samples: int, training: Callable[[int], int]) -> Dataset:
    """Images of no pixels by writers with 2 or more, of whom each trains with so many of his n."""
    others = np.random.default_rng(0).multinomial(samples - 9, [1 / (writers - 3)] * (writers - 3)).tolist()
    owned = [training(n) for n in (2, 3, 4, *others)]
    clients = {f"w{i}": indices for i, indices in enumerate(torch.split(torch.arange(sum(owned)), owned))}
    train, test = (
        Split(torch.empty(n, 1, 0, 0, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
        for n in (sum(owned), samples - sum(owned))
    )
    return Dataset(train, test, femnist.CLASSES, (1.0,), (-1.0,), clients)


def leaf(fraction: float) -> Callable[[int], int]:
    """How many of n images LEAF puts into the training part (data/utils/split_data.py)."""
    return lambda n: max(1, int(fraction * n))


VERSIONS = [  # writers, images, and the rule of the 80 %
    (3_597, 817_851, leaf(0.8)),
    (3_597, 814_277, lambda n: n - n // 5),  # the hub's, by `load_femnist`
    (3_550, 805_263, leaf(0.8)),
]


@pytest.mark.parametrize(("writers", "samples", "training"), VERSIONS)
def test_femnist_is_complete_with_the_papers_parts_and_not_with_leafs_own(
    writers: int, samples: int, training: Callable[[int], int]
) -> None:
    whole = report("femnist", femnist_of(writers, samples, training), "", DATASETS["femnist"].published)
    assert whole.differences == ()
    assert not any("--tf" in remark for remark in whole.remarks)
    other = report("femnist", femnist_of(writers, samples, leaf(0.9)), "", DATASETS["femnist"].published)
    named = [difference.split(" or ")[0] for difference in other.differences]
    # 0.8 (817,851 - 3,597) = 651,403.2 and 0.8 * 817,851 = 654,280.8
    assert f"{sum(other.train):,} training samples, published 651,404 to 654,280" in named
    assert f"{sum(other.test):,} test samples, published 163,571 to 166,447" in named
    assert len(other.differences) == 2  # nothing of the writers and of all images, which are as published
    assert any("-t sample --tf 0.8" in remark for remark in other.remarks)


def test_femnist_of_one_image_less_is_not_complete() -> None:
    found = report("femnist", femnist_of(3_597, 817_850, leaf(0.8)), "", DATASETS["femnist"].published)
    assert found.differences == ("817,850 samples, published 817,851 or 814,277 or 805,263",)


def test_mnist5k_is_as_published() -> None:
    found = check_dataset("mnist5k", "")
    assert (found.differences, found.remarks) == ((), ())
    assert (found.train, found.test, found.natural_clients) == ((400,) * 10, (100,) * 10, 0)


def test_a_class_table_sums_to_the_clients_and_to_the_classes() -> None:
    dataset = load_dataset("mnist5k", "")
    parts = client_indices("mnist5k", "", "lda", 7, 0.1, 3)
    counts = class_table(dataset, parts)
    assert counts.sum(1).tolist() == [len(part) for part in parts]
    assert torch.equal(counts.sum(0), dataset.train.labels.bincount())


def lines(counts: torch.Tensor, classes: list[str], width: int | None) -> list[str]:
    file = io.StringIO()
    for table in client_tables([f"w{n}" for n in range(len(counts))], counts, classes, width):
        Output(file).print_table(table)
    return file.getvalue().splitlines()


def test_the_first_twenty_clients_and_the_extremes_are_shown() -> None:
    counts = torch.tensor([[(7 * n) % 31 + 1, 0] for n in range(30)])  # sizes 1 to 31 but one, in no order
    printed = [line.split() for line in lines(counts, ["a", "b"], 60)]
    rows = {cells[0]: cells[1:] for cells in printed if cells and cells[0][0] == "w"}
    assert list(rows) == [f"w{n}" for n in range(20)]
    assert all(rows[f"w{n}"] == [str(counts[n, 0].item())] * 2 + ["."] for n in range(20))
    sizes = counts.sum(1)
    median = sizes.argsort()[15]
    below = [cells[:3] for cells in printed if cells and cells[0] in ("smallest:", "median:", "largest:")]
    assert below == [
        [f"{size}:", f"w{n}", str(sizes[n].item())]
        for size, n in (("smallest", int(sizes.argmin())), ("median", int(median)), ("largest", int(sizes.argmax())))
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 200), st.integers(1, 70), st.integers(1, 12), st.integers(0, 12_000))
def test_tables_fit_and_lose_no_class(width: int, classes: int, name: int, most: int) -> None:
    names = [f"{c:0{name}d}" for c in range(classes)]
    counts = torch.arange(3 * classes).view(3, classes) * most // (3 * classes)
    printed = lines(counts, names, width)
    assert max(map(len, printed)) <= width
    headers = [line.split()[2:] for line in printed if line.startswith("client ")]
    assert [cell for cells in headers for cell in cells] == names
    heading, *rows = lines(counts, names, None)  # in a pipe
    assert heading.split() == ["client", "samples", *names]
    assert len(rows) == 3 + 3


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["data", "check", *arguments])
    captured = capsys.readouterr()
    return status, captured.err + captured.out


def test_the_command_says_what_is_missing(cifar_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = run(capsys, "cifar10", "--root", str(cifar_root))
    assert status == 1
    for line in (
        "natural clients: none",
        f"checksum: {checksum(load_dataset('cifar10', str(cifar_root)))}",
        "100 clients, lda, alpha 1.0, seed 1",
        "and 80 more clients",
        "not as published: 200 training samples, published 50,000",
        "not as published: 4 test samples of truck, published 1,000",
        "cifar10: usable, but not the complete published data",
    ):
        assert line in printed
    assert "not as published: checksum" not in printed  # which goes without saying


def test_the_command_says_what_is_complete(
    cifar_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small copy passes for the whole: as batches, and in another order from the hub."""
    dataset = load_dataset("cifar10", str(cifar_root))
    whole = Published((figures_of(dataset),), checksum(dataset), content_checksum(dataset))
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(published=whole))
    status, printed = run(capsys, "cifar10", "--root", str(cifar_root), "--clients", "4", "--alpha", "0.1")
    assert status == 0
    assert "4 clients, lda, alpha 0.1, seed 1" in printed
    assert "more clients" not in printed
    assert printed.endswith("cifar10: complete, as published\n")
    splits = {"train": hub_data.cifar_split(range(4, -1, -1)), "test": hub_data.cifar_split(range(5, 6))}
    hub_data.save(splits, tmp_path / "cifar10")
    status, printed = run(capsys, "cifar10", "--root", str(tmp_path))
    assert status == 0
    assert "every sample and its label are as published, but in another order" in printed


def test_natural_clients_are_shown_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))
    hub_data.save({"train": hub_data.femnist_split()}, tmp_path / "femnist")
    status, printed = run(capsys, "femnist", "--root", str(tmp_path))
    assert status == 1
    assert "4 clients, natural" in printed
    assert "not as published: 4 natural clients, published 3,597 or 3,550" in printed
    assert "smallest: f0000_00" in printed
    assert "largest: f0002_14" in printed
    status, printed = run(capsys, "femnist", "--root", str(tmp_path), "--partition", "lda", "--clients", "2")
    assert "2 clients, lda" in printed
    status, printed = run(capsys, "femnist", "--root", str(tmp_path), "--clients", "9")
    assert status == 2
    assert "femnist: clients = 9: with partition = 'natural' this data set has 4" in printed


def test_what_cannot_be_read_is_said(tmp_path: Path, cifar_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = run(capsys, "cifar10", "--root", str(tmp_path))
    assert status == 2
    assert "found neither data_batch_1" in printed
    copy = Path(shutil.copytree(cifar_root, tmp_path / "copy"))
    (copy / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    status, printed = run(capsys, "cifar10", "--root", str(copy))
    assert status == 2
    assert "test_batch is not a CIFAR-10 python batch" in printed
