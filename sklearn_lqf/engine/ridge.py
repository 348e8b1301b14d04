"""The quadratic on explicit features: its solution in closed form, and what a solution says of rows left out.

Hides in which form the matrix is: of rows, or of columns. It knows features, targets and weights; it knows no network
and no estimator.

The objective is ``sum_i s_i |phi_i' B + b - y_i|^2 + |B|^2``, the intercept b without a penalty. Features are centered
with the weights, which eliminates b: then ``A^-1 1 = s`` for ``A = Phi Phi' + S^-1``, and with ``t = sum_i s_i``

    M = A^-1 - s s' / t = S - s s' / t - S Phi H^-1 Phi' S,    H = Phi' S Phi + I,
    alpha = M Y = S (Y - f(X)),    B = Phi' alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.memory import PIECE_BYTES
from ..runtime.processes import ALONE, ProcessGroup
from .centered import CenteredRows, Features
from .conjugate_gradients import Course

__all__ = [
    "ColumnForm", "Factorization", "Optimum", "RowForm", "closed_form_fits", "factorize", "inner_products",
    "leave_one_out", "leave_sets_out", "noise_variance", "removals",
]  # fmt: skip


@dataclass(frozen=True)
class Optimum:
    """The solution for some targets.

    Attributes
    ----------
    coef : Tensor of shape (D, C)
        B.
    intercept : Tensor of shape (C,)
        b.
    dual : Tensor of shape (n, C)
        alpha.
    targets : Tensor of shape (n, C)
        Y, in float64.
    energy : float
        tr(Y' M Y), the least value of the objective.
    course : Course or None
        Of the iterations, where it took some.
    """

    coef: Tensor
    intercept: Tensor
    dual: Tensor
    targets: Tensor
    energy: float
    course: Course | None


class Factorization:
    """What answers for a quadratic; see `RowForm`, `ColumnForm` and `estimate.EstimatedForm`.

    Rows have to stand for two images at least if one is to be left out.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Phi, each column times the root of its prior variance.
    weights : Tensor of shape (n,)
        s > 0.
    piece : int
        Bytes of the features that are held in float64 at once.
    group : ProcessGroup
        The processes that share the rows: each has the features of its own, and the weights and targets of all.

    Attributes
    ----------
    method : {"rows", "columns", "estimate"}
        Name of the form.
    weights : Tensor of shape (n,)
        In float64.
    """

    method: str

    def __init__(self, features: Features, weights: Tensor, piece: int = PIECE_BYTES, group: ProcessGroup = ALONE):
        self._rows = CenteredRows(features, weights, piece, group)
        self.weights = self._rows.weights

    def solve(self, targets: Tensor) -> Optimum:
        """The solution for targets (n, C)."""
        y, mean = self._rows.center_targets(targets)
        coef, dual, course = self._optimum(y)
        intercept = mean - self._rows.mean @ coef
        # M 1 = 0: without the mean rounding errors are smaller.
        return Optimum(coef, intercept, dual, targets.to(dual), float((y * dual).sum()), course)

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        raise NotImplementedError

    def remaining(self, fraction: Tensor) -> Tensor:
        """q M_ii + (1 - q) s_i for q (n,), (n,): alpha over this is the residual without q of the row's weight."""
        return fraction * self.diagonal + (1 - fraction) * self.weights

    def block(self, rows: Tensor) -> Tensor:
        """M_gg of some rows (k,): (k, k)."""
        raise ValueError(
            "Sets of images can be left out together in closed form only: use solver='closed', or fewer images."
        )

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D), with f(x) = B_x Y: (k, n). Many rows are for the caller to split."""
        raise NotImplementedError

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of f(x) over that of the noise, of new rows (k, D): (k,)."""
        raise NotImplementedError

    def _optimum(self, targets: Tensor) -> tuple[Tensor, Tensor, Course | None]:
        """B (D, C) and alpha (n, C) for centered targets (n, C)."""
        raise NotImplementedError


