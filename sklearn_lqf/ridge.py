"""The quadratic on explicit features: its solution, and what it answers for all outputs at once.

Hides in which form the matrices are: of rows, of columns, or too large for a square matrix. It knows features, targets
and weights; it knows no network and no estimator.

The objective is ``sum_i s_i |phi_i' B + b - y_i|^2 + |B|^2``, the intercept b without a penalty. With K = Phi Phi',
A = K + S^-1 and M = A^-1 - A^-1 1 1' A^-1 / (1' A^-1 1), the dual variables are alpha = M Y, and B = Phi' alpha. In
columns, with H = Phi' S Phi + I on centered features, M = S - S 1 1' S / (1' S 1) - S Phi H^-1 Phi' S.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Block", "ColumnForm", "Course", "EstimatedForm", "Factorization", "KroneckerPreconditioner", "RowForm", "Status",
    "changes", "closed_form_fits", "factorize", "leave_one_out", "noise_variance", "pcg",
]  # fmt: skip

_COPIES = 3  # square matrices of float64 that a closed form holds at its peak
_ROWS_AT_ONCE = 1 << 24  # elements of the features that are converted to float64 at once
_BLOCK_MAX = 2048  # columns of an exact block of the preconditioner
_REFRESH = 20  # iterations after which the recursive residual is replaced by the true one


class Status(enum.Enum):
    """How an iterative solver ended; the value is what a user may do about it."""

    CONVERGED = "The tolerance was reached."
    MAX_ITER = "Increase max_iter, or alpha, or accept a larger tol."
    NOT_FINITE = "Values are not finite: check the network's outputs, or increase alpha."


@dataclass(frozen=True)
class Course:
    """The course of an iterative solve.

    Attributes
    ----------
    status : Status
    n_iter : int
    residual_norms : tuple of float
        Largest relative norm of the gradient of an output, before the first and after each iteration.
    """

    status: Status
    n_iter: int
    residual_norms: tuple[float, ...]


class Factorization:
    """What answers for a quadratic; see `RowForm`, `ColumnForm` and `EstimatedForm`.

    Parameters
    ----------
    features : Tensor of shape (n, D)
        Phi, each column times the root of its prior variance.
    weights : Tensor of shape (n,)
        s > 0.

    Attributes
    ----------
    method : str
        Name of the form.
    course : Course or None
        Of the last `solve`, where it iterates.
    """

    method: str
    course: Course | None = None

    def __init__(self, features: Tensor, weights: Tensor):
        self.weights = weights.double()
        self._total = self.weights.sum()
        self._mean = (self.weights @ features.double()) / self._total
        self._features = features

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """B (D, C) and b (C,) for targets (n, C)."""
        raise NotImplementedError

    def dual(self, targets: Tensor) -> Tensor:
        """alpha = M Y, (n, C)."""
        raise NotImplementedError

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        raise NotImplementedError

    def hat(self, features: Tensor) -> Tensor:
        """The rows B_x of new rows (k, D), with f(x) = B_x Y: (k, n)."""
        raise NotImplementedError

    def variance(self, features: Tensor) -> Tensor:
        """Posterior variance of f(x) over that of the noise, of new rows (k, D): (k,)."""
        raise NotImplementedError

    def _centered(self, features: Tensor) -> Tensor:
        return features.double() - self._mean

    def _intercept(self, coef: Tensor, targets: Tensor) -> Tensor:
        return (self.weights @ targets.double()) / self._total - self._mean @ coef


class RowForm(Factorization):
    """One matrix of n rows and columns; at most three are held at once."""

    method = "rows"

    def __init__(self, features: Tensor, weights: Tensor):
        super().__init__(features, weights)
        self._phi = self._centered(features)
        a = self._phi @ self._phi.T
        a.diagonal().add_(1 / self.weights)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
        self._one = self._inverse.sum(1)  # A^-1 1
        self._sum = self._one.sum()

    def dual(self, targets: Tensor) -> Tensor:
        y = targets.double()
        return self._inverse @ y - torch.outer(self._one, self._one @ y / self._sum)

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        coef = self._phi.T @ self.dual(targets)
        return coef, self._one @ targets.double() / self._sum - self._mean @ coef

    @property
    def diagonal(self) -> Tensor:
        return self._inverse.diagonal() - self._one.square() / self._sum

    def hat(self, features: Tensor) -> Tensor:
        k = self._centered(features) @ self._phi.T
        return k @ self._inverse + torch.outer((1 - k @ self._one) / self._sum, self._one)

    def variance(self, features: Tensor) -> Tensor:
        z = self._centered(features)
        k = z @ self._phi.T
        rest = z.square().sum(1) - ((k @ self._inverse) * k).sum(1)
        return rest.clamp_min(0) + (1 - k @ self._one).square() / self._sum


class ColumnForm(Factorization):
    """One matrix of D rows and columns, summed over pieces of the rows; at most three are held at once."""

    method = "columns"

    def __init__(self, features: Tensor, weights: Tensor):
        super().__init__(features, weights)
        d = features.shape[1]
        h = torch.eye(d, dtype=torch.float64, device=features.device)
        for rows, phi in self._pieces():
            h.addmm_((phi * self.weights[rows, None]).T, phi)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Centered rows in float64, in pieces."""
        n, d = self._features.shape
        step = max(1, _ROWS_AT_ONCE // max(d, 1))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            yield rows, self._centered(self._features[rows])

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        y = targets.double() - (self.weights @ targets.double()) / self._total
        rhs = torch.zeros(self._features.shape[1], y.shape[1], dtype=torch.float64, device=y.device)
        for rows, phi in self._pieces():
            rhs.addmm_(phi.T, self.weights[rows, None] * y[rows])
        coef = self._inverse @ rhs
        return coef, self._intercept(coef, targets)

    def dual(self, targets: Tensor) -> Tensor:
        coef, intercept = self.solve(targets)
        fitted = torch.cat([phi @ coef for _, phi in self._pieces()]) + self._mean @ coef + intercept
        return self.weights[:, None] * (targets.double() - fitted)

    @property
    def diagonal(self) -> Tensor:
        leverage = torch.cat([((phi @ self._inverse) * phi).sum(1) for _, phi in self._pieces()])
        return self.weights - self.weights.square() * (leverage + 1 / self._total)

    def hat(self, features: Tensor) -> Tensor:
        z = self._centered(features) @ self._inverse
        return torch.cat([(z @ phi.T + 1 / self._total) * self.weights[rows] for rows, phi in self._pieces()], 1)

    def variance(self, features: Tensor) -> Tensor:
        z = self._centered(features)
        return ((z @ self._inverse) * z).sum(1) + 1 / self._total


# --------------------------------------------------------------------------------------------- large problems


@dataclass(frozen=True)
class Block:
    """Columns of the preconditioner that are inverted together.

    Attributes
    ----------
    columns : slice
    sides : tuple of int or None
        (p, q): the features are matrices of p rows and q columns, whose curvature is taken for a Kronecker product.
        None: the block is exact.
    """

    columns: slice
    sides: tuple[int, int] | None = None


class KroneckerPreconditioner:
    """The inverse of a block-diagonal approximation of H.

    Exact blocks are factorized. For features that are matrices F_i the curvature is approximated by
    ``L (x) R / tr L`` with ``L = sum s F F'`` and ``R = sum s F'F``: the factors of K-FAC for sketched gradients
    (Martens & Grosse 2015), exact where the F_i are multiples of one Kronecker product.

    Parameters
    ----------
    features : Tensor of shape (n, D)
    mean : Tensor of shape (D,)
        Taken away from the features.
    weights : Tensor of shape (n,)
    blocks : sequence of Block
        That cover the columns. Exact ones of too many columns are split.
    """

    def __init__(self, features: Tensor, mean: Tensor, weights: Tensor, blocks: Sequence[Block]):
        self._blocks = [part for block in blocks for part in _split(block)]
        n, d = features.shape
        step = max(1, _ROWS_AT_ONCE // max(d, 1))
        sums: list[Any] = [None] * len(self._blocks)
        for start in range(0, n, step):
            phi, s = features[start : start + step].double() - mean, weights[start : start + step]
            for i, block in enumerate(self._blocks):
                new = _curvature(phi[:, block.columns], s, block.sides)
                sums[i] = new if sums[i] is None else [a + b for a, b in zip(sums[i], new, strict=True)]
        self._factors = [_factor(found, block.sides) for found, block in zip(sums, self._blocks, strict=True)]

    def __call__(self, vectors: Tensor) -> Tensor:
        """P v for vectors (D, C)."""
        out = torch.empty_like(vectors)
        for block, factors in zip(self._blocks, self._factors, strict=True):
            v = vectors[block.columns]
            if block.sides is None:
                out[block.columns] = torch.cholesky_solve(v, factors[0])
                continue
            left, right, eigenvalues = factors
            x = v.T.reshape(-1, *block.sides)
            out[block.columns] = (left @ ((left.T @ x @ right) / eigenvalues) @ right.T).flatten(1).T
        return out


def _split(block: Block) -> list[Block]:
    start, stop = block.columns.start, block.columns.stop
    if block.sides is not None or stop - start <= _BLOCK_MAX:
        return [block]
    return [Block(slice(a, min(a + _BLOCK_MAX, stop))) for a in range(start, stop, _BLOCK_MAX)]


def _curvature(phi: Tensor, weights: Tensor, sides: tuple[int, int] | None) -> list[Tensor]:
    """Sums over some rows: the block itself, or its two factors."""
    if sides is None:
        return [(phi * weights[:, None]).T @ phi]
    f = phi.view(-1, *sides)
    weighted = f * weights[:, None, None]
    return [torch.einsum("npq,nrq->pr", weighted, f), torch.einsum("npq,npr->qr", weighted, f)]


def _factor(sums: list[Tensor], sides: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """What the inverse of a block, with the identity of the prior, is applied by."""
    if sides is None:
        return (torch.linalg.cholesky(sums[0] + torch.eye(len(sums[0])).to(sums[0])),)
    (a, left), (b, right) = (torch.linalg.eigh(m) for m in sums)
    trace = a.sum()
    product = torch.outer(a, b) / trace if trace > 0 else torch.zeros(sides).to(a)
    return left, right, product.clamp_min(0) + 1


class EstimatedForm(Factorization):
    """Conjugate gradients for the solution, and estimates of what a square matrix would give.

    The diagonal of M, the rows of `hat` and the variance are those of the preconditioner in the place of H^-1.

    Parameters
    ----------
    features : Tensor of shape (n, D)
    weights : Tensor of shape (n,)
    blocks : sequence of Block
    tol, max_iter
        As in `pcg`.
    """

    method = "estimate"

    def __init__(self, features: Tensor, weights: Tensor, blocks: Sequence[Block], *, tol: float, max_iter: int):
        super().__init__(features, weights)
        self._tol, self._max_iter = tol, max_iter
        self._precondition = KroneckerPreconditioner(features, self._mean, self.weights, blocks)

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        y = targets.double() - (self.weights @ targets.double()) / self._total
        coef, self.course = pcg(
            self._features, self._mean, self.weights, y, self._precondition, tol=self._tol, max_iter=self._max_iter
        )
        return coef, self._intercept(coef, targets)

    def dual(self, targets: Tensor) -> Tensor:
        coef, intercept = self.solve(targets)
        fitted = torch.cat([part.double() @ coef for part in self._features.split(self._step)]) + intercept
        return self.weights[:, None] * (targets.double() - fitted)

    @property
    def _step(self) -> int:
        return max(1, _ROWS_AT_ONCE // max(self._features.shape[1], 1))

    @property
    def diagonal(self) -> Tensor:
        found = torch.cat([self.variance(part) for part in self._features.split(self._step)])
        least = torch.finfo(torch.float64).eps * self.weights
        return torch.maximum(self.weights - self.weights.square() * found, least)

    def hat(self, features: Tensor) -> Tensor:
        z = self._precondition(self._centered(features).T).T
        parts = [z @ self._centered(part).T for part in self._features.split(self._step)]
        return (torch.cat(parts, 1) + 1 / self._total) * self.weights

    def variance(self, features: Tensor) -> Tensor:
        z = self._centered(features)
        return (self._precondition(z.T).T * z).sum(1) + 1 / self._total


def pcg(
    features: Tensor,
    mean: Tensor,
    weights: Tensor,
    targets: Tensor,
    precondition: Any,
    *,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Course]:
    """Conjugate gradients for all outputs at once, each with step lengths of its own.

    Parameters
    ----------
    features : Tensor of shape (n, D)
        Of any precision; sums are in float64.
    mean : Tensor of shape (D,)
        Weighted mean, taken away from the features.
    weights : Tensor of shape (n,)
    targets : Tensor of shape (n, C)
        Less their weighted mean.
    precondition : callable
        Vectors (D, C) to vectors.
    tol : float
        It stops when the gradient of each output relative to that at zero is below, by a residual that is computed
        anew.
    max_iter : int

    Returns
    -------
    coef : Tensor of shape (D, C)
    course : Course
    """
    step = max(1, _ROWS_AT_ONCE // max(features.shape[1], 1))

    def product(v: Tensor) -> Tensor:
        found = v.clone()
        for part, s in zip(features.split(step), weights.split(step), strict=True):
            phi = part.double() - mean
            found.addmm_(phi.T, s[:, None] * (phi @ v))
        return found

    rhs = torch.zeros(features.shape[1], targets.shape[1], dtype=torch.float64, device=features.device)
    for part, s, y in zip(features.split(step), weights.split(step), targets.split(step), strict=True):
        rhs.addmm_((part.double() - mean).T, s[:, None] * y)
    scale = rhs.norm(dim=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x, r = torch.zeros_like(rhs), rhs.clone()
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum(0)
    norms = [float((r.norm(dim=0) / scale).max())]
    status = Status.CONVERGED if norms[0] <= tol else Status.MAX_ITER
    n_iter = 0
    while status is Status.MAX_ITER and n_iter < max_iter:
        hp = product(p)
        a = torch.where(rz > 0, rz / (p * hp).sum(0), torch.zeros_like(rz)).nan_to_num(0.0)
        x, r, n_iter = x + a * p, r - a * hp, n_iter + 1
        if n_iter % _REFRESH == 0 or bool((r.norm(dim=0) <= tol * scale).all()):
            r = rhs - product(x)
        norms.append(float((r.norm(dim=0) / scale).max()))
        if norms[-1] <= tol:
            status = Status.CONVERGED
        elif not norms[-1] < float("inf"):
            status = Status.NOT_FINITE
        z = precondition(r)
        new = (r * z).sum(0)
        p = z + torch.where(rz > 0, new / rz, torch.zeros_like(rz)) * p
        rz = new
    return x, Course(status, n_iter, tuple(norms))


# ------------------------------------------------------------------------------------------------- all forms


def closed_form_fits(n: int, d: int, budget: int) -> bool:
    """Whether the square matrices of the smaller form take no more than so many bytes."""
    return _COPIES * 8 * min(n, d) ** 2 <= budget


def factorize(features: Tensor, weights: Tensor, budget: int) -> Factorization:
    """The closed form of the smaller matrices.

    Parameters
    ----------
    features : Tensor of shape (n, D)
    weights : Tensor of shape (n,)
    budget : int
        Bytes.

    Raises
    ------
    ValueError
        The matrices do not fit.
    """
    n, d = features.shape
    if not closed_form_fits(n, d, budget):
        raise ValueError(
            f"The closed form of {n} rows and {d} features takes {_COPIES} square matrices of {min(n, d)} rows, more "
            f"than the {budget / 2**30:.1f} GiB meant for them: use solver='pcg' or 'auto', or fewer images."
        )
    return RowForm(features, weights) if n <= d else ColumnForm(features, weights)


def leave_one_out(form: Factorization, targets: Tensor, multiplicity: Tensor) -> Tensor:
    """Outputs for each row by the solution without it, (n, C).

    Of a row that stands for m identical images one is left out: the fraction q = 1 / m of its weight. The residual is
    then ``alpha_i / (q M_ii + (1 - q) s_i)``.
    """
    gone, _ = _without(form, targets, multiplicity)
    return targets.double() - gone


def changes(form: Factorization, targets: Tensor, multiplicity: Tensor, features: Tensor) -> Tensor:
    """Change of f(x) of new rows (k, D) when a row is left out, (k, n, C).

    That is ``-B_xi q alpha_i / (q M_ii + (1 - q) s_i)``, in the terms of `leave_one_out`.
    """
    gone, q = _without(form, targets, multiplicity)
    return -form.hat(features)[:, :, None] * (q[:, None] * gone)


def _without(form: Factorization, targets: Tensor, multiplicity: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (n, C) of the rows by the solutions without them, and the fractions that are left out (n,)."""
    q = 1 / multiplicity.double()
    return form.dual(targets) / (q * form.diagonal + (1 - q) * form.weights)[:, None], q


def noise_variance(form: Factorization, targets: Tensor, multiplicity: Tensor, free: int) -> float:
    """The variance of the noise of a row of weight 1 with the largest restricted likelihood.

    ``tr(Y' M Y) / ((N - 1) free)`` with N the number of images and ``free`` that of the outputs that are free.
    """
    energy = float((targets.double() * form.dual(targets)).sum())
    return max(energy, 0.0) / (max(float(multiplicity.sum()) - 1, 1.0) * max(free, 1))
