"""Solvers of the quadratic: H d = b with H symmetric positive definite, given as a product.

They know no network and no data. Each returns a result with a status; nothing is raised or warned here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SolverResult", "Status", "pcg", "sgd"]

Operator = Callable[[Tensor], Tensor]
_REFRESH = 20  # iterations after which the recursive residual of conjugate gradients is recomputed
_MOMENTUM = 0.9  # of the paper's optimizer: Achille et al. 2021, section 4


class Status(enum.Enum):
    """How a solver ended; the value is what a user may do about it."""

    CONVERGED = "The tolerance was reached."
    MAX_ITER = "Increase max_iter, or alpha, or accept a larger tol."
    STAGNATED = "Rounding errors prevent further progress: accept a larger tol, or use dtype='float64'."
    NOT_FINITE = "Values are not finite: check the network's outputs, or increase alpha."


@dataclass(frozen=True)
class SolverResult:
    """Solution, status and history of a solve.

    Attributes
    ----------
    x : Tensor of shape (P,)
    status : Status
    n_iter : int
        Products with H for PCG, epochs for SGD.
    residual_norms : list of float
        |b - H x| / |b|, that is the gradient's norm relative to its value at x = 0, at the start and after
        each iteration.
    """

    x: Tensor
    status: Status
    n_iter: int
    residual_norms: list[float] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        return self.status is Status.CONVERGED


def _dot(x: Tensor, y: Tensor) -> float:
    """Inner product accumulated in float64."""
    return float(torch.dot(x.double(), y.double()))


def pcg(
    matvec: Operator,
    b: Tensor,
    precondition: Operator,
    tol: float,
    max_iter: int,
    callback: Callable[[int, float, Tensor], bool | None] = lambda i, r, x: None,
) -> SolverResult:
    """Preconditioned conjugate gradients from zero.

    Parameters
    ----------
    matvec : callable
        v (P,) -> H v.
    b : Tensor of shape (P,)
    precondition : callable
        Symmetric positive definite approximation of H^-1.
    tol : float
        Stop when |b - H x| <= tol |b|, confirmed on the recomputed residual.
    max_iter : int
    callback : callable
        Called after each iteration with its number, the relative residual and x; true stops.

    Returns
    -------
    SolverResult

    References
    ----------
    Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems", algorithm 9.1.
    """
    x = torch.zeros_like(b)
    scale = _dot(b, b) ** 0.5
    if scale == 0.0:
        return SolverResult(x, Status.CONVERGED, 0, [0.0])
    r = b.clone()
    z = precondition(r)
    p = z.clone()
    rz = _dot(r, z)
    history, fresh = [1.0], True
    for i in range(1, max_iter + 1):
        hp = matvec(p)
        curvature = _dot(p, hp)
        if not (curvature > 0 and rz > 0):
            status = Status.STAGNATED if curvature == curvature and rz == rz else Status.NOT_FINITE
            return SolverResult(x, status, i - 1, history)
        step = rz / curvature
        x += step * p
        r -= step * hp
        fresh = False
        relative = _dot(r, r) ** 0.5 / scale
        if relative <= tol or i % _REFRESH == 0 or i == max_iter:
            r, fresh = b - matvec(x), True
            relative = _dot(r, r) ** 0.5 / scale
        history.append(relative)
        if relative != relative:
            return SolverResult(x, Status.NOT_FINITE, i, history)
        stop = callback(i, relative, x)
        if relative <= tol:
            return SolverResult(x, Status.CONVERGED, i, history)
        if stop:
            break
        if fresh and len(history) > 2 * _REFRESH and relative > 0.5 * history[-2 * _REFRESH]:
            return SolverResult(x, Status.STAGNATED, i, history)
        z = precondition(r)
        new = _dot(r, z)
        # after a refresh the recursion's orthogonality is gone: restart along the preconditioned gradient
        p = z.clone() if fresh else z + (new / rz) * p
        rz = new
    return SolverResult(x, Status.MAX_ITER, len(history) - 1, history)


def sgd(
    matvec: Operator,
    batch_matvec: Callable[[int, Tensor], Tensor],
    n_batches: int,
    b: Tensor,
    precondition: Operator,
    tol: float,
    max_iter: int,
    generator: torch.Generator,
    callback: Callable[[int, float, Tensor], bool | None] = lambda i, r, x: None,
) -> SolverResult:
    """Preconditioned stochastic gradient descent with momentum, anchored once an epoch.

    The paper's optimizer, with the step from the largest eigenvalue instead of a learning rate, and with
    the gradient's noise removed by a control variate (SVRG): the full gradient at the epoch's start plus the
    batch's product with the distance travelled since. Without it a constant step would stall at a noise floor;
    with it the iterates go to the optimum.

    Parameters
    ----------
    matvec : callable
        v -> H v.
    batch_matvec : callable
        (k, v) -> H_k v with H the mean of H_k over batches k = 0 .. n_batches - 1.
    b, precondition, tol, max_iter, callback
        As in `pcg`; ``max_iter`` counts epochs.
    generator : torch.Generator
        On the CPU; draws the order of the batches.

    Returns
    -------
    SolverResult

    References
    ----------
    Achille et al. 2021, section 4; Johnson & Zhang, "Accelerating SGD using predictive variance reduction", 2013.
    """
    x = torch.zeros_like(b)
    scale = _dot(b, b) ** 0.5
    if scale == 0.0:
        return SolverResult(x, Status.CONVERGED, 0, [0.0])
    largest = max(
        _largest_eigenvalue(lambda v, k=k: batch_matvec(k, v), precondition, b) for k in range(n_batches)
    )
    step = (1 - _MOMENTUM) / largest
    velocity = torch.zeros_like(b)
    history = [1.0]
    gradient = -b
    for epoch in range(1, max_iter + 1):
        anchor = x.clone()
        for k in torch.randperm(n_batches, generator=generator).tolist():
            velocity = _MOMENTUM * velocity - precondition(gradient + batch_matvec(k, x - anchor))
            x = x + step * velocity
        gradient = matvec(x) - b
        relative = _dot(gradient, gradient) ** 0.5 / scale
        history.append(relative)
        if relative != relative:
            return SolverResult(x, Status.NOT_FINITE, epoch, history)
        stop = callback(epoch, relative, x)
        if relative <= tol:
            return SolverResult(x, Status.CONVERGED, epoch, history)
        if stop:
            break
    return SolverResult(x, Status.MAX_ITER, len(history) - 1, history)


def _largest_eigenvalue(
    matvec: Operator, precondition: Operator, start: Tensor, iterations: int = 12
) -> float:
    """Largest eigenvalue of P H by the power method, with a margin for its error from below."""
    v, value = start / _dot(start, start) ** 0.5, 0.0
    for _ in range(iterations):
        v = precondition(matvec(v))
        value = _dot(v, v) ** 0.5
        if value == 0.0:
            return 0.0
        v = v / value
    return 1.1 * value
