"""Small networks for tests of what loads them."""

import torch
import torchvision
from torch import nn

from sklearn_lqf.backbones.preprocessing import Preprocessing

SMALL = "squeezenet1_1"  # the smallest of torchvision; its head is a 1x1 convolution
IMAGENET = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


class Net(nn.Module):
    """Convolution, normalization and a head, with something of each kind that a copy may lose."""

    def __init__(self, classes: int = 5, channels: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def built(make, seed=1):
    """A network made without moving the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def assert_same_state(module, other):
    a, b = module.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def saved(state, path):
    torch.save(state, path)
    return path


class Other(nn.Module):
    """A network of these modules, by a function of it and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, m in modules.items():
            self.add_module(name, m)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def uninitialized(name, **options):
    """A network of torchvision with small uniform weights: its own initial values take long to draw."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, **options)
    net = net.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.data.fill_(1)
    for p in net.parameters():
        if p.ndim > 1:
            scale = (3 / p[0].numel()) ** 0.5
            p.data.uniform_(-scale, scale, generator=generator)
    return net
