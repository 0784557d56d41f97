"""ZeroFL (Qiu et al., ICLR 2022): federated learning with sparse local training and sparse uplinks."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerofl.run.load import load_model
    from zerofl.sparse.layers import SparseConv2d, SparseLinear
    from zerofl.sparse.sgd import SparseSGD
    from zerofl.sparse.sparsify import bake_, densify_, realised_sparsity, sparsify_

__version__ = "0.1.0"

__all__ = [
    "SparseConv2d",
    "SparseLinear",
    "SparseSGD",
    "bake_",
    "densify_",
    "load_model",
    "realised_sparsity",
    "sparsify_",
]

_MOVED = {
    "aggregate": "exchange.aggregate",
    "innermost": "sparse.layout",
    "layers": "sparse.sparsify",
    "native": "sparse.kernels",
    "paper_bytes": "report.paper_bytes",
    "results": "run.folder",
    "swat": "sparse.swat",
    "topk": "sparse.topk",
    "train": "fl.train",
    "uplink": "exchange.uplink",
    "wire": "exchange.wire",
}
"""Modules of version 0.1.0 and where they are now; pickled models name some of them."""


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: PyTorch takes seconds, and `zerofl --help` does without."""
    if name in __all__:
        place = {"load_model": "run.load", "SparseSGD": "sparse.sgd"}.get(name, "sparse.sparsify")
        return getattr(import_module(f"zerofl.{place}"), name)
    if name in _MOVED:
        return import_module(f"zerofl.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Moved(Loader):
    """Imports a module by its former name, with a DeprecationWarning: it gives what the one in its place has."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, _Moved()) if package == __name__ and module in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python: an empty one."""

    def exec_module(self, module: ModuleType) -> None:
        now = import_module(f"{__name__}.{_MOVED[module.__name__.rpartition('.')[2]]}")
        warnings.warn(f"{module.__name__} is {now.__name__} now", DeprecationWarning, stacklevel=2)
        module.__dict__["__getattr__"] = now.__getattribute__
        module.__doc__ = now.__doc__


sys.meta_path.append(_Moved)
