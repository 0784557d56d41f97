"""ZeroFL (Qiu et al., ICLR 2022): federated learning with sparse local training and sparse uplinks."""

from importlib.metadata import version

from zerofl.extras import DISTRIBUTION
from zerofl.layers import SparseConv2d, SparseLinear, bake_, densify_, realised_sparsity, sparsify_
from zerofl.load import load_model

__all__ = ["SparseConv2d", "SparseLinear", "bake_", "densify_", "load_model", "realised_sparsity", "sparsify_"]
__version__ = version(DISTRIBUTION)
