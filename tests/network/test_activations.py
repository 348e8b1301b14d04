"""Activations: their derivatives, and their leaky forms, however they are written."""

import pytest
import torch
import torch.nn.functional as F
from support.linearized import IMAGES, VECTORS, check, randomized
from support.networks import Other
from support.splits import SLOPE
from torch import nn

from sklearn_lqf.network.tracing import split_network


def spread(activation):
    """A network whose activation sees values on all its pieces, at the same weights for all activations."""
    channels = 2 if isinstance(activation, nn.GLU) else 4
    layers = {"first": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(channels, 5, 3)}
    net = Other(lambda m, x: m.last(m.activation(m.first(x))).flatten(1), **layers)
    net.activation = activation
    net = randomized(net)
    net.first.weight.data *= 6
    return net


# name: (activation, low, high, slope of the leak relative to negative_slope)
INFINITY = float("inf")
PIECEWISE = {
    "ReLU": (nn.ReLU(), 0, INFINITY, 1),
    "F.relu": (lambda x: F.relu(input=x), 0, INFINITY, 1),
    "torch.relu": (torch.relu, 0, INFINITY, 1),
    "relu": (lambda x: x.relu(), 0, INFINITY, 1),
    "ReLU6": (nn.ReLU6(), 0, 6, 1),
    "F.relu6": (lambda x: F.relu6(x, inplace=True), 0, 6, 1),
    "Hardtanh": (nn.Hardtanh(-2, 3), -2, 3, 1),
    "F.hardtanh": (lambda x: F.hardtanh(x, -2, max_val=3), -2, 3, 1),
    "Hardswish": (nn.Hardswish(), -3, INFINITY, 1),
    "F.hardswish": (lambda x: F.hardswish(x, True), -3, INFINITY, 1),
    "Hardsigmoid": (nn.Hardsigmoid(), -3, 3, 1 / 6),
    "F.hardsigmoid": (F.hardsigmoid, -3, 3, 1 / 6),
}


@pytest.mark.parametrize(("activation", "low", "high", "gain"), PIECEWISE.values(), ids=PIECEWISE)
def test_leaky_activation(activation, low, high, gain):
    formula = spread(lambda x: activation(x.clone()) + SLOPE * gain * (x - x.clamp(low, high)))
    check(spread(activation), IMAGES, expected=formula, negative_slope=SLOPE)
    assert split_network(spread(activation), IMAGES, "all", SLOPE).swapped == 1


SMOOTH = {
    "F.silu": F.silu, "F.gelu": F.gelu, "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.elu": lambda x: F.elu(x, 2.0, True), "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
    "torch.sigmoid": torch.sigmoid, "F.sigmoid": F.sigmoid, "torch.tanh": torch.tanh, "tanh_": lambda x: x.tanh_(),
    "PReLU": nn.PReLU(4), "Softmax": nn.Softmax(1), "GLU": nn.GLU(1),
}  # fmt: skip
STAY = {name: (activation, SLOPE) for name, activation in SMOOTH.items()}
STAY |= {
    f"{name}, slope 0": (activation, 0.0)
    for name, (activation, *_) in PIECEWISE.items()
    if isinstance(activation, nn.Module)
}


@pytest.mark.parametrize(("activation", "slope"), STAY.values(), ids=STAY)
def test_other_activations_stay(activation, slope):
    net = spread(activation)
    check(net, IMAGES, negative_slope=slope)
    assert split_network(net, IMAGES, "all", slope).swapped == 0


def test_each_call_is_counted():
    def forward(m, x):
        return F.relu(m.other(m.act(m.layer(m.act(x))))) + torch.relu(x)

    net = Other(forward, act=nn.ReLU(), other=nn.ReLU6(), unused=nn.ReLU(), layer=nn.Linear(5, 5))
    assert split_network(randomized(net), VECTORS, "all", SLOPE).swapped == 5
