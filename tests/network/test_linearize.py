"""Jacobian products against torch.func on the network as it was given."""

import itertools
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.linearized import (
    IMAGES,
    OUTPUTS,
    TOKENS,
    VECTORS,
    assert_close,
    check,
    dense_jacobian,
    linearized,
    pooled,
    randomized,
)
from support.needs import needs_sizes_as_arguments
from support.networks import Other
from support.splits import SLOPE, rand
from torch import nn

from sklearn_lqf.network.linearize import LinearizedNetwork
from sklearn_lqf.network.statistics import Part
from sklearn_lqf.network.tracing import Split, split_network
from sklearn_lqf.runtime.arithmetic import DUAL_NUMBERS

# -------------------------------------------------------------------------------------------------- layers

CONVOLUTIONS = {
    "same, dilated": {"padding": "same", "dilation": 2},
    "no bias": {"bias": False},
    "all at once": {"stride": 2, "dilation": 2, "groups": 4, "padding": 2, "padding_mode": "reflect"},
    "wide": {"kernel_size": 5, "groups": 4, "padding": 2, "stride": 2},
    "wide, no bias": {"kernel_size": 5, "groups": 4, "bias": False},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(options):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, **options})
    net = pooled(nn.Conv2d(3, 4, 1), nn.Tanh(), conv, nn.Tanh())
    check(net, IMAGES)
    check(net, IMAGES, tangent_layers=["2"])


@pytest.mark.parametrize("method", ["_conv_forward", "forward"])
def test_convolutions_with_a_method_of_their_own(method):
    def circular(self, x, *_):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="circular"), self.weight, self.bias, groups=4)

    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    setattr(conv, method, types.MethodType(circular, conv))
    check(pooled(nn.Conv2d(3, 4, 1), nn.Tanh(), conv, nn.Tanh()), IMAGES)


def test_parameters_are_not_read_while_another_thread_has_swapped_them():
    network, activations = linearized(pooled(nn.Conv2d(3, 4, 3), nn.Tanh()), IMAGES)
    split = Split(network.trunk, network.module, network.names, [Part("last", 4)])
    made = threading.Thread(target=lambda: LinearizedNetwork(split, network.weight, network.bias))
    with DUAL_NUMBERS:
        made.start()
        made.join(0.1)
        assert made.is_alive()
    made.join()
    assert network.at(activations).vjp(rand(3, OUTPUTS)).count_nonzero() == network.n_parameters


REUSED = {  # wide depthwise layers whose parameters have a part in the output several times
    "one layer twice": lambda m, x: m.second(m.first(input=m.first(x).tanh()).tanh()),
    "read by a function": lambda m, x: m.second(x.tanh()) + F.conv2d(m.first(x), m.second.weight, None, 1, 2, 1, 3),
}


@pytest.mark.parametrize("forward", REUSED.values(), ids=REUSED)
def test_wide_depthwise_convolutions_with_several_parts(forward):
    first, second = (nn.Conv2d(3, 3, 5, groups=3, padding=2) for _ in range(2))
    check(randomized(Other(lambda m, x: forward(m, x).tanh().mean((2, 3)), first=first, second=second)), IMAGES)


NORMS = {
    "GroupNorm": nn.GroupNorm(2, 4),
    "InstanceNorm": nn.InstanceNorm2d(4, affine=True),
    "BatchNorm that cannot be folded": nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4, eps=0.3)),
    "BatchNorm without parameters": nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4, affine=False)),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_normalizations(norm):
    net = pooled(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 5, 3), nn.Tanh())
    check(net, IMAGES)
    if list(norm.parameters()):
        check(net, IMAGES, tangent_layers=["1"])


def test_tangent_of_a_folded_batch_norm():
    # With s = gamma / sqrt(var + eps), the folded weight is s W: a step d of it is the step d / s of W, and a
    # step of the folded bias is one of beta.
    norm = nn.BatchNorm2d(4, eps=0.3)
    net = pooled(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 5, 3))
    network, activations = linearized(net, IMAGES)
    assert not any(name.startswith("1.") for name in network.names)
    j, d = dense_jacobian(net, IMAGES, network, {"0.bias": "1.bias"}), rand(network.n_parameters)
    scale = norm.weight.detach() / (norm.running_var + 0.3).sqrt()
    j[:, :, network.slices["0.weight"]] /= scale.repeat_interleave(3 * 3 * 3)
    assert_close(network.at(activations).jvp(d), j @ d)


