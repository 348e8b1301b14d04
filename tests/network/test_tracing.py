"""Tracing, folding, leaky activations and the cut: functions are unchanged, and so is the caller's network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.needs import needs_sizes_as_arguments
from torch import fx, nn

from sklearn_lqf.network.rewrite import Attention
from sklearn_lqf.network.tracing import find_head, remove_head, split_network

SLOPE = 0.1


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(module, seed=0):
    """Float64, evaluation mode, every parameter and statistic away from its initial value."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 2.0, generator=generator)
    return module


IMAGES = rand(5, 3, 8, 8, seed=5)  # other than the example, of which there are two
EXAMPLE = IMAGES[:2] * 0.5
VECTORS = rand(5, 6, seed=6)
TOKENS = rand(5, 4, 6, seed=7)


def split_checked(net, tangent_layers="all", x=IMAGES, example=None, tolerance=1e-12):
    """A split whose parts compute what the network computes, for several batch sizes."""
    example = x[:2] * 0.5 if example is None else example
    split = split_network(net, example, tangent_layers)
    for rows in (1, 2, len(x)):
        expected = net(x[:rows]).detach()
        cached = split.trunk(x[:rows])
        assert isinstance(cached, tuple)
        assert all(z.shape[0] == rows for z in cached)
        torch.testing.assert_close(split.tail(*cached).detach(), expected, rtol=tolerance, atol=tolerance)
    assert split.n_features == expected.shape[1]
    assert not set(split.tangent) - {n for n, _ in split.tail.named_parameters()}
    assert not any(p.requires_grad for p in split.trunk.parameters())
    return split


def operations(split, *kinds):
    """Targets of the nodes of these kinds, in both parts."""
    graphs = [part.graph for part in (split.trunk, split.tail) if isinstance(part, fx.GraphModule)]
    return [node.target for graph in graphs for node in graph.nodes if node.op in kinds]


def of_type(split, kind):
    return [m for part in (split.trunk, split.tail) for m in part.modules() if type(m) is kind]


# ---------------------------------------------------------------------------------------------------- fold


FOLDED = {
    "plain": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "eps": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.7)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "no parameters": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "no parameters, no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
    "groups": (nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
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


def test_batch_norm_is_folded_into_other_layers():
    net = randomized(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)))
    assert split_checked(net, x=VECTORS).folded == 1
    net = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.Flatten())
    assert split_checked(randomized(net), x=VECTORS).folded == 1
    net = nn.Sequential(nn.Conv3d(3, 2, 3), nn.BatchNorm3d(2), nn.Flatten())
    assert split_checked(randomized(net), x=rand(3, 3, 4, 4, 4)).folded == 1


