"""Features of groups: tangents against gradients of single images, groups of networks, scale and directions."""

import numpy as np
import pytest
import torch
import torchvision
from support import networks
from support.data import tiny_net
from support.splits import rand
from torch import nn
from torch.func import functional_call

from sklearn_lqf.engine.features import Group, GroupFeatures, draw_directions, fit_standardization
from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.tracing import Split, split_network

F64 = torch.float64


class Twice(nn.Module):
    """A layer that is called twice, a depthwise one, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding="same")
        self.depthwise = nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        return torch.tanh(self.depthwise(x)).mean((2, 3))


# Windows, and rows of all images, are passed over, which a warning says.
pytestmark = pytest.mark.filterwarnings("ignore:Nothing is read of 2 of 5 stages")


class Windows(nn.Module):
    """Attention inside windows of tokens, which stand in the batch; a table of constants goes through a layer, too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.qkv = nn.Linear(6, 18)
        self.table = nn.Parameter(torch.randn(2, 3))
        self.bias = nn.Linear(3, 6)
        self.query = nn.Parameter(torch.randn(1, 1, 6))
        self.latent = nn.Linear(6, 6)
        self.tokens_first = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.embed(x))  # (B, 6, 4, 4)
        b = x.shape[0]
        x = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(b * 4, 4, 6)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = (torch.softmax(q @ k.transpose(1, 2), -1) @ v).reshape(b, 16, 6)
        x = x + self.tokens_first(x.transpose(0, 1)).transpose(0, 1)
        q = self.latent(self.query.expand(b, 1, 6))  # the same for all images
        return torch.tanh(self.out(x + q + self.bias(self.table).mean(0))).mean(1)


class Branching(nn.Module):
    """Control flow that depends on the data: it is not traced."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.act(self.conv(x))
        if bool((x < 0).any()):
            x = -x
        return torch.tanh(self.fc(x.mean((2, 3))))


def vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12
    )
    net.heads = nn.Identity()
    return net


def built(make) -> nn.Module:
    return networks.built(make).double().eval()


def prepared(net: nn.Module, images: torch.Tensor, layers="all", **options) -> tuple[Split, tuple[torch.Tensor, ...]]:
    """A split network and its trunk activations."""
    split = split_network(net, images[:2], layers, **options)
    with torch.no_grad():
        return split, tuple(split.trunk(images))


def grouped(split, activations, directions, size=None, seed=0, scales=None) -> GroupFeatures:
    return GroupFeatures(split, directions, size, seed, [z[:1] for z in activations], scales)


def oracle(net: nn.Module, images: torch.Tensor, directions: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Gradients of u_k . phi of single images by parameters, columns by parameter, then by direction."""
    rows = []
    for image in images:
        columns = []
        for name in names:
            weight = net.get_parameter(name)
            for u in directions:

                def output(w, u=u, name=name, image=image):
                    return functional_call(net, {name: w}, image[None])[0] @ u

                columns.append(torch.func.grad(output)(weight.detach()).flatten())
        rows.append(torch.cat(columns))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------- tangents


NETWORKS = pytest.mark.parametrize("make", [Twice, Windows, vit])
# Layers that are not called, see no image, or all images in each row.
NO_FEATURES = {Twice: ["unused"], Windows: ["bias", "latent", "tokens_first"], vit: []}


@pytest.mark.parametrize("read_stages", [False, True])
@NETWORKS
def test_exact_gradients_of_single_images(make, read_stages):
    """By the weights of layers, those of attention by any name: the inner products of all of them."""
    net, x = built(make), rand(3, 3, 8, 8)
    split, activations = prepared(net, x, read_stages=read_stages)
    width = split.parts[0].size
    directions = rand(2, width, seed=1)
    features = grouped(split, activations, directions)
    found = features(activations)
    assert found.shape == (3, sum(features.sizes)) and not found.requires_grad
    torch.testing.assert_close(found[:, :width], net(x).detach(), rtol=1e-10, atol=1e-12)
    layers = {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "self_attention" not in n}
    assert layers - set(features.layers) == set(NO_FEATURES[make])
    names = [f"{n}.weight" for n in layers & set(features.layers)]
    names += [n for n, _ in net.named_parameters() if "self_attention" in n and n.endswith("weight")]
    gradients = oracle(net, x, directions, names)
    found = found[:, -sum(g.size for g in features.groups if g.name.endswith("directions")) :]
    torch.testing.assert_close(found @ found.T, gradients @ gradients.T, rtol=1e-9, atol=1e-11)


