"""Names under which modules were known before, among them those in pickled models."""

import pickle
import sys
import warnings
from importlib import import_module

import pytest
import torch
from torch import nn

import zerofl
from tests.conftest import needs_kernels
from zerofl import sparsify_
from zerofl.sparse import layers, layout

MOVED = sorted(zerofl._MOVED.items())


@pytest.fixture(autouse=True)
def _not_imported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _ in MOVED:
        for module in [m for m in sys.modules if f"{m}.".startswith(f"zerofl.{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.delitem(vars(zerofl), name, raising=False)


@pytest.mark.parametrize(("before", "now"), MOVED)
def test_a_former_module_gives_what_the_new_one_has_and_says_where_it_is(before: str, now: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"^zerofl.{before} is zerofl.{now} now$"):
        module = __import__(f"zerofl.{before}", fromlist=["x"])
    assert module is __import__(f"zerofl.{now}", fromlist=["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert __import__(f"zerofl.{before}", fromlist=["x"]) is module


@pytest.mark.parametrize("inside", ["entropy", "payload", "reader", "schema", "values"])
def test_a_module_in_a_former_package_is_not_there_twice(inside: str) -> None:
    """Else an `except` of its error would miss the one that is raised."""
    with pytest.warns(DeprecationWarning, match=rf"^zerofl\.wire\.{inside} is zerofl\.exchange\.wire\.{inside} now$"):
        module = import_module(f"zerofl.wire.{inside}")
    assert module is import_module(f"zerofl.exchange.wire.{inside}")


def test_what_a_former_package_never_had_is_missing() -> None:
    moved = pytest.warns(DeprecationWarning, match="zerofl.wire is")
    with moved, pytest.raises(ModuleNotFoundError, match="zerofl.exchange.wire.nothing"):
        import_module("zerofl.wire.nothing")


@pytest.mark.parametrize("documented", ["default_layers", "overlap", "paper_bytes", "topk", "uplink", "wire"])
def test_what_the_documents_named_is_found(documented: str) -> None:
    assert documented in dict(MOVED)


def test_it_is_an_attribute_too() -> None:
    with pytest.warns(DeprecationWarning, match="zerofl.sparse.sparsify now"):
        assert zerofl.layers.sparsify_ is sparsify_
    with pytest.raises(AttributeError, match="^module 'zerofl' has no attribute 'layer'$"):
        zerofl.layer  # noqa: B018


@needs_kernels
def test_a_model_that_was_pickled_before_is_loaded() -> None:
    """As 0.1.0 wrote it: its classes were in zerofl.layers and zerofl.innermost."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    sparsify_(model, 0.5, layers=["2"])
    classes = {layers.SparseConv2d: "zerofl.layers", layout.Conv2d: "zerofl.innermost"}
    assert classes.keys() <= {type(module) for module in model}
    pickled = pickle.dumps(model, protocol=0)
    for now, before in (("zerofl.sparse.layers", "zerofl.layers"), ("zerofl.sparse.layout", "zerofl.innermost")):
        assert f"c{now}\n".encode() in pickled
        pickled = pickled.replace(f"c{now}\n".encode(), f"c{before}\n".encode())
    expected = model(torch.arange(3 * 36.0).view(1, 3, 6, 6).sin())
    with pytest.warns(DeprecationWarning, match="zerofl.layers is zerofl.sparse.sparsify now"):
        loaded = pickle.loads(pickled)
    assert [type(module) for module in loaded] == [type(module) for module in model]
    assert torch.equal(loaded(torch.arange(3 * 36.0).view(1, 3, 6, 6).sin()), expected)
