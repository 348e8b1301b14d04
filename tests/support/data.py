"""Small images and networks for tests of the estimator."""

import numpy as np
import torch
from torch import nn


class TinyNet(nn.Module):
    """A convolutional classifier with BatchNorm, a depthwise layer and a skip connection."""

    def __init__(self, channels: int = 3, width: int = 8, n_classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU6())
        self.block2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.fc = nn.Linear(2 * width, n_classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block1(x)
        return self.fc(self.block2(x).mean((2, 3)))


def tiny_net(seed: int = 0, **options) -> TinyNet:
    """A TinyNet in evaluation mode with statistics that are not trivial; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TinyNet(**options)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 2.0)
    return net.eval()


def make_images(n: int = 24, size: int = 12, n_classes: int = 3, seed: int = 0):
    """uint8 images (n, size, size, 3) whose class is a bright corner, and labels as strings."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_classes
    X = rng.integers(0, 120, (n, size, size, 3))
    half = size // 2
    corners = [(0, 0), (0, half), (half, 0), (half, half)]
    for i, k in enumerate(codes):
        a, b = corners[k % 4]
        X[i, a : a + half, b : b + half, k % 3] += 130
    return X.astype(np.uint8), np.array(["ant", "bee", "cow", "dog"])[codes % 4]


def merged(*parts: dict) -> dict:
    """Parameters of an estimator, of which the later win; items of ``execution`` are put together, too."""
    found: dict = {}
    for part in parts:
        items = {**found.get("execution", {}), **part.get("execution", {})}
        found |= part
        if items:
            found["execution"] = items
    return found
