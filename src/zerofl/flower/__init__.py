"""ZeroFL on Flower: the client and server apps, and the engines that run them. Only this package imports flwr."""

import os

# Read by flwr when it is imported. A run sends nothing to anybody but its own clients unless the user asks for it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