# ---------------------------------------------------------------------------------------------- operations


class Net(nn.Module):
    """Two convolutions h and k of one input and an operation on them; the result is flattened."""

    def __init__(self, operation):
        super().__init__()
        self.h, self.k = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("grid", torch.arange(64.0).view(8, 8))
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.operation = operation

    def forward(self, x):
        return torch.flatten(self.operation(self, self.h(x).tanh(), self.k(x)), 1)


OPERATIONS = {
    "pooling": lambda m, h, k: F.avg_pool2d(h, 2) * F.adaptive_avg_pool2d(k, 4),
    "skip": lambda m, h, k: F.silu(h + k) + h,
    "torch.add with alpha": lambda m, h, k: torch.add(h, k, alpha=2),
    "added to itself": lambda m, h, k: h + h,
    "keyword": lambda m, h, k: torch.flatten(input=h, start_dim=1) * k.reshape((k.shape[0], -1)),
    "constant added": lambda m, h, k: (h + 1) * (2 - k) / 3,
    "cat": lambda m, h, k: torch.cat([h, k, h * k], 1),
    "chunk": lambda m, h, k: torch.chunk(h, 2, dim=1)[1] * k.chunk(2, 1)[0],
    "unbind": lambda m, h, k: h.unbind(1)[0] * torch.unbind(k, 1)[2],
    "transpose": lambda m, h, k: h.flatten(2).transpose(1, 2) @ k.flatten(2),
    "view": lambda m, h, k: h.view(h.size(0), -1) * k.reshape(k.shape[0], -1),
    "view of another layout": lambda m, h, k: (h.permute(0, 2, 3, 1).contiguous() * 2).view(h.size(0), -1),
    "expand": lambda m, h, k: h.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8) * k,
    "maximum along an axis": lambda m, h, k: h.max(1).values * k.max(dim=2)[0][:, 0, :, None],
    "comparison": lambda m, h, k: torch.where(h > 0, h, k),
    "index of the largest": lambda m, h, k: h * k.argmax(1, keepdim=True),
    "parameter by attribute": lambda m, h, k: h * m.scale + k,
    "layer_norm by function": lambda m, h, k: F.layer_norm(h, (8,), m.gain, m.shift, 1e-3) * k,
    "conv2d by function": lambda m, h, k: F.conv2d(h, m.k.weight[:, :1].repeat(1, 4, 1, 1)),
    "a layer called twice": lambda m, h, k: m.h(k[:, :3]) * h,
    "in place": lambda m, h, k: (h * 1).add_(k).mul_(2).relu_(),
    "in place by operator": lambda m, h, k: _in_place(h * 1, k),
    "size as an argument": lambda m, h, k: torch.reshape(h * k, (k.shape[0], -1)) + torch.arange(h.shape[1] * 64),
    "size of a list": lambda m, h, k: h.reshape(k.shape[0], k.shape[1], -1).reshape([k.shape[0], 4, 64]),
    "shape": lambda m, h, k: h.flatten(2).reshape(k.transpose(1, 2).shape),
    "constant tensor": lambda m, h, k: h * (m.grid + m.scale) * k,
    "zeros like the batch": lambda m, h, k: h * k + k.new_zeros(k.shape[0], 1, 1, 8),
    "device": lambda m, h, k: (h + torch.ones(8).to(k)).to(k.device, k.dtype),
    "dimension": lambda m, h, k: h.transpose(1, k.dim() - 2) * k.transpose(1, 2),
}  # fmt: skip


def _in_place(h, k):
    h += k
    h *= 2
    h -= 1
    return h


