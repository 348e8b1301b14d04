"""Leaky forms of activations, however they are written."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import Other
from support.splits import EXAMPLE, IMAGES, SLOPE, VECTORS, randomized
from torch import nn

from sklearn_lqf.network.tracing import split_network


def activated(function):
    """A network of an activation and the parameter before it."""
    net = Other(lambda m, x: m.activation(x * m.scale.weight.sum()).flatten(1), scale=nn.Linear(1, 1))
    net.activation = function
    return net


# name: (activation, low, high, slope of the leak relative to negative_slope)
INFINITY = float("inf")
PIECEWISE = {
    "ReLU": (nn.ReLU(), 0, INFINITY, 1),
    "ReLU in place": (nn.ReLU(inplace=True), 0, INFINITY, 1),
    "F.relu": (F.relu, 0, INFINITY, 1),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), 0, INFINITY, 1),
    "F.relu positional": (lambda x: F.relu(x, True), 0, INFINITY, 1),
    "F.relu by keyword": (lambda x: F.relu(input=x), 0, INFINITY, 1),
    "F.relu_": (F.relu_, 0, INFINITY, 1),
    "torch.relu": (torch.relu, 0, INFINITY, 1),
    "torch.relu_": (torch.relu_, 0, INFINITY, 1),
    "relu": (lambda x: x.relu(), 0, INFINITY, 1),
    "relu_": (lambda x: x.relu_(), 0, INFINITY, 1),
    "ReLU6": (nn.ReLU6(), 0, 6, 1),
    "F.relu6": (F.relu6, 0, 6, 1),
    "F.relu6 in place": (lambda x: F.relu6(x, inplace=True), 0, 6, 1),
    "Hardtanh": (nn.Hardtanh(-2, 3), -2, 3, 1),
    "F.hardtanh": (lambda x: F.hardtanh(x, -2, max_val=3), -2, 3, 1),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, -2, 3), -2, 3, 1),
    "Hardswish": (nn.Hardswish(), -3, INFINITY, 1),
    "F.hardswish": (lambda x: F.hardswish(x, True), -3, INFINITY, 1),
    "Hardsigmoid": (nn.Hardsigmoid(), -3, 3, 1 / 6),
    "F.hardsigmoid": (F.hardsigmoid, -3, 3, 1 / 6),
}


@pytest.mark.parametrize(("activation", "low", "high", "gain"), PIECEWISE.values(), ids=PIECEWISE)
def test_leaky_activation(activation, low, high, gain):
    net = activated(activation).double().eval()
    net.scale.weight.data.fill_(1.0)
    x = torch.linspace(-10, 10, 402, dtype=torch.float64).view(2, -1)  # no point lies at a kink
    original = net(x).detach()
    split = split_network(net, x, "all", SLOPE)
    assert split.traced
    assert split.swapped == 1

    def function(z):
        return split.tail(*split.trunk(z))

    y, slope = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    _, original_slope = torch.func.jvp(lambda z: net(z * 1), (x,), (torch.ones_like(x),))
    below, above = x < low, x > high
    inside = ~below & ~above
    torch.testing.assert_close(y[inside], original[inside], rtol=0, atol=1e-14)
    torch.testing.assert_close(slope[inside], original_slope[inside], rtol=0, atol=1e-14)
    for part, edge in ((below, low), (above, high)):
        flat = original_slope[part]
        torch.testing.assert_close(flat, torch.zeros_like(flat))
        torch.testing.assert_close(slope[part], torch.full_like(flat, SLOPE * gain))
        leak = SLOPE * gain * (x[part] - edge) if part.any() else flat
        torch.testing.assert_close(y[part], original[part] + leak)


SMOOTH = {
    "F.silu": F.silu, "F.gelu": F.gelu, "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "F.elu": F.elu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.3), "torch.sigmoid": torch.sigmoid, "sigmoid": lambda x: x.sigmoid(),
    "F.sigmoid": F.sigmoid, "torch.tanh": torch.tanh, "tanh_": lambda x: x.tanh_(), "F.tanh": F.tanh,
    "SiLU": nn.SiLU(), "F.elu alpha": lambda x: F.elu(x, 2.0, True),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
}  # fmt: skip
STAY = {name: (activation, SLOPE) for name, activation in SMOOTH.items()}
STAY |= {f"{name}, slope 0": (PIECEWISE[name][0], 0.0) for name in ("ReLU", "F.relu", "ReLU6", "Hardswish")}


@pytest.mark.parametrize(("activation", "slope"), STAY.values(), ids=STAY)
def test_other_activations_stay(activation, slope):
    net = randomized(activated(activation))
    split = split_network(net, EXAMPLE, "all", slope)
    assert split.swapped == 0
    torch.testing.assert_close(split.tail(IMAGES), net(IMAGES.clone()), rtol=1e-14, atol=1e-14)


def test_each_call_is_counted():
    def forward(m, x):
        return F.relu(m.other(m.act(m.layer(m.act(x))))) + torch.relu(x)

    net = Other(forward, act=nn.ReLU(), other=nn.ReLU6(), unused=nn.ReLU(), layer=nn.Linear(6, 6))
    assert split_network(randomized(net), VECTORS, "all", SLOPE).swapped == 5
