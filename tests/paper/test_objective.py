"""The quadratic and its curvature against dense Jacobians of the plain network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from support.networks import Other
from support.oracle import as_matrix, gauss_newton, jacobian
from support.splits import rand
from torch import Tensor, nn

from sklearn_lqf.network.linearize import LinearizedNetwork
from sklearn_lqf.network.tracing import split_network
from sklearn_lqf.paper.kfac import KFAC, SmallBlock
from sklearn_lqf.paper.objective import Budget, Quadratic, build_kfac
from sklearn_lqf.paper.solvers import pcg

F64 = torch.float64
N, C = 11, 3
# In units of the mean squared norm of the Jacobian of an output: penalty, and damping, which saves iterations.
PENALTY, DAMPING = 0.05, 0.5


def convolutional() -> nn.Module:
    """Strided, depthwise, grouped and pointwise convolutions, pooling and a Linear; 156 parameters."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.SiLU(),
        nn.Conv2d(4, 4, (1, 3), padding="same", groups=2), nn.LeakyReLU(0.1),
        nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.GELU(),
    )  # fmt: skip


def tokens() -> nn.Module:
    """Parameters outside Linear and Conv2d: a position embedding, a scalar and LayerNorm."""

    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2) + m.position  # (B, T, 5)
        return F.gelu(m.mix(m.scale * m.norm(x))).mean(1)

    net = Other(forward, patches=nn.Conv2d(2, 5, 4, 4), norm=nn.LayerNorm(5), mix=nn.Linear(5, 4))
    net.position, net.scale = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.ones(()))
    return net


def uncommon() -> nn.Module:
    """A Linear twice on windows of an image, two on tokens before images, and one that is read but not called."""

    def forward(m, x):
        x = torch.tanh(m.stem(x.mean(1)))  # (B, 8, 4)
        x = torch.tanh(m.windows(torch.tanh(m.windows(x.reshape(-1, 2, 4))))).reshape(-1, 8, 4)
        x = torch.tanh(m.turned(x.transpose(0, 1)).transpose(0, 1))
        x = torch.tanh(m.odd(x[:, 1:].transpose(0, 1)).transpose(0, 1))  # an odd number of tokens
        return torch.tanh(F.linear(x, m.read.weight, m.read.bias)).mean(1)

    names = ("windows", "turned", "odd", "read")
    return Other(forward, stem=nn.Linear(8, 4), **{name: nn.Linear(4, 4) for name in names})


def outside() -> nn.Module:
    """A layer whose weight has a second part in the output, and a depthwise one."""

    def forward(m, x):
        return m.last(m.linear(m.depthwise(x).tanh().mean((2, 3))).tanh() @ m.linear.weight)

    return Other(forward, depthwise=nn.Conv2d(2, 2, 3, groups=2), linear=nn.Linear(2, 4), last=nn.Linear(2, 2))


NETWORKS = {f.__name__: f for f in (convolutional, tokens, uncommon, outside)}


@dataclass
class Problem:
    """A linearized network with data, and its dense Jacobian."""

    network: LinearizedNetwork
    inputs: tuple[Tensor, ...]
    j: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def unit(self) -> float:
        return float((self.weights.view(-1, 1, 1) * self.j.square()).sum() / (C * self.weights.sum()))

    @property
    def alpha(self) -> float:
        return PENALTY * self.unit

    def batches(self, sizes: Sequence[int] | int = 4) -> list[tuple[Tensor, ...]]:
        return list(zip(*(z.split(sizes) for z in self.inputs), strict=True))

    def quadratic(self, sizes: Sequence[int] | int = 4, **options) -> Quadratic:
        return Quadratic(self.network, self.batches(sizes), self.targets, self.weights, self.alpha, **options)

    def kfac(self, sizes: Sequence[int] | int = 4, probes: Tensor | None = None, **options) -> KFAC:
        probes = torch.eye(C, dtype=F64) if probes is None else probes
        return build_kfac(self.network, self.batches(sizes), self.weights, probes, **options)

    def preconditioner(self, sizes: Sequence[int] | int = 4, **options) -> KFAC:
        return self.kfac(sizes, **options).factorize(DAMPING * self.unit, F64)

    def hessian(self) -> Tensor:
        return gauss_newton(self.j, self.weights) + self.alpha * torch.eye(self.network.n_parameters, dtype=F64)

    def rhs(self) -> Tensor:
        return torch.einsum("n,ncp,nc->p", self.weights, self.j, self.targets)


def make(name: str, tangent_layers="all") -> Problem:
    module = NETWORKS[name]().double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=F64) * 0.5
    x, targets, weights = rand(N, 2, 8, 8, seed=2), rand(N, C, seed=3), torch.arange(N, dtype=F64) % 3 + 0.5
    split = split_network(module, rand(2, 2, 8, 8, seed=4), tangent_layers)
    weight, bias = rand(C, split.n_features, seed=5), rand(C, seed=6)
    network = LinearizedNetwork(split, weight, bias)
    inputs = tuple(z.detach() for z in split.trunk(x))
    return Problem(network, inputs, jacobian(module, network.names, weight, bias, x), targets, weights)


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request) -> Problem:
    return make(request.param)


@pytest.fixture(scope="module")
def conv() -> Problem:
    return make("convolutional")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_products_equal_the_dense_quadratic(problem):
    quadratic, d = problem.quadratic([1, 4, 6]), rand(problem.network.n_parameters, seed=7)
    before = d.clone()
    close(quadratic.rhs(), problem.rhs())
    close(quadratic.matvec(d), problem.hessian() @ d)
    close(torch.stack([quadratic.batch_matvec(k, d) for k in range(3)]).mean(0), problem.hessian() @ d)
    assert torch.equal(d, before)
    loss = (problem.weights.unsqueeze(1) * (problem.j @ d - problem.targets).square()).sum()
    assert quadratic.value(d) == pytest.approx(float(loss + problem.alpha * d.square().sum()), rel=1e-12)