@pytest.mark.parametrize("tangent_layers", ["all", ["h"]])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(operation, tangent_layers):
    if operation is OPERATIONS["size as an argument"]:
        needs_sizes_as_arguments()
    network = check(randomized(Net(operation)), IMAGES, tangent_layers=tangent_layers)
    # All that has an influence is linearized as part of a graph, and the rest has no place in it.
    assert "h.weight" in network.names
    # Devices are read from the batch, and constants follow the module.
    assert not [n for n in network.module.graph.nodes if torch.device("cpu") in n.args]
    assert all(b.dtype == torch.float32 for b in network.module.float().buffers() if b.is_floating_point())


def keyword():
    return Other(lambda m, x: m.b(input=m.a(input=x).tanh()), a=nn.Linear(5, 4), b=nn.Linear(4, 3))


def hooked():
    """Hooks that change what a layer sees and returns."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].register_forward_hook(lambda module, args, out: out * 3)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    return net


def spectral():
    norm = nn.utils.parametrizations.spectral_norm
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), *pool, norm(nn.Linear(4, 3)))


def tokens():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4, bias=False), nn.Flatten())


def one_dimension():
    return nn.Sequential(
        nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=2), nn.Flatten()
    )


def without_forward_mode_derivative():
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), norm(nn.Linear(4, 3)))


LAYERS = [
    (tokens, TOKENS), (keyword, VECTORS), (hooked, VECTORS), (spectral, IMAGES), (one_dimension, TOKENS),
    (without_forward_mode_derivative, VECTORS),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x"), LAYERS)
def test_other_layers(make, x):
    check(randomized(make()), x)


class Squared(torch.autograd.Function):
    """Backward alone is written down."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x**2, y * 1

    @staticmethod
    def backward(ctx, g, h):
        (x,) = ctx.saved_tensors
        return 2 * x * g, h


