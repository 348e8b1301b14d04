"""K-FAC: factors, inverses and exactness against explicit Jacobians."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from support.oracle import as_matrix, gauss_newton, jacobian, layer_jacobians
from torch import Tensor, nn

from sklearn_lqf.paper.kfac import KFAC, HeadBlock, KroneckerBlock, Sizes, SmallBlock

F64 = torch.float64
Linear, Conv2d = partial(nn.Linear, dtype=F64), partial(nn.Conv2d, dtype=F64)
RIDGE = 0.3
WEIGHTS = torch.linspace(0.5, 1.5, 7, dtype=F64)

# torch says that asymmetric padding takes a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


@dataclass
class Case:
    """A layer with inputs, output gradients and weights of images."""

    layer: nn.Linear | nn.Conv2d
    inputs: list[Tensor]
    gradients: list[list[Tensor]]
    weights: Tensor

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.layer.parameters())

    def jacobians(self) -> Tensor:
        """Explicit Jacobians times roots of the weights, (B, K, G, o, m)."""
        j = layer_jacobians(self.layer, self.inputs, self.gradients, len(self.weights))
        return j * self.weights.sqrt().view(-1, 1, 1, 1, 1)

    def block(self, sizes: Sizes | None = None, parts: int = 1) -> KroneckerBlock:
        """The block of the layer, given the images in parts."""
        size, *bias = (p.numel() for p in self.layer.parameters())
        block = KroneckerBlock(
            self.layer, slice(0, size), slice(size, size + bias[0]) if bias else None, sizes or Sizes()
        )
        for rows in torch.arange(len(self.weights)).chunk(parts):
            part = self.part(int(rows[0]), int(rows[-1]) + 1)
            with torch.no_grad():
                block.update(part.inputs, part.gradients, part.weights)
        return block

    def part(self, start: int, stop: int) -> Case:
        """Some of the images."""
        part = self.mapped(lambda x: torch.cat(x.chunk(len(self.weights))[start:stop]))
        return replace(part, weights=self.weights[start:stop])

    def mapped(self, function) -> Case:
        """Inputs and gradients changed by a function."""
        gradients = [[function(g) for g in probe] for probe in self.gradients]
        return replace(self, inputs=[function(x) for x in self.inputs], gradients=gradients)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(len(shape)))


def make(layer, shape, calls=1, windows=1, images=3, probes=2) -> Case:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=F64)
    for p in layer.parameters():
        p.data = draw(p.shape)
    inputs = [draw(images * windows, *shape) for _ in range(calls)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        outputs = [layer(x).detach() for x in inputs]
    gradients = [[draw(o.shape) for o in outputs] for _ in range(probes)]
    return Case(layer, inputs, gradients, torch.rand(images, generator=generator, dtype=F64) + 0.5)


CASES = {
    "linear": make(Linear(5, 4), (5,)),
    "linear on tokens": make(Linear(5, 4), (7, 5)),
    "linear on few tokens": make(Linear(30, 20), (2, 30)),
    "linear on windows": make(Linear(5, 4), (3, 5), windows=4),
    "conv": make(Conv2d(3, 4, 3), (3, 7, 6)),
    "conv on few pixels": make(Conv2d(8, 9, 3, 2, 1), (8, 3, 3)),
    "conv oblong, dilated": make(Conv2d(3, 4, (3, 1), (1, 2), (0, 1), (2, 1), bias=False), (3, 7, 6)),
    "conv reflect": make(Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6)),
    "conv twice": make(Conv2d(3, 4, 3, padding=1), (3, 5, 5), calls=2),
    "conv on windows": make(Conv2d(3, 4, 3), (3, 5, 5), windows=2),
    "pixel conv": make(Conv2d(6, 5, 1, (2, 1), 1), (6, 5, 4)),
    "two groups": make(Conv2d(6, 8, 3, 2, 1, groups=2), (6, 7, 7)),
    "two groups of few pixels": make(Conv2d(20, 12, 1, groups=2), (20, 2, 1)),
    "large depthwise": make(Conv2d(3, 3, 9, padding=4, groups=3), (3, 6, 6)),
}
EXACT = {
    "small groups": make(Conv2d(6, 6, 1, groups=3), (6, 4, 4)),
    "depthwise": make(Conv2d(5, 5, 3, 2, 1, 2, groups=5), (5, 7, 6)),
    "depthwise same, even kernel": make(Conv2d(5, 5, 2, padding="same", groups=5), (5, 6, 6)),
    "depthwise wide, many positions": make(Conv2d(3, 3, (2, 5), 1, 2, groups=3, bias=False), (3, 6, 7)),
    "depth multiplier": make(Conv2d(5, 10, 3, (2, 1), (1, 2), groups=5), (5, 6, 6)),
    "depthwise twice": make(Conv2d(5, 5, 3, padding=1, groups=5), (5, 4, 4), calls=2),
    "depthwise on windows": make(Conv2d(5, 10, 3, padding=1, groups=5), (5, 4, 4), windows=3),
    "depthwise wide on windows": make(Conv2d(5, 5, (2, 5), padding=2, groups=5), (5, 4, 4), windows=3),
}
ALL = CASES | EXACT


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to rounding, relative to the largest element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=F64)


def applied(block: KroneckerBlock | SmallBlock | HeadBlock | KFAC, size: int) -> Tensor:
    """The matrix that a factorized block applies; nan where it writes nothing."""

    def apply(v: Tensor) -> Tensor:
        out = torch.full_like(v, torch.nan)
        block.apply(v, out)
        return out

    return as_matrix(block if isinstance(block, KFAC) else apply, size)


def inverse(block: KroneckerBlock | SmallBlock | HeadBlock, size: int, ridge: float = RIDGE) -> Tensor:
    block.factorize(ridge, F64)
    return applied(block, size)


def flat(blocks: Tensor, case: Case) -> Tensor:
    """Matrices of groups (G, o m, o m), the bias as last column, as one matrix for weight, then bias."""
    bias = case.layer.bias is not None
    index = torch.arange(case.size).view(-1, case.layer.weight[0].numel() + bias)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]]) if bias else index.flatten()
    return torch.block_diag(*blocks)[order][:, order]


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of the matrices of each group."""
    return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)])


