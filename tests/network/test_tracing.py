"""Tracing: functions are unchanged, and so is the caller's network."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import Other, uninitialized
from support.splits import (
    EXAMPLE,
    IMAGES,
    SLOPE,
    VECTORS,
    chain,
    of_type,
    operations,
    rand,
    randomized,
    split_checked,
)
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth

from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.tracing import split_network


def untidy(m, x):
    """What evaluation does not need, and operations in place."""
    torch._assert(x.shape[1] == 3, "three channels")
    y = m.drop2(m.act(m.depth(m.conv(x))))
    y = F.dropout(m.identity(y), 0.5, training=m.training)
    y = F.dropout(input=y, training=m.training)
    y = stochastic_depth(y, 0.5, "row", training=m.training)
    y += 1
    y -= 0.5
    y *= 2
    y /= 3
    y.add_(1)
    return m.drop(F.elu_(torch.sigmoid_(y) - 0.5)).flatten(1)


def test_untidy_network():
    layers = {"conv": nn.Conv2d(3, 4, 3), "act": nn.ReLU(inplace=True), "identity": nn.Identity()}
    drops = {"drop": nn.Dropout(0.5), "drop2": nn.Dropout2d(0.5), "depth": StochasticDepth(0.5, "row")}
    split = split_checked(randomized(Other(untidy, **layers, **drops)))
    names = [getattr(target, "__name__", str(target)) for target in operations(split, "call_function", "call_method")]
    assert not [n for n in names if n.endswith("_") or n in ("iadd", "isub", "imul", "itruediv", "_assert")]
    names += operations(split, "call_module")
    assert not [n for n in names if any(part in n for part in ("drop", "identity", "depth"))]
    assert not any(getattr(m, "inplace", False) for m in split.tail.modules())


def relies_on_place(activation, part=lambda x: x):
    """A network that drops the activation's result: its input has been changed."""

    def forward(m, x):
        x = m.layer(x)
        m.activation(part(x))
        return x * 2

    net = Other(forward, layer=nn.Linear(6, 4))
    net.activation = activation
    return net


IN_PLACE = {
    "module": nn.ReLU(inplace=True),
    "function": lambda x: F.relu(x, inplace=True),
    "positional": lambda x: F.relu(x, True),
    "function with underscore": torch.relu_,
    "method": lambda x: x.relu_(),
}


@pytest.mark.parametrize("activation", IN_PLACE.values(), ids=IN_PLACE)
def test_operations_in_place_are_followed(activation):
    net = randomized(relies_on_place(activation))
    assert split_checked(net, x=VECTORS).traced
    assert split_network(net, VECTORS, "all", SLOPE).swapped == 1


def alias(m, x):
    """What is changed has a second name."""
    x = same = m.a(x)
    rows = count = x.shape[1]
    rows += 1
    x += rows
    return same * count


@pytest.mark.parametrize(
    "net",
    [
        relies_on_place(lambda x: x.relu_(), lambda x: x[:, :2]),  # a view of the tensor that is used later
        relies_on_place(nn.ReLU(inplace=True), lambda x: x.view(-1)),
        relies_on_place(lambda x: x.zero_()),  # nothing computes the same out of place
        Other(alias, a=nn.Linear(6, 4)),
        Other(lambda m, x: m.a(x) if x.shape[0] > 2 else m.a(x) + 0, a=nn.Linear(6, 4)),  # by the number of images
    ],
)
def test_what_is_not_traced(net):
    with pytest.warns(UserWarning, match="cannot be traced"):
        assert not split_checked(randomized(net), x=VECTORS).traced


def test_leaky_form_of_what_must_work_in_place():
    net = randomized(relies_on_place(nn.ReLU(inplace=True), lambda x: x.view(-1)))
    with (
        pytest.warns(UserWarning, match="cannot be traced"),
        pytest.raises(ValueError, match=r"'activation' works in place, .* Set negative_slope=0"),
    ):
        split_network(net, VECTORS, "all", SLOPE)


