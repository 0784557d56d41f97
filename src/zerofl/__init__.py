"""ZeroFL (Qiu et al., ICLR 2022): federated learning with sparse local training and sparse uplinks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerofl.layers import SparseConv2d, SparseLinear, bake_, densify_, realised_sparsity, sparsify_
    from zerofl.load import load_model

__all__ = ["SparseConv2d", "SparseLinear", "bake_", "densify_", "load_model", "realised_sparsity", "sparsify_"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: PyTorch takes seconds, and `zerofl --help` does without."""
    if name in __all__:
        return getattr(import_module("zerofl.load" if name == "load_model" else "zerofl.layers"), name)
    if name == "__version__":
        from importlib.metadata import version

        from zerofl.extras import DISTRIBUTION

        return version(DISTRIBUTION)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
