"""The quadratic on explicit features: its solution, and what it answers for all outputs at once.

Hides in which form the matrices are: of rows, of columns, or too large for a square matrix. It knows features, targets
and weights; it knows no network and no estimator.

The objective is ``sum_i s_i |phi_i' B + b - y_i|^2 + |B|^2``, the intercept b without a penalty. Features are centered
with the weights, which eliminates b: then ``A^-1 1 = s`` for ``A = Phi Phi' + S^-1``, and with ``t = sum_i s_i``

    M = A^-1 - s s' / t = S - s s' / t - S Phi H^-1 Phi' S,    H = Phi' S Phi + I,
    alpha = M Y = S (Y - f(X)),    B = Phi' alpha.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Block", "ColumnForm", "EstimatedForm", "Factorization", "KroneckerPreconditioner", "RowForm", "Solution", "Status",
    "changes", "closed_form_fits", "factorize", "leave_one_out", "noise_variance", "pcg",
]  # fmt: skip

Features = Tensor | np.ndarray  # an ndarray may be a memmap: it is read in pieces of rows
Operator = Callable[[Tensor], Tensor]

_COPIES = 3  # square matrices of float64 that a closed form holds at its peak, LAPACK's own copy included
_ELEMENTS = 1 << 24  # of the features that are held in float64 at once
_BLOCK_MAX = 2048  # columns of an exact block of the preconditioner, or of a factor of a Kronecker product
_REFRESH = 20  # iterations after which the recursive residual is replaced by the true one
_DRIFT = 1 / 3  # part of the true residual from which on it is put down to rounding
_DRIFTS = 3  # replacements dominated by rounding after which the solver gives up
_PROBES = 32  # of the trace of H^-1, whose standard deviation is below sqrt(2 degrees of freedom / 32), about
_LOG_FACTOR = math.log(1e3)  # by which the preconditioner's odds may be wrong: beyond, errors of the trace would decide


# --------------------------------------------------------------------------------------------------- closed forms


class _Rows:
    """Features less their weighted mean, in float64, in pieces of rows; one piece alone is kept."""

    def __init__(self, features: Features, weights: Tensor):
        self.features, self.weights, self.total = features, weights, weights.sum()
        n, d = features.shape
        step = max(1, _ELEMENTS // max(d, 1))
        self._slices = [slice(a, min(a + step, n)) for a in range(0, n, step)]
        self._kept: Tensor | None = None
        self.mean = torch.zeros(d, dtype=torch.float64, device=weights.device)
        for rows in self._slices:
            self.mean += weights[rows] @ _double(features[rows])
        self.mean /= self.total

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self._slices:
            if self._kept is not None:
                yield rows, self._kept
                continue
            piece = self.center(self.features[rows])
            if len(self._slices) == 1:
                self._kept = piece
            yield rows, piece

    def whole(self) -> Tensor:
        """Phi, (n, D), kept as the only piece."""
        if len(self._slices) > 1:
            self._kept = torch.cat([phi for _, phi in self])
            self._slices = [slice(0, len(self._kept))]
        return next(iter(self))[1]

    def center(self, features: Features) -> Tensor:
        """New rows (k, D) less the mean of these."""
        return _double(features) - self.mean

    def fitted(self, coef: Tensor) -> Tensor:
        """Phi B, (n, C)."""
        return torch.cat([phi @ coef for _, phi in self])

    def moment(self, values: Tensor) -> Tensor:
        """Phi' S V for V (n, C): (D, C)."""
        found = torch.zeros(len(self.mean), values.shape[1], dtype=torch.float64, device=self.mean.device)
        for rows, phi in self:
            found.addmm_(phi.T, self.weights[rows, None] * values[rows])
        return found

    def product(self, vectors: Tensor) -> Tensor:
        """H V for V (D, C), in one pass."""
        found = vectors.clone()
        for rows, phi in self:
            found.addmm_(phi.T, self.weights[rows, None] * (phi @ vectors))
        return found

    def center_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (n, C) less their weighted mean, and that (C,)."""
        y = targets.double()
        first = y[:1]  # taken away first, a constant leaves exactly nothing
        y = y - first
        mean = (self.weights @ y) / self.total
        return y - mean, mean + first[0]


class Factorization:
    """What answers for a quadratic; see `RowForm`, `ColumnForm` and `EstimatedForm`.

    Rows have to stand for two images at least if one is to be left out.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Phi, each column times the root of its prior variance.
    weights : Tensor of shape (n,)
        s > 0.

    Attributes
    ----------
    method : {"rows", "columns", "estimate"}
        Name of the form.
    course : Solution or None
        Of the last targets, where a solution takes iterations.
    """

    method: str
    course: Solution | None = None

    def __init__(self, features: Features, weights: Tensor):
        self.features, self.weights = features, weights.double()
        self._rows = _Rows(features, self.weights)

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """B (D, C) and b (C,) for targets (n, C)."""
        y, mean = self._rows.center_targets(targets)
        coef = self._coef(y)
        return coef, mean - self._rows.mean @ coef

    def dual(self, targets: Tensor) -> Tensor:
        """alpha = M Y, that is S (Y - f(X)), for targets (n, C): (n, C)."""
        y, _ = self._rows.center_targets(targets)
        return self.weights[:, None] * (y - self._rows.fitted(self._coef(y)))

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        raise NotImplementedError

    def remaining(self, fraction: Tensor) -> Tensor:
        """q M_ii + (1 - q) s_i for q (n,), (n,): alpha over this is the residual without q of the row's weight."""
        return fraction * self.diagonal + (1 - fraction) * self.weights

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D), with f(x) = B_x Y: (k, n). Many rows are for the caller to split."""
        raise NotImplementedError

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of f(x) over that of the noise, of new rows (k, D): (k,)."""
        raise NotImplementedError

    def _coef(self, targets: Tensor) -> Tensor:
        """B (D, C) for centered targets (n, C)."""
        raise NotImplementedError