class RowForm(Factorization):
    """M itself, of n rows and columns.

    Parameters
    ----------
    features, weights, piece, group
        As of a `Factorization`.
    products : Tensor of shape (n, n) or None
        Phi Phi', in whose place M is made; None: it is computed.
    """

    method = "rows"

    def __init__(
        self, features: Features, weights: Tensor, piece: int = PIECE_BYTES, group: ProcessGroup = ALONE,
        products: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(features, weights, piece, group)
        a = self._rows.kernel() if products is None else products
        a.diagonal().add_(1 / self.weights)
        upper = _cholesky(a).mT
        self._m = torch.cholesky_inverse(upper, upper=True, out=upper)
        self._m.addr_(self.weights, self.weights / self._rows.total, alpha=-1)

    def _optimum(self, targets: Tensor) -> tuple[Tensor, Tensor, None]:
        dual = self._m @ targets
        return self._rows.transposed(dual), dual, None

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        return self._m.diagonal()

    def block(self, rows: Tensor) -> Tensor:
        """M_gg of some rows (k,): (k, k)."""
        return self._m[rows[:, None], rows]

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D): (k, n)."""
        kernel = self._rows.fitted(self._rows.center(features).T).T
        return kernel @ self._m + self.weights / self._rows.total

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of new rows (k, D) over that of the noise: (k,)."""
        z = self._rows.center(features)
        kernel = self._rows.fitted(z.T).T
        rest = z.square().sum(1) - ((kernel @ self._m) * kernel).sum(1)
        return rest.clamp_min(0) + 1 / self._rows.total


