"""The notebook examples/tour, run from top to bottom: simulated, drawn, and through a real SuperLink."""

import re
import subprocess
import sys
from pathlib import Path

from tests.documents.reading import ROOT


def test_the_tour_ends_in_a_deployed_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "tour" / "tour.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = re.findall(r"^(\w[^:\n]*): (\S+)% (?:for (\S+) MB up|in \S+ s)$", done.stdout, re.MULTILINE)
    found = {name: (float(accuracy), float(megabytes or 0)) for name, accuracy, megabytes in printed}
    assert len(found) == 7, done.stdout
    assert all(accuracy > 50 for accuracy, _ in found.values()), found  # of eight states
    full, least, more = (found[f"simulated, {name}"] for name in ("full", "diff, 0.0", "diff, 0.1"))
    assert full[1] > 3 * more[1] > 3 * least[1] > 0
    # Two nodes and two rounds: a tenth of what ten clients sent in four.
    assert 0.085 < found["deployed"][1] / more[1] < 0.115
    assert Path(done.stdout.partition("drawn: ")[2].partition("\n")[0]).is_file()
