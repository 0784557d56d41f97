"""docs/extending.md: its code and its tests are run as they are, and each example takes part in a whole run."""

import re
import types
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.documents.reading import ROOT, fenced_in, section, summary_of
from tests.running import experiment_of, run
from zerofl.data import DATASETS
from zerofl.data.source import Published, Source
from zerofl.exchange import aggregate, uplink
from zerofl.exchange.uplink import UPLINKS
from zerofl.report.tables import STRATEGIES

PAGE = ROOT / "docs" / "extending.md"


def extended(
    title: str, module: types.ModuleType | None, entries: MutableMapping[str, Any], patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What a section's blocks define within a module's names; its line of a dict is put into `entries`."""
    names = dict(vars(module)) if module else {}
    names |= {"np": np, "pytest": pytest, "Path": Path, "zlib": __import__("zlib")}
    names |= {"Source": Source, "Published": Published, "fashion": types.SimpleNamespace()}
    for language, block in fenced_in(section(PAGE, title)):
        if "load_fashion" in names:
            names["fashion"].load_fashion = names["load_fashion"]
        if language == "python" and re.match(r' +"', block):
            for name, entry in eval(f"{{{block}}}", names).items():
                patch.setitem(entries, name, entry)
        elif language == "python":
            exec(block, names)
    return names


def test_a_new_uplink(cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = extended("An uplink strategy", uplink, UPLINKS, monkeypatch)
    names["test_random_k_draws_by_the_weights_and_not_by_their_size"]()
    summary = summary_of(run(experiment_of(cifar_root, rounds=1, uplink="random_k"), tmp_path / "run"))
    assert 0 < summary["uplink_bytes"] < summary["updates"] * summary["full_model_bytes"]


def test_a_new_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = extended("A data set", None, DATASETS, monkeypatch)
    names["test_fashion_reads_class_folders_in_order"](tmp_path / "data")
    coat = (tmp_path / "data" / "test" / "Coat").rename(tmp_path / "data" / "test" / "coat")  # as the test has left it
    Image.new("L", (28, 28)).save(coat / "0.png")  # which it has damaged
    experiment = experiment_of(tmp_path / "data", dataset="fashion", rounds=1, validate_every=0)
    assert summary_of(run(experiment, tmp_path / "run"))["rounds"] == 1


def test_a_new_server_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    names = extended("A server strategy or optimiser", aggregate, {}, monkeypatch)
    names["test_fedadagrad_by_hand"]()


def test_the_files_to_touch_are_there() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    new = {"src/zerofl/data/fashion.py", "tests/data/test_fashion.py"}
    assert new < set(named)
    assert [path for path in named if path not in new and not (ROOT / path).is_file()] == []


def test_every_uplink_has_its_name_in_the_report() -> None:
    assert STRATEGIES.keys() == UPLINKS.keys() | {"dense"}