class ColumnForm(Factorization):
    """The Cholesky factor of H, of D rows and columns, from sums over pieces of the rows.

    Parameters
    ----------
    features, weights, piece, group
        As of a `Factorization`.
    products : Tensor of shape (D, D) or None
        Phi' S Phi, in whose place H is factorized; None: it is computed.
    """

    method = "columns"

    def __init__(
        self, features: Features, weights: Tensor, piece: int = PIECE_BYTES, group: ProcessGroup = ALONE,
        products: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(features, weights, piece, group)
        h = self._rows.curvature() if products is None else products
        h.diagonal().add_(1)
        self._lower = _cholesky(h)

    def _optimum(self, targets: Tensor) -> tuple[Tensor, Tensor, None]:
        coef = self._solve(self._rows.transposed(self.weights[:, None] * targets))
        return coef, self.weights[:, None] * (targets - self._rows.fitted(coef)), None

    def _half(self, vectors: Tensor) -> Tensor:
        """L^-1 V for V (D, C), H = L L'."""
        return torch.linalg.solve_triangular(self._lower, vectors, upper=False)

    def _solve(self, vectors: Tensor) -> Tensor:
        """H^-1 V for V (D, C)."""
        return torch.linalg.solve_triangular(self._lower.mT, self._half(vectors), upper=True)

    @property
    def diagonal(self) -> Tensor:
        """M_ii, (n,)."""
        leverage = self._rows.each(lambda rows, phi: self._half(phi.T).square().sum(0))
        return self.weights - self.weights.square() * (leverage + 1 / self._rows.total)

    def block(self, rows: Tensor) -> Tensor:
        """M_gg of some rows (k,) in ascending order: (k, k)."""
        z, s = self._half(self._rows.at(rows).T), self.weights[rows]
        found = -(s[:, None] * (z.T @ z + 1 / self._rows.total) * s)
        found.diagonal().add_(s)
        return found

    def hat(self, features: Features) -> Tensor:
        """The rows B_x of new rows (k, D): (k, n)."""
        z = self._solve(self._rows.center(features).T)
        return (self._rows.fitted(z).T + 1 / self._rows.total) * self.weights

    def variance(self, features: Features) -> Tensor:
        """Posterior variance of new rows (k, D) over that of the noise: (k,)."""
        return self._half(self._rows.center(features).T).square().sum(0) + 1 / self._rows.total


def closed_form_fits(n: int, d: int, budget: int) -> bool:
    """Whether the square matrix of the smaller form of n rows and d features takes at most ``budget`` bytes."""
    return _bytes(min(n, d)) <= budget


def inner_products(features: Features, weights: Tensor, *, group: ProcessGroup = ALONE) -> Tensor:
    """What `factorize` takes as ``products``; it scales with the square of the features."""
    rows = CenteredRows(features, weights, group=group)
    return rows.kernel() if len(weights) <= features.shape[1] else rows.curvature()


def factorize(
    features: Features, weights: Tensor, budget: int, *, form: str = "auto", group: ProcessGroup = ALONE,
    products: Tensor | None = None,
) -> RowForm | ColumnForm:  # fmt: skip
    """A closed form.

    Parameters
    ----------
    features, weights, group
        As of a `Factorization`.
    budget : int
        Bytes that the square matrix may take.
    form : {"auto", "rows", "columns"}, default="auto"
        "auto" takes the smaller matrix.
    products : Tensor or None
        `inner_products` of these features, which are used up; None: they are computed.

    Returns
    -------
    RowForm or ColumnForm

    Raises
    ------
    ValueError
        The form is unknown, its matrix does not fit, or it is not positive definite.
    """
    n, d = len(weights), features.shape[1]
    if form == "auto":
        form = "rows" if n <= d else "columns"
    if form not in ("rows", "columns"):
        raise ValueError(f"form must be 'auto', 'rows' or 'columns'; got {form!r}.")
    size = n if form == "rows" else d
    if _bytes(size) > budget:
        raise ValueError(
            f"The closed form of {n} rows and {d} features takes a square matrix of {size} rows, "
            f"{_bytes(size) / 2**30:.3g} GiB, more than the {budget / 2**30:.3g} GiB meant for it: use solver='pcg' "
            "or 'auto', or fewer images or features."
        )
    chosen = RowForm if form == "rows" else ColumnForm
    return chosen(features, weights, group=group, products=products)


def _bytes(size: int) -> int:
    """Of a square matrix of float64, which is factorized in its place."""
    return 8 * size**2


def _cholesky(matrix: Tensor) -> Tensor:
    """L of a symmetric positive definite matrix L L' whose lower triangle is given, in the memory of the matrix."""
    upper = matrix.mT  # the order of memory of LAPACK, which then makes no copy
    info = torch.empty(0, dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
    if info:
        raise ValueError(
            f"The quadratic is not positive definite to rounding in row {int(info) - 1} of {len(matrix)}: check that "
            "features and weights are finite, or increase alpha, since the prior outweighs the noise beyond float64."
        )
    return matrix


# ----------------------------------------------------------------------------------------------- rows that are left out


def leave_one_out(form: Factorization, optimum: Optimum, multiplicity: Tensor) -> Tensor:
    """Outputs for each row by the solution without it.

    Parameters
    ----------
    form : Factorization
        Of n rows.
    optimum : Optimum
        Its solution.
    multiplicity : Tensor of shape (n,)
        m >= 1, how many identical images a row stands for, of which one is left out.

    Returns
    -------
    Tensor of shape (n, C)

    Notes
    -----
    The fraction q = 1 / m of the row's weight goes; the residual is then ``alpha_i / (q M_ii + (1 - q) s_i)``.
    """
    return optimum.targets - _without(form, optimum, 1 / multiplicity.to(form.weights))


def leave_sets_out(form: Factorization, optimum: Optimum, together: Tensor) -> Tensor:
    """Outputs for each row by the solution without all rows of its set.

    Parameters
    ----------
    form : Factorization
        Of n rows, in closed form.
    optimum : Optimum
        Its solution.
    together : Tensor of shape (n,)
        Numbers of the sets, at least two.

    Returns
    -------
    Tensor of shape (n, C)

    Notes
    -----
    The residuals of a set g are ``M_gg^-1 alpha_g``.
    """
    outputs = optimum.targets.clone()
    for number in together.unique():
        rows = (together == number).nonzero().squeeze(1).to(outputs.device)
        outputs[rows] -= torch.linalg.solve(form.block(rows), optimum.dual[rows])
    return outputs


def removals(form: Factorization, optimum: Optimum, multiplicity: Tensor) -> Tensor:
    """What has to be taken from the targets of a row for the effect of leaving it out.

    Parameters
    ----------
    form : Factorization
        Of n rows.
    optimum : Optimum
        Its solution.
    multiplicity : Tensor of shape (n,)
        As in `leave_one_out`.

    Returns
    -------
    Tensor of shape (n, C)
        ``q alpha_i / (q M_ii + (1 - q) s_i)``: f(x) changes by ``-B_xi`` times this.
    """
    q = 1 / multiplicity.to(form.weights)
    return q[:, None] * _without(form, optimum, q)


def noise_variance(optimum: Optimum, multiplicity: Tensor, free: int) -> float:
    """The variance of the noise of a row of weight 1 that has the largest restricted likelihood.

    Parameters
    ----------
    optimum : Optimum
        Of n rows.
    multiplicity : Tensor of shape (n,)
        As in `leave_one_out`; N is its sum.
    free : int
        Outputs that are free: C - 1 of indicators that add up to one, else C.

    Returns
    -------
    float

    Notes
    -----
    The noise of a row is normal with the variance ``sigma^2 / s_i``. ``tr(Y' M Y) / ((N - 1) free)``: one degree of
    freedom goes to the intercept.
    """
    return max(optimum.energy, 0.0) / (max(float(multiplicity.sum()) - 1, 1.0) * max(free, 1))


def _without(form: Factorization, optimum: Optimum, fraction: Tensor) -> Tensor:
    """Residuals (n, C) of the rows by the solutions without these fractions (n,) of their weights."""
    return optimum.dual / form.remaining(fraction)[:, None]