class Shared(nn.Module):
    """A convolution, its norm, and other uses of one of the two."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), use

    def forward(self, x):
        return self.use(self, x).flatten(1)


NOT_FOLDED = {
    "the output has another user": lambda m, x: m.norm(h := m.conv(x)) + h,
    "the convolution is called twice": lambda m, x: m.conv(m.norm(m.conv(x))),
    "the norm is called twice": lambda m, x: m.norm(m.conv(x)) + m.norm(x),
    "another operation is between": lambda m, x: m.norm(m.conv(x).relu()),
    "the norm comes first": lambda m, x: m.conv(m.norm(x)),
}


@pytest.mark.parametrize("use", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_batch_norm_is_not_folded(use):
    split = split_checked(randomized(Shared(use)))
    assert split.folded == 0
    assert len(of_type(split, nn.BatchNorm2d)) == 1


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_other_batch_norms_are_not_folded():
    split = split_checked(randomized(nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.Flatten())))
    assert split.folded == 0
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    assert split_network(randomized(net), EXAMPLE, "all").folded == 0


def test_a_batch_norm_that_is_named_stays():
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten()))
    split = split_checked(net, ["1"])
    assert (split.folded, split.tangent) == (0, ["1.weight", "1.bias"])
    split = split_checked(net, ["0", "1"])
    assert (split.folded, split.tangent) == (1, ["0.weight", "0.bias"])


def test_batch_norm_over_tokens_is_not_folded():
    # It normalizes the tokens, not the features that the Linear makes: here there are four of both.
    net = randomized(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Flatten()))
    assert split_checked(net, x=TOKENS).folded == 0


def test_batch_norm_of_a_convolution_with_own_forward_is_not_folded():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    net = randomized(nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    assert split_checked(net).folded == 0


# --------------------------------------------------------------------------------------------- activations


class Activated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.function = function

    def forward(self, x):
        return self.function(x * self.scale.weight.sum()).flatten(1)


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
    net = Activated(activation).double().eval()
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


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, nn.ReLU6(), nn.Hardswish()])
def test_slope_zero_changes_nothing(activation):
    net = randomized(Activated(activation))
    split = split_network(net, EXAMPLE, "all", 0.0)
    assert split.swapped == 0
    assert torch.equal(split.tail(*split.trunk(IMAGES)), net(IMAGES))


SMOOTH = {
    "F.silu": F.silu, "F.gelu": F.gelu, "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "F.elu": F.elu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.3), "torch.sigmoid": torch.sigmoid, "sigmoid": lambda x: x.sigmoid(),
    "F.sigmoid": F.sigmoid, "torch.tanh": torch.tanh, "tanh_": lambda x: x.tanh_(), "F.tanh": F.tanh,
    "SiLU": nn.SiLU(), "F.elu alpha": lambda x: F.elu(x, 2.0, True),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("activation", SMOOTH.values(), ids=SMOOTH)
def test_other_activations_stay(activation):
    net = randomized(Activated(activation))
    split = split_network(net, EXAMPLE, "all", SLOPE)
    assert split.swapped == 0
    torch.testing.assert_close(split.tail(IMAGES), net(IMAGES.clone()))


def test_each_call_is_counted():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other, self.unused = nn.ReLU(), nn.ReLU6(), nn.ReLU()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return F.relu(self.other(self.act(self.layer(self.act(x))))) + torch.relu(x)

    split = split_network(randomized(Two()), VECTORS, "all", SLOPE)
    assert split.swapped == 5


# ------------------------------------------------------------------------------------------------- cleaning


class Untidy(nn.Module):
    """What evaluation does not need, and operations in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.drop, self.drop2 = nn.Dropout(0.5), nn.Dropout2d(0.5)
        self.identity = nn.Identity()

    def forward(self, x):
        torch._assert(x.shape[1] == 3, "three channels")
        y = self.drop2(self.act(self.conv(x)))
        y = F.dropout(self.identity(y), 0.5, training=self.training)
        y = F.dropout(input=y, training=self.training)
        y += 1
        y -= 0.5
        y *= 2
        y /= 3
        y.add_(1)
        y = F.elu_(torch.sigmoid_(y) - 0.5)
        return self.drop(y).flatten(1)


def test_untidy_network():
    net = randomized(Untidy())
    split = split_checked(net)
    functions = operations(split, "call_function", "call_method")
    assert not {torch._assert, F.dropout} & set(functions)
    assert not [name for name in operations(split, "call_module") if "drop" in name or "identity" in name]
    names = [f if isinstance(f, str) else f.__name__ for f in functions]
    assert not [name for name in names if name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")]
    assert not any(getattr(m, "inplace", False) for m in split.tail.modules())


def test_activations_in_the_cache_are_not_changed():
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten()))
    split = split_checked(net, ["2"])
    (cached,) = split.trunk(IMAGES)
    before = cached.clone()
    split.tail(cached)
    assert torch.equal(cached, before)


def test_stochastic_depth_is_removed():
    torchvision = pytest.importorskip("torchvision")

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.depth = nn.Conv2d(3, 3, 3, padding=1), torchvision.ops.StochasticDepth(0.5, "row")

        def forward(self, x):
            x = x + self.depth(self.conv(x))
            return torchvision.ops.stochastic_depth(x, 0.5, "row", training=self.training).flatten(1)

    found = operations(split_checked(randomized(Residual())), "call_function", "call_module")
    assert not [t for t in found if "stochastic" in str(t) or "depth" in str(t)]