def test_folded_normalization_and_an_untraced_network():
    net, x = tiny_net().double(), rand(3, 3, 12, 12)
    net = as_vectors(net, x)
    split, activations = prepared(net, x, layers=1)
    directions = rand(3, 16, seed=1)
    features = grouped(split, activations, directions)
    assert features.layers == ["block2.0"]
    expected = oracle(split.tail, activations[0], directions, ["block2.0.weight"])  # of the weight with the scale in it
    torch.testing.assert_close(features(activations)[:, 16:], expected, rtol=1e-9, atol=1e-11)

    net = built(Branching)
    with pytest.warns(UserWarning, match="cannot be traced"):
        split, activations = prepared(net, x)
    directions = rand(2, 5, seed=1)
    features = grouped(split, activations, directions)
    assert not split.traced and [g.name for g in features.groups] == ["last", "fc directions"]
    expected = torch.cat([net(x).detach(), oracle(net, x, directions, ["conv.weight", "fc.weight"])], 1)
    torch.testing.assert_close(features(activations), expected, rtol=1e-9, atol=1e-11)


def test_sketches_have_the_exact_kernel_in_expectation():
    net, x = built(Twice), rand(4, 3, 8, 8)
    split, activations = prepared(net, x)
    directions = rand(1, 4, seed=1) + 0.3 * rand(3, 4, seed=2)  # products of two directions must cancel
    exact = grouped(split, activations, directions)(activations)[:, 4:]
    found = [grouped(split, activations, directions, 2, seed)(activations)[:, 4:] for seed in range(100)]
    kernels = torch.stack([f @ f.T for f in found])
    error = kernels.std(0) / len(kernels) ** 0.5
    # Ten entries, each other than exact by more than 4 standard errors in one of 15000 choices of seeds.
    assert bool((abs(kernels.mean(0) - exact @ exact.T) < 4 * error).all())


