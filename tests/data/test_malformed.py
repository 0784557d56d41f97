"""Files whose content is not what the format says."""

import contextlib
import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from flwr.app import Context, Message

from tests.conftest import write_cifar_python
from tests.data import hub_data
from tests.data.forms import write_cifar_binary, write_cifar_images, write_cifar_parquet, write_speech
from tests.data.test_femnist import write_femnist
from tests.running import run
from zerofl.cli import main
from zerofl.data import DatasetError, load_dataset
from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.partition import validation_split
from zerofl.data.speech import load_speech_commands_by_speaker
from zerofl.experiment import Experiment, ExperimentError
from zerofl.fl.server import RoundError
from zerofl.flower.client_app import app as client_app
from zerofl.run.folder import read_lines
from zerofl.run.preflight import check_fits


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_may_begin_with_the_mark_of_its_bytes_order(encoding: str, tmp_path: Path) -> None:
    before = checksum(load_femnist(str(write_femnist(tmp_path))))
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text(), encoding=encoding)
    assert checksum(load_femnist(str(tmp_path))) == before


def test_what_stands_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    write_cifar_parquet(tmp_path / "cifar10")
    file = tmp_path / "cifar10" / "train.parquet"
    table = pyarrow.parquet.read_table(file)
    damaged = [
        (table.replace_schema_metadata({"huggingface": text}), "has metadata that are not the hub's, or are damaged")
        for text in ("{", "[]", '{"info": 3}', "\ud7ff".encode("utf-16"), "[" * 100_000)
    ]
    text = pyarrow.array(["a"] * len(table))
    damaged += [(table.set_column(0, "img", pyarrow.StructArray.from_arrays([text], ["bytes"])), "row 0 has no bytes")]
    for content, message in damaged:
        pyarrow.parquet.write_table(content, file)
        with pytest.raises(DatasetError, match=rf"train\.parquet.*{message}"):
            load_cifar10(str(tmp_path))


def test_text_in_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    hub_data.save({"train": hub_data.femnist_split()}, tmp_path / "femnist")
    file = tmp_path / "femnist" / "train.parquet"
    table = pyarrow.parquet.read_table(file)
    writers = pyarrow.array([b"\xff"] * len(table), pyarrow.binary()).view(pyarrow.utf8())
    pyarrow.parquet.write_table(table.set_column(1, "writer_id", writers), file)
    with pytest.raises(DatasetError, match=r"train\.parquet is not a parquet file, or is damaged"):
        load_femnist(str(tmp_path))


@pytest.mark.parametrize(("name", "message"), [(b"\xff_nohash_0.wav", r"\\udcff_nohash_0\.wav"), (b"a\nb.wav", "a.*b")])
def test_a_clip_whose_name_is_no_text_is_named(name: bytes, message: str, tmp_path: Path) -> None:
    write_speech(tmp_path)
    (tmp_path / "yes" / "00000000_nohash_0.wav").rename(tmp_path / "yes" / os.fsdecode(name))
    with pytest.raises(DatasetError, match=f"{message}.* has a name that is no text; rename it"):
        load_speech_commands_by_speaker(str(tmp_path))


def test_json_under_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    before = checksum(load_femnist(str(write_femnist(tmp_path))))
    file = tmp_path / "femnist" / "train" / "all_data_1.json"
    file.rename(file.with_name(os.fsdecode(b"\xff.json")))
    assert checksum(load_femnist(str(tmp_path))) == before


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]}),
        pickle.dumps([]),
        pickle.dumps(3),
        b"cnumpy\nndarray\n(I99999999999\ntR.",
        b"cnumpy\ndtype\n(S'x'\ntR.",
        b"cnumpy\nndarray\n}b.",
        b"(" * 10,
    ],
)
def test_a_pickle_that_is_no_batch_is_named(pickled: bytes, tmp_path: Path) -> None:
    write_cifar_python(tmp_path / "cifar10", 10)
    (tmp_path / "cifar10" / "data_batch_3").write_bytes(pickled)
    with pytest.raises(DatasetError, match="data_batch_3 is not a CIFAR-10 python batch"):
        load_cifar10(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".bin"])
@pytest.mark.parametrize(
    "missing", [["test_batch"], ["data_batch_1"], [f"data_batch_{i}" for i in range(1, 6)]], ids=", ".join
)
def test_missing_batches_are_named(missing: list[str], suffix: str, tmp_path: Path) -> None:
    (write_cifar_binary if suffix else write_cifar_python)(tmp_path / "cifar10")
    for name in missing:
        (tmp_path / "cifar10" / f"{name}{suffix}").unlink()
    with pytest.raises(DatasetError, match=f"lacks {', '.join(name + suffix for name in missing)}$"):
        load_cifar10(str(tmp_path))


SERVERS: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "cifar10": (write_cifar_images, "train", {"width": 4}),
    "femnist": (write_femnist, "femnist/train", {"model": "leaf_cnn"}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_whose_nodes_have_the_training_data_needs_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, train, settings = SERVERS[name]
    write(tmp_path / "whole")
    write(tmp_path / "server")
    shutil.rmtree(tmp_path / "server" / train)
    whole, dataset = (load_dataset(name, str(tmp_path / root)) for root in ("whole", "server"))
    assert torch.equal(dataset.test.images, whole.test.images)
    assert torch.equal(dataset.test.labels, whole.test.labels)
    assert dataset.train.images.shape == (0, *whole.train.images.shape[1:])
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.clients == {}
    settings = settings | {
        "dataset": name, "root": str(tmp_path / "server"), "clients": 1, "clients_per_round": 1, "rounds": 1,
        "threads": 1,
    }  # fmt: skip
    for partition in ("lda", "natural"):
        with pytest.raises(ExperimentError, match=f"server has no training part, which partition = '{partition}' "):
            check_fits(Experiment(partition=partition, **settings), dataset)
    experiment = Experiment(partition="node", **settings)
    check_fits(experiment, dataset)

    def at_node(message: Message, context: Context) -> Message:
        return client_app(message, dataclasses.replace(context, node_config={"root": str(tmp_path / "whole")}))

    out = run(experiment, tmp_path / "run", client=at_node)  # type: ignore[arg-type]
    (record,) = read_lines(out / "rounds.jsonl")
    assert record["examples"] == len(validation_split(torch.arange(len(whole.train.labels)), 0.1, 1, 0)[0])
    assert 0 <= record["test_accuracy"] <= 1
    with pytest.raises(RoundError, match="server has no training part; add one"):
        run(dataclasses.replace(experiment, name="alone"), tmp_path / "alone")
    assert main(["data", "check", name, "--root", str(tmp_path / "server")]) == 1
    assert "not as published" in capsys.readouterr().out


def test_fewer_samples_than_clients_say_how_to_give_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar_images(tmp_path)
    assert main(["data", "check", "cifar10", "--root", str(tmp_path)]) == 2
    assert "clients = 100: expected 1 to 10, the number of training samples; give their number with --clients N" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert main(["data", "check", "cifar10", "--root", str(tmp_path), "--clients", "10"]) == 1
    assert main(["data", "check", "cifar10", "--root", str(tmp_path), "--clients", "11"]) == 2
    assert "--clients N" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "0", "alpha = 0.0: expected a number from"),
        ("--partition", "natural", "the data set has no clients of its own; use partition = 'lda'"),
        ("--seed", "-1", "argument --seed: '-1' is not a whole number of 0 or more"),
    ],
)
def test_another_mistake_does_not_ask_for_the_number_of_clients(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert main(["data", "check", "mnist5k", option, value]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "give their number" not in printed
