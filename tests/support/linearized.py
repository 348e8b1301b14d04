"""Linearized networks on a random head, and what their products must be."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from sklearn_lqf.network.linearize import LinearizedNetwork
from sklearn_lqf.network.rewrite import plain_attention
from sklearn_lqf.network.tracing import split_network

from .oracle import jacobian
from .splits import rand
from .splits import randomized as randomized_by

OUTPUTS = 3
IMAGES = rand(3, 3, 8, 8, seed=5)
VECTORS = rand(3, 5, seed=6)
TOKENS = rand(3, 4, 6, seed=7)


def randomized(module, seed=0):
    return randomized_by(module, seed, by_fan=True)


def pooled(*layers):
    return randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def linearized(features, x, tangent_layers="all", negative_slope=0.0, traced=True):
    """The package's network on a random head, and its trunk activations of ``x``."""
    untraced = pytest.warns(UserWarning, match=r"cannot be traced by torch\.fx")
    with contextlib.nullcontext() if traced else untraced:
        split = split_network(features, x[:2], tangent_layers, negative_slope)
    network = LinearizedNetwork(split, rand(OUTPUTS, split.n_features, seed=1), rand(OUTPUTS, seed=2))
    return network, split.trunk(x)


def dense_jacobian(features, x, network, rename=None):
    """Jacobian (n, C, P) of a network and its head, in the order of the package's flat vector.

    ``rename``: the parameters of the network by the names that they have in the package's.
    """
    names = [(rename or {}).get(name, name) for name in network.names]
    # Fused kernels of attention cannot be differentiated by all outputs at once.
    with plain_attention(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return jacobian(features, names, network.weight, network.bias, x.clone())


def assert_close(actual, expected, tolerance=1e-10):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def check(features, x, *, expected=None, rename=None, jacobians=(), **options):
    """Products of a network agree with those of the oracle on ``expected``, by default the same network.

    So do, of the parameters named in ``jacobians``, the Jacobians of each image. Maps may lie in memory with the
    channels last, too.
    """
    network, activations = linearized(features, x, **options)
    expected = features if expected is None else expected
    j = dense_jacobian(expected, x, network, rename)
    before, point = [z.clone() for z in activations], network.at(activations)
    assert_close(point.outputs, expected(x.clone()).detach() @ network.weight.mT + network.bias)
    d, u = rand(network.n_parameters, seed=3), rand(len(x), OUTPUTS, seed=4)
    tangent, gradient = j @ d, torch.einsum("nc,ncp->p", u, j)
    assert float(tangent.abs().max()) > 1e-3  # there is something to compare
    for _ in range(2):  # products leave the evaluation as it is
        assert_close(point.jvp(d), tangent)
        assert_close(point.vjp(u), gradient)
    assert_close(network.at(activations, gradients=False).jvp(d), tangent)
    last = [z.contiguous(memory_format=torch.channels_last) if z.ndim == 4 else z for z in activations]
    assert_close(network.at(last).jvp(d), tangent)
    assert_close(network.at(last).vjp(u), gradient)
    found = network.sample_jacobians(activations, jacobians) if jacobians else {}
    assert set(found) == set(jacobians)
    for name, one in found.items():
        assert not one.requires_grad
        assert_close(one.flatten(2), j[:, :, network.slices[name]])
    assert all(map(torch.equal, activations, before))
    return network
