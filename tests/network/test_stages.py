"""The head and the stages of networks, found by evaluating them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sklearn_lqf.network.head import Head, find_head, remove_head
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


# ---------------------------------------------------------------------------------------------------- heads

# name: (options, size of the images, head, features)
TORCHVISION = {
    "resnet18": ({}, 32, Head("fc"), 512),
    "vgg11": ({}, 32, Head("classifier.6"), 4096),
    "densenet121": ({}, 32, Head("classifier"), 1024),
    "mobilenet_v3_small": ({}, 32, Head("classifier.3"), 1024),
    "mobilenet_v2": ({}, 32, Head("classifier.1"), 1280),
    "efficientnet_b0": ({}, 32, Head("classifier.1"), 1280),
    "shufflenet_v2_x0_5": ({}, 32, Head("fc"), 1024),
    "squeezenet1_1": ({}, 32, Head("classifier.1", "classifier.2"), 512),
    "convnext_tiny": ({}, 32, Head("classifier.2"), 768),
    "swin_t": ({}, 32, Head("head"), 768),
    "googlenet": ({"init_weights": False}, 32, Head("fc"), 1024),
}


@pytest.fixture(scope="module")
def torchvision_network():
    """Networks without initial values, which the search for a head does not need and which take long to draw."""
    models = pytest.importorskip("torchvision").models

    def build(name, **options):
        with torch.device("meta"):
            net = models.get_model(name, **options)
        net = net.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.data.fill_(1)
        for p in net.parameters():
            if p.ndim > 1:
                scale = (3 / p[0].numel()) ** 0.5
                p.data.uniform_(-scale, scale, generator=generator)
        return net

    return build


@pytest.mark.parametrize("name", TORCHVISION)
def test_heads_of_torchvision(torchvision_network, name):
    options, size, head, n_features = TORCHVISION[name]
    net, x = torchvision_network(name, **options), example(size)
    assert find_head(net, x) == head
    with torch.no_grad():
        logits = net(x)
        last = net.get_submodule(head.name)
        remove_head(net, x)
        features = net(x)
        assert features.shape == (2, n_features)
        if isinstance(last, nn.Linear):  # on the features it gives the logits
            torch.testing.assert_close(last(features), logits)


def test_head_of_a_vision_transformer(torchvision_network):
    vit = pytest.importorskip("torchvision").models.VisionTransformer
    net = vit(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8).eval()
    net.heads.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))  # torchvision starts at zero
    assert find_head(net, IMAGES) == Head("heads.head")
    remove_head(net, IMAGES)
    assert net(IMAGES).shape == (2, 8)


TIMM = {
    "resnet18": (32, Head("fc"), 512),
    "tf_efficientnet_lite0": (32, Head("classifier"), 1280),
    "mobilenetv3_small_050": (32, Head("classifier"), 1024),
    "convnext_atto": (32, Head("head.fc"), 320),
    "vit_tiny_patch16_224": (224, Head("head"), 192),
}


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_timm(name):
    timm = pytest.importorskip("timm")
    size, head, n_features = TIMM[name]
    net = timm.create_model(name).eval()
    assert find_head(net, example(size)) == head
    remove_head(net, example(size))
    assert net(example(size)).shape == (2, n_features)


class ByFunction(nn.Module):
    """A chain of two layers whose output passes through a function."""

    def __init__(self, function, last=None):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 5), last or nn.Linear(5, 4), function

    def forward(self, x):
        return self.function(self.last(self.first(x).tanh()), self)


HEADS = {
    "Linear": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), Head("2")),
    "one layer": (nn.Sequential(nn.Linear(6, 4)), Head("0")),
    "dropout behind": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Dropout(), nn.Identity()), Head("1")),
    "ReLU behind": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU()), Head("1", "2")),
    "ReLU in place": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(inplace=True)), Head("1", "2")),
    "without bias": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), Head("1")),
}


@pytest.mark.parametrize(("net", "head"), HEADS.values(), ids=HEADS)
def test_heads_of_plain_modules(net, head):
    net = net.eval()
    assert find_head(net, VECTORS) == head
    last = net.get_submodule(head.name)
    remove_head(net, VECTORS)
    assert net(VECTORS).shape == (2, last.in_features)


CONVOLUTIONS = {
    "pooled": ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], Head("1")),
    "one pixel": ([nn.AvgPool2d(32), nn.Flatten()], Head("1")),
    "ReLU": ([nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], Head("1", "2")),
    "ReLU in place": ([nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()], Head("1", "2")),
}


@pytest.mark.parametrize(("behind", "head"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_as_head(behind, head):
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1), *behind).eval()
    assert find_head(net, IMAGES) == head
    expected = net[0](IMAGES).mean((2, 3))
    remove_head(net, IMAGES)
    torch.testing.assert_close(net(IMAGES), expected)


# ------------------------------------------------------------------------------------------------- refusals


class Other(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, m in modules.items():
            self.add_module(name, m)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def two():
    return {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}


REFUSED = {
    "two heads, joined": (Other(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), **two()), r"is 'b' \(Linear\)"),
    "two heads, added": (Other(lambda m, x: m.a(x) + m.b(x), **two()), r"last layer evaluated is 'b' \(Linear\)"),
    "scaled output": (Other(lambda m, x: m.a(x) * 2, **two()), "not its plain result"),
    "softmax by function": (Other(lambda m, x: F.softmax(m.a(x), 1), **two()), "not its plain result"),
    "softmax": (nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), r"'1' \(Softmax\)"),
    "norm last": (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), r"'1' \(LayerNorm\)"),
    "layer called twice": (Other(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)), r"'a' \(Linear\)"),
    "no Linear": (nn.Sequential(nn.Tanh()), r"'0' \(Tanh\)"),
    "no layer": (nn.Flatten(), "has no layer"),
    "tuple": (Other(lambda m, x: (m.a(x), m.b(x)), **two()), r"must return one tensor .* returns tuple"),
    "dict": (Other(lambda m, x: {"out": m.a(x)}, **two()), "returns dict"),
    "tokens": (Other(lambda m, x: m.a(x)[:, None], **two()), r"returns a tensor of shape \(2, 1, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "message"), REFUSED.values(), ids=REFUSED)
def test_network_without_one_head_is_refused(net, message):
    with pytest.raises(ValueError, match=message):
        find_head(net.eval(), VECTORS)


def test_output_that_is_not_finite():
    net = nn.Linear(6, 4).eval()
    net.bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        find_head(nn.Sequential(net), VECTORS)


def test_subclass_of_linear_with_another_result():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    net = Other(lambda m, x: m.a(x)[0], a=Pair(6, 4))
    with pytest.raises(ValueError, match=r"'a' \(Pair\)"):
        find_head(net.eval(), VECTORS)


def test_features_must_be_one_vector_for_each_image():
    def pooled(m, x):
        x = m.a(x)
        return x.mean((2, 3)) if x.shape[1] == 4 else x

    # The head is found, as its result is pooled; its input is not.
    net = Other(pooled, a=nn.Conv2d(3, 4, 1)).eval()
    assert find_head(net, IMAGES) == Head("a")
    with pytest.raises(ValueError, match=r"head 'a' must be one vector for each image; .* \(2, 3, 32, 32\)"):
        remove_head(net, IMAGES)

    def paired(m, x):
        x = m.a(x)
        return x if x.shape[1] == 4 else (x, x)

    pair = Other(paired, a=nn.Linear(6, 4)).eval()
    with pytest.raises(ValueError, match="head the network returns tuple"):
        remove_head(pair, VECTORS)


def test_the_search_leaves_the_network_as_it_is():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    net[0].register_forward_hook(lambda m, args, out: None)
    state, x = copy.deepcopy(net.state_dict()), VECTORS.clone()
    find_head(net, x)
    with pytest.raises(ValueError, match="cannot be evaluated"):
        find_head(net, IMAGES)
    assert [len(m._forward_hooks) for m in net] == [1, 0, 0]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(x, VECTORS)


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
def test_stages_of_torchvision(torchvision_network, name):
    expected = TORCHVISION_STAGES[name]
    assert find_stages(torchvision_network(name), example(64))[: len(expected)] == expected


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
