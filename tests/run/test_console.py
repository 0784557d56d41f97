"""What is printed arrives as it is, fits, and never fails."""

import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.printing import Terminal, lines_of
from zerofl.run.console import Output, Table

TABLE = Table(
    ["run", "seed", "test accuracy", "uplink MB", "savings"],
    [["vanilla-swat", "1", "90.1%", "2729.8", "1.2x"], ["zerofl", "12", "9.2%", "143.3", "22.7x"]],
    keys=2,
)


@pytest.mark.parametrize("text", ["runs[a]/b", "x[/b]", "[bold]", ":smile:", "a/" * 200, "résultats", "3 of 'four'"])
def test_text_is_printed_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    file = io.StringIO()
    Output(file).print(text)
    assert file.getvalue() == f"{text}\n"


def test_what_the_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    Output(io.TextIOWrapper(raw, encoding="ascii")).print("é.toml \udcff")
    assert raw.getvalue() == b"\\xe9.toml \\udcff\n"


def test_a_reader_that_has_gone_is_told_of_once_and_costs_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lost: list[OSError] = []
    with os.fdopen(writer, "w") as stream:
        output = Output(stream)
        output.on_lost = lost.append
        output.print("one")
        output.print_table(TABLE)
        stream.write("what is left in a buffer, as of argparse")
    assert [type(error) for error in lost] == [BrokenPipeError]
    Output(None).print("no stream at all")


def test_a_table_in_a_pipe_is_whole_with_a_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    file = io.StringIO()
    Output(file).print_table(TABLE)
    assert file.getvalue().splitlines() == [
        "run           seed  test accuracy  uplink MB  savings",
        "vanilla-swat  1             90.1%     2729.8     1.2x",
        "zerofl        12             9.2%      143.3    22.7x",
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90))
def test_a_narrow_terminal_loses_columns_and_no_letter(width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        terminal = Terminal()
        Output(terminal).print_table(TABLE)
    heading, *rows = lines_of(terminal)
    widths = [max(map(len, column)) for column in zip(TABLE.columns, *TABLE.rows, strict=True)]
    fitting = [n for n in range(1, 6) if sum(widths[:n]) + 2 * (n - 1) <= width]
    shown = max([3, *fitting])  # what a row is, and one figure
    assert " ".join(heading.split()) == " ".join(TABLE.columns[:shown])
    assert [row.split() for row in rows[:2]] == [row[:shown] for row in TABLE.rows]
    more = {0: [], 1: ["(1 more column: widen the terminal, or pipe the output)"]}
    assert rows[2:] == more.get(5 - shown, [f"({5 - shown} more columns: widen the terminal, or pipe the output)"])
