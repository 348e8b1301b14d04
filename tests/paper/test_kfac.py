"""K-FAC: factors, inverses and exactness against explicit Jacobians."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from support.oracle import as_matrix, gauss_newton, jacobian, layer_jacobians
from torch import Tensor, nn

from sklearn_lqf.paper import kfac
from sklearn_lqf.paper.kfac import KFAC, HeadBlock, KroneckerBlock, SmallBlock

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

    def jacobians(self) -> Tensor:
        """Explicit Jacobians times roots of the weights, (B, K, G, o, m)."""
        j = layer_jacobians(self.layer, self.inputs, self.gradients, len(self.weights))
        return j * self.weights.sqrt().view(-1, 1, 1, 1, 1)

    def empty(self) -> KroneckerBlock:
        size, *bias = (p.numel() for p in self.layer.parameters())
        return KroneckerBlock(self.layer, slice(0, size), slice(size, size + bias[0]) if bias else None)

    def feed(self, block: KroneckerBlock) -> KroneckerBlock:
        with torch.no_grad():
            block.update(self.inputs, self.gradients, self.weights)
        return block

    def block(self) -> KroneckerBlock:
        return self.feed(self.empty())

    def part(self, start: int, stop: int) -> Case:
        """Some of the images."""

        def rows(x: Tensor) -> Tensor:
            return torch.cat(x.chunk(len(self.weights))[start:stop])

        gradients = [[rows(g) for g in probe] for probe in self.gradients]
        return Case(self.layer, [rows(x) for x in self.inputs], gradients, self.weights[start:stop])


def make(layer, shape, calls=1, windows=1, images=3, probes=2) -> Case:
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.randn, generator=generator, dtype=F64)
    for p in layer.parameters():
        p.data = rand(p.shape)
    inputs = [rand(images * windows, *shape) for _ in range(calls)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        outputs = [layer(x).detach() for x in inputs]
    gradients = [[rand(o.shape) for o in outputs] for _ in range(probes)]
    return Case(layer, inputs, gradients, torch.rand(images, generator=generator, dtype=F64) + 0.5)


CASES = {
    "linear": make(Linear(5, 4), (5,)),
    "linear without bias": make(Linear(5, 4, bias=False), (5,)),
    "linear on tokens": make(Linear(5, 4), (7, 5)),
    "linear on a grid": make(Linear(5, 4), (3, 2, 5)),
    "linear on few tokens": make(Linear(30, 20), (2, 30)),
    "linear wide": make(Linear(3, 7), (5, 3)),
    "linear twice": make(Linear(5, 4), (7, 5), calls=2),
    "linear on windows": make(Linear(5, 4), (3, 5), windows=4),
    "conv": make(Conv2d(3, 4, 3), (3, 7, 6)),
    "conv without bias": make(Conv2d(3, 4, 3, bias=False), (3, 6, 6)),
    "conv strided": make(Conv2d(3, 4, 3, 2, 1), (3, 8, 7)),
    "conv on few pixels": make(Conv2d(8, 9, 3, 2, 1), (8, 3, 3)),
    "conv dilated": make(Conv2d(3, 4, 3, 1, 2, dilation=2), (3, 6, 6)),
    "conv oblong": make(Conv2d(3, 4, (3, 1), (1, 2), (0, 1), (2, 1)), (3, 7, 6)),
    "conv same": make(Conv2d(3, 4, 3, padding="same"), (3, 6, 6)),
    "conv same, even kernel": make(Conv2d(3, 4, (4, 2), padding="same"), (3, 6, 6)),
    "conv valid": make(Conv2d(3, 4, 3, padding="valid"), (3, 6, 6)),
    "conv reflect": make(Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6)),
    "conv circular": make(Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "conv replicate": make(Conv2d(3, 4, 3, padding=(1, 0), padding_mode="replicate"), (3, 5, 6)),
    "conv twice": make(Conv2d(3, 4, 3, padding=1), (3, 5, 5), calls=2),
    "conv on windows": make(Conv2d(3, 4, 3), (3, 5, 5), windows=2),
    "pixel conv": make(Conv2d(6, 5, 1), (6, 4, 5)),
    "pixel conv strided": make(Conv2d(6, 5, 1, (2, 1), 1, bias=False), (6, 5, 4)),
    "two groups": make(Conv2d(6, 8, 3, 2, 1, groups=2), (6, 7, 7)),
    "two groups of pixels": make(Conv2d(20, 12, 1, groups=2), (20, 3, 3)),
    "large depthwise": make(Conv2d(3, 3, 9, padding=4, groups=3), (3, 6, 6)),
}
EXACT = {
    "small groups": make(Conv2d(6, 6, 1, groups=3), (6, 4, 4)),
    "depthwise": make(Conv2d(5, 5, 3, 2, 1, groups=5), (5, 6, 7)),
    "depthwise without bias": make(Conv2d(5, 5, 3, groups=5, bias=False), (5, 6, 6)),
    "depthwise dilated": make(Conv2d(5, 5, 3, 1, 2, 2, groups=5), (5, 7, 6)),
    "depthwise same": make(Conv2d(5, 5, 3, padding="same", groups=5), (5, 6, 6)),
    "depthwise same, even kernel": make(Conv2d(5, 5, 2, padding="same", groups=5), (5, 6, 6)),
    "depthwise wide": make(Conv2d(5, 5, (2, 5), 2, 2, groups=5), (5, 6, 7)),
    "depthwise wide, many positions": make(Conv2d(3, 3, (2, 5), 1, 2, groups=3, bias=False), (3, 6, 7)),
    "depthwise reflect": make(Conv2d(5, 5, 3, padding=1, padding_mode="reflect", groups=5), (5, 6, 6)),
    "depth multiplier": make(Conv2d(5, 10, 3, (2, 1), (1, 2), groups=5), (5, 6, 6)),
    "depthwise twice": make(Conv2d(5, 5, 3, padding=1, groups=5), (5, 4, 4), calls=2),
    "depthwise on windows": make(Conv2d(5, 10, 3, padding=1, groups=5), (5, 4, 4), windows=3),
    "depthwise wide on windows": make(Conv2d(5, 5, (2, 5), padding=2, groups=5), (5, 4, 4), windows=3),
}
ALL = CASES | EXACT


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to rounding, relative to the largest element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def close_factors(found: KroneckerBlock, expected: KroneckerBlock) -> None:
    for a, b in zip(found._sums, expected._sums, strict=True):
        close(a, b, 1e-12)


def applied(block: KroneckerBlock | SmallBlock | HeadBlock | KFAC, size: int) -> Tensor:
    """The matrix that a factorized block applies; nan where it writes nothing."""

    def apply(v: Tensor) -> Tensor:
        out = torch.full_like(v, torch.nan)
        block.apply(v, out)
        return out

    return as_matrix(block if isinstance(block, KFAC) else apply, size)


def flat(blocks: Tensor, o: int, m: int, bias: bool) -> Tensor:
    """Matrices of groups (G, o m, o m), the bias as last column, as one matrix for weight, then bias."""
    index = torch.arange(len(blocks) * o * m).view(-1, m)
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


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=F64)


# ------------------------------------------------------------------------------------------------ factors


@pytest.mark.parametrize("name", ALL)
def test_factors_and_inverse_are_those_of_the_jacobians(name, monkeypatch):
    case, block = ALL[name], ALL[name].block()
    left, right, tau = factors(case)
    assert block.exact == (name in EXACT)
    assert block.trace == pytest.approx(float(tau.sum()), rel=1e-12)
    if block.exact:
        j = case.jacobians().flatten(3)
        dense = torch.einsum("bkgx,bkgy->gxy", j, j)
        close(block.block, dense)
    else:
        close(block.left.sum, left)
        close(block.right.sum, right)
        dense = kronecker(left / tau.view(-1, 1, 1), right)
    expected = flat(torch.linalg.inv(dense + RIDGE * eye(dense.shape[1])), block.o, block.m, block.bias is not None)
    block.factorize(RIDGE, F64)
    close(applied(block, len(expected)), expected)
    # However they are summed up.
    expected = case.block()
    monkeypatch.setattr(kfac, "_CHUNK", 1)
    for by_gram in (True, False):
        monkeypatch.setattr(KroneckerBlock, "_prefers_gram", lambda *_, by_gram=by_gram: by_gram)
        close_factors(case.block(), expected)


@pytest.mark.parametrize(
    "name", ["conv strided", "two groups", "depthwise", "linear on windows", "depthwise on windows"]
)
def test_batches_add_up_in_any_memory_format(name):
    def last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    case, block = ALL[name], ALL[name].empty()
    for part in (case.part(0, 1), case.part(1, 3)):
        gradients = [[last(g) for g in probe] for probe in part.gradients]
        replace(part, inputs=[last(x) for x in part.inputs], gradients=gradients).feed(block)
    close_factors(block, case.block())


# ----------------------------------------------------------------------------------------------- inverses


LOW_RANK = {"_WHOLE_MAX": 2, "_RANK": 2, "_EIGH_MAX": 2}


def limited(monkeypatch, limits: dict[str, int]) -> None:
    for constant, value in limits.items():
        monkeypatch.setattr(kfac, constant, value)


def nystrom(matrix: Tensor, test: Tensor) -> Tensor:
    """The approximation by its definition, and what is left of the trace spread over what it does not span."""
    found = matrix @ test @ torch.linalg.inv(test.T @ matrix @ test) @ (matrix @ test).T
    basis = torch.linalg.qr(matrix @ test)[0]
    rest = (torch.trace(matrix) - torch.trace(found)) / (len(matrix) - test.shape[1])
    return found + rest * (eye(len(matrix)) - basis @ basis.T)


@pytest.mark.parametrize("whole_max", [3, 6, 8, 512])  # both factors, the left, the right one or none is approximated
@pytest.mark.parametrize("by_gram", [True, False])
@pytest.mark.parametrize("name", ["linear on tokens", "two groups", "linear wide", "large depthwise"])
def test_large_factors_are_damped_alone_and_approximated(name, by_gram, whole_max, monkeypatch):
    limited(monkeypatch, {"_WHOLE_MAX": whole_max, "_RANK": 2, "_EIGH_MAX": 0})
    monkeypatch.setattr(KroneckerBlock, "_prefers_gram", lambda self, positions, probes: by_gram)
    block, (left, right, tau) = CASES[name].block(), factors(CASES[name])
    assert block.trace == pytest.approx(float(tau.sum()), rel=1e-12)
    sizes = [2 if n > whole_max else n for n in (block.o, block.m)]
    assert [f.sum.shape[2] for f in (block.left, block.right)] == sizes
    if block.left.test is not None:
        left = torch.stack([nystrom(x, block.left.test) for x in left])
    if block.right.test is not None:
        right = torch.stack([nystrom(x, block.right.test) for x in right])
    pi = (tau / block.m * block.o).sqrt().view(-1, 1, 1)  # mean eigenvalue of R over that of L / tau
    l_inverse = torch.linalg.inv(left / tau.view(-1, 1, 1) + RIDGE**0.5 / pi * eye(block.o))
    dense = kronecker(l_inverse, torch.linalg.inv(right + RIDGE**0.5 * pi * eye(block.m)))
    expected = flat(dense, block.o, block.m, block.bias is not None)
    block.factorize(RIDGE, F64)
    found = applied(block, len(expected))
    close(found, expected)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_approximation_is_exact_up_to_its_rank(dtype):
    rows = torch.randn(3, 1, 20, 700, generator=torch.Generator().manual_seed(0), dtype=dtype)
    factor = kfac._Factor(1, 700, rows)
    assert factor.test is not None and factor.sum.shape == (1, 700, kfac._RANK)
    factor.add(rows, rows)
    exact = torch.einsum("bgti,bgtj->gij", rows.double(), rows.double())  # of rank 60
    vector = torch.randn(1, 4, 700, generator=torch.Generator().manual_seed(1), dtype=F64)
    ridge = torch.tensor([10.0], dtype=F64)
    found = factor.damped(ridge, exact.diagonal(dim1=1, dim2=2).sum(1), F64)(vector)
    expected = torch.linalg.solve(exact[0] + ridge * eye(700), vector[0].T).T
    close(found[0], expected, 1e-9 if dtype == F64 else 2e-4)


@pytest.mark.parametrize("limit", [{}, {"_EIGH_MAX": 0}, LOW_RANK])
@pytest.mark.parametrize("name", ["conv", "linear on few tokens", "two groups", "depthwise"])
def test_singular_factors(name, limit, monkeypatch):
    limited(monkeypatch, limit)
    case = ALL[name]
    size = sum(p.numel() for p in case.layer.parameters())
    dead = replace(case, gradients=[[torch.zeros_like(g) for g in p] for p in case.gradients]).block()
    assert dead.trace == 0.0
    dead.factorize(RIDGE, F64)
    close(applied(dead, size), eye(size) / RIDGE)
    # Of one image, with a ridge below rounding errors: the inverse stays positive.
    block = case.part(0, 1).block()
    block.factorize(1e-40, F64)
    for v in torch.randn(5, size, dtype=F64, generator=torch.Generator().manual_seed(0)):
        out = torch.empty_like(v)
        block.apply(v, out)
        assert 0 < float(v @ out) < float("inf")


def test_float32_factors_are_close_to_float64():
    case = CASES["conv strided"]
    layer = Conv2d(3, 4, 3, 2, 1).float()
    single = Case(
        layer, [x.float() for x in case.inputs], [[g.float() for g in p] for p in case.gradients], case.weights.float()
    ).block()
    assert single.left.sum.dtype == torch.float64
    close(single.right.sum, case.block().right.sum, 1e-6)
    single.factorize(RIDGE, torch.float32)
    out = torch.empty(112)
    single.apply(torch.ones(112), out)
    assert bool(out.isfinite().all())


# ---------------------------------------------------------------------------------- where K-FAC is exact


def body_block(net: nn.Sequential, index: int, x: Tensor, weights: Tensor) -> tuple[KroneckerBlock, Tensor]:
    """The block of one layer of a sequential network, all outputs as probes, and the Gauss-Newton block."""
    values = [x]
    for module in net:
        values.append(module(values[-1]))
    layer, inputs, out = net[index], values[index].detach(), values[index + 1]
    outputs = values[-1].flatten(1)
    gradients = [[torch.autograd.grad(outputs[:, c].sum(), out, retain_graph=True)[0]] for c in range(outputs.shape[1])]
    sizes = [p.numel() for p in layer.parameters()]
    block = KroneckerBlock(layer, slice(0, sizes[0]), slice(sizes[0], sum(sizes)))
    with torch.no_grad():
        block.update([inputs], gradients, weights)
    features = nn.Sequential(*net, nn.Flatten())
    identity, zero = eye(outputs.shape[1]), torch.zeros(outputs.shape[1], dtype=F64)
    names = [f"{index}.weight", f"{index}.bias"]
    j = jacobian(features, names, identity, zero, x)[..., : sum(sizes)]
    return block, gauss_newton(j, weights)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(len(shape)))


DEEP, SHALLOW = (Linear(4, 6), Linear(6, 5), Linear(5, 3)), (Linear(4, 6), nn.Tanh(), Linear(6, 3))
WHERE_EXACT = {
    **{f"deep linear network, {i}": (DEEP, i, rand(7, 4)) for i in range(3)},
    **{f"one datum, {i}": (SHALLOW, i, rand(1, 4)) for i in (0, 2)},
    "one pixel, gradients that do not depend on data": (
        (Conv2d(2, 4, 3), nn.Flatten(), Linear(4, 3)), 0, rand(6, 2, 3, 3),
    ),
    "groups": ((Conv2d(3, 6, 3, padding=1, groups=3), nn.Tanh(), nn.Flatten(), Linear(96, 4)), 0, rand(5, 3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "index", "x"), WHERE_EXACT.values(), ids=WHERE_EXACT)
def test_where_it_is_exact(layers, index, x):
    block, dense = body_block(nn.Sequential(*layers), index, x, WEIGHTS[: len(x)])
    if block.groups > 1:
        group = torch.cat([torch.arange(6).repeat_interleave(9), torch.arange(6)]) // 2
        dense = dense * (group[:, None] == group)
    block.factorize(RIDGE, F64)
    close(applied(block, len(dense)), torch.linalg.inv(dense + RIDGE * eye(len(dense))), 1e-9)


# -------------------------------------------------------------------------------------------- other blocks


@pytest.mark.parametrize("dense_max", [0, 512])
def test_small_block(dense_max):
    shapes, n, k = [(2, 3), (), (4,)], 5, 3  # a matrix, a scalar and a vector
    jacobians = [rand(n, k, *shape) for shape in shapes]
    weights = torch.rand(n, dtype=F64) + 0.5
    slices = [slice(4, 10), slice(12, 13), slice(0, 4)]
    block = SmallBlock(slices, torch.device("cpu"), dense_max)
    block.update([j[:2] for j in jacobians], weights[:2])
    block.update([j[2:] for j in jacobians], weights[2:])
    dense = gauss_newton(torch.cat([j.reshape(n, k, -1) for j in jacobians], 2), weights)
    dense = dense if dense_max else torch.diag(dense.diagonal())
    assert block.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    block.factorize(RIDGE, F64)
    own = [*range(4, 10), 12, *range(4)]
    found = applied(block, 13)[own][:, own]
    close(found, torch.linalg.inv(dense + RIDGE * eye(11)))


@pytest.mark.parametrize("rows", [3, 9])  # fewer and more than there are columns
def test_head_block_is_exact(rows):
    x, weights, n_outputs = rand(rows, 4), torch.rand(rows, dtype=F64) + 0.5, 3
    w, b = rand(n_outputs, 4), torch.zeros(n_outputs, dtype=F64)
    dense = gauss_newton(jacobian(nn.Identity(), [], w, b, x), weights)
    block = HeadBlock(n_outputs, 4, slice(0, 12), slice(12, 15))
    for part in (slice(0, 2), slice(2, 7), slice(7, 9)):
        block.update(x[part], weights[part])
    assert block.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    block.factorize(RIDGE, F64)
    close(applied(block, 15), torch.linalg.inv(dense + RIDGE * eye(15)))


# ------------------------------------------------------------------------------------------ all of them


def preconditioner() -> tuple[KFAC, int]:
    """A layer in slices 0..24, a small block in 24..30 and a head in 30..45."""
    layer = CASES["linear"].block()
    small = SmallBlock([slice(24, 28), slice(28, 30)], torch.device("cpu"))
    small.update([rand(3, 2, 4), rand(3, 2, 2)], torch.ones(3, dtype=F64))
    head = HeadBlock(3, 4, slice(30, 42), slice(42, 45))
    head.update(rand(6, 4), torch.ones(6, dtype=F64))
    return KFAC([layer, small, head]), 45


@pytest.mark.parametrize("limit", [{}, {"_EIGH_MAX": 0}, LOW_RANK])
def test_preconditioner_is_symmetric_positive_definite_and_owns_every_parameter_once(limit, monkeypatch):
    limited(monkeypatch, limit)
    operator, size = preconditioner()
    trace = sum(block.trace for block in operator.blocks)
    assert operator.trace == pytest.approx(trace)
    assert operator.output_trace == pytest.approx(trace / 3)
    assert operator.factorize(RIDGE, F64) is operator
    found = applied(operator, size)
    close(found, found.T, 1e-13)
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    covered = torch.zeros(size)
    for block in operator.blocks:
        covered += applied(block, size).isfinite().all(1)
    assert bool((covered == 1).all())


def test_damping_spares_the_head():
    found = applied(preconditioner()[0].factorize(RIDGE, F64, damping=2 * RIDGE), 45)
    expected = applied(preconditioner()[0].factorize(3 * RIDGE, F64), 45)
    close(found[:30, :30], expected[:30, :30])
    close(found[30:, 30:], applied(preconditioner()[0].factorize(RIDGE, F64), 45)[30:, 30:])


BAD = [float("nan"), float("inf"), -1.0]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [("penalty", (x, F64)) for x in (0.0, *BAD)] + [("damping", (RIDGE, F64, x)) for x in BAD],
)
def test_penalty_and_damping_must_be_finite(message, arguments):
    with pytest.raises(ValueError, match=message):
        preconditioner()[0].factorize(*arguments)


@pytest.mark.parametrize("features", [20, 600])  # whole factors, and approximated ones
def test_curvature_that_is_not_finite_is_refused(features):
    operator, _ = preconditioner()
    operator.blocks[2].update(torch.full((1, 4), torch.inf, dtype=F64), torch.ones(1, dtype=F64))
    with pytest.raises(ValueError, match="finite"):
        operator.factorize(RIDGE, F64)
    block = KroneckerBlock(Linear(features, 3), slice(0, 3 * features), None)
    large, ones = torch.full((2, features), 1e200, dtype=F64), torch.ones(2, 3, dtype=F64)
    block.update([large], [[ones]], ones[:, 0])
    with pytest.raises(ValueError, match="overflow"):
        block.factorize(1.0, F64)