def everything():
    """A network that each pass works on."""
    attention = nn.MultiheadAttention(9, 3, batch_first=True)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.Dropout(), nn.Flatten(2),
        Other(lambda m, x: m.attention(x, x, x, need_weights=False)[0].mean(1), attention=attention), nn.Linear(9, 4),
    )  # fmt: skip


def snapshot(net):
    return [
        (
            name, type(m), m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._forward_pre_hooks),
            [(n, id(p), p._version, p.requires_grad, p.dtype, p.device) for n, p in m.named_parameters()],
            [(n, id(b), b._version) for n, b in m.named_buffers()],
        )
        for name, m in net.named_modules()
    ]  # fmt: skip


def test_the_module_and_the_generator_are_untouched():
    net = everything().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = EXAMPLE.float()
    before, example, random = snapshot(net), x.clone(), torch.get_rng_state()
    split = split_network(net, x, 1, SLOPE)
    with pytest.raises(ValueError, match="no module"):
        split_network(net, x, ["nothing"])
    with pytest.raises(ValueError, match="cannot be evaluated"):
        as_vectors(net, x[:, :1])
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(net) == before
    assert torch.equal(x, example)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    parts = (split.trunk, split.tail)
    parameters = [p for part in parts for p in part.parameters()]
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in parameters}
    assert not any(m.training for part in parts for m in part.modules() if not list(m.children()))


def test_input_that_the_network_changes_in_place():
    net = Other(lambda m, x: m.layer(x.sub_(1).mul_(2)), layer=nn.Linear(6, 4))
    example = VECTORS.clone()
    split = split_network(randomized(net), example, "all")
    torch.testing.assert_close(split.tail(*split.trunk(example)), net(VECTORS.clone()))
    assert torch.equal(example, VECTORS)


def test_input_of_the_wrong_size():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    for refuse in (as_vectors, split_network):
        with pytest.raises(ValueError, match=r"input of shape \(3, 16, 16\) .*set image_size"):
            refuse(net.eval(), torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"input of shape \(6,\): ") as error:
        split_network(nn.Linear(5, 4), VECTORS)
    assert "image_size" not in str(error.value)


def test_timm_same_padding():
    timm = pytest.importorskip("timm")
    conv = timm.layers.Conv2dSame
    layers = [conv(3, 4, 3, stride=2), conv(4, 4, (3, 5), stride=2), conv(4, 4, 3, 2, dilation=2, groups=4)]
    x = rand(3, 3, 45, 45)  # the padding is one and two on all sides, then larger on the right
    split = split_checked(randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())), x=x)
    assert split.traced
    assert not of_type(split, conv)
    assert len(of_type(split, nn.Conv2d)) == 3


def test_timm_norm_with_activation():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3), norm(4, apply_act=False), timm.layers.LayerNorm2d(4)]
    net = nn.Sequential(*layers, nn.Flatten())
    split = split_checked(randomized(net))
    assert split.folded == 2
    assert not of_type(split, norm)
    assert split_network(net, EXAMPLE, "all", SLOPE).swapped == 1


def test_a_network_of_torchvision():
    x = rand(3, 3, 40, 40)
    net = randomized(uninitialized("mobilenet_v3_small"), by_fan=True)
    net = as_vectors(net, x)
    split = split_checked(net, 1, x=x, tolerance=1e-9)
    assert split.traced
    assert len(split.trunk(x)) == 1
    assert not of_type(split, nn.BatchNorm2d)


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
    assert split_checked(randomized(ByShape()), tangent_layers).traced


def test_faults_of_the_package_are_no_reason_not_to_trace(monkeypatch):
    def fail(*args):
        raise TypeError("a fault")

    monkeypatch.setattr("sklearn_lqf.network.tracing.add_readout", fail)
    with pytest.raises(TypeError, match="a fault"):
        split_network(chain(), IMAGES)


def test_stages_in_wrappers():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    for _ in range(2):
        net = Other(lambda m, x: m.inner(x), inner=net)
    split = split_checked(randomized(net), 1, x=VECTORS)
    assert len(split.stages) == 3
    assert split.tangent == ["inner.inner.2.0.weight", "inner.inner.2.0.bias"]
