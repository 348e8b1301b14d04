"""Solvers of the quadratic: H d = b, with a symmetric positive definite H that is given by its product with vectors.

They know no network and no data. Each returns a result with a status; they raise no errors and no warnings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.conjugate_gradients import Operator, Status

__all__ = ["Callback", "SolverResult", "pcg", "sgd"]

BatchOperator = Callable[[int, Tensor], Tensor]
Callback = Callable[[int, float, Tensor], bool | None]

_REFRESH = 20  # iterations after which the recursive residual is replaced by the true one
_TRUSTED = 1e4  # rounding units: with a tolerance of at least this, few steps of the recursion need no confirmation
_DRIFT = 1 / 3  # part of the true residual; a larger difference to the recursive one is attributed to rounding
_DRIFTS = 3  # replacements with such a difference after which a solver stops
_MOMENTUM = 0.9  # of the paper's optimizer: Achille et al. 2021, section 4
_STEP = 0.25  # over the largest eigenvalue of the batches: Johnson & Zhang 2013, theorem 1
_POWER_STEPS = 3  # of the power method: the step only has to be right within a factor of about 3
_DOT_CHUNK = 1 << 18  # elements of a product converted to float64 at once: they stay in the cache


@dataclass(frozen=True)
class SolverResult:
    """Solution and status of a solver, and the norms of its residuals.

    Attributes
    ----------
    x : Tensor of shape (P,)
    status : Status
    n_iter : int
        Iterations of `pcg`, epochs of `sgd`.
    residual_norms : list of float
        |b - H x| / |b|, that is the norm of the gradient relative to its value at x = 0, at the start and after each
        iteration.
    """

    x: Tensor
    status: Status
    n_iter: int
    residual_norms: list[float] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.status is Status.CONVERGED


def _continue(number: int, residual: float, x: Tensor) -> None:
    """The callback that never stops."""


def pcg(
    matvec: Operator,
    b: Tensor,
    precondition: Operator,
    tol: float,
    max_iter: int,
    callback: Callback = _continue,
) -> SolverResult:
    """Preconditioned conjugate gradients from zero.

    Parameters
    ----------
    matvec : callable
        Maps v (P,) to H v.
    b : Tensor of shape (P,)
    precondition : callable
        Maps v (P,) to an approximation of H^-1 v; symmetric and positive definite.
    tol : float
        The solver stops when |b - H x| <= tol |b|, after at least one iteration. A residual after many steps of the
        recursion, or near the rounding errors, is confirmed by a product.
    max_iter : int
        Largest number of iterations.
    callback : callable
        Called after each iteration with its number, the relative norm of the residual and x, which the next iteration
        overwrites. A true value stops the solver.

    Returns
    -------
    SolverResult

    References
    ----------
    Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems", algorithm 9.1; in the flexible form of
    Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 2000.
    """
    return _conjugate_directions(matvec, b, precondition, tol, max_iter, callback)


def sgd(
    matvec: Operator,
    batch_matvec: BatchOperator,
    n_batches: int,
    b: Tensor,
    precondition: Operator,
    tol: float,
    max_iter: int,
    generator: torch.Generator,
    callback: Callback = _continue,
) -> SolverResult:
    """Preconditioned stochastic gradient descent with momentum and variance reduction (SVRG).

    This is the paper's optimizer with two changes. No learning rate has to be chosen: the step within an epoch follows
    from the largest eigenvalue of the batches. And the noise of the gradients is removed by a control variate (SVRG):
    a step uses the full gradient at the start of the epoch, plus the product of the batch with the displacement since
    then.

    After each epoch its displacement is made H-orthogonal to that of the epoch before, and scaled to the minimum of the
    quadratic along it. This takes one product with H, which the full gradient of the next epoch needs anyway, and the
    objective never increases. The order of the batches is drawn once, so each epoch applies the same linear map to the
    residual; then the displacements lose less of their orthogonality to earlier ones.

    Parameters
    ----------
    matvec : callable
        Maps v (P,) to H v.
    batch_matvec : callable
        Maps (k, v) to H_k v; H is the mean of H_k over the batches k = 0, ..., n_batches - 1.
    n_batches : int
    b, precondition, tol, max_iter, callback
        As in `pcg`; ``max_iter`` counts epochs.
    generator : torch.Generator
        On the CPU; draws the order of the batches once.

    Returns
    -------
    SolverResult

    References
    ----------
    Achille et al. 2021, section 4; Johnson & Zhang, "Accelerating stochastic gradient descent using
    predictive variance reduction", NeurIPS 2013; Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput.
    2000.
    """
    largest = max(_largest_eigenvalue(batch_matvec, k, precondition, b) for k in range(n_batches))
    step = _STEP * (1 - _MOMENTUM) / largest if largest > 0 else 1.0
    order = torch.randperm(n_batches, generator=generator).tolist()

    def epoch(residual: Tensor) -> Tensor:
        nonlocal step
        velocity = precondition(residual)  # at the anchor every batch has the full gradient
        first = moved = step * velocity
        for k in order[1:]:
            velocity = _MOMENTUM * velocity + precondition(residual - batch_matvec(k, moved))
            moved = moved + step * velocity
        # The displacement if the gradient did not shrink; a longer one shows that the step is too long.
        longest = n_batches / (1 - _MOMENTUM) * _dot(first, first) ** 0.5
        if _dot(residual, moved) > 0 and _dot(moved, moved) ** 0.5 <= longest:
            return moved
        step /= 2
        return first

    return _conjugate_directions(matvec, b, epoch, tol, max_iter, callback)


def _conjugate_directions(
    matvec: Operator,
    b: Tensor,
    propose: Operator,
    tol: float,
    max_iter: int,
    callback: Callback,
) -> SolverResult:
    """Minimize the quadratic along directions that ``propose`` makes from the residual b - H x.

    Each direction is made H-orthogonal to the one before. For a fixed symmetric preconditioner this is the method of
    conjugate gradients. It uses explicit inner products instead of the ratio of residuals, so it also works, without a
    restart, if the preconditioner changes, the residual is replaced, or rounding errors occur.
    """
    scale = _dot(b, b) ** 0.5
    if scale == 0.0:
        return SolverResult(torch.zeros_like(b), Status.CONVERGED, 0, [0.0])
    history, drifts, status = [1.0], 0, Status.MAX_ITER
    x, r = torch.zeros_like(b), b
    p = hp = torch.zeros_like(b)
    curvature = 1.0
    trusted = tol >= _TRUSTED * torch.finfo(b.dtype).eps
    for i in range(1, max_iter + 1):
        z = propose(r)
        p = torch.sub(z, p, alpha=_dot(z, hp) / curvature)
        hp = matvec(p)
        curvature = _dot(p, hp)
        if not 0 < curvature < math.inf:
            status = Status.STAGNATED if curvature <= 0 else Status.NOT_FINITE
            break
        step = _dot(r, p) / curvature
        x.add_(p, alpha=step)
        r = torch.sub(r, hp, alpha=step)
        relative = _dot(r, r) ** 0.5 / scale
        recent = trusted and i < _REFRESH  # the recursion is as accurate as a product would be
        if (relative <= tol and not recent) or i % _REFRESH == 0 or i == max_iter:
            true = b - matvec(x)
            relative = _dot(true, true) ** 0.5 / scale
            drifts += _dot(true - r, true - r) ** 0.5 / scale > _DRIFT * relative
            r = true
        history.append(relative)
        if not math.isfinite(relative):
            status = Status.NOT_FINITE
            break
        stop = callback(i, relative, x)
        if relative <= tol:
            status = Status.CONVERGED
        elif drifts >= _DRIFTS:
            status = Status.STAGNATED
        if stop or status is not Status.MAX_ITER:
            break
    return SolverResult(x, status, len(history) - 1, history)


def _dot(x: Tensor, y: Tensor) -> float:
    """Inner product of two vectors, accumulated in float64."""
    pairs = zip(x.split(_DOT_CHUNK), y.split(_DOT_CHUNK), strict=True)
    return float(torch.stack([torch.dot(u.double(), v.double()) for u, v in pairs]).sum())


def _largest_eigenvalue(batch_matvec: BatchOperator, k: int, precondition: Operator, start: Tensor) -> float:
    """Estimate of the largest eigenvalue of the preconditioned H_k, by the power method."""
    v, value = start, 0.0
    for _ in range(_POWER_STEPS):
        norm = _dot(v, v) ** 0.5
        if not 0 < norm < math.inf:
            break
        v = precondition(batch_matvec(k, v / norm))
        value = _dot(v, v) ** 0.5
    return value
