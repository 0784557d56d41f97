"""A finished sweep."""

from pathlib import Path

import pytest

from tests.report.sweeps import write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep")