class ReliesOnPlace(nn.Module):
    """The activation's result is dropped: its input has been changed."""

    def __init__(self, activation, part=None):
        super().__init__()
        self.layer, self.activation, self.part = nn.Linear(6, 4), activation, part or (lambda x: x)

    def forward(self, x):
        x = self.layer(x)
        self.activation(self.part(x))
        return x * 2


IN_PLACE = {
    "module": nn.ReLU(inplace=True),
    "function": lambda x: F.relu(x, inplace=True),
    "positional": lambda x: F.relu(x, True),
    "function with underscore": torch.relu_,
    "method": lambda x: x.relu_(),
}


@pytest.mark.parametrize("activation", IN_PLACE.values(), ids=IN_PLACE)
def test_operations_in_place_are_followed(activation):
    net = randomized(ReliesOnPlace(activation))
    assert split_checked(net, x=VECTORS).traced
    assert split_network(net, VECTORS, "all", SLOPE).swapped == 1


@pytest.mark.parametrize(
    ("activation", "part"),
    [
        (lambda x: x.relu_(), lambda x: x[:, :2]),  # a view of the tensor that is used later
        (nn.ReLU(inplace=True), lambda x: x.view(-1)),
        (lambda x: x.zero_(), None),  # nothing computes the same out of place
    ],
)
def test_operations_in_place_that_are_not_followed(activation, part):
    net = randomized(ReliesOnPlace(activation, part))
    with pytest.warns(UserWarning, match="cannot be traced"):
        split = split_checked(net, x=VECTORS)
    assert not split.traced


def test_alias_of_what_is_changed():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            x = same = self.layer(x)
            rows = count = x.shape[1]
            rows += 1
            x += rows
            return same * count

    with pytest.warns(UserWarning, match="cannot be traced"):
        assert not split_checked(randomized(Alias()), x=VECTORS).traced


def test_leaky_form_of_what_must_work_in_place():
    net = randomized(ReliesOnPlace(nn.ReLU(inplace=True), lambda x: x.view(-1)))
    with (
        pytest.warns(UserWarning, match="cannot be traced"),
        pytest.raises(ValueError, match=r"'activation' works in place, .* Set negative_slope=0"),
    ):
        split_network(net, VECTORS, "all", SLOPE)


# ------------------------------------------------------------------------------------------------------ cut


