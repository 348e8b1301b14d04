"""What the head reads: the statistics of stages, their derivative, and the standardization of the parts."""

import numpy as np
import pytest
import torch
from images import tiny_net
from torch import nn
from torch.func import functional_call, jacrev, jvp

from sklearn_lqf.graph import remove_head, split_network
from sklearn_lqf.linearize import LinearizedNetwork
from sklearn_lqf.readout import Statistics, add_readout, fit_standardization

F64 = torch.float64
CASES = {
    "channels first": ((3, 4, 5, 6), (2, 3)),
    "channels last": ((3, 5, 5, 4), (1, 2)),
    "tokens": ((3, 7, 4), (1,)),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_statistics_and_their_tangent(name, mean):
    shape, axes = CASES[name]
    x, x_dot = rand(*shape), rand(*shape, seed=1)
    module = Statistics(axes, mean)
    values = x.numpy()
    expected = [values.mean(axes), np.sqrt(values.var(axes) + 1e-5)][0 if mean else 1 :]
    np.testing.assert_allclose(module(x), np.concatenate(expected, 1), rtol=1e-12)
    y, y_dot = jvp(module, (x,), (x_dot,))
    torch.testing.assert_close(module.tangent(x, y, x_dot), y_dot, rtol=1e-12, atol=1e-12)


def test_constant_channel_has_a_finite_derivative():
    x = torch.ones(2, 3, 4, 4, dtype=F64)
    module = Statistics((2, 3))
    assert bool(torch.isfinite(module.tangent(x, module(x), rand(2, 3, 4, 4))).all())


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, torch.Tensor]:
    net = tiny_net().double()
    x = torch.rand(5, 3, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(3))
    remove_head(net, x)
    return net, x


def expected_readout(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """By the network's own modules, without the package.

    The stem has the resolution and the width of the first block and makes one stage with it; what is read is the
    output of the last module that has parameters.
    """
    stem = net.stem(x)
    block1, block2 = net.block1[:2](stem), net.block2[:2](stem + net.block1(stem))
    parts = [net(x)]
    for z in (block1, block2):
        parts += [z.mean((2, 3)), (z.var((2, 3), correction=0) + 1e-5).sqrt()]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("layers", ["head", 1, "all"])
def test_split_network_reads_the_stages(network, layers):
    net, x = network
    split = split_network(net, x[:2], layers, read_stages=True)
    assert split.parts == [16, 16, 32]
    assert split.n_features == 64
    torch.testing.assert_close(split.tail(*split.trunk(x)), expected_readout(net, x), rtol=1e-10, atol=1e-10)


def test_jacobian_goes_through_the_readout_and_its_units(network):
    net, x = network
    split = split_network(net, x[:2], 1, read_stages=True)
    features = split.tail(*split.trunk(x)).detach()
    standardization = fit_standardization(features, torch.ones(len(x)), split.parts)
    model = LinearizedNetwork(split, rand(3, 64), rand(3), standardization)
    model.tail_scale = 0.3
    point = model.at(split.trunk(x))
    torch.testing.assert_close(
        point.outputs, (features - standardization.shift) / standardization.scale @ model.weight.T + model.bias
    )
    direction = rand(model.n_parameters, seed=4)
    parameters = {n: p.detach() for n, p in split.tail.named_parameters() if n in split.tangent}

    def outputs(body, w, b):
        z = functional_call(split.tail, body, tuple(split.trunk(x)))
        return ((z - standardization.shift) / standardization.scale) @ w.T + b

    body, w, b = model.views(direction)
    dots = ({n: 0.3 * body[n] for n in parameters}, w, b)
    expected = jvp(outputs, (parameters, model.weight, model.bias), dots)[1]
    torch.testing.assert_close(point.jvp(direction), expected, rtol=1e-10, atol=1e-10)
    u = rand(len(x), 3, seed=5)
    torch.testing.assert_close((point.vjp(u) * direction).sum(), (u * expected).sum(), rtol=1e-10, atol=1e-10)
    found = model.sample_jacobians(split.trunk(x), model.names)
    dense = jacrev(outputs)(parameters, model.weight, model.bias)
    for name in model.names:
        torch.testing.assert_close(found[name], 0.3 * dense[name], rtol=1e-9, atol=1e-10)


def test_too_many_statistics_are_thinned_out_evenly(network, monkeypatch):
    net, x = network
    monkeypatch.setattr("sklearn_lqf.readout._FEATURES_MAX", 50)
    split = split_network(net, x[:2], "all", read_stages=True)
    assert split.parts == [16, 32]  # the last stage stays
    monkeypatch.setattr("sklearn_lqf.readout._FEATURES_MAX", 20)
    split = split_network(net, x[:2], "all", read_stages=True)
    assert split.parts == [16]
    torch.testing.assert_close(split.tail(*split.trunk(x)), net(x), rtol=1e-10, atol=1e-10)


def test_vectors_have_no_positions():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    *_, relu, output = graph.graph.nodes
    value = rand(2, 4)
    assert add_readout(graph, [relu], {relu: value, output: value}, value) == [4]


def test_standardization_is_weighted_and_scales_parts():
    x, s = (
        rand(7, 5) * torch.tensor([1.0, 2, 3, 4, 0], dtype=F64) + 10,
        torch.tensor([1.0, 2, 1, 1, 3, 1, 1], dtype=F64),
    )
    found = fit_standardization(x, s, [2, 2, 1])
    repeated = fit_standardization(x.repeat_interleave(s.long(), 0), torch.ones(10, dtype=F64), [2, 2, 1])
    torch.testing.assert_close(found.scale, repeated.scale)
    torch.testing.assert_close(found.shift, repeated.shift)
    z = found(x)
    weights = s / s.sum()
    torch.testing.assert_close(weights @ z, torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)
    for part in (z[:, :2], z[:, 2:4]):
        assert float(weights @ part.square().sum(1)) == pytest.approx(1)
    assert float(found.scale[4]) == 1  # a constant part is left alone


def test_means_that_the_features_already_hold_are_not_read_twice():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    x = rand(3, 3, 8, 8)
    assert split_network(net, x, "all", read_stages=True).parts == [6, 8, 6]
