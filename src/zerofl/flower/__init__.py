"""ZeroFL on Flower: its apps, their engines, and its uplink for other people's apps. Only this package imports flwr."""

import os

# Read by flwr when it is imported. A run sends nothing to anybody but its own clients unless the user asks for it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns that it will stop hiding GPUs from workers that ask for none; with 0 it has stopped, and is quiet.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from zerofl.flower.adopt_client import uplink_mod
from zerofl.flower.adopt_server import SparseUplink

__all__ = ["SparseUplink", "uplink_mod"]
