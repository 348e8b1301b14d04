"""The cut between trunk and tail, and the parameters that are linearized."""

import pytest
import torch
from support.needs import needs_sizes_as_arguments
from support.splits import EXAMPLE, IMAGES, VECTORS, chain, randomized, split_checked
from torch import nn

from sklearn_lqf.network.tracing import split_network


def parameters(*layers):
    return [f"{name}.0.{part}" for name in layers for part in ("weight", "bias")]


CUTS = {
    "head": ("head", []),
    "0": (0, []),
    "1": (1, parameters("2")),
    "2": (2, parameters("1", "2")),
    "3": (3, parameters("0", "1", "2")),
    "all": ("all", parameters("0", "1", "2")),
    "list": (["1", "2"], parameters("1", "2")),
    "tuple": (("2",), parameters("2")),
    "name": ("2", parameters("2")),
    "inside a stage": (["2.0"], parameters("2")),
    "middle": (["1"], parameters("1")),
    "not at the end": (["0"], parameters("0")),
    "without parameters": (["3"], []),
}


@pytest.mark.parametrize(("tangent_layers", "tangent"), CUTS.values(), ids=CUTS)
def test_cut(tangent_layers, tangent):
    net = chain()
    split = split_checked(net, tangent_layers)
    assert split.tangent == tangent
    assert split.folded == 3
    # What depends on no tangent parameter is in the trunk, and the trunk has no tangent parameter.
    kept = {n for n, _ in split.trunk.named_parameters()}
    assert not kept & set(tangent)
    first = tangent[0][0] if tangent else "3"
    assert kept == {n for n in parameters("0", "1", "2") if n[0] < first}


def test_integers_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert split_checked(chain(), numpy.int64(1)).tangent == parameters("2")


def test_head_alone_caches_the_features():
    net = chain()
    split = split_checked(net, "head")
    (features,) = split.trunk(IMAGES)
    assert features.shape == (5, 6)
    assert torch.equal(split.tail(features), features)


def test_whole_network_caches_the_input():
    split = split_checked(chain(), "all")
    assert split.trunk(IMAGES)[0] is IMAGES


class Dense(nn.Module):
    """Each layer sees the outputs of all before it: several activations cross a cut."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1)
        self.c, self.d = nn.Conv2d(7, 2, 3, padding=1), nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x):
        features = [x]
        for layer in (self.a, self.b, self.c, self.d):
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features[1:], 1).mean((2, 3))


def test_several_tensors_cross_the_cut():
    split = split_checked(randomized(Dense()), ["d"])
    # The joined input of d, and the three outputs that the result is made of.
    assert sorted(z.shape[1] for z in split.trunk(IMAGES)) == [2, 2, 2, 9]
    split_checked(randomized(Dense()), ["b"])


class Crossing(nn.Module):
    """Two layers and, between them, values of other kinds."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 5), between
        self.token = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("grid", torch.arange(64.0).view(1, 1, 8, 8))

    def forward(self, x):
        return self.between(self, self.first(x), x).mean(1)


BETWEEN = {
    "view": lambda m, h, x: m.last(h.flatten(2)).view(x.size(0), -1, 5),
    "size of a list": lambda m, h, x: m.last(h.reshape(h.shape[0], h.shape[1], -1)).reshape([x.shape[0], 4, 5]),
    "shape": lambda m, h, x: m.last(h.flatten(2)).reshape(h.flatten(2)[..., :5].shape),
    "expand": lambda m, h, x: m.last((h * m.token.expand(x.shape[0], -1, 8, 8)).flatten(2)),
    "constant size": lambda m, h, x: m.last(h.flatten(2)) / h.shape[-1],
    "constant tensor": lambda m, h, x: m.last(h.flatten(2)) * (m.grid.mean() + m.token.flatten(2)),
    "tensor of a size": lambda m, h, x: m.last(h.flatten(2)) + torch.arange(h.shape[1]).view(1, -1, 1),
    "zeros like the batch": lambda m, h, x: m.last(h.flatten(2)) + h.new_zeros(x.shape[0], 1, 5),
    "device": lambda m, h, x: m.last(h.flatten(2)) + torch.ones(5).to(h),
    "dimension": lambda m, h, x: m.last(h.flatten(2)).transpose(1, h.dim() - 2),
}  # fmt: skip


