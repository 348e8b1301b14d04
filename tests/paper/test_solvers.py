"""Solvers: the optimum, certificates and statuses, against a dense solve."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from support.splits import rand
from torch import Tensor, nn

from sklearn_lqf.engine.conjugate_gradients import Status
from sklearn_lqf.paper.solvers import SolverResult, pcg, sgd

F64 = torch.float64


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues."""
    q = torch.linalg.qr(rand(len(values), len(values), seed=seed))[0]
    return (q * values) @ q.T


def identity(v: Tensor) -> Tensor:
    return v


def spectrum(kind: str, size: int = 60, condition: float = 1e4) -> Tensor:
    if kind == "logarithmic":
        return torch.logspace(-math.log10(condition), 0, size, dtype=F64)
    values = torch.full((size,), 1 / condition, dtype=F64)  # a matrix of low rank plus a ridge
    values[: size // 4] += torch.linspace(0.1, 1, size // 4, dtype=F64)
    return values


KINDS = ["logarithmic", "low rank"]


def assert_solution(result: SolverResult, h: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    """By numpy; condition numbers are 1e4 at most, times the relative residuals asked for."""
    assert result.status is Status.CONVERGED and result.converged
    expected = torch.from_numpy(np.linalg.solve(h.numpy(), b.numpy()))
    assert float((result.x - expected).norm()) <= tolerance * float(expected.norm())


def relative_residual(h: Tensor, b: Tensor, x: Tensor) -> float:
    return float((b.double() - h.double() @ x.double()).norm() / b.double().norm())


def block_diagonal_inverse(h: Tensor) -> Tensor:
    """What K-FAC is at its best: the inverse of diagonal blocks."""
    return torch.linalg.inv(torch.block_diag(*(h[i : i + 20, i : i + 20] for i in range(0, 60, 20))))


@pytest.mark.parametrize("kind", KINDS)
def test_pcg_equals_dense_solve(kind):
    h, b = rotated(spectrum(kind)), rand(60, seed=1)
    p = block_diagonal_inverse(h)
    assert_solution(pcg(lambda v: h @ v, b, lambda v: p @ v, 1e-12, 2000), h, b)


def test_number_of_iterations():
    h, b = rotated(spectrum("logarithmic")), rand(60, seed=1)
    inverse = torch.linalg.inv(h)
    result = pcg(lambda v: h @ v, b, lambda v: inverse @ v, 1e-10, 10)
    assert result.n_iter == 1
    assert_solution(result, h, b)
    assert pcg(lambda v: h @ v, b, identity, 2.0, 10).n_iter == 1  # one at least
    few = rotated(torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=F64).repeat(15))
    assert pcg(lambda v: few @ v, b, identity, 1e-10, 100).n_iter == 4  # as many as distinct eigenvalues


def test_changing_preconditioner_converges():
    # A method that takes the directions as conjugate by construction would stall.
    h, b = rotated(spectrum("logarithmic", condition=1e2)), rand(60, seed=1)
    generator = torch.Generator().manual_seed(0)

    def precondition(v: Tensor) -> Tensor:
        return v * (0.5 + torch.rand(60, generator=generator, dtype=F64))

    assert_solution(pcg(lambda v: h @ v, b, precondition, 1e-12, 2000), h, b)


def rounding(b: Tensor, x: Tensor) -> float:
    """Error of a residual computed in float32, relative to b, for |H| = 1."""
    return 2**-23 * float(x.norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_certificate_in_float32_is_the_true_residual(kind):
    h, b = rotated(spectrum(kind, 100, 1e3)).float(), rand(100, seed=1).float()
    result = pcg(lambda v: h @ v, b, identity, 1e-4, 1000)
    assert result.status is Status.CONVERGED
    assert result.x.dtype == torch.float32
    assert relative_residual(h, b, result.x) == pytest.approx(result.residual_norms[-1], abs=rounding(b, result.x))


def test_norms_of_long_vectors_accumulate_in_float64():
    h, b = torch.linspace(1, 2, 300_000), rand(300_000).float()
    result = pcg(lambda v: h * v, b, identity, 1e-6, 1)
    expected = (b - h * result.x).double().norm() / b.double().norm()
    assert result.residual_norms[-1] == pytest.approx(float(expected), rel=1e-12)


def run_sgd(matvec, b, precondition, tol, max_iter, *callback) -> SolverResult:
    """One batch: the product itself."""
    generator = torch.Generator().manual_seed(0)
    return sgd(matvec, lambda k, v: matvec(v), 1, b, precondition, tol, max_iter, generator, *callback)


both = pytest.mark.parametrize("solver", [pcg, run_sgd])


@both
def test_history_and_callback(solver):
    h, b = rotated(spectrum("low rank")), rand(60, seed=1)
    given, seen = b.clone(), []
    result = solver(lambda v: h @ v, b, identity, 1e-4, 500, lambda i, r, x: seen.append((i, r, x.clone())))
    assert torch.equal(b, given)
    norms = result.residual_norms
    assert norms[0] == 1.0 and len(norms) == result.n_iter + 1
    assert norms[-1] == pytest.approx(relative_residual(h, b, result.x), rel=1e-6)
    assert norms[-1] <= 1e-4 < min(norms[:-1])
    assert [(i, r) for i, r, _ in seen] == list(enumerate(norms))[1:]
    assert torch.equal(seen[-1][2], result.x)
    with pytest.raises(FrozenInstanceError):
        result.n_iter = 1
    # A callback that stops at convergence leaves the status.
    assert solver(identity, b, identity, 1e-6, 10, lambda i, r, x: True).converged


@both
@pytest.mark.parametrize("limits", [(7,), (100, lambda i, r, x: i == 7)], ids=["max_iter", "callback"])
def test_stopped_before_convergence(solver, limits):
    h, b = rotated(spectrum("logarithmic")), rand(60, seed=1)
    result = solver(lambda v: h @ v, b, identity, 1e-10, *limits)
    assert result.status is Status.MAX_ITER and not result.converged
    assert (result.n_iter, len(result.residual_norms)) == (7, 8)
    assert result.residual_norms[-1] == pytest.approx(relative_residual(h, b, result.x), rel=1e-10)


@both
def test_without_a_step(solver):
    result = solver(identity, torch.zeros(5, dtype=F64), identity, 1e-6, 10)
    assert (result.status, result.n_iter, result.residual_norms) == (Status.CONVERGED, 0, [0.0])
    assert not result.x.any()
    result = solver(lambda v: -v, rand(6, seed=1), identity, 1e-6, 10)  # an operator that is not positive
    assert (result.status, result.n_iter) == (Status.STAGNATED, 0)
    assert not result.x.any()


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(solver, value):
    b = rand(6, seed=1)
    assert solver(lambda v: v * value, b, identity, 1e-6, 10).status is Status.NOT_FINITE
    assert solver(identity, b, lambda v: v * value, 1e-6, 10).status is Status.NOT_FINITE
    assert solver(identity, b * value, identity, 1e-6, 10).status is Status.NOT_FINITE
    products = iter([1.0, value])  # the second one confirms convergence
    assert pcg(lambda v: v * next(products), b, identity, 1e-13, 10).status is Status.NOT_FINITE


@both
@pytest.mark.parametrize("kind", KINDS)
def test_tolerance_out_of_reach_of_float32_stagnates_near_the_optimum(solver, kind):
    h, b = rotated(spectrum(kind, 100, 1e2)).float(), rand(100, seed=1).float()
    result = solver(lambda v: h @ v, b, identity, 1e-12, 3000)
    assert result.status is Status.STAGNATED
    assert result.n_iter < 500
    assert result.residual_norms[-1] < 5 * rounding(b, result.x)


@both
def test_slow_progress_is_no_stagnation(solver):
    # The residual of conjugate gradients does not fall for many iterations here.
    h, b = rotated(spectrum("logarithmic", 300, 1e6)), rand(300, seed=1)
    result = solver(lambda v: h @ v, b, identity, 1e-7, 400)
    assert result.status is Status.MAX_ITER
    norms = result.residual_norms
    assert any(later > 0.5 * earlier for earlier, later in zip(norms, norms[40:], strict=False))


class Batches:
    """A ridge regression in batches of some scales, with a block-diagonal preconditioner."""

    def __init__(self, n_batches: int, rows: int, decay: float = 1.0, ridge: float = 1.0, scales=None):
        j = rand(rows, 60) * torch.arange(1, 61, dtype=F64) ** -decay
        j = j @ torch.linalg.qr(rand(60, 60, seed=7))[0]
        self.parts, self.ridge = j.tensor_split(n_batches), ridge
        if scales is not None:
            self.parts = [scale * part for scale, part in zip(scales, self.parts, strict=True)]
        self.h = sum(p.T @ p for p in self.parts) + ridge * torch.eye(60, dtype=F64)
        self.b = j.T @ rand(rows, seed=3)
        self.p = block_diagonal_inverse(self.h)

    def batch_matvec(self, k: int, v: Tensor) -> Tensor:
        return len(self.parts) * (self.parts[k].T @ (self.parts[k] @ v)) + self.ridge * v

    def solve(self, seed: int = 0, max_iter: int = 1000) -> SolverResult:
        return sgd(
            lambda v: self.h @ v, self.batch_matvec, len(self.parts), self.b, lambda v: self.p @ v,
            1e-11, max_iter, torch.Generator().manual_seed(seed),
        )  # fmt: skip


SGD = {
    "one batch": Batches(1, 240),
    "rank-deficient": Batches(30, 30),
    "unequal batches": Batches(6, 120, scales=[1e-3, 1e-2, 0.1, 1.0, 10.0, 30.0]),
}


@pytest.mark.parametrize("problem", SGD.values(), ids=SGD)
def test_sgd_reaches_the_optimum(problem):
    assert_solution(problem.solve(), problem.h, problem.b)


def test_sgd_bears_bad_conditioning_without_preconditioner():
    problem = Batches(5, 120, decay=2.0, ridge=1e-2)
    problem.p = torch.eye(60, dtype=F64)
    assert_solution(problem.solve(max_iter=3000), problem.h, problem.b, 1e-7)


def test_sgd_order_of_batches_changes_the_path_only():
    problem, state = Batches(8, 120), torch.get_rng_state()
    first, again, other = (problem.solve(seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert other.residual_norms != first.residual_norms
    assert_solution(other, problem.h, problem.b)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first.residual_norms) == first.n_iter + 1  # epochs


def test_sgd_survives_a_step_that_is_far_too_long():
    """The largest eigenvalue is in a direction in which the vector from which it is estimated hardly has a part."""
    problem, u = Batches(30, 120), nn.functional.normalize(rand(60, seed=9), dim=0)
    rest = torch.eye(60, dtype=F64) - torch.outer(u, u)
    problem.parts = [torch.cat([part @ rest, (1e5 / 30) ** 0.5 * u[None]]) for part in problem.parts]
    problem.h = sum(p.T @ p for p in problem.parts) + torch.eye(60, dtype=F64)
    problem.b, problem.p = rest @ problem.b, torch.eye(60, dtype=F64)
    problem.b += 1e-12 * problem.b.norm() * u
    assert_solution(problem.solve(), problem.h, problem.b)