def chain():
    """Three stages."""
    return randomized(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


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


# --------------------------------------------------------------------------------------- the caller's network


def everything():
    """A network that each pass works on."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.Dropout(), nn.Flatten(2),
        SelfAttention(), nn.Linear(9, 4),
    )  # fmt: skip


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(9, 3, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def snapshot(net):
    return [
        (
            name, type(m), m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._forward_pre_hooks),
            [(n, id(p), p._version, p.requires_grad, p.dtype, p.device) for n, p in m.named_parameters()],
            [(n, id(b), b._version) for n, b in m.named_buffers()],
        )
        for name, m in net.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_module_and_the_generator_are_untouched(dtype):
    net = everything().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = EXAMPLE.to(dtype)
    before, example, random = snapshot(net), x.clone(), torch.get_rng_state()
    split = split_network(net, x, 1, SLOPE)
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(net) == before
    assert torch.equal(x, example)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    shared = {p.data_ptr() for p in net.parameters()}
    assert not shared & {p.data_ptr() for part in (split.trunk, split.tail) for p in part.parameters()}
    assert {p.dtype for part in (split.trunk, split.tail) for p in part.parameters()} == {dtype}


def test_the_module_is_untouched_when_it_is_refused():
    net = everything().eval()
    before = snapshot(net)
    with pytest.raises(ValueError, match="no module"):
        split_network(net, EXAMPLE.float(), ["nothing"])
    with pytest.raises(ValueError, match="cannot be evaluated"):
        find_head(net, EXAMPLE.float()[:, :1])
    assert snapshot(net) == before


def test_input_that_the_network_changes_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            x -= 1
            return self.layer(x.mul_(2))

    net, example = randomized(InPlace()), VECTORS.clone()
    split = split_network(net, example, "all")
    assert torch.equal(example, VECTORS)
    torch.testing.assert_close(split.tail(*split.trunk(example)), net(VECTORS.clone()))
    assert torch.equal(example, VECTORS)


def test_parts_are_in_evaluation_mode():
    split = split_network(everything().train(), EXAMPLE.float(), 1)
    assert not any(m.training for part in (split.trunk, split.tail) for m in part.modules() if list(m.children()) == [])


def test_a_second_split_is_the_same():
    net = randomized(everything())
    one, two = (split_network(net, EXAMPLE, "all", SLOPE) for _ in range(2))
    assert one.tangent == two.tangent
    assert torch.equal(one.tail(IMAGES), two.tail(IMAGES))


# -------------------------------------------------------------------------------------------------- surgery


def test_attention_is_made_of_linear_layers():
    net = randomized(everything())
    split = split_checked(net)
    assert not of_type(split, nn.MultiheadAttention)
    assert "5.attention.qkv.weight" in split.tangent
    assert "5.attention.out_proj.bias" in split.tangent


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_module(batch_first, bias):
    source = randomized(nn.MultiheadAttention(6, 3, bias=bias, batch_first=batch_first))
    expected, _ = source(TOKENS, TOKENS, TOKENS, need_weights=False)
    found, weights = Attention(source)(TOKENS, TOKENS, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert weights is None


ATTENTION = {
    "other keys": ({}, lambda a, x: a(x, x + 1, x)),
    "mask": ({}, lambda a, x: a(x, x, x, attn_mask=torch.eye(4, dtype=torch.bool))),
    "weights used": ({}, lambda a, x: (a(x, x, x)[1] @ x,)),
    "bias of keys": ({"add_bias_kv": True}, lambda a, x: a(x, x, x)),
    "zero key": ({"add_zero_attn": True}, lambda a, x: a(x, x, x)),
    "other dimensions": ({"kdim": 5}, lambda a, x: a(x, x[:, :, :5], x)),
}


@pytest.mark.parametrize(("options", "call"), ATTENTION.values(), ids=ATTENTION)
def test_attention_that_is_not_rewritten(options, call):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

        def forward(self, x):
            return call(self.attention, x)[0].flatten(1)

    net = randomized(Other())
    if call is ATTENTION["weights used"][1]:  # seen only from the result
        with pytest.warns(UserWarning, match="cannot be traced"):
            assert not split_checked(net, x=TOKENS).traced
    else:
        split = split_checked(net, x=TOKENS)
        assert of_type(split, nn.MultiheadAttention)


def test_transformer_encoder_layer_is_traced():
    net = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten())
    split = split_checked(randomized(net), x=TOKENS)
    assert split.traced
    assert not of_type(split, nn.TransformerEncoderLayer)


def test_wrong_image_size_mentions_image_size():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with pytest.raises(ValueError, match=r"input of shape \(3, 16, 16\) .*set image_size"):
        find_head(net.eval(), torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"input of shape \(3, 16, 16\) .*set image_size"):
        split_network(net, torch.rand(2, 3, 16, 16))


def test_wrong_number_of_features():
    with pytest.raises(ValueError, match=r"input of shape \(6,\): ") as error:
        split_network(nn.Linear(5, 4), VECTORS)
    assert "image_size" not in str(error.value)


# ------------------------------------------------------------------------------------- networks of libraries


def features(net, x):
    net = randomized(net)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):  # keep the scale of activations
            m.weight.data *= 2 * (2 / m.weight[0].numel()) ** 0.5
    remove_head(net, x)
    return net


@pytest.mark.parametrize("size", [32, 45])
def test_timm_same_padding(size):
    timm = pytest.importorskip("timm")
    conv = timm.layers.Conv2dSame
    layers = [conv(3, 4, 3, stride=2), conv(4, 4, (3, 5), stride=2), conv(4, 4, 3, dilation=2, groups=4)]
    x = rand(3, 3, size, size + 3)
    split = split_checked(randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())), x=x)
    assert split.traced
    assert not of_type(split, conv)
    assert len(of_type(split, nn.Conv2d)) == 3


def test_timm_norm_with_activation():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3), norm(4, apply_act=False), nn.Flatten())
    split = split_checked(randomized(net))
    assert split.folded == 2
    assert not of_type(split, norm)
    assert split_network(net, EXAMPLE, "all", SLOPE).swapped == 1


LIBRARIES = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "timm:tf_efficientnet_lite0",
    "timm:convnext_atto",
]


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("tangent_layers", [1, "all"])
def test_networks_of_libraries(name, tangent_layers):
    library, _, name = name.partition(":")
    package = pytest.importorskip(library)
    create = package.create_model if library == "timm" else package.models.get_model
    x = rand(3, 3, 40, 40)
    net = features(create(name), x)
    split = split_checked(net, tangent_layers, x=x, tolerance=1e-9)
    assert split.traced
    assert len(split.trunk(x)) == 1
    assert not of_type(split, nn.BatchNorm2d)


# ------------------------------------------------------------------------------------------ tracing at one size


class ByShape(nn.Module):
    """Control flow, loops and constants by the shape of the input, and optional arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x, mask=None, returns_all=False, *, scale=True):
        if mask is not None or x.dim() != 4:
            raise ValueError("not of this kind")
        batch, channels, height, width = x.shape
        x = self.a(x)
        if scale and x.size(-1) == width and x.dtype.is_floating_point and len(x.shape) == 4:
            x = x * self.scale
        for row in range(x.shape[2] // 2):
            x = x + row / height
        x = x.reshape(batch, self.a.out_channels, -1).transpose(1, 2)
        assert x.shape == (batch, height * width, channels + 1)
        x = torch.cat([part.mean(1, keepdim=True) for part in x.chunk(2, 1)], 1)
        return (x, None) if returns_all else self.b(x).mean(1)


@pytest.mark.parametrize("tangent_layers", ["all", ["b"]])
def test_what_depends_on_the_shape_alone_is_traced(tangent_layers):
    net, x = randomized(ByShape()), EXAMPLE
    split = split_checked(net, tangent_layers, x=x)
    assert split.traced
    for rows in (1, 5):  # the number of images is no constant
        more = x[:1].repeat(rows, 1, 1, 1) + torch.arange(rows, dtype=x.dtype).view(-1, 1, 1, 1)
        torch.testing.assert_close(split.tail(*split.trunk(more)), net(more))


def test_control_flow_by_the_number_of_images_is_not_traced():
    class ByNumber(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x):
            return self.a(x) if x.shape[0] > 2 else self.a(x) + 0

    with pytest.warns(UserWarning, match="cannot be traced"):
        assert not split_checked(randomized(ByNumber()), "all", x=VECTORS).traced


def test_faults_of_the_package_are_no_reason_not_to_trace(monkeypatch):
    def fail(*args):
        raise TypeError("a fault")

    monkeypatch.setattr("sklearn_lqf.network.tracing.add_readout", fail)
    with pytest.raises(TypeError, match="a fault"):
        split_network(chain(), IMAGES)


@pytest.mark.parametrize("wrappers", [1, 3])
def test_stages_in_wrappers(wrappers):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    for _ in range(wrappers):
        net = Wrapper(net)
    split = split_checked(randomized(net), 1, x=VECTORS)
    assert len(split.stages) == 3
    assert split.tangent == [f"{'inner.' * wrappers}2.0.{p}" for p in ("weight", "bias")]