def factors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """L (G, o, o), R (G, m, m) and tau (G,) by their definition."""
    j = case.jacobians()
    left, right = torch.einsum("bkgom,bkgpm->gop", j, j), torch.einsum("bkgom,bkgon->gmn", j, j)
    return left, right, j.square().sum((0, 1, 3, 4))


@pytest.mark.parametrize("name", ALL)
def test_factors_and_inverse_are_those_of_the_jacobians(name):
    case = ALL[name]
    left, right, tau = factors(case)
    j = case.jacobians().flatten(3)
    exact = torch.einsum("bkgx,bkgy->gxy", j, j)
    dense = exact if name in EXACT else kronecker(left / tau.view(-1, 1, 1), right)
    expected = flat(torch.linalg.inv(dense + RIDGE * eye(dense.shape[1])), case)
    assert case.block().trace == pytest.approx(float(tau.sum()), rel=1e-12)
    close(inverse(case.block(), case.size), expected)
    # However they are summed up: in pieces, in batches, in another format of memory.
    close(inverse(case.block(Sizes(chunk=1)), case.size), expected)
    last = case.mapped(lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    close(inverse(last.block(parts=2), case.size), expected)


def nystrom(matrix: Tensor, test: Tensor) -> Tensor:
    """The approximation by its definition, and what is left of the trace spread over what it does not span."""
    found = matrix @ test @ torch.linalg.inv(test.T @ matrix @ test) @ (matrix @ test).T
    basis = torch.linalg.qr(matrix @ test)[0]
    rest = (torch.trace(matrix) - torch.trace(found)) / (len(matrix) - test.shape[1])
    return found + rest * (eye(len(matrix)) - basis @ basis.T)


@pytest.mark.parametrize("whole", [3, 25, 512])  # both factors, the larger one or none is approximated
@pytest.mark.parametrize("name", ["linear on few tokens", "two groups"])
def test_large_factors_are_damped_alone_and_approximated(name, whole):
    case = CASES[name]
    block, (left, right, tau) = case.block(Sizes(diagonalized=0, whole=whole, rank=2)), factors(case)
    assert block.trace == pytest.approx(float(tau.sum()), rel=1e-12)
    for factor, size in ((block.left, block.o), (block.right, block.m)):
        assert factor.sum.shape[2] == (2 if size > whole else size)
    if block.left.test is not None:
        left = torch.stack([nystrom(x, block.left.test) for x in left])
    if block.right.test is not None:
        right = torch.stack([nystrom(x, block.right.test) for x in right])
    pi = (tau / block.m * block.o).sqrt().view(-1, 1, 1)  # mean eigenvalue of R over that of L / tau
    l_inverse = torch.linalg.inv(left / tau.view(-1, 1, 1) + RIDGE**0.5 / pi * eye(block.o))
    expected = flat(kronecker(l_inverse, torch.linalg.inv(right + RIDGE**0.5 * pi * eye(block.m))), case)
    found = inverse(block, case.size)
    close(found, expected)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_approximation_is_exact_up_to_its_rank_in_float32():
    case = CASES["linear on few tokens"]  # of ranks 12 and 6
    given = replace(case.mapped(Tensor.float), layer=nn.Linear(30, 20), weights=case.weights.float())
    expected = inverse(case.block(Sizes(diagonalized=0)), case.size)
    close(inverse(given.block(Sizes(diagonalized=0, whole=18, rank=14)), case.size), expected, 2e-4)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(diagonalized=0), Sizes(diagonalized=2, whole=2, rank=2)])