@pytest.mark.parametrize("tangent_layers", [["last"], "all"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_values_that_cross_the_cut(between, tangent_layers):
    if between is BETWEEN["tensor of a size"]:
        needs_sizes_as_arguments()
    split = split_checked(randomized(Crossing(between)), tangent_layers)
    assert split.traced
    assert "last.weight" in split.tangent


def test_sizes_and_devices_are_read_from_the_batch():
    def both(m, h, x):
        return m.last(h.flatten(2)).view(x.size(0), 4, 5).to(x.device, x.dtype)

    split = split_checked(randomized(Crossing(both)), ["last"])
    assert not [n for n in split.tail.graph.nodes if torch.device("cpu") in n.args or 2 in n.args[1:2]]


def test_constants_follow_the_module():
    split = split_checked(randomized(Crossing(BETWEEN["constant tensor"])), ["last"])
    constants = dict(split.tail.named_buffers())
    assert constants
    assert all(b.dtype == torch.float32 for b in split.tail.float().buffers())


NO_ROWS = {
    "images to the second axis": lambda m, h, x: m.last(h.flatten(2).transpose(0, 1)).transpose(0, 1),
    "patches to the batch": lambda m, h, x: m.last(h.reshape(-1, 64)).view(x.shape[0], -1, 5),
    "mean over the batch": lambda m, h, x: m.last(h.flatten(2)) * h.flatten(2).mean((0, 2), True),
    "number of pixels": lambda m, h, x: m.last(h.flatten(2)) / h.numel(),
}  # fmt: skip


@pytest.mark.parametrize("between", NO_ROWS.values(), ids=NO_ROWS)
def test_cut_where_there_is_no_row_for_each_image(between):
    net = randomized(Crossing(between))
    with pytest.raises(ValueError, match="tangent_layers cuts the network"):
        split_network(net, EXAMPLE, ["last"])
    split_network(net, EXAMPLE, "all")


# ------------------------------------------------------------------------------------------------ parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())


@pytest.mark.parametrize("tangent_layers", ["all", ["b", "c"], ["a"]])
def test_tied_weights_are_refused(tangent_layers):
    with pytest.raises(ValueError, match=r"'a\.weight' and 'b\.weight' are tied"):
        split_network(randomized(Tied()), VECTORS, tangent_layers)


def test_tied_weights_in_the_trunk():
    split = split_checked(randomized(Tied()), ["c"], x=VECTORS)
    assert split.tangent == ["c.weight", "c.bias"]


def test_tied_weights_are_seen_before_folding():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="tied"):
        split_network(randomized(net), EXAMPLE, "all")


class Aliased(nn.Module):
    """One module under two names is no tied weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.chain = nn.Sequential(self.layer, nn.Tanh())

    def forward(self, x):
        return self.last(self.chain(x))


@pytest.mark.parametrize("tangent_layers", ["all", ["chain", "last"], ["layer", "last"]])
def test_module_of_two_names(tangent_layers):
    split = split_checked(randomized(Aliased()), tangent_layers, x=VECTORS)
    assert split.tangent == ["layer.weight", "layer.bias", "last.weight", "last.bias"]


@pytest.mark.parametrize("name", ["3.0", "layer4", "", "1."])
def test_unknown_layers(name):
    with pytest.raises(ValueError, match=r"tangent_layers names .* no module .* Blocks: \['0\.0', "):
        split_network(chain(), EXAMPLE, [name])


@pytest.mark.parametrize("layers", [-1, 1.5, None, True, [1], {"2"}])
def test_malformed_layers(layers):
    with pytest.raises(ValueError, match="tangent_layers must be"):
        split_network(chain(), EXAMPLE, layers)
