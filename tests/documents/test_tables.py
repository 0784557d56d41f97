"""The tables of keys and of data sets, against the code."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

import pytest
import tomli_w

from tests.documents.reading import ROOT, section
from zerofl.data import DATASETS, PARTITIONS
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import POSITIONS, VALUES
from zerofl.experiment import PRECISIONS, SERVER_OPTIMIZERS, Experiment
from zerofl.models import DEFAULT_INITIALIZATION, INITIALIZATIONS
from zerofl.sparse.distribution import DISTRIBUTIONS

PAGE = ROOT / "docs" / "experiments.md"
FIELDS = {field.name: field for field in dataclasses.fields(Experiment)}
CHOICES: dict[str, Collection[str]] = {
    "dataset": DATASETS, "partition": PARTITIONS, "model": DEFAULT_INITIALIZATION, "initialization": INITIALIZATIONS,
    "precision": PRECISIONS, "uplink": UPLINKS, "uplink_values": VALUES, "uplink_positions": POSITIONS,
    "downlink_values": VALUES, "server_optimizer": SERVER_OPTIMIZERS, "sparsity_distribution": DISTRIBUTIONS,
}  # fmt: skip


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table rows whose first cell is code."""
    lines = section(PAGE, title).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]


KEYS = {row[0].strip("`| "): row[1:] for row in rows("Keys")}


def test_every_key_has_its_row_in_the_order_of_the_dataclass() -> None:
    assert list(KEYS) == list(FIELDS)
    assert len(rows("Keys")) == len(FIELDS), "no row stands twice"


@pytest.mark.parametrize("key", FIELDS)
def test_a_keys_row_has_its_type_default_and_choices(key: str) -> None:
    type_, default, meaning = KEYS[key]
    field = FIELDS[key]
    assert type_ == ("float" if field.type == float | None else getattr(field.type, "__name__", None))
    if field.default is None:
        assert default == "none"
    else:
        assert default == f"`{tomli_w.dumps({'x': field.default}).removeprefix('x = ').strip()}`"
    named = set(re.findall(r"`(\w+)`", meaning))
    assert set(CHOICES.get(key, ())) <= named
    assert meaning.strip(" |")


def test_every_data_set_has_its_row() -> None:
    assert {row[0].strip("`| ") for row in rows("Data sets")} == DATASETS.keys()


def test_every_preset_is_named() -> None:
    named = {name for row in rows("The paper's experiments") for name in re.findall(r"`([\w-]+)`", row[0])}
    assert named == {path.stem for path in Path(ROOT / "src" / "zerofl" / "experiments").glob("*.toml")}
