"""The last features of networks: classifiers are found and taken away, vectors are chosen from what is returned."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.networks import Other, uninitialized
from torch import nn

from sklearn_lqf.network.head import as_vectors

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))


def of_torchvision(name, **options):
    return lambda: uninitialized(name, **options)


def vision_transformer():
    net = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    net.heads.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))  # torchvision starts at zero
    return net


# name: (network, its classifier, features)
TORCHVISION = {
    "mobilenet_v3_small": (of_torchvision("mobilenet_v3_small"), "classifier.3", 1024),
    "squeezenet1_1": (of_torchvision("squeezenet1_1"), "classifier.1", 512),
    "googlenet": (of_torchvision("googlenet", init_weights=False), "fc", 1024),
    "vit": (vision_transformer, "heads.head", 8),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "name", "n_features"), TORCHVISION.values(), ids=TORCHVISION)
def test_heads_of_torchvision(make, name, n_features):
    net = make().eval()
    logits, last = net(IMAGES), net.get_submodule(name)
    features = as_vectors(net, IMAGES)(IMAGES)
    assert features.shape == (2, n_features)
    if isinstance(last, nn.Linear):  # on the features it gives the logits
        torch.testing.assert_close(last(features), logits)


BEHIND = {
    "nothing": [],
    "dropout": [nn.Dropout(), nn.Identity()],
    "ReLU": [nn.ReLU()],
    "ReLU in place": [nn.ReLU(inplace=True)],
}


@torch.no_grad()
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_heads_of_plain_modules(behind):
    first, last = nn.Linear(6, 5), nn.Linear(5, 4)
    for before, expected in (([first], first(VECTORS)), ([], VECTORS)):
        head = last if before else nn.Linear(6, 4)
        assert torch.equal(as_vectors(nn.Sequential(*before, head, *behind).eval(), VECTORS)(VECTORS), expected)


CONVOLUTIONS = {
    "one pixel": [nn.AvgPool2d(32), nn.Flatten()],
    "ReLU": [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "ReLU in place": [nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
}


@torch.no_grad()
@pytest.mark.parametrize("behind", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_as_head(behind):
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1), *behind).eval()
    expected = net[0](IMAGES).mean((2, 3))
    torch.testing.assert_close(as_vectors(net, IMAGES)(IMAGES), expected)


def two():
    return {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


REFUSED = {
    "scaled output": (Other(lambda m, x: m.a(x) * 2, **two()), "not its plain result"),
    "layer called twice": (Other(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)), r"'a' \(Linear\)"),
    "no layer": (nn.Flatten(), "has no layer"),
    "tokens": (Other(lambda m, x: m.a(x)[:, None], **two()), r"returns a tensor of shape \(2, 1, 4\)"),
    "not finite": (Other(lambda m, x: m.a(x) / 0, **two()), "not finite"),
    "subclass with another result": (Other(lambda m, x: m.a(x)[0], a=Pair(6, 4)), r"'a' \(Pair\)"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_vector_is_refused(net, message):
    with pytest.raises(ValueError, match=message):
        as_vectors(net.eval(), VECTORS)


@pytest.mark.parametrize(
    ("unpooled", "found"), [(lambda x: x, r"a tensor of shape \(2, 3, 32, 32\)"), (lambda x: (x, x), "tuple")]
)
def test_features_must_be_one_vector_for_each_image(unpooled, found):
    """The result of the head is pooled, its input is not."""

    def forward(m, x):
        x = m.a(x)
        return x.mean((2, 3)) if x.shape[1] == 4 else unpooled(x)

    net = Other(forward, a=nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(ValueError, match=rf"head 'a' must be one vector .* the network returns {found}"):
        as_vectors(net, IMAGES)


def body(**more):
    return {"a": nn.Linear(6, 5), "norm": nn.LayerNorm(5), **more}


def vector(m, x):
    return m.norm(m.a(x))


Named = namedtuple("Named", ["x", "tokens"])


@dataclass
class Record:
    logits: torch.Tensor
    hidden: torch.Tensor


B = {"b": nn.Linear(5, 4)}
TWO = {**B, "c": nn.Linear(5, 4)}
HEADS_TOO = {"b": nn.Linear(5, 4), "c": nn.Linear(5, 3)}
# name: a network whose vector is the one of `vector`
TAKEN = {
    "no classifier": Other(vector, **body()),
    "classifier": Other(lambda m, x: m.b(vector(m, x)), **body(**B)),
    "tuple of a named kind": Other(lambda m, x: Named(vector(m, x), x[:, None]), **body()),
    "scores and others": Other(lambda m, x: (m.b(vector(m, x)), x[:, None]), **body(**B)),
    "dict that names it": Other(lambda m, x: {"x": x, "pooler_output": vector(m, x)}, **body()),
    "nested": Other(lambda m, x: {"out": [{"features": vector(m, x)}], "x": x}, **body()),
    "map of one pixel": Other(lambda m, x: {"pooler_output": vector(m, x)[..., None, None], "x": x}, **body()),
    "dict of scores": Other(lambda m, x: {"logits": m.b(vector(m, x)), "x": x}, **body(**B)),
    "record of scores": Other(lambda m, x: Record(m.b(vector(m, x)), x), **body(**B)),
    "heads, averaged": Other(lambda m, x: (m.b(v := vector(m, x)) + m.c(v)) / 2, **body(**TWO)),
    "heads, several": Other(lambda m, x: (m.b(v := vector(m, x)), m.c(v)), **body(**HEADS_TOO)),
    "tokens": Other(lambda m, x: {"last_hidden_state": vector(m, x)[:, None].expand(-1, 3, -1)}, **body()),
}  # fmt: skip


@pytest.mark.parametrize("net", TAKEN.values(), ids=TAKEN)
def test_one_vector_for_each_image(net):
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        expected = vector(net, VECTORS)
        found = as_vectors(net, VECTORS)
        torch.testing.assert_close(found(VECTORS), expected)
        torch.testing.assert_close(copy.deepcopy(found)(VECTORS), expected)
    names = [name for name, _ in found.named_parameters()]
    assert "a.weight" in names  # nothing is renamed
    assert not {"b.weight", "c.weight"} & set(names)


# An embedding of norm one, to which its projection belongs, and a convolution of more than one pixel.
NO_CLASSIFIERS = [
    (Other(lambda m, x: F.normalize(m.a(x)), a=nn.Linear(6, 5)), VECTORS),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES),
]


@pytest.mark.parametrize(("net", "x"), NO_CLASSIFIERS)
def test_last_layers_that_are_no_classifier_stay(net, x):
    expected = net.eval()(x)
    assert torch.equal(as_vectors(net, x)(x), expected)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Other(lambda m, x: m.a(x).softmax(1), a=nn.Linear(6, 4)), "one vector for each image, or come from one"),
        (nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), r"'1' \(Softmax\)"),
        (Other(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), **two()), r"last layer evaluated is 'b'"),
        (Other(lambda m, x: {"u": m.a(x).tanh(), "v": m.b(x).tanh()[:, :3]}, **two()),
         r"it returns dict with \['u'\] of shape \(2, 4\), \['v'\] of shape \(2, 3\)\. Name the part"),
        (Other(lambda m, x: m.a(x)[:, None], **two()), r"returns a tensor of shape \(2, 1, 4\)\. Append the pooling"),
        (Other(lambda m, x: {}, **two()), "it returns dict. Name the part"),
        (nn.Sequential(nn.Tanh()), r"'0' \(Tanh\)"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_lists_what_was_found(net, message):
    with pytest.raises(ValueError, match=message):
        as_vectors(net.eval(), VECTORS)


class Several(nn.Module):
    """Vectors and tokens, one of them in a part of a part."""

    def forward(self, x):
        deep = {"x": 2 * x, "tokens": torch.stack([x, 3 * x], 1), "pair": (x, -x)}
        return {"low": x, "deep": deep, "map": x[:, None, :, None]}


@pytest.mark.parametrize(
    ("chosen", "factor"), [("low", 1), ("x", 2), (("deep", "x"), 2), (["deep", "tokens"], 2), (1, -1)]
)
def test_the_part_that_is_named_is_taken_as_it_is(chosen, factor):
    torch.testing.assert_close(as_vectors(Several(), VECTORS, chosen)(VECTORS), factor * VECTORS)


@pytest.mark.parametrize("chosen", ["deep", "map", 2, ("x", "deep"), "high"])
def test_a_part_that_is_no_vector_is_refused_with_what_there_is(chosen):
    with pytest.raises(ValueError, match=r"(?s)output=.*\['low'\] of shape \(2, 6\), \['deep'\]\['x'\]"):
        as_vectors(Several(), VECTORS, chosen)
