"""Conjugate gradients for several right-hand sides, and how an iterative solver ended.

Hides when the residual is computed anew, and which of the runs go on. It knows no features and no targets.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Course", "Operator", "Status", "conjugate_gradients"]

Operator = Callable[[Tensor], Tensor]

_REFRESH = 20  # iterations after which the recursive residual is replaced by the true one
_DRIFT = 1 / 3  # part of the true residual from which on it is put down to rounding
_DRIFTS = 3  # replacements dominated by rounding after which the solver gives up


class Status(enum.Enum):
    """How an iterative solver ended; the value is what a user may do about it."""

    CONVERGED = "The tolerance was reached."
    MAX_ITER = "Increase max_iter, or alpha, or accept a larger tol."
    STAGNATED = "Rounding errors prevent further progress: accept a larger tol, use float64, or increase alpha."
    NOT_FINITE = "Values are not finite: check the network's outputs, or increase alpha."


@dataclass(frozen=True)
class Course:
    """How iterations went.

    Attributes
    ----------
    status : Status
    errors : tuple of float
        What was compared with the tolerance before the first and after each iteration: the norm of the residual over
        its scale, the largest of all right-hand sides.
    """

    status: Status
    errors: tuple[float, ...]

    @property
    def n_iter(self) -> int:
        """Iterations."""
        return len(self.errors) - 1

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.status is Status.CONVERGED


def _the_same(values: Tensor) -> Tensor:
    return values


def conjugate_gradients(
    product: Operator, rhs: Tensor, precondition: Operator, *, scale: Tensor, tol: float, max_iter: int,
    agreed: Operator = _the_same,
) -> tuple[Tensor, Course]:  # fmt: skip
    """H X = R by runs side by side, each with step lengths of its own; those that are done rest.

    Parameters
    ----------
    product : callable
        Vectors (D, C) -> H times these; symmetric and positive definite.
    rhs : Tensor of shape (D, C)
        R.
    precondition : callable
        Vectors (D, C) -> about H^-1 times these; symmetric and positive definite.
    scale : Tensor of shape (C,)
        Of the residuals; 0 where the right-hand side is 0.
    tol : float
        It stops when each |R - H X| is at most this times its scale, in a residual computed anew.
    max_iter : int
    agreed : callable
        Norms of the residuals (C,) -> those by which all processes decide that share a product.

    Returns
    -------
    Tensor of shape (D, C)
        X.
    Course

    References
    ----------
    Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems", algorithm 9.1; with the products that
    bear a residual computed anew: Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 2000.
    """
    size = torch.where(scale > 0, scale, 1.0)
    x, r, p, hp = torch.zeros_like(rhs), rhs.clone(), torch.zeros_like(rhs), torch.zeros_like(rhs)
    curvature, drifts = torch.full_like(size, math.inf), 0
    relative = agreed(r.norm(dim=0) / size)
    errors, status = [_largest(relative)], _judge(relative, tol, drifts)
    while status is Status.MAX_ITER and len(errors) <= max_iter:
        on = (relative > tol).nonzero().squeeze(1)
        z = precondition(r[:, on])
        direction = z - (z * hp[:, on]).sum(0) / curvature[on] * p[:, on]
        along = product(direction)
        curvature[:] = math.inf  # a run that rests goes on without its last direction
        curvature[on] = (direction * along).sum(0)
        step = (r[:, on] * direction).sum(0) / curvature[on]
        p[:, on], hp[:, on] = direction, along
        x[:, on] += step * direction
        r[:, on] -= step * along
        relative = agreed(r.norm(dim=0) / size)
        if len(errors) % _REFRESH == 0 or len(errors) == max_iter or bool((relative <= tol).all()):
            true = rhs - product(x)
            relative, drift = agreed(torch.stack([true.norm(dim=0), (true - r).norm(dim=0)]) / size)
            drifts += bool(((drift > _DRIFT * relative) & (relative > tol)).any())
            r = true
        errors.append(_largest(relative))
        status = _judge(relative, tol, drifts)
    return x, Course(status, tuple(errors))


def _largest(relative: Tensor) -> float:
    """The largest of the norms (C,), NaN if one is; 0 of none."""
    return float(relative.max()) if len(relative) else 0.0


def _judge(relative: Tensor, tol: float, drifts: int) -> Status:
    """Status for the relative norms of the residuals (C,)."""
    if not bool(relative.isfinite().all()):
        return Status.NOT_FINITE
    if bool((relative <= tol).all()):
        return Status.CONVERGED
    return Status.STAGNATED if drifts >= _DRIFTS else Status.MAX_ITER
