"""Conjugate gradients for several right-hand sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sklearn_lqf.engine.conjugate_gradients import Course, Status, conjugate_gradients

SIZE = 56


def system(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """H with eigenvalues from 1 to 1e5, right-hand sides (56, 3), and a rough inverse of H."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    eigenvalues = np.geomspace(1, 1e5, SIZE)
    h, rough = ((q * v) @ q.T for v in (eigenvalues, 1 / (eigenvalues * rng.uniform(0.5, 2, SIZE))))
    return torch.from_numpy(h), torch.from_numpy(rng.standard_normal((SIZE, 3))), torch.from_numpy(rough)


def run(h: Tensor, rhs: Tensor, rough: Tensor | None = None, *, tol: float = 1e-10, max_iter: int = 1000):
    """With residuals relative to the right-hand sides."""
    precondition = torch.clone if rough is None else rough.matmul
    return conjugate_gradients(h.matmul, rhs, precondition, scale=rhs.norm(dim=0), tol=tol, max_iter=max_iter)


def residuals(h: Tensor, rhs: Tensor, x: Tensor) -> Tensor:
    return (rhs - h @ x).norm(dim=0) / rhs.norm(dim=0)


def test_the_solution_is_found_and_sooner_with_a_preconditioner() -> None:
    h, rhs, rough = system()
    expected, courses = torch.linalg.solve(h, rhs), []
    for help in (None, rough, torch.linalg.inv(h)):
        x, course = run(h, rhs, help)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-8)
        assert course.converged
        assert course.errors[0] == pytest.approx(1.0)
        courses.append(course.n_iter)
    assert 2 * courses[1] < courses[0]
    assert courses[2] == 1


@pytest.mark.parametrize("tol", [1e-1, 1e-4, 1e-8])
def test_converged_means_the_true_residual_of_each_side(tol: float) -> None:
    h, rhs, rough = system()
    rhs = rhs * torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64)  # each has a scale of its own
    x, course = run(h, rhs, rough, tol=tol)
    found = residuals(h, rhs, x)
    assert bool((found <= tol * (1 + 1e-6)).all())
    assert float(found.max()) == pytest.approx(course.errors[-1], rel=1e-4)


def test_those_that_are_done_rest() -> None:
    h, rhs, _ = system()
    rhs[:, 1] = 0  # done from the start
    rhs[:, 2] = torch.linalg.eigh(h)[1][:, -1]  # after one step
    x, course = run(h, rhs)
    assert course.converged
    assert not x[:, 1].any()
    torch.testing.assert_close(x[:, 2], run(h, rhs[:, 2:], max_iter=1)[0][:, 0])


def test_statuses() -> None:
    h, rhs, rough = system()
    x, short = run(h, rhs, max_iter=3)
    assert (short.status, short.n_iter, short.converged) == (Status.MAX_ITER, 3, False)
    assert float(residuals(h, rhs, x).max()) == pytest.approx(short.errors[-1], rel=1e-6)
    assert run(h, rhs, max_iter=0)[1] == Course(Status.MAX_ITER, short.errors[:1])
    rhs[3, 1] = torch.inf
    assert run(h, rhs)[1].status is Status.NOT_FINITE
    _, hopeless = run(h, rhs[:, :1], rough, tol=1e-30, max_iter=10_000)
    assert hopeless.status is Status.STAGNATED
    assert hopeless.n_iter < 1000


def test_nothing_to_solve() -> None:
    for outputs in (0, 2):
        x, course = run(torch.eye(4), torch.zeros(4, outputs))
        assert (x.shape, course.n_iter, course.converged) == ((4, outputs), 0, True)