class RowForm(Factorization):
    """M itself, of n rows and columns, and a copy of the features in float64."""

    method = "rows"

    def __init__(self, features: Features, weights: Tensor):
        super().__init__(features, weights)
        self._phi = self._rows.whole()
        a = self._phi @ self._phi.T
        a.diagonal().add_(1 / self.weights)
        self._m = _inverse(a)
        self._m.addr_(self.weights, self.weights / self._rows.total, alpha=-1)

    def dual(self, targets: Tensor) -> Tensor:
        """alpha = M Y for targets (n, C): (n, C)."""
        # M 1 = 0: the mean is taken away first for its rounding errors.
        return self._m @ self._rows.center_targets(targets)[0]

    def _coef(self, targets: Tensor) -> Tensor:
        return self._phi.T @ (self._m @ targets)

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        return self._m.diagonal()

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D): (k, n)."""
        kernel = self._rows.center(features) @ self._phi.T
        return kernel @ self._m + self.weights / self._rows.total

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of new rows (k, D) over that of the noise: (k,)."""
        z = self._rows.center(features)
        kernel = z @ self._phi.T
        rest = z.square().sum(1) - ((kernel @ self._m) * kernel).sum(1)
        return rest.clamp_min(0) + 1 / self._rows.total


class ColumnForm(Factorization):
    """H^-1, of D rows and columns, from sums over pieces of the rows."""

    method = "columns"

    def __init__(self, features: Features, weights: Tensor):
        super().__init__(features, weights)
        h = torch.eye(features.shape[1], dtype=torch.float64, device=self.weights.device)
        for rows, phi in self._rows:
            h.addmm_((phi * self.weights[rows, None]).T, phi)
        self._inverse = _inverse(h)

    def _coef(self, targets: Tensor) -> Tensor:
        return self._inverse @ self._rows.moment(targets)

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        leverage = torch.cat([((phi @ self._inverse) * phi).sum(1) for _, phi in self._rows])
        return self.weights - self.weights.square() * (leverage + 1 / self._rows.total)

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D): (k, n)."""
        z = self._rows.center(features) @ self._inverse
        return (self._rows.fitted(z.T).T + 1 / self._rows.total) * self.weights

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of new rows (k, D) over that of the noise: (k,)."""
        z = self._rows.center(features)
        return ((z @ self._inverse) * z).sum(1) + 1 / self._rows.total


def closed_form_fits(n: int, d: int, budget: int) -> bool:
    """Whether the square matrices of the smaller form of n rows and d features take at most ``budget`` bytes.

    The features themselves, n by d in float64 in the form of rows, come on top.
    """
    return _bytes(min(n, d)) <= budget


