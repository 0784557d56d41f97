"""What `zerofl bench` measures: one module a command."""
