"""The tutorial, played: its Python in one session, its commands, and its file, in the page's order."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.documents.reading import ROOT, fenced, summary_of
from zerofl.cli import main

PAGE = ROOT / "docs" / "tutorial.md"


def test_the_tutorial_ends_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    played = []
    for language, block in fenced(PAGE):
        if language == "python":
            exec(block, session)
        elif language == "toml":
            assert "Save this as `tutorial.toml`" in PAGE.read_text(encoding="utf-8")
            (tmp_path / "tutorial.toml").write_text(block)
        elif language == "sh":
            for command in block.splitlines():
                program, *words = shlex.split(command)
                assert program == "zerofl"
                assert main(words) == 0, command
        played.append(language)
    assert set(played) == {"python", "toml", "sh"}

    assert session["sparse_layers"] == ["3", "7"]  # the first convolution and the last linear layer stay dense
    assert min(session["dense_accuracy"], session["sparse_accuracy"]) > 0.8
    assert min(session["federated_accuracy"], session["final_accuracy"]) > 0.5
    dense_bytes = session["schema"].dense_bytes
    assert len(session["payload"]) < dense_bytes / 3
    assert all(0 < size < 5 * dense_bytes / 3 for size in session["strategy"].uplink_bytes.values())
    assert session["strategy"].uplink_bytes.keys() == {1, 2, 3}
    runs = {name: summary_of(tmp_path / "runs" / "tutorial" / name) for name in ("vanilla-swat", "zerofl")}
    assert runs["zerofl"]["uplink_bytes"] < runs["vanilla-swat"]["uplink_bytes"] / 2.5
    assert session["baked_accuracy"] == pytest.approx(session["final_accuracy"], abs=0.01)
    assert (tmp_path / "tutorial.html").is_file()
