"""The API reference has every public name, and no other."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import zerofl
import zerofl.data
import zerofl.exchange.wire
import zerofl.flower

PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))

# What is public: of each module the names that users and extensions need. All else is internal.
PUBLIC = {
    "zerofl": tuple(zerofl.__all__),
    "zerofl.flower": tuple(zerofl.flower.__all__),
    "zerofl.flower.engines": ("InProcessGrid",),
    "zerofl.experiment": ("Experiment", "ExperimentError", "make_experiment"),
    "zerofl.run.evaluate": ("Evaluation", "evaluate_run"),
    "zerofl.report.paper_bytes": ("PAPER_MB", "paper_csr_bytes", "paper_full_bytes"),
    "zerofl.exchange.uplink": ("UPLINKS", "Uplink", "make_update"),
    "zerofl.exchange.update": ("Sparse", "State", "Update"),
    "zerofl.exchange.wire": tuple(zerofl.exchange.wire.__all__),
    "zerofl.exchange.aggregate": ("ServerOptimizer", "average", "fedadam", "fedavg", "fedavgm", "nonzero_ratio"),
    "zerofl.exchange.robust": ("Clip", "clipped", "trimmed_mean"),
    "zerofl.exchange.rounded": ("put_back", "rounding"),
    "zerofl.data": tuple(zerofl.data.__all__),
    "zerofl.data.partition": ("lda_partition", "validation_split"),
    "zerofl.data.flwr_partitioner": ("LdaPartitioner",),
    "zerofl.models": ("LeafCNN", "ResNet18", "build_model"),
    "zerofl.fl.client": ("train_client",),
    "zerofl.fl.records": ("ClientRecord", "RoundRecord"),
    "zerofl.fl.server": ("Failure", "RoundError", "ServerState", "initial_state", "step", "test_model"),
    "zerofl.fl.train": ("empty_model", "evaluate", "initial_model", "learning_rate", "train"),
    "zerofl.rng": ("cohort", "rng"),
}
NAMES = sorted((module, name) for module, names in PUBLIC.items() for name in names)


def documented(pages: list[Path]) -> list[str]:
    """The names that pages have entries of, as `::: zerofl.sparsify_` makes them."""
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def test_the_reference_has_every_public_name_once_and_no_other() -> None:
    assert sorted(documented(PAGES)) == sorted(f"{module}.{name}" for module, name in NAMES)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_has_a_docstring(module: str, name: str) -> None:
    given = getattr(import_module(module), name)
    text = inspect.getdoc(given) if inspect.isclass(given) or inspect.isroutine(given) else constant_text(module, name)
    assert text
    assert not text.startswith(f"{name}("), "the signature that dataclasses and tuples give themselves"


def constant_text(module: str, name: str) -> str | None:
    """The string below a constant where it is assigned, in the module or in the one it comes from."""
    body = ast.parse(Path(str(import_module(module).__file__)).read_text(encoding="utf-8")).body
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ImportFrom) and name in [alias.name for alias in statement.names]:
            return constant_text(str(statement.module), name)
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if name in [target.id for target in targets if isinstance(target, ast.Name)]:
                text = below.value if isinstance(below, ast.Expr) else None
                return text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None
    raise AssertionError(f"{module} has no {name}")
