"""SWAT (§3.1): layers that train on their top-k weights and activations, and the kernels that make it fast."""
