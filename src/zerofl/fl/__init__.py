"""Algorithm 1 without a framework: what a client does, what the server does."""
