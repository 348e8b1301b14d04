"""The solution of problems too large for a square matrix, and estimates of what would take one.

Hides the preconditioner, the accuracy of its solutions, and how a trace becomes leverages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.memory import PIECE_BYTES
from ..runtime.processes import ALONE, ProcessGroup
from .centered import Features
from .conjugate_gradients import Course, conjugate_gradients
from .preconditioner import Block, KroneckerPreconditioner
from .ridge import Factorization

__all__ = ["EstimatedForm"]

_PROBES = 32  # of the trace of H^-1, whose standard deviation is below sqrt(2 degrees of freedom / 32), about
_LOG_FACTOR = math.log(1e3)  # by which the preconditioner's odds may be wrong: beyond, errors of the trace would decide


class EstimatedForm(Factorization):
    """Conjugate gradients for the solution and `hat`, and estimates of the diagonal of M and of the variance.

    Parameters
    ----------
    features, weights, piece, group
        As of a `Factorization`.
    blocks : sequence of Block
        Of the preconditioner.
    tol : float
        Of the root mean squared error of the outputs for the training rows, relative to the root mean square of their
        targets less the mean: it is guaranteed, for each output.
    max_iter : int
    multiplicity : Tensor of shape (n,), optional
        How many images a row stands for, one each by default: with it the variance is the same if rows are given as
        often instead.

    Notes
    -----
    The error e of a solution with the residual r is ``H^-1 r``, so that of the outputs is, since no eigenvalue of H is
    below 1, ``sum_i s_i (phi_i' e)^2 = r' (H^-1 - H^-2) r <= |r|^2 / 4``. The iterations stop when that bound allows.

    With ``h_i = phi_i' H^-1 phi_i`` and ``c_i = 1 - s_i / t``, ``M_ii / s_i = c_i - s_i h_i = c_i / (1 + o_i)``, where
    o_i is ``s_i / c_i`` times the posterior variance of phi_i' B without row i. The preconditioner's o_i are right in
    their proportions more than in their size, since its blocks do not know of each other: they are multiplied by one
    number, for which ``sum_i s_i h_i`` are the degrees of freedom, ``D - tr H^-1``. The trace comes from conjugate
    gradients of random signs (Hutchinson 1990), which are fixed and belong to the columns: the order of rows does not
    matter. The variance of new rows is the preconditioner's times the same number. These are estimates, not bounds;
    they are exact where the preconditioner is one exact block.
    """

    method = "estimate"

    def __init__(
        self,
        features: Features,
        weights: Tensor,
        blocks: Sequence[Block],
        *,
        tol: float,
        max_iter: int,
        multiplicity: Tensor | None = None,
        piece: int = PIECE_BYTES,
        group: ProcessGroup = ALONE,
    ):
        super().__init__(features, weights, piece, group)
        self._tol, self._max_iter = tol, max_iter
        self._fraction = torch.ones_like(self.weights) if multiplicity is None else 1 / multiplicity.to(self.weights)
        self._precondition = KroneckerPreconditioner(self._rows, blocks)
        self._freedom: float | None = None

    def _optimum(self, targets: Tensor) -> tuple[Tensor, Tensor, Course]:
        rows = self._rows
        coef, course = self._iterate(rows.transposed(self.weights[:, None] * targets), 2 * rows.norm(targets))
        return coef, self.weights[:, None] * (targets - rows.fitted(coef)), course

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,): an estimate."""
        return self.remaining(torch.ones_like(self.weights))

    def remaining(self, fraction: Tensor) -> Tensor:
        """q M_ii + (1 - q) s_i for q (n,), (n,): an estimate, the same for a row of weight 2 and a row given twice."""
        share, odds = self._odds(fraction)
        return self.weights * share / (1 + self._factor(fraction, share, odds) * odds)

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D), (k, n): as many runs of conjugate gradients."""
        z = self._rows.center(features).T
        # By the bound of the notes, relative to about the norm of the outputs B_x stands for: its square is z' H^-1 z.
        found, _ = self._iterate(z, 2 * (self._precondition(z) * z).sum(0).clamp_min(0).sqrt())
        return (self._rows.fitted(found).T + 1 / self._rows.total) * self.weights

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of new rows (k, D) over that of the noise, (k,): an estimate."""
        z = self._rows.center(features)
        factor = self._factor(self._fraction, *self._odds(self._fraction))
        return factor * (self._precondition(z.T).T * z).sum(1) + 1 / self._rows.total

    def _odds(self, fraction: Tensor) -> tuple[Tensor, Tensor]:
        """What the intercept leaves of the weights (n,) times q, and the preconditioner's odds (n,)."""
        weights = fraction * self.weights
        share = 1 - weights / self._rows.total
        return share, self._rows.each(lambda rows, phi: self._precondition.odds(phi, weights[rows], share[rows]))

    def _factor(self, fraction: Tensor, share: Tensor, odds: Tensor) -> float:
        """The number times the odds with which the rows use up the degrees of freedom: by bisection of its log."""
        freedom, (low, high) = self._degrees_of_freedom(), (-_LOG_FACTOR, _LOG_FACTOR)
        for _ in range(60):  # the interval is then below the rounding errors
            middle = (low + high) / 2
            used = float(((share - share / (1 + math.exp(middle) * odds)) / fraction).sum())
            low, high = (middle, high) if used < freedom else (low, middle)
        return math.exp((low + high) / 2)

    def _degrees_of_freedom(self) -> float:
        """D - tr H^-1, kept."""
        if self._freedom is None:
            mean = self._rows.mean
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (len(mean), _PROBES), generator=generator).to(mean) * 2 - 1
            found, _ = self._iterate(signs, signs.norm(dim=0))
            # The signs see the difference to the preconditioner alone: its own trace is known.
            differing = float((signs * (found - self._precondition(signs))).sum()) / _PROBES
            self._freedom = len(mean) - self._precondition.trace - differing
        return self._freedom

    def _iterate(self, rhs: Tensor, scale: Tensor) -> tuple[Tensor, Course]:
        """H^-1 times vectors (D, C), with residuals of at most ``tol`` times a scale (C,)."""
        return conjugate_gradients(
            self._rows.product, rhs, self._precondition, scale=scale, tol=self._tol, max_iter=self._max_iter,
            agreed=self._rows.agreed,
        )  # fmt: skip
