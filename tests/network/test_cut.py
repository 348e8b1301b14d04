"""The cut between trunk and tail, and the parameters that are linearized."""

import numpy as np
import pytest
import torch
from support.networks import Other
from support.splits import EXAMPLE, IMAGES, VECTORS, chain, randomized, split_checked
from torch import nn

from sklearn_lqf.network.tracing import split_network


def parameters(*layers):
    return [f"{name}.0.{part}" for name in layers for part in ("weight", "bias")]


CUTS = {
    "head": ("head", []),
    "0": (0, []),
    "1": (np.int64(1), parameters("2")),
    "3": (3, parameters("0", "1", "2")),
    "all": ("all", parameters("0", "1", "2")),
    "list": (["1", "2"], parameters("1", "2")),
    "name": ("2", parameters("2")),
    "inside a stage": (["2.0"], parameters("2")),
    "middle": (["1"], parameters("1")),
    "not at the end": (["0"], parameters("0")),
    "without parameters": (["3"], []),
    "nothing": ((), []),
}


@pytest.mark.parametrize(("tangent_layers", "tangent"), CUTS.values(), ids=CUTS)
def test_cut(tangent_layers, tangent):
    split = split_checked(chain(), tangent_layers)
    assert split.tangent == tangent
    assert split.folded == 3
    # What depends on no tangent parameter is in the trunk, and the trunk has no tangent parameter.
    first = tangent[0][0] if tangent else "3"
    assert {n for n, _ in split.trunk.named_parameters()} == {n for n in parameters("0", "1", "2") if n[0] < first}
    (cached,) = split.trunk(IMAGES)
    if not tangent:  # the features
        assert torch.equal(split.tail(cached), cached)
    assert (cached is IMAGES) == (first == "0")


def test_more_stages_than_there_are():
    with pytest.warns(UserWarning, match="takes all parameters of the backbone: it has 3 stages"):
        assert split_network(chain(), EXAMPLE, 8).tangent == parameters("0", "1", "2")


@pytest.mark.parametrize("name", ["3.0", "layer4", "", ".", "1.", "2.0.weight"])
def test_unknown_layers(name):
    with pytest.raises(ValueError, match=r"tangent_layers names .* no module .* Blocks: \['0\.0', "):
        split_network(chain(), EXAMPLE, ["1", name])


@pytest.mark.parametrize("layers", [-1, 1.5, None, True, [1], {"2"}, b"all", {"2": 1}])
def test_malformed_layers(layers):
    with pytest.raises(ValueError, match="tangent_layers must be"):
        split_network(chain(), EXAMPLE, layers)


def test_several_tensors_cross_the_cut():
    """Each layer sees the outputs of all before it."""

    def forward(m, x):
        features = [x]
        for layer in (m.a, m.b, m.c, m.d):
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features[1:], 1).mean((2, 3))

    layers = {name: nn.Conv2d(width, 2, 3, padding=1) for name, width in zip("abcd", (3, 5, 7, 9), strict=True)}
    net = randomized(Other(forward, **layers))
    # The joined input of d, and the three outputs that the result is made of.
    assert sorted(z.shape[1] for z in split_checked(net, ["d"]).trunk(IMAGES)) == [2, 2, 2, 9]
    split_checked(net, ["b"])


NO_ROWS = {
    "patches to the batch": lambda m, h, x: m.last(h.reshape(-1, 64)).view(x.shape[0], -1, 5),
    "number of pixels": lambda m, h, x: m.last(h.flatten(2)) / h.numel(),
}  # fmt: skip


@pytest.mark.parametrize("between", NO_ROWS.values(), ids=NO_ROWS)
def test_cut_where_there_is_no_row_for_each_image(between):
    layers = {"first": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Linear(64, 5)}
    net = randomized(Other(lambda m, x: between(m, m.first(x), x).mean(1), **layers))
    with pytest.raises(ValueError, match="tangent_layers cuts the network"):
        split_network(net, EXAMPLE, ["last"])
    split_network(net, EXAMPLE, "all")


def tied():
    net = Other(lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()), **{name: nn.Linear(6, 6) for name in "abc"})
    net.b.weight = net.a.weight
    return net


def tied_and_folded():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    net[2].weight = net[0].weight
    return net


TIED = [(tied, VECTORS, "all"), (tied, VECTORS, ["b", "c"]), (tied, VECTORS, ["a"]), (tied_and_folded, EXAMPLE, "all")]


@pytest.mark.parametrize(("make", "x", "tangent_layers"), TIED)
def test_tied_weights_are_refused(make, x, tangent_layers):
    with pytest.raises(ValueError, match=r"'[a0]\.weight' and '[b2]\.weight' are tied"):
        split_network(randomized(make()), x, tangent_layers)


def test_tied_weights_in_the_trunk():
    assert split_checked(randomized(tied()), ["c"], x=VECTORS).tangent == ["c.weight", "c.bias"]


@pytest.mark.parametrize("tangent_layers", ["all", ["chain", "last"], ["layer", "last"]])
def test_one_module_under_two_names_is_no_tied_weight(tangent_layers):
    net = Other(lambda m, x: m.last(m.chain(x)), layer=nn.Linear(6, 6), last=nn.Linear(6, 4))
    net.chain = nn.Sequential(net.layer, nn.Tanh())
    split = split_checked(randomized(net), tangent_layers, x=VECTORS)
    assert split.tangent == ["layer.weight", "layer.bias", "last.weight", "last.bias"]
