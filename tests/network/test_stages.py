"""The stages of networks, found by evaluating them."""

import pytest
import torch
from support.networks import Other, uninitialized
from torch import nn

from sklearn_lqf.network.stages import channels_last, find_stages, tangent_prefixes

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))


def example(size):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_channels_are_told_from_rows_by_the_proportion_of_the_images():
    square, wide = torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 256, 320)
    for shape, example, expected in (
        ((2, 8, 8, 96), square, True), ((2, 8, 8, 8), square, False), ((2, 96, 8, 8), square, False),
        ((2, 8, 7, 9), square, False), ((2, 64, 64, 80), wide, False), ((2, 64, 80, 64), wide, True),
        ((2, 7, 9, 96), wide, True), ((2, 512, 8, 10), wide, False), ((2, 5, 5, 7), torch.zeros(2, 6), True),
    ):  # fmt: skip
        assert channels_last(torch.Size(shape), example) is expected, shape


# -------------------------------------------------------------------------------------------------- stages


def test_stages_of_a_convolutional_network():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
    ).eval()  # fmt: skip
    assert find_stages(net, IMAGES) == [["0", "1", "3.0"], ["4", "5"], ["8", "12"]]


class Block(nn.Module):
    """A residual block: a unit, whatever containers it holds."""

    def __init__(self, width, new=None, stride=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, new or width, 3, stride, 1), nn.ReLU())

    def forward(self, x):
        return self.body(x) if self.body[0].in_channels != self.body[0].out_channels else x + self.body(x)


class Body(nn.Module):
    """Blocks in a module of their own that holds most of the parameters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(4), Block(4, 8, 2), Block(8), Block(8, 9, 2), Block(9)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_stages_of_a_residual_network():
    net = Other(lambda m, x: m.body(x).mean((2, 3)), body=Body()).eval()
    stages = [["stem", "blocks.0"], ["blocks.1", "blocks.2"], ["blocks.3", "blocks.4"]]
    assert find_stages(net, IMAGES) == [[f"body.{name}" for name in stage] for stage in stages]


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


def test_stages_with_channels_last():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), Permute(0, 2, 3, 1), nn.Linear(4, 5), nn.Linear(5, 6), Permute(0, 3, 1, 2),
        nn.Conv2d(6, 8, 2, 2), Permute(0, 2, 3, 1), nn.Linear(8, 8),
    ).eval()  # fmt: skip
    assert find_stages(net, IMAGES) == [["0", "2", "3"], ["5", "7"]]


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(3)))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(x))[:, 0]


def test_stages_of_a_transformer():
    stages = [["patches"], ["blocks.0"], ["blocks.1"], ["blocks.2", "norm"]]
    assert find_stages(Transformer().eval(), IMAGES) == stages


def test_stages_of_a_network_on_vectors():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh())
    assert find_stages(net.eval(), VECTORS) == [["0"], ["1", "2"], ["4"]]


def test_stages_follow_the_order_of_evaluation():
    net = Other(lambda m, x: m.a(m.b(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)).eval()
    assert find_stages(net, VECTORS) == [["b"], ["a"]]


def test_output_of_several_values_counts_by_its_first():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Table(nn.Linear):
        def forward(self, x):
            return {"out": super().forward(x)}

    net = Other(lambda m, x: m.b(m.a(x)[0])["out"], a=Pair(6, 6), b=Table(6, 6)).eval()
    assert find_stages(net, VECTORS) == [["a"]]


TORCHVISION_STAGES = {
    "resnet18": [["conv1", "bn1"], ["layer1.0", "layer1.1"], ["layer2.0", "layer2.1"], ["layer3.0", "layer3.1"]],
    "swin_t": [
        ["features.0.0", "features.0.2", "features.1.0", "features.1.1"],
        ["features.2", "features.3.0", "features.3.1"],
    ],
}


@pytest.mark.parametrize("name", TORCHVISION_STAGES)
def test_stages_of_torchvision(name):
    expected = TORCHVISION_STAGES[name]
    assert find_stages(uninitialized(name), example(64))[: len(expected)] == expected


# ------------------------------------------------------------------------------------------ tangent_layers


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


@pytest.mark.parametrize(
    ("layers", "prefixes"),
    [
        ("all", None), ("head", []), (0, []), (1, ["4"]), (2, ["2", "4"]), (3, None),
        ("2", ["2"]), (["2", "0"], ["2", "0"]), ((), []),
    ],
)  # fmt: skip
def test_tangent_layers(layers, prefixes):
    assert tangent_prefixes(mlp(), VECTORS, layers) == prefixes


def test_more_stages_than_there_are():
    with pytest.warns(UserWarning, match="takes all parameters of the backbone: it has 3 stages"):
        assert tangent_prefixes(mlp(), VECTORS, 8) is None


@pytest.mark.parametrize("layers", [-1, 0.5, None, True, [0], b"all", {"0": 1}])
def test_tangent_layers_of_another_kind(layers):
    with pytest.raises(ValueError, match="tangent_layers must be"):
        tangent_prefixes(mlp(), VECTORS, layers)


@pytest.mark.parametrize("name", ["5", "0.weight", "", "."])
def test_tangent_layers_that_are_not_there(name):
    with pytest.raises(ValueError, match=r"names '.*', which is no module .* Blocks: \['0', '2', '4'\]"):
        tangent_prefixes(mlp(), VECTORS, ["0", name])


def test_module_of_two_names_is_known_by_the_first():
    net = mlp()
    net.add_module("again", nn.Sequential(net[2]))
    net.forward = lambda x: nn.Sequential.forward(net[:5], x)
    assert tangent_prefixes(net, VECTORS, ["again"]) == ["again", "2"]