def factorize(features: Features, weights: Tensor, budget: int, *, form: str = "auto") -> RowForm | ColumnForm:
    """A closed form.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Phi, each column times the root of its prior variance.
    weights : Tensor of shape (n,)
        s > 0.
    budget : int
        Bytes that the square matrices may take.
    form : {"auto", "rows", "columns"}, default="auto"
        "auto" takes the smaller matrices.

    Returns
    -------
    RowForm or ColumnForm

    Raises
    ------
    ValueError
        The form is unknown, its matrices do not fit, or they are not positive definite.
    """
    n, d = features.shape
    if form == "auto":
        form = "rows" if n <= d else "columns"
    if form not in ("rows", "columns"):
        raise ValueError(f"form must be 'auto', 'rows' or 'columns'; got {form!r}.")
    size = n if form == "rows" else d
    if _bytes(size) > budget:
        raise ValueError(
            f"The closed form of {n} rows and {d} features takes {_COPIES} square matrices of {size} rows, "
            f"{_bytes(size) / 2**30:.3g} GiB, more than the {budget / 2**30:.3g} GiB meant for them: use solver='pcg' "
            "or 'auto', or fewer images or features."
        )
    return RowForm(features, weights) if form == "rows" else ColumnForm(features, weights)


def _bytes(size: int) -> int:
    """That a closed form with matrices of so many rows takes at its peak."""
    return _COPIES * 8 * size**2


def _double(features: Features) -> Tensor:
    """Rows in float64."""
    if isinstance(features, np.ndarray):
        return torch.from_numpy(np.array(features, dtype=np.float64))  # a copy: a memmap may be read-only
    return features.double()


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, which is overwritten."""
    _, info = torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty(0, dtype=torch.int32, device=matrix.device)))
    if info:
        raise ValueError(
            f"The quadratic is not positive definite to rounding in row {int(info) - 1} of {len(matrix)}: check that "
            "features and weights are finite, or increase alpha, since the prior outweighs the noise beyond float64."
        )
    return torch.cholesky_inverse(matrix)


# ------------------------------------------------------------------------------------------------- large problems


class Status(enum.Enum):
    """How an iterative solver ended; the value is what a user may do about it."""

    CONVERGED = "The tolerance was reached."
    MAX_ITER = "Increase max_iter, or alpha, or accept a larger tol."
    STAGNATED = "Rounding errors prevent further progress: accept a larger tol, or increase alpha."
    NOT_FINITE = "Values are not finite: check the network's outputs, or increase alpha."


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes
    ----------
    coef : Tensor of shape (D, C)
    intercept : Tensor of shape (C,)
    status : Status
    n_iter : int
    residual_norms : tuple of float
        Norm of the gradient relative to that at zero, the largest of all outputs, before the first and after each
        iteration.
    """

    coef: Tensor
    intercept: Tensor
    status: Status
    n_iter: int
    residual_norms: tuple[float, ...]

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True)
class Block:
    """Columns of the preconditioner that are inverted together.

    Attributes
    ----------
    columns : slice
        With a start and a stop.
    sides : tuple of int or None
        (p, q): the features are matrices of p rows and q columns, row by row, whose curvature is taken for a Kronecker
        product. None: the block is exact.
    """

    columns: slice
    sides: tuple[int, int] | None = None