class Viewing(torch.autograd.Function):
    """Twice its input; its forward-mode derivative asks for contiguous memory, as group_norm's until torch 2.13."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent.transpose(0, 1).view(tangent.shape)


FUNCTIONS = {
    "two tangents": (lambda h: Squared.apply(h, h)[0], lambda h: h**2),
    "of contiguous memory": (Viewing.apply, lambda h: 2 * h),
}


@pytest.mark.parametrize(("function", "formula"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_without_forward_mode_derivative(function, formula):
    """In a network that does not trace: torch.fx looks into the functions."""

    def network(f):
        layers = {"first": nn.Linear(5, 4), "last": nn.Linear(4, 3)}
        return randomized(Other(lambda m, x: m.last(f(m.first(x))) if x.abs().sum() > 0 else x, **layers))

    check(network(function), VECTORS, expected=network(formula), traced=False)


# ----------------------------------------------------------------------------------------------- attention


def self_attention(batch_first=True, bias=True, **call):
    def forward(m, x):
        x = x if batch_first else x.transpose(0, 1)
        y = m.attention(x, x, x, **call)[0]
        y = y if batch_first else y.transpose(0, 1)
        return (x.mean() * 0 + y).flatten(1)

    return Other(forward, attention=nn.MultiheadAttention(6, 2, batch_first=batch_first, bias=bias))


QKV = {f"attention.qkv.{part}": f"attention.in_proj_{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize(("batch_first", "bias", "need_weights"), [(True, False, False), (False, True, True)])
def test_multihead_attention(batch_first, bias, need_weights):
    net = randomized(self_attention(batch_first, bias, need_weights=need_weights))
    network = check(net, TOKENS, rename=QKV)
    assert set(network.kronecker_layers()) == {"attention.qkv", "attention.out_proj"}


ATTENTION = {
    "other keys": ({}, lambda a, x: a(x, x + 1, x)),
    "mask": ({}, lambda a, x: a(x, x, x, attn_mask=torch.eye(4, dtype=torch.bool))),
    "weights used": ({}, lambda a, x: (a(x, x, x)[1] @ x,)),
    "bias of keys": ({"add_bias_kv": True}, lambda a, x: a(x, x, x)),
    "zero key": ({"add_zero_attn": True}, lambda a, x: a(x, x, x)),
    "other dimensions": ({"kdim": 5}, lambda a, x: a(x, x[:, :, :5], x)),
    "query": ({}, lambda a, x: a(a.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_is_not_rewritten(name):
    options, call = ATTENTION[name]
    attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
    attention.query = nn.Parameter(torch.zeros(1, 2, 6))
    net = randomized(Other(lambda m, x: call(m.attention, x)[0].flatten(1), attention=attention))
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    jacobians = ["attention.query"] if name == "query" else []
    traced = name != "weights used"  # seen only from the result
    network = check(net, TOKENS, traced=traced, jacobians=jacobians)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before
    # Its layers are used inside torch's module, where K-FAC does not see them.
    assert not network.kronecker_layers()


def dot_product(bias=False, **options):
    """Attention by torch's function; with a parameter as mask."""

    def forward(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        if options.get("enable_gqa"):
            k, v = k[:, :1], v[:, :1]
        return F.scaled_dot_product_attention(q, k, v, **({"attn_mask": m.bias} if bias else options)).flatten(1)

    net = Other(forward, qkv=nn.Linear(6, 12))
    net.bias = nn.Parameter(torch.zeros(4, 4)) if bias else None
    return net


DOT_PRODUCTS = {
    "boolean mask": {"attn_mask": torch.ones(4, 4, dtype=torch.bool).tril(1)},
    "additive mask": {"attn_mask": rand(4, 4)},
    "parameter as mask": {"bias": True},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "shared keys": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", DOT_PRODUCTS.values(), ids=DOT_PRODUCTS)
def test_scaled_dot_product_attention(options):
    check(randomized(dot_product(**options)), TOKENS)


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False)
    rename = {
        f"0.layers.{i}.self_attn.qkv.{part}": f"0.layers.{i}.self_attn.in_proj_{part}"
        for i, part in itertools.product(range(2), ("weight", "bias"))
    }
    network = check(randomized(nn.Sequential(encoder, nn.Flatten())), TOKENS, rename=rename)
    assert {"0.layers.1.linear2", "0.layers.0.self_attn.qkv"} <= set(network.kronecker_layers())


# ---------------------------------------------------------------------------------------------- the function


def small_net():
    """Convolutions, a skip, a gate and a norm: nothing is folded, so that bits can be compared."""

    def forward(m, x):
        x = m.first(x).relu()
        x = x + F.silu(m.norm(m.second(x)))
        return torch.sigmoid(m.gate(x.mean((2, 3)))) * x.amax((2, 3))

    convolutions = {"first": nn.Conv2d(3, 4, 3, padding=1), "second": nn.Conv2d(4, 4, 3, padding=1, groups=2)}
    return randomized(Other(forward, **convolutions, norm=nn.GroupNorm(2, 4), gate=nn.Linear(4, 4)))


PARTS = {"head": [], "second": ["second"], "second and gate": ["second", "gate"], "norm": ["norm"]}


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_a_part_of_the_network(part):
    net, tangent_layers = small_net(), PARTS.get(part) or part
    names = ["norm.weight", "gate.weight", "norm.bias"]
    network = check(net, IMAGES, tangent_layers=tangent_layers, jacobians=names if part == "all" else [])
    if part in PARTS:
        assert {name.partition(".")[0] for name in network.names} == set(PARTS[part])
    # At zero it is the network, to the bit.
    with torch.no_grad():
        expected = F.linear(net(IMAGES), network.weight, network.bias)
    for gradients in (True, False):
        point = network.at(network.trunk(IMAGES), gradients)
        assert torch.equal(point.outputs, expected)
        assert torch.equal(point.outputs + point.jvp(torch.zeros(network.n_parameters).double()), expected)


def test_products_at_one_point():
    network, activations = linearized(small_net(), IMAGES)
    point, d, u = network.at(activations), rand(network.n_parameters), rand(3, OUTPUTS)
    # Each row has its own.
    rows = [network.at([z[i : i + 1] for z in activations]).jvp(d) for i in range(len(IMAGES))]
    assert_close(point.jvp(d), torch.cat(rows), 1e-13)
    # Gradients, where the caller has none; and evaluation without them.
    with torch.no_grad():
        assert torch.equal(network.at(activations).vjp(u), point.vjp(u))
    without = network.at(activations, gradients=False)
    assert not any(value.requires_grad for value in (without.features, without.outputs, without.jvp(d)))
    with pytest.raises(RuntimeError, match="gradients=False"):
        without.vjp(u)


def test_flat_layout():
    network, _ = linearized(small_net(), IMAGES, ["second", "gate"])
    shapes = {"second.weight": (4, 2, 3, 3), "second.bias": (4,), "gate.weight": (4, 4), "gate.bias": (4,)}
    assert network.names == list(shapes)
    assert list(network.slices) == [*shapes, "head.weight", "head.bias"]
    vector = torch.arange(network.n_parameters, dtype=torch.float64)
    body, weight, bias = network.views(vector)
    assert {n: tuple(p.shape) for n, p in body.items()} == shapes
    assert torch.equal(torch.cat([p.flatten() for p in [*body.values(), weight, bias]]), vector)
    body["gate.bias"].zero_()  # views, not copies
    assert vector[network.slices["gate.bias"]].count_nonzero() == 0
    # The parameters are those of the tail, and these alone have gradients.
    assert all(p.requires_grad for p in network.parameters)
    assert not any(p.requires_grad for p in network.trunk.parameters())
    assert set(network.kronecker_layers()) == {"second", "gate"}


# ------------------------------------------------------------------------------- networks that do not trace


def branching(activation=None):
    """Control flow that depends on the data."""

    def forward(m, x):
        x -= 0.5  # in place, in the caller's tensor
        h = m.norm(m.activation(m.first(input=x)))
        return m.second(h) if h.abs().sum() > 0 else h

    layers = {"first": nn.Linear(5, 6), "second": nn.Linear(6, 4), "norm": nn.LayerNorm(6)}
    return randomized(Other(forward, **layers, activation=activation or nn.Tanh()))


def attentive():
    def forward(m, x):
        return m.attention(x) if x.abs().sum() > 0 else x.flatten(1)

    return randomized(Other(forward, attention=self_attention(need_weights=False)))


LEAKY = Other(lambda m, x: F.relu6(x) + SLOPE * (x - x.clamp(0, 6)))  # of a ReLU6
UNTRACED = {
    "all": (branching(), VECTORS, {"jacobians": ["norm.weight", "second.bias"]}),
    "part": (branching(), VECTORS, {"tangent_layers": ["second"]}),
    "head": (branching(), VECTORS, {"tangent_layers": "head"}),
    "leaky": (branching(nn.ReLU6(inplace=True)), VECTORS, {"negative_slope": SLOPE, "expected": branching(LEAKY)}),
    "attention": (attentive(), TOKENS, {}),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_network_that_does_not_trace(name):
    net, x, options = UNTRACED[name]
    given = x.clone()
    network = check(net, given, traced=False, **options)
    assert torch.equal(given, x)
    if name == "attention":  # the projection is used without being called
        assert not network.kronecker_layers()
    if name == "part":
        assert network.names == ["second.weight", "second.bias"]
        calls = {layer: network.at((x,)).layer_calls(layer) for layer in ("first", "second", "norm")}
        shapes = {layer: [(*a.shape, *b.shape) for a, b in found] for layer, found in calls.items()}
        assert shapes == {"first": [(3, 5, 3, 6)], "second": [(3, 6, 3, 4)], "norm": []}


# ----------------------------------------------------------------------------------------------- precision


def test_single_precision():
    net = small_net()
    double, activations = linearized(net, IMAGES)
    d = rand(double.n_parameters)
    expected = double.at(activations).jvp(d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_network(net, IMAGES[:2].float(), "all")
    single = LinearizedNetwork(split, double.weight.float(), double.bias.float())
    tangent = single.at(split.trunk(IMAGES.float())).jvp(d.float())
    assert tangent.dtype == torch.float32
    assert next(net.parameters()).dtype == torch.float64
    assert_close(tangent.double(), expected, 1e-5)