@NETWORKS
def test_features_are_of_the_image_alone(make):
    net, x = built(make), rand(5, 3, 8, 8)
    split, activations = prepared(net, x, read_stages=True)
    features, again = (grouped(split, activations, rand(2, split.parts[0].size, seed=1), 3) for _ in range(2))
    whole = features(activations)
    assert torch.equal(again(activations), whole)
    alone = torch.cat([features([z[i : i + 1] for z in activations]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(features([z[order] for z in activations]), whole[order], rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- groups


def test_groups_of_a_small_network():
    net, x = tiny_net().double(), rand(3, 3, 12, 12)
    net = as_vectors(net, x)
    split, activations = prepared(net, x, layers=1, read_stages=True)
    features = grouped(split, activations, rand(2, 16, seed=1), 5)
    assert features.groups == [
        Group("last", (16,)),
        Group("block1.1 tangents", (8,)),  # the stem has the resolution of the first block, and its input is the image
        Group("block1.1 deviation", (8,)),
        Group("block2.1 tangents", (8,)),
        Group("block2.1 deviation", (8,)),
        Group("block2.1 directions", (25,), ((5, 5),)),
    ]
    assert features.layers == ["block2.0"]
    assert features(activations).shape == (3, sum(features.sizes))


@pytest.mark.parametrize("rows", [2, 4])
def test_statistics_are_of_what_has_a_row_for_each_image(rows):
    # A table of as many constants as there are images in the example, and windows, are no features of an image.
    net, x = built(Windows), rand(rows, 3, 8, 8)
    split = split_network(net, x, "all", read_stages=True)
    sizes = {n: sum(p.size for p in split.parts if p.name.endswith(n)) for n in ("tangents", "deviation")}
    assert sizes == {"tangents": 6 + 6, "deviation": 6 + 6}  # inputs of out and, one vector for all images, latent


def test_layers_without_tangents():
    x = rand(3, 3, 8, 8)
    wide = nn.Conv2d(300, 300, (3, 5), padding="same", groups=300)  # more than 4096 weights, in groups
    net = built(lambda: nn.Sequential(nn.Conv2d(3, 300, 1), wide, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert grouped(*prepared(net, x), rand(1, 300), 2).layers == ["0"]
    net = built(Twice)
    for layers, n_directions in (("head", 3), ("all", 0)):
        split, activations = prepared(net, x, layers)
        features = grouped(split, activations, rand(n_directions, 4, seed=1), 4)
        assert features.groups == [Group("last", (4,))] and features.layers == []
        torch.testing.assert_close(features(activations), net(x).detach(), rtol=1e-10, atol=1e-12)
        assert features.part_norms(torch.ones(5, 4)).tolist() == [1.0]  # of features that do not vary


def test_layers_of_a_stage_have_equal_shares_in_few_columns(monkeypatch):
    net, x = built(vit), rand(12, 3, 8, 8)
    split, activations = prepared(net, x, read_stages=True)
    plain = grouped(split, activations, rand(0, 8))
    network = plain.network_features(activations)
    scales = plain.part_norms(network)
    columns = np.split(network.numpy(), np.cumsum([p.size for p in split.parts])[:-1], 1)
    np.testing.assert_allclose(scales, [np.sqrt(c.var(0).sum()) for c in columns], rtol=1e-10)
    # Divided by the norms of the parts, each layer has variance 1; the columns of a group are those of its parts.
    expected = {g.name: [] for g in plain.groups}
    for part, values, norm in zip(split.parts, columns, scales.tolist(), strict=True):
        expected[part.name].append(values if part.name == "last" else values / norm)
    assert max(map(len, expected.values())) > 1
    found = grouped(split, activations, rand(0, 8), scales=scales)(activations)
    stacked = np.concatenate([np.concatenate(v, 1) for v in expected.values()], 1)
    np.testing.assert_allclose(found, stacked, rtol=1e-9, atol=1e-12)
    # Put together by chance into fewer columns, inner products have the same mean.
    monkeypatch.setattr("sklearn_lqf.engine.features._GROUP_COLUMNS", 7)
    few = [grouped(split, activations, rand(0, 8), seed=s, scales=scales) for s in range(150)]
    assert few[0].sizes == [8, *(7 for _ in few[0].sizes[1:])]  # the last features are never put together
    few_columns = [g(activations)[:3].split(g.sizes, 1) for g in few]
    for i, name in enumerate(expected):
        kernels = np.stack([(f[i] @ f[i].T).numpy() for f in few_columns])
        z = np.concatenate(expected[name], 1)[:3]
        error = kernels.std(0) / len(kernels) ** 0.5 + 1e-12
        # Six entries for each of few groups, fixed seeds: chance passes 4.5 standard errors for one in 6000 choices.
        assert (abs(kernels.mean(0) - z @ z.T) < 4.5 * error).all(), name


# ----------------------------------------------------------------------------------------------------- directions


def test_directions_have_the_covariance_of_the_features():
    x = rand(50, 4) @ rand(4, 4, seed=1) + 3
    u = draw_directions(x, 40000, torch.Generator().manual_seed(0)).numpy()
    covariance = np.cov(x.numpy().T, bias=True)
    # Sample covariances of 40000 vectors are off by about 1 / sqrt(40000) = 0.5 % of their trace.
    np.testing.assert_allclose(u.T @ u / len(u), covariance / np.trace(covariance), atol=0.02)
    np.testing.assert_allclose(np.square(u).sum(1).mean(), 1, rtol=1e-12)


def test_directions_are_seeded_and_zero_without_variance(global_generators_unchanged):
    x = rand(10, 4).float()
    a, b, c = (draw_directions(x, 3, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == F64
    assert not draw_directions(torch.full((10, 4), 0.5), 3, torch.Generator().manual_seed(0)).any()
    assert draw_directions(x, 0, torch.Generator()).shape == (0, 4)
    varies = x.clone()
    varies[:, 1] = 7
    assert not draw_directions(varies, 3, torch.Generator().manual_seed(0))[:, 1].any()


# ---------------------------------------------------------------------------------------------------------- scale

GROUPS = [Group("last", (3,)), Group("a directions", (2, 4, 1))]


def test_mean_zero_and_equal_shares():
    x = rand(30, 10).numpy() * np.geomspace(1e-4, 1e4, 10) + 5
    weights = np.arange(30) % 4
    found = fit_standardization(x, weights, GROUPS)
    z = found(x)
    np.testing.assert_allclose(np.average(z, axis=0, weights=weights), 0, atol=1e-6)  # of a spread of 1e-4 around 5
    norms = [np.average(np.square(p).sum(1), weights=weights) for p in np.split(z, [3, 5, 9], 1)]
    np.testing.assert_allclose(norms, [1, 1 / 3, 1 / 3, 1 / 3], rtol=1e-8)
    for part in (slice(0, 3), slice(5, 9)):  # proportions within a part are kept
        np.testing.assert_allclose(
            z[:, part].std(0) / z[:, part.start].std(), x[:, part].std(0) / x[:, part.start].std()
        )
    repeated = np.repeat(x, weights, 0)  # which weights stand for
    for piece in (1 << 30, 1 << 8):
        other = fit_standardization(repeated, np.ones(len(repeated)), GROUPS, piece=piece)
        np.testing.assert_allclose(other.shift, found.shift, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(other.scale, found.scale, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_parts_say_nothing_and_leave_their_share(dtype):
    x = rand(30, 10).numpy().astype(dtype)
    x[:, 3:5] = 0.1
    x[::2, 3:5] = np.nextafter(dtype(0.1), dtype(1))  # rounding of a batch of another size
    x[:, 9] = 0
    found = fit_standardization(x, np.ones(30), GROUPS)
    assert np.isinf(found.scale[[3, 4, 9]]).all() and found.shift.dtype == found.scale.dtype == np.float64
    z = found(x)
    assert not z[:, [3, 4, 9]].any() and z.dtype == np.float64
    np.testing.assert_allclose(np.square(z[:, 5:9]).sum(1).mean(), 1, rtol=1e-6)
    large = 1e4 + rand(200, 3).numpy()  # a digit is 1e-3 in float32
    seen = fit_standardization(large.astype(dtype), np.ones(200), GROUPS[:1])(large)
    np.testing.assert_allclose(np.square(seen).sum(1).mean(), 1, rtol=1e-2)
    alone = fit_standardization(np.full((4, 10), 0.3, dtype), np.ones(4), GROUPS)
    assert np.isinf(alone.scale).all() and not alone(np.ones((2, 10))).any()