class KroneckerPreconditioner:
    """The inverse P of a block-diagonal approximation of H, a function of vectors (D, C).

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
    weights : Tensor of shape (n,)
        s > 0.
    blocks : sequence of Block
        That cover the columns, in their order. Blocks too wide for a square matrix are split.

    Raises
    ------
    ValueError
        The blocks do not cover the columns, or sides do not fit them.

    Notes
    -----
    An exact block is ``Phi_g' S Phi_g + I`` with its Cholesky factor. For features that are matrices F_i the curvature
    is approximated by ``L (x) R / tr L`` with ``L = sum_i s_i F_i F_i'`` and ``R = sum_i s_i F_i' F_i``, of the same
    trace, and inverted with the identity by two eigendecompositions: trace-restricted K-FAC (Gao et al., "A
    trace-restricted Kronecker-factored approximation to natural gradient", AAAI 2021). It is exact for one row, and for
    rows of one Kronecker direction: F_i = c_i u v'.
    """

    def __init__(self, features: Features, weights: Tensor, blocks: Sequence[Block]):
        self._build(_Rows(features, weights.double()), blocks)

    @classmethod
    def _of(cls, rows: _Rows, blocks: Sequence[Block]) -> KroneckerPreconditioner:
        """Of rows that are centered already."""
        made = cls.__new__(cls)
        made._build(rows, blocks)
        return made

    def _build(self, rows: _Rows, blocks: Sequence[Block]) -> None:
        _check_blocks(blocks, len(rows.mean))
        self._blocks = [part for block in blocks for part in _split(block)]
        sums = [_zeros(block, rows.mean) for block in self._blocks]
        for at, phi in rows:
            for block, found in zip(self._blocks, sums, strict=True):
                _add_curvature(found, phi[:, block.columns], rows.weights[at], block.sides)
        self._factors = [_factor(found, block.sides) for found, block in zip(sums, self._blocks, strict=True)]

    def __call__(self, vectors: Tensor) -> Tensor:
        """P v for vectors (D, C)."""
        out = torch.empty_like(vectors)
        for i, block in enumerate(self._blocks):
            out[block.columns] = self._solve(i, vectors[block.columns])
        return out

    @property
    def trace(self) -> float:
        """tr P."""
        exact = (torch.cholesky_inverse(f[0]).trace() for f in self._factors if len(f) == 1)
        products = ((1 / f[2]).sum() for f in self._factors if len(f) == 3)
        return float(sum(exact)) + float(sum(products))

    def odds(self, features: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """What the blocks think of the variance of rows (k, D) before these were seen with weights (k,): (k,).

        That is the sum over blocks of ``s h / (c - s h)``, ``h = phi_g' P_g phi_g``, for an exact block; c (k,) is what
        the intercept leaves. Those of Kronecker products, where s h may be above c, add ``s h``.
        """
        found = torch.zeros_like(share)
        for i, block in enumerate(self._blocks):
            phi = features[:, block.columns]
            leverage = weights * (self._solve(i, phi.T).T * phi).sum(1)
            if block.sides is None:
                leverage = leverage / (share - leverage).clamp_min(torch.finfo(torch.float64).eps)
            found += leverage
        return found

    def _solve(self, i: int, vectors: Tensor) -> Tensor:
        """P_g v for vectors (d, C) of the i-th block."""
        sides, factors = self._blocks[i].sides, self._factors[i]
        if sides is None:
            return torch.cholesky_solve(vectors, factors[0])
        left, right, eigenvalues = factors
        x = vectors.T.reshape(-1, *sides)  # (C, p, q)
        return (left @ ((left.T @ x @ right) / eigenvalues) @ right.T).flatten(1).T


def _check_blocks(blocks: Sequence[Block], d: int) -> None:
    """Raise unless blocks cover d columns, once and in order."""
    stop = 0
    for block in blocks:
        start, end = block.columns.start, block.columns.stop
        if start != stop or end < start:
            raise ValueError(f"Blocks must cover the columns in order; {block} follows column {stop}.")
        if block.sides is not None and math.prod(block.sides) != end - start:
            raise ValueError(f"{block} has sides of {math.prod(block.sides)} features for {end - start} columns.")
        stop = end
    if stop != d:
        raise ValueError(f"Blocks must cover all {d} columns; they end at column {stop}.")


def _split(block: Block) -> list[Block]:
    """A block in parts whose square matrices are small enough."""
    start, stop, width, sides = block.columns.start, block.columns.stop, _BLOCK_MAX, block.sides
    if sides is not None and sides[1] <= _BLOCK_MAX:
        width *= sides[1]  # whole rows of the matrices
    else:
        sides = None
    parts = [slice(a, min(a + width, stop)) for a in range(start, stop, width)]
    return [Block(part, sides and ((part.stop - part.start) // sides[1], sides[1])) for part in parts]


def _zeros(block: Block, like: Tensor) -> list[Tensor]:
    """Where the curvature of a block is summed: (d, d), or (p, p) and (q, q)."""
    return [like.new_zeros(k, k) for k in block.sides or (block.columns.stop - block.columns.start,)]


def _add_curvature(sums: list[Tensor], phi: Tensor, weights: Tensor, sides: tuple[int, int] | None) -> None:
    """Add some rows (k, d) to the block itself, or to its two factors."""
    weighted = phi * weights[:, None]
    if sides is None:
        sums[0].addmm_(weighted.T, phi)
        return
    f, weighted = phi.reshape(-1, *sides), weighted.view(-1, *sides)
    sums[0] += torch.einsum("npq,nrq->pr", weighted, f)
    sums[1] += torch.einsum("npq,npr->qr", weighted, f)


def _factor(sums: list[Tensor], sides: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """What the inverse of a block, with the identity of the prior, is applied by."""
    if sides is None:
        sums[0].diagonal().add_(1)
        return (torch.linalg.cholesky(sums[0]),)
    (a, left), (b, right) = (torch.linalg.eigh(m) for m in sums)
    trace = a.sum()
    product = torch.outer(a, b) / torch.where(trace > 0, trace, 1.0)
    return left, right, product.clamp_min(0) + 1


class EstimatedForm(Factorization):
    """Conjugate gradients for the solution and `hat`, and estimates of the diagonal of M and of the variance.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Phi, each column times the root of its prior variance.
    weights : Tensor of shape (n,)
        s > 0.
    blocks : sequence of Block
        Of the preconditioner.
    tol, max_iter
        As in `pcg`.
    multiplicity : Tensor of shape (n,), optional
        How many images a row stands for, one each by default: with it the variance is the same if rows are given as
        often instead.

    Notes
    -----
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
    ):
        super().__init__(features, weights)
        self._tol, self._max_iter = tol, max_iter
        self._fraction = torch.ones_like(self.weights) if multiplicity is None else 1 / multiplicity.double()
        self._precondition = KroneckerPreconditioner._of(self._rows, blocks)
        self._targets: Tensor | None = None
        self._freedom: float | None = None

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """B (D, C) and b (C,) for targets (n, C); those of the last targets are kept."""
        if self.course is None or self._targets is None or not torch.equal(self._targets, targets):
            self.course = _minimize(self._rows, targets, self._precondition, self._tol, self._max_iter)
            self._targets = targets.clone()
        return self.course.coef, self.course.intercept

    def dual(self, targets: Tensor) -> Tensor:
        """alpha = S (Y - f(X)) for targets (n, C): (n, C)."""
        coef, _ = self.solve(targets)
        y, _ = self._rows.center_targets(targets)
        return self.weights[:, None] * (y - self._rows.fitted(coef))

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,): an estimate."""
        return self.remaining(torch.ones_like(self.weights))

    def remaining(self, fraction: Tensor) -> Tensor:
        """q M_ii + (1 - q) s_i for q (n,), (n,): an estimate, the same for a row of weight 2 and a row given twice."""
        share, odds = self._odds(fraction)
        return self.weights * share / (1 + self._factor(fraction, share, odds) * odds)

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D), (k, n): as many runs of conjugate gradients, to ``tol`` or ``max_iter``."""
        z = self._rows.center(features).T
        found = _conjugate_gradients(self._rows.product, z, self._precondition, self._tol, self._max_iter)[0]
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
        odds = [self._precondition.odds(phi, weights[rows], share[rows]) for rows, phi in self._rows]
        return share, torch.cat(odds)

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
            found = _conjugate_gradients(self._rows.product, signs, self._precondition, self._tol, self._max_iter)[0]
            # The signs see the difference to the preconditioner alone: its own trace is known.
            differing = float((signs * (found - self._precondition(signs))).sum()) / _PROBES
            self._freedom = len(mean) - self._precondition.trace - differing
        return self._freedom


def pcg(
    features: Features,
    weights: Tensor,
    targets: Tensor,
    preconditioner: Operator | None,
    *,
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
) -> Solution:
    """Conjugate gradients for all outputs simultaneously, each with step lengths of its own.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Phi, of any precision, read in pieces of rows; sums are in float64.
    weights : Tensor of shape (n,)
        s > 0.
    targets : Tensor of shape (n, C)
    preconditioner : callable or None
        Vectors (D, C) -> about H^-1 times these; symmetric and positive definite.
    tol : float
        It stops when each output's gradient relative to that at zero is at most this, in a residual computed anew.
    max_iter : int
    start : Tensor of shape (D, C), optional
        Zero by default.

    Returns
    -------
    Solution

    References
    ----------
    Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems", algorithm 9.1.
    """
    return _minimize(_Rows(features, weights.double()), targets, preconditioner, tol, max_iter, start)


def _minimize(
    rows: _Rows, targets: Tensor, precondition: Operator | None, tol: float, max_iter: int, start: Tensor | None = None
) -> Solution:
    """`pcg` on rows that are centered already."""
    y, mean = rows.center_targets(targets)
    coef, status, norms = _conjugate_gradients(
        rows.product, rows.moment(y), precondition or torch.clone, tol, max_iter, start
    )
    return Solution(coef, mean - rows.mean @ coef, status, len(norms) - 1, norms)


def _conjugate_gradients(
    product: Operator, rhs: Tensor, precondition: Operator, tol: float, max_iter: int, start: Tensor | None = None
) -> tuple[Tensor, Status, tuple[float, ...]]:
    """H X = rhs for (D, C) by as many runs side by side, of which those that are done rest."""
    size = rhs.norm(dim=0)
    size = torch.where(size > 0, size, 1.0)
    x = torch.zeros_like(rhs) if start is None else start.double().clone()
    r = rhs.clone() if start is None else rhs - product(x)
    p, before, drifts = torch.zeros_like(rhs), torch.full_like(size, math.inf), 0
    relative = r.norm(dim=0) / size
    norms, status = [_largest(relative)], _judge(relative, tol, drifts)
    while status is Status.MAX_ITER and len(norms) <= max_iter:
        on = (relative > tol).nonzero().squeeze(1)
        z = precondition(r[:, on])
        rz = (r[:, on] * z).sum(0)
        p[:, on] = z + rz / before[on] * p[:, on]
        before[:] = math.inf  # a run that rested goes on without its last direction
        before[on] = rz
        hp = product(p[:, on])
        step = rz / (p[:, on] * hp).sum(0)
        x[:, on] += step * p[:, on]
        r[:, on] -= step * hp
        relative = r.norm(dim=0) / size
        if len(norms) % _REFRESH == 0 or len(norms) == max_iter or bool((relative <= tol).all()):
            true = rhs - product(x)
            relative = true.norm(dim=0) / size
            drift = (true - r).norm(dim=0) / size
            drifts += bool(((drift > _DRIFT * relative) & (relative > tol)).any())
            r = true
        norms.append(_largest(relative))
        status = _judge(relative, tol, drifts)
    return x, status, tuple(norms)


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


# ------------------------------------------------------------------------------------------------------ all forms


def leave_one_out(form: Factorization, targets: Tensor, multiplicity: Tensor) -> Tensor:
    """Outputs for each row by the solution without it.

    Parameters
    ----------
    form : Factorization
        Of n rows.
    targets : Tensor of shape (n, C)
    multiplicity : Tensor of shape (n,)
        m >= 1, how many identical images a row stands for, of which one is left out.

    Returns
    -------
    Tensor of shape (n, C)

    Notes
    -----
    The fraction q = 1 / m of the row's weight goes; the residual is then ``alpha_i / (q M_ii + (1 - q) s_i)``.
    """
    return targets.double() - _without(form, targets, 1 / multiplicity.double())


def changes(form: Factorization, targets: Tensor, multiplicity: Tensor, features: Features) -> Tensor:
    """Change of f(x) when a row is left out.

    Parameters
    ----------
    form : Factorization
        Of n rows.
    targets : Tensor of shape (n, C)
    multiplicity : Tensor of shape (n,)
        As in `leave_one_out`.
    features : Tensor or ndarray of shape (k, D)
        Of new rows.

    Returns
    -------
    Tensor of shape (k, n, C)

    Notes
    -----
    ``-B_xi q alpha_i / (q M_ii + (1 - q) s_i)``.
    """
    q = 1 / multiplicity.double()
    return -form.hat(features)[:, :, None] * (q[:, None] * _without(form, targets, q))


def noise_variance(form: Factorization, targets: Tensor, multiplicity: Tensor, free: int) -> float:
    """The variance of the noise of a row of weight 1 that has the largest restricted likelihood.

    Parameters
    ----------
    form : Factorization
        Of n rows.
    targets : Tensor of shape (n, C)
    multiplicity : Tensor of shape (n,)
        As in `leave_one_out`; N is its sum.
    free : int
        Outputs that are free: C - 1 of indicators that add up to one, else C.

    Returns
    -------
    float

    Notes
    -----
    ``tr(Y' M Y) / ((N - 1) free)``: one degree of freedom goes to the intercept.
    """
    y, _ = form._rows.center_targets(targets)  # M 1 = 0: without the mean rounding errors are smaller
    energy = float((y * form.dual(targets)).sum())
    return max(energy, 0.0) / (max(float(multiplicity.sum()) - 1, 1.0) * max(free, 1))


def _without(form: Factorization, targets: Tensor, fraction: Tensor) -> Tensor:
    """Residuals (n, C) of the rows by the solutions without these fractions (n,) of their weights."""
    return form.dual(targets) / form.remaining(fraction)[:, None]
