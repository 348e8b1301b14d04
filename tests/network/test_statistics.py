"""What is read of the layers: statistics of their inputs, against hooks on the network itself."""

import numpy as np
import pytest
import torch
from support.data import tiny_net
from support.networks import Other, built
from support.splits import rand
from torch import nn

from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.linearize import walker
from sklearn_lqf.network.statistics import Statistics
from sklearn_lqf.network.tracing import split_network

F64 = torch.float64
# Shape of an activation, whether its channels come last, the axes of its positions.
CASES = {
    "channels first": ((3, 4, 5, 6), False, (2, 3)),
    "channels last": ((3, 5, 6, 4), True, (1, 2)),
    "tokens": ((3, 7, 4), True, (1,)),
    "sequence": ((3, 4, 7), False, (2,)),
    "vectors": ((3, 4), True, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics(name):
    shape, last, axes = CASES[name]
    x = rand(*shape)
    expected = x.numpy()
    if axes:
        expected = np.concatenate([expected.mean(axes), np.sqrt(expected.var(axes) + 1e-5)], 1)
    np.testing.assert_allclose(Statistics(last)(x), expected, rtol=1e-12)


def inputs_of(net: nn.Module, names: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    """Inputs of some layers, by hooks."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def read(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z.mean((2, 3)), (z.var((2, 3), correction=0) + 1e-5).sqrt()], 1)


@pytest.mark.parametrize("layers", ["head", 1, "all"])
def test_the_inputs_of_layers_are_read(layers):
    net, x = tiny_net().double(), torch.rand(5, 3, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(3))
    net = as_vectors(net, x)
    split = split_network(net, x[:2], layers, read_stages=True)
    # The stem has the resolution and width of the first block and is of its stage; the image itself is not read.
    assert [(p.name, p.size) for p in split.parts] == [
        ("last", 16), ("block1.1 tangents", 8), ("block1.1 deviation", 8), ("block2.1 tangents", 8),
        ("block2.1 deviation", 8),
    ]  # fmt: skip
    assert split.n_features == 48
    expected = torch.cat([net(x), *map(read, inputs_of(net, ["block1.0", "block2.0"], x))], 1)
    torch.testing.assert_close(split.tail(*split.trunk(x)), expected, rtol=1e-10, atol=1e-10)
    assert [p.name for p in split_network(net, x[:2], layers).parts] == ["last"]


def shared():
    """Two layers that read one activation, which changes in place, and vectors behind the positions."""

    def forward(m, x):
        x = m.stem(x)
        x.relu_()
        z = (m.a(x) * m.b(x)).mean((2, 3))
        return m.expand(m.squeeze(z).relu()) + z

    convolutions = {"stem": nn.Conv2d(3, 4, 3), "a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(4, 6, 3)}
    return Other(forward, **convolutions, squeeze=nn.Linear(6, 2), expand=nn.Linear(2, 6))


def test_an_input_is_read_once_and_vectors_have_no_deviation():
    net, x = built(shared).double().eval(), rand(3, 3, 8, 8)
    split = split_network(net, x, "all", read_stages=True)
    sizes = [(p.name.rpartition(" ")[2], p.size) for p in split.parts]
    assert sizes == [("last", 6), ("tangents", 4), ("deviation", 4), ("tangents", 6), ("tangents", 2)]
    maps, squeezed, expanded = inputs_of(net, ["a", "squeeze", "expand"], x)
    expected = torch.cat([net(x), read(maps), squeezed, expanded], 1)
    torch.testing.assert_close(split.tail(*split.trunk(x)), expected, rtol=1e-10, atol=1e-10)


def test_a_network_that_does_not_trace():
    """A branch, which must evaluate the same layers for all images, and an input that changes in place."""

    def forward(m, x):
        z = m.stem(x)
        z += m.a(z)
        return m.b(z.relu()).mean((2, 3)) if x.sum() > 0 else z.mean((2, 3))

    layers = {"stem": nn.Conv2d(3, 4, 3), "a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}
    net, x = built(lambda: Other(forward, **layers)).double().eval(), rand(3, 3, 8, 8).abs()
    with pytest.warns(UserWarning, match="cannot be traced"):
        split = split_network(net, x, "head", read_stages=True)
    tail, _ = walker(split)
    with torch.no_grad():
        inputs = net.stem(x)
        expected = torch.cat([net(x), read(inputs), read((inputs + net.a(inputs)).relu())], 1)
        torch.testing.assert_close(tail.primal([x])[0], expected)
        with pytest.raises(ValueError, match=r"layers \['b'\] for some images only"):
            tail.primal([-x])
