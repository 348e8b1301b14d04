"""BatchNorms become a part of the layer before them, where the function stays the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import Other
from support.splits import EXAMPLE, IMAGES, TOKENS, VECTORS, of_type, rand, randomized, split_checked
from torch import nn

from sklearn_lqf.network.tracing import split_network

FOLDED = {
    "eps": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.7)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "no parameters, no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
    "groups": (nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    "two norms": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("layers", FOLDED.values(), ids=FOLDED)
def test_batch_norm_is_folded_into_a_convolution(layers):
    net = randomized(nn.Sequential(*layers, nn.ReLU(), nn.Flatten()))
    split = split_checked(net)
    assert split.folded == len(layers) - 1
    assert split.tangent == ["0.weight", "0.bias"]
    assert not of_type(split, nn.BatchNorm2d)


def test_folding_is_more_exact_than_the_precision_in_use():
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())).float()
    weight = split_network(net, EXAMPLE.float(), "all").tail.get_submodule("0").weight
    norm = copy.deepcopy(net[1]).double()
    exact = net[0].weight.double() * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    assert torch.equal(weight, exact.float())


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


def conv_and_norm(use, **layers):
    """A convolution, its norm, and other uses of one of the two, or other forms."""
    layers = {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3), **layers}
    return Other(lambda m, x: use(m, x).flatten(1), **layers)


# Networks, inputs, and how many norms are folded.
OTHERS = {
    "linear": (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), VECTORS, 1),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 4, 2), nn.BatchNorm1d(4), nn.Flatten()), TOKENS, 1),
    "three dimensions": (nn.Sequential(nn.Conv3d(3, 2, 3), nn.BatchNorm3d(2), nn.Flatten()), rand(3, 3, 4, 4, 4), 1),
    # It normalizes the tokens, not the features that the Linear makes: here there are four of both.
    "tokens": (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Flatten()), TOKENS, 0),
    "the output has another user": (conv_and_norm(lambda m, x: m.norm(h := m.conv(x)) + h), IMAGES, 0),
    "the convolution is called twice": (conv_and_norm(lambda m, x: m.conv(m.norm(m.conv(x)))), IMAGES, 0),
    "the norm is called twice": (conv_and_norm(lambda m, x: m.norm(m.conv(x)) + m.norm(x)), IMAGES, 0),
    "another operation is between": (conv_and_norm(lambda m, x: m.norm(m.conv(x).relu())), IMAGES, 0),
    "the norm comes first": (conv_and_norm(lambda m, x: m.conv(m.norm(x))), IMAGES, 0),
    "another norm": (conv_and_norm(lambda m, x: m.norm(m.conv(x)), norm=ActivatedNorm(3)), IMAGES, 0),
    "another convolution": (conv_and_norm(lambda m, x: m.norm(m.conv(x)), conv=Standardized(3, 3, 3)), IMAGES, 0),
}


@pytest.mark.parametrize(("net", "x", "folded"), OTHERS.values(), ids=OTHERS)
def test_batch_norm_is_folded_where_the_function_stays_the_same(net, x, folded):
    assert split_checked(randomized(net), x=x).folded == folded


def test_batch_norm_without_statistics_is_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    assert split_network(randomized(net), EXAMPLE, "all").folded == 0


def test_a_batch_norm_that_is_named_stays():
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten()))
    split = split_checked(net, ["1"])
    assert (split.folded, split.tangent) == (0, ["1.weight", "1.bias"])
    split = split_checked(net, ["0", "1"])
    assert (split.folded, split.tangent) == (1, ["0.weight", "0.bias"])