@pytest.mark.parametrize(("kept", "counts"), [(0, [3, 6, 9, 12]), (1, [3, 5, 7, 9]), (3, [3, 3, 3, 3])])
def test_points_are_kept_within_the_memory_meant_for_them(conv, kept, counts, monkeypatch):
    """How often the tail has been evaluated on three batches, after each of three products and a value."""
    one, size = conv.network.at(conv.batches(1)[0]).nbytes, conv.network.at(conv.batches()[0]).nbytes
    assert conv.inputs[0][:1].numel() * 8 < one < size <= 4 * one  # grows with the rows
    seen, primal, quadratic = [], conv.network.tail.primal, conv.quadratic(kept=kept * size)
    monkeypatch.setattr(conv.network.tail, "primal", lambda z: (seen.append(1), primal(z))[1])
    d, found = rand(conv.network.n_parameters, seed=7), []
    for _ in range(3):
        close(quadratic.matvec(d), conv.hessian() @ d)
        found.append(len(seen))
    quadratic.value(d)
    assert [*found, len(seen)] == counts


def test_head_alone_is_ridge():
    problem = make("convolutional", "head")
    assert problem.network.names == []
    quadratic, kfac = problem.quadratic(), problem.kfac().factorize(problem.alpha, F64)
    result = pcg(quadratic.matvec, quadratic.rhs(), kfac, 1e-12, 2000)
    assert result.n_iter == 1  # the curvature of the head is exact
    x = torch.cat([problem.inputs[0], torch.ones(N, 1, dtype=F64)], 1)  # the bias is penalized, as a weight
    ridge = Ridge(problem.alpha, fit_intercept=False).fit(x, problem.targets, problem.weights)
    _, weight, bias = problem.network.views(result.x)
    close(torch.cat([weight, bias.unsqueeze(1)], 1), torch.from_numpy(ridge.coef_), 1e-8)


def test_kfac_has_the_trace_and_is_symmetric_positive_definite_and_owns_every_parameter_once(problem):
    operator, size = problem.kfac(), problem.network.n_parameters
    expected = (problem.weights.view(-1, 1, 1) * problem.j.square()).sum()
    assert operator.trace == pytest.approx(float(expected), rel=1e-10)
    dense = as_matrix(operator.factorize(DAMPING * problem.unit, F64), size)
    close(dense, dense.T)
    assert float(torch.linalg.eigvalsh(dense).min()) > 0
    covered = torch.zeros(size)
    for block in operator.blocks:
        out = torch.full((size,), torch.nan, dtype=F64)
        block.apply(rand(size), out)
        covered += out.isfinite()
    assert bool((covered == 1).all())


def check_small_blocks(problem: Problem, names: list[str], expected: Tensor, sizes: int = 4, **options) -> None:
    """The blocks outside Linear and Conv2d have these parameters and are those of a dense matrix."""
    starts = {s.start: name for name, s in problem.network.slices.items()}
    blocks = [b for b in problem.kfac(sizes, **options).blocks if isinstance(b, SmallBlock)]
    assert sorted(",".join(starts[s.start] for s in b.slices) for b in blocks) == names
    for block in blocks:
        own = torch.cat([torch.arange(s.start, s.stop) for s in block.slices])
        close(block.block, expected[own][:, own])


SMALL = {
    "tokens": ["norm.weight,norm.bias", "position", "scale"],
    # Layers whose rows are not images, or which are read and not called.
    "uncommon": ["odd.weight,odd.bias", "read.weight,read.bias", "turned.weight,turned.bias"],
}


@pytest.mark.parametrize("name", SMALL)
def test_other_parameters_have_exact_blocks(name):
    problem = make(name)
    check_small_blocks(problem, SMALL[name], gauss_newton(problem.j, problem.weights))


@pytest.mark.parametrize("sizes", [4, 1])  # with one image a batch, some batches have none of them
def test_other_parameters_are_estimated_from_some_images(sizes):
    problem = make("tokens")
    problem.weights[[1, 7]] = 0
    chosen = torch.tensor([0, 3, 5, 8])  # evenly spread over those with a weight
    scale = problem.weights.sum() / problem.weights[chosen].sum()
    estimate = gauss_newton(problem.j[chosen], problem.weights[chosen] * scale)
    check_small_blocks(problem, SMALL["tokens"], estimate, sizes, budget=Budget(other_rows=4))


@pytest.mark.parametrize("limit", ["gradients", "other_elements", "other_products"])
def test_limits_of_memory_do_not_change_the_curvature(limit):
    problem = make("tokens")
    d = rand(problem.network.n_parameters, seed=7)
    close(problem.preconditioner(N, budget=Budget(**{limit: 1}))(d), problem.preconditioner(N)(d))


def test_probes_may_differ_between_rows(conv):
    """The curvature of the layers is that along the probes; that of the head is exact."""
    probes, start = rand(2, N, C, seed=11), conv.network.slices["head.weight"].start
    along = torch.einsum("knc,ncp->knp", probes, conv.j[:, :, :start])
    layers, head = (
        torch.einsum("n,knp->", conv.weights, j.square()) for j in (along, conv.j[:, :, start:].transpose(0, 1))
    )
    assert conv.kfac(probes=probes).trace == pytest.approx(float(layers + head), rel=1e-10)
