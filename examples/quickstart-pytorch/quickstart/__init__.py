"""A PyTorch app for Flower: a small network learns MNIST's digits on ten clients."""