@pytest.mark.parametrize("name", ["linear on few tokens", "two groups", "depthwise"])
def test_singular_factors(name, sizes):
    case = ALL[name]
    dead = replace(case, gradients=[[torch.zeros_like(g) for g in p] for p in case.gradients]).block(sizes)
    assert dead.trace == 0.0
    close(inverse(dead, case.size), eye(case.size) / RIDGE)
    # Of one image, with a ridge below rounding errors: the inverse stays positive.
    block = case.part(0, 1).block(sizes)
    block.factorize(1e-40, F64)
    for v in rand(5, case.size):
        out = torch.empty_like(v)
        block.apply(v, out)
        assert 0 < float(v @ out) < float("inf")


@pytest.mark.parametrize("dense_max", [0, 512])
def test_small_block(dense_max):
    shapes, n, k = [(2, 3), (), (4,)], 5, 3  # a matrix, a scalar and a vector
    jacobians, weights = [rand(n, k, *shape) for shape in shapes], WEIGHTS[:n]
    block = SmallBlock([slice(4, 10), slice(12, 13), slice(0, 4)], torch.device("cpu"), dense_max)
    for part in (slice(0, 2), slice(2, n)):
        block.update([j[part] for j in jacobians], weights[part])
    dense = gauss_newton(torch.cat([j.reshape(n, k, -1) for j in jacobians], 2), weights)
    dense = dense if dense_max else torch.diag(dense.diagonal())
    assert block.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    own = [*range(4, 10), 12, *range(4)]
    close(inverse(block, 13)[own][:, own], torch.linalg.inv(dense + RIDGE * eye(11)))


@pytest.mark.parametrize("rows", [3, 7])  # fewer and more than there are columns
def test_head_block_is_exact(rows):
    x, weights = rand(rows, 4), WEIGHTS[:rows]
    dense = gauss_newton(jacobian(nn.Identity(), [], rand(3, 4), torch.zeros(3, dtype=F64), x), weights)
    block = HeadBlock(3, 4, slice(0, 12), slice(12, 15))
    for part in (slice(0, 2), slice(2, 6), slice(6, 7)):
        block.update(x[part], weights[part])
    assert block.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    close(inverse(block, 15), torch.linalg.inv(dense + RIDGE * eye(15)))


def preconditioner() -> KFAC:
    """A layer in slices 0..24, a small block in 24..30 and a head in 30..45."""
    layer = CASES["linear"].block()
    small = SmallBlock([slice(24, 28), slice(28, 30)], torch.device("cpu"))
    small.update([rand(3, 2, 4), rand(3, 2, 2)], torch.ones(3, dtype=F64))
    head = HeadBlock(3, 4, slice(30, 42), slice(42, 45))
    head.update(rand(6, 4), torch.ones(6, dtype=F64))
    return KFAC([layer, small, head])


def test_damping_spares_the_head():
    trace = sum(block.trace for block in preconditioner().blocks)
    assert preconditioner().output_trace == pytest.approx(trace / 3)
    plain, damped, higher = (
        applied(preconditioner().factorize(ridge, F64, damping=damping), 45)
        for ridge, damping in ((RIDGE, 0.0), (RIDGE, 2 * RIDGE), (3 * RIDGE, 0.0))
    )
    close(damped[:30, :30], higher[:30, :30])
    close(damped[30:, 30:], plain[30:, 30:])


BAD = [float("nan"), float("inf"), -1.0]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [("penalty", (x, F64)) for x in (0.0, *BAD)] + [("damping", (RIDGE, F64, x)) for x in BAD],
)
def test_penalty_and_damping_must_be_finite(message, arguments):
    with pytest.raises(ValueError, match=message):
        preconditioner().factorize(*arguments)


@pytest.mark.parametrize("features", [20, 600])  # whole factors, and approximated ones
def test_curvature_that_is_not_finite_is_refused(features):
    operator = preconditioner()
    operator.blocks[2].update(torch.full((1, 4), torch.inf, dtype=F64), torch.ones(1, dtype=F64))
    with pytest.raises(ValueError, match="finite"):
        operator.factorize(RIDGE, F64)
    block = KroneckerBlock(Linear(features, 3), slice(0, 3 * features), None)
    large, ones = torch.full((2, features), 1e200, dtype=F64), torch.ones(2, 3, dtype=F64)
    block.update([large], [[ones]], ones[:, 0])
    with pytest.raises(ValueError, match="overflow"):
        block.factorize(1.0, F64)
