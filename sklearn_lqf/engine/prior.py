"""Prior variances of groups of features, learned from the kernels of the groups.

Hides by which closed form a prior is judged and how the best one is searched. It knows kernels, targets and weights; it
knows no network, no features and no estimator.

    letter      in code                        shape
    K_g         rows.kernels[g]                (n, n)     kernel of group g
    theta       theta                          (G,)       prior variances; K = sum_g theta_g K_g
    s, m        rows.weights, .multiplicity    (n,)       weights; identical images that a row stands for
    A, M        -, solution.m                  (n, n)     K + S^-1; its inverse without the intercept, M 1 = 0
    alpha       solution.alpha                 (n, C)     M Y
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

__all__ = ["CRITERIA", "Rows", "criterion", "learn_prior", "scale_prior"]

CRITERIA = ("leave-one-out", "evidence")

_START = float(np.log(10.0))  # log of the scale at which the search starts: features count ten times the noise
_LOG_SCALE = (-9.0, 12.0)  # between them the kernel goes from nothing to interpolation
_LOG_RATIO = 9.0  # largest change of the log of a variance: a group 8000 times weaker is out
_SCALE_PENALTY = 0.01  # of u^2, the log of the scale: a deviation of 7, felt only where the data say nothing
_GRADIENT_TOLERANCE = 1e-2  # nats by unit of log theta: far below what a finite sample can tell
_GRID = 15  # scales tried before the refinement, a factor of 4.5 apart: criteria vary over factors of 10
_SCALE_TOLERANCE = 1e-3  # of the log of the scale
_JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6)  # parts of the trace, from the rounding unit to that of float32
_ROUNDING = 8 * np.finfo(np.float64).eps  # relative spread below which targets are all equal


@dataclass(frozen=True)
class Rows:
    """What a criterion sees of the training rows: tensors in float64, on one device.

    Attributes
    ----------
    kernels : Tensor of shape (G, n, n)
        K_g, symmetric and positive semi-definite. Contiguous, otherwise each evaluation copies them.
    targets : Tensor of shape (n, C)
        Y. A constant added to an output changes nothing, since the intercept is not penalized.
    weights : Tensor of shape (n,)
        s > 0; row i has noise v / s_i.
    multiplicity : Tensor of shape (n,)
        m >= 1, how many identical images a row stands for.
    free : int
        Outputs that are free: C - 1 for one-hot targets, else C.
    together : Tensor of shape (n,) or None
        Numbers of the sets of rows that leave-one-out leaves out as wholes, whatever their multiplicity; None: each row
        is left out alone.
    """

    kernels: Tensor
    targets: Tensor
    weights: Tensor
    multiplicity: Tensor
    free: int
    together: Tensor | None = None


@dataclass(frozen=True)
class _Solution:
    """The ridge regression of the centered targets at one theta."""

    m: Tensor  # M (n, n)
    alpha: Tensor  # M Y (n, C)
    targets: Tensor  # Y, centered (n, C)
    logdet: Tensor  # log det(I + S^1/2 K S^1/2) = logdet A + logdet S
    total: Tensor  # 1' A^-1 1


def criterion(rows: Rows, theta: np.ndarray, kind: str = "leave-one-out") -> tuple[float, np.ndarray]:
    """Criterion of a prior, without hyper-prior, and its gradient.

    Parameters
    ----------
    rows : Rows
        Kernels, targets and weights.
    theta : ndarray of shape (G,)
        Prior variances, not negative.
    kind : {"leave-one-out", "evidence"}, default="leave-one-out"
        What judges the prior.

    Returns
    -------
    value : float
        Smaller is better; in nats. 0 where the targets are all equal, which tells nothing of the prior.
    gradient : ndarray of shape (G,)
        Derivatives with respect to theta, not to its logarithm.

    Raises
    ------
    ValueError
        If ``kind`` is not one of `CRITERIA`.
    numpy.linalg.LinAlgError
        If K is not finite, or further from positive semi-definite than rounding in float32 explains.

    Notes
    -----
    With A = K + S^-1, M = A^-1 - A^-1 1 1' A^-1 / (1' A^-1 1), alpha = M Y, q_i = 1 / m_i and N = sum_i m_i::

        leave-one-out:  1/2 N free log( sum_i s_i |r_i|^2 ),   r_i = alpha_i / (q_i M_ii + (1 - q_i) s_i)
        evidence:       free/2 ( (N - 1) log v + logdet A + logdet S + log(1' A^-1 1) ),
                        v = tr(Y' M Y) / ((N - 1) free)

    r_i is the residual of row i for the fit without one of the m_i images that it stands for [1]_, [2]_. The evidence
    is the marginal likelihood [2]_ of the contrasts of Y, that is with the intercept integrated out [3]_; logdet S is
    constant and makes a row of weight 2 and multiplicity 2 equal to the row given twice, to the value.

    Both take copies at their word: equal images with equal targets look like targets without noise, so many of them
    favor a large theta. Where features can reproduce all targets, the evidence of rows with copies has no lower bound
    in the scale of theta.

    The derivative of M in the direction K_g is -M K_g M, so each gradient is <K_g, W> with one W for all groups::

        leave-one-out:  W = M diag(w) M - (M Q alpha' + alpha Q' M) / 2,   p_i = q_i M_ii + (1 - q_i) s_i,
                        Q_i = N free s_i r_i / (p_i sum_j s_j |r_j|^2),   w_i = q_i <Q_i, r_i>
        evidence:       W = (free M - alpha alpha' / v) / 2

    Of sets of rows that are left out together, r_g = M_gg^-1 alpha_g. With V_g = M_gg^-1 Q_g and the block-diagonal
    matrix B of r_g V_g', W = M (B + B') M / 2 - (M V alpha' + alpha V' M) / 2.

    References
    ----------
    .. [1] D. M. Allen, "The relationship between variable selection and data augmentation and a method for prediction",
       Technometrics 16, 1974.
    .. [2] C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, sections 5.4.1 and
       5.4.2.
    .. [3] H. D. Patterson and R. Thompson, "Recovery of inter-block information when block sizes are unequal",
       Biometrika 58, 1971.
    """
    judge = _judge(kind)
    groups = len(rows.kernels)
    targets = _centered(rows)
    if targets is None:
        return 0.0, np.zeros(groups)
    value, weight = judge(rows, _solve(rows, theta, targets))
    return float(value), (rows.kernels.flatten(1) @ weight.flatten()).cpu().numpy()


def learn_prior(
    rows: Rows,
    expected: np.ndarray,
    *,
    kind: str = "leave-one-out",
    deviation: float | np.ndarray = 1.0,
    max_iter: int = 60,
) -> np.ndarray:
    """Prior variances of the groups that are most probable given the rows.

    Parameters
    ----------
    rows : Rows
        Kernels, targets and weights.
    expected : ndarray of shape (G,)
        Variances expected before any label is seen, positive; only their ratios matter.
    kind : {"leave-one-out", "evidence"}, default="leave-one-out"
        What judges the prior; see `criterion`.
    deviation : float or ndarray of shape (G,), default=1.0
        How far the log of each variance is expected to be from ``expected``, positive.
    max_iter : int, default=60
        Largest number of iterations of L-BFGS.

    Returns
    -------
    theta : ndarray of shape (G,)
        Positive. Where rows tell nothing, the ratios of ``expected``.

    Raises
    ------
    ValueError
        If ``kind`` is unknown, or if ``expected`` or ``deviation`` are not positive and finite.
    numpy.linalg.LinAlgError
        As `criterion`.

    Notes
    -----
    With e_g = expected_g / sum(expected), the search is over z and the log u of the scale::

        theta_g = e_g exp(z_g + u),   minimize  criterion(theta) + sum_g z_g^2 / (2 deviation_g^2) + 0.01 u^2

    |z_g| is at most 9, u in [-9, 12], and L-BFGS starts at z = 0, u = log 10.
    """
    shares = _shares(expected, len(rows.kernels), "expected")
    spread = np.broadcast_to(np.asarray(deviation, dtype=np.float64), shares.shape)
    _check_positive(spread, "deviation")
    _judge(kind)
    groups = len(shares)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        z, u = point[:groups], point[groups]
        theta = _theta(shares, point)
        value, slope = criterion(rows, theta, kind)
        slope = slope * theta  # with respect to log theta
        value += float((z**2 / (2 * spread**2)).sum())
        return value + _SCALE_PENALTY * u**2, np.append(slope + z / spread**2, slope.sum() + 2 * _SCALE_PENALTY * u)

    start, bounds = np.append(np.zeros(groups), _START), [*[(-_LOG_RATIO, _LOG_RATIO)] * groups, _LOG_SCALE]
    options = {"maxiter": max_iter, "gtol": _GRADIENT_TOLERANCE}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return _theta(shares, found.x)


def scale_prior(rows: Rows, shares: np.ndarray, *, kind: str = "leave-one-out") -> float:
    """Sum of the prior variances that is most probable when their ratios are given.

    Parameters
    ----------
    rows : Rows
        Kernels, targets and weights.
    shares : ndarray of shape (G,)
        Ratios of the variances, positive.
    kind : {"leave-one-out", "evidence"}, default="leave-one-out"
        What judges the prior; see `criterion`.

    Returns
    -------
    scale : float
        Positive; theta = scale * shares / shares.sum(). 1 where the targets are all equal.

    Raises
    ------
    ValueError
        If ``kind`` is unknown, or if ``shares`` are not positive and finite.
    numpy.linalg.LinAlgError
        As `criterion`.

    Notes
    -----
    Minimizes criterion(theta) + 0.01 u^2 over u, the log of the scale, in [-9, 12]: the objective of `learn_prior` with
    z = 0. The best point of a grid is refined between its neighbors, since leave-one-out may have several minima.
    """
    ratios = _shares(shares, len(rows.kernels), "shares")
    _judge(kind)
    if _centered(rows) is None:
        return 1.0
    kernel = _mixture(rows, ratios)[None]  # summed once, not at each scale
    joined = replace(rows, kernels=kernel)

    def objective(u: float) -> float:
        return criterion(joined, np.exp([u]), kind)[0] + _SCALE_PENALTY * u**2

    grid = np.linspace(*_LOG_SCALE, _GRID)
    values = [objective(u) for u in grid]
    best = int(np.argmin(values))
    bracket = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    found = minimize_scalar(objective, bounds=bracket, method="bounded", options={"xatol": _SCALE_TOLERANCE})
    # The bounded search never evaluates the ends of its bracket, nor the point of the grid.
    return float(np.exp(found.x if found.fun < values[best] else grid[best]))


def _leave_one_out(rows: Rows, solution: _Solution) -> tuple[Tensor, Tensor]:
    """Value of the leave-one-out criterion, and W (n, n) of its gradient."""
    if rows.together is not None:
        return _leave_sets_out(rows, solution, rows.together)
    m, alpha = solution.m, solution.alpha
    left_out = 1 / rows.multiplicity
    p = left_out * m.diagonal() + (1 - left_out) * rows.weights
    residual = alpha / p[:, None]  # (n, C)
    squares, size = _squares(rows, residual)
    q = size / squares * (rows.weights / p)[:, None] * residual  # (n, C)
    w = left_out * (q * residual).sum(1)
    outer = (m @ q) @ alpha.T
    return 0.5 * size * squares.log(), m @ (w[:, None] * m) - 0.5 * (outer + outer.T)


def _leave_sets_out(rows: Rows, solution: _Solution, together: Tensor) -> tuple[Tensor, Tensor]:
    """The same for rows that are left out together."""
    m, alpha = solution.m, solution.alpha
    sets = [(together == number).nonzero().squeeze(1) for number in together.unique()]
    inverses = [torch.linalg.inv(m[i[:, None], i]) for i in sets]
    residual, v, blocks = torch.empty_like(alpha), torch.empty_like(alpha), torch.zeros_like(m)
    for i, inverse in zip(sets, inverses, strict=True):
        residual[i] = inverse @ alpha[i]
    squares, size = _squares(rows, residual)
    q = size / squares * rows.weights[:, None] * residual
    for i, inverse in zip(sets, inverses, strict=True):
        v[i] = inverse @ q[i]
        block = residual[i] @ v[i].T
        blocks[i[:, None], i] = 0.5 * (block + block.T)
    outer = (m @ v) @ alpha.T
    return 0.5 * size * squares.log(), m @ blocks @ m - 0.5 * (outer + outer.T)


def _squares(rows: Rows, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of squares of the residuals (n, C), positive, and N free."""
    squares = rows.weights @ residual.square().sum(1)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny), rows.multiplicity.sum() * rows.free


def _evidence(rows: Rows, solution: _Solution) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the restricted likelihood, up to a constant, and W (n, n) of its gradient."""
    m, alpha, free = solution.m, solution.alpha, rows.free
    degrees = rows.multiplicity.sum() - 1  # one goes to the intercept
    squares = (solution.targets * alpha).sum().clamp_min(torch.finfo(alpha.dtype).tiny)
    noise = squares / (degrees * free)
    value = 0.5 * free * (degrees * noise.log() + solution.logdet + solution.total.log())
    return value, 0.5 * (free * m - alpha @ alpha.T / noise)


def _judge(kind: str) -> Callable[[Rows, _Solution], tuple[Tensor, Tensor]]:
    """The function behind the name of a criterion."""
    if kind not in CRITERIA:
        raise ValueError(f"kind must be one of {CRITERIA}, got {kind!r}.")
    return _leave_one_out if kind == "leave-one-out" else _evidence


def _solve(rows: Rows, theta: np.ndarray, targets: Tensor) -> _Solution:
    """Ridge regression with unpenalized intercept: theta (G,), targets (n, C)."""
    root = rows.weights.sqrt()
    # A^-1 = S^1/2 B^-1 S^1/2 with B = I + S^1/2 K S^1/2, whose eigenvalues are at least 1 whatever the weights are.
    b = _mixture(rows, theta).mul_(root[:, None]).mul_(root)
    b.diagonal().add_(1)
    inverse, logdet = _inverse(b)
    inverse.mul_(root[:, None]).mul_(root)
    sums = inverse.sum(1)  # A^-1 1
    total = sums.sum()
    m = inverse.addr_(sums, sums / total, alpha=-1)
    return _Solution(m, m @ targets, targets, logdet, total)


def _inverse(b: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse (n, n) and log determinant of a symmetric matrix (n, n) with eigenvalues of at least 1."""
    for jitter in _JITTERS:
        # Kernels from sketches in float32 have eigenvalues a little below 0: a part of the trace, which bounds the
        # largest eigenvalue, lifts them. Most matrices need none.
        lifted = b if jitter == 0 else b + jitter * b.trace() * torch.eye(len(b)).to(b)
        factor, info = torch.linalg.cholesky_ex(lifted)
        # Some builds of LAPACK let NaN pass; it has reached the last entry of the diagonal then.
        if not info and factor[-1, -1].isfinite():
            return torch.cholesky_inverse(factor), 2 * factor.diagonal().log().sum()
    raise np.linalg.LinAlgError(
        f"The kernel of {len(b)} rows has no Cholesky factor: kernels must be finite and positive semi-definite."
    )


def _mixture(rows: Rows, theta: np.ndarray) -> Tensor:
    """K = sum_g theta_g K_g (n, n)."""
    variances = torch.tensor(theta, dtype=rows.kernels.dtype, device=rows.kernels.device)
    return (variances @ rows.kernels.flatten(1)).view(rows.kernels.shape[1:])


def _centered(rows: Rows) -> Tensor | None:
    """Targets less their mean (n, C), which M does not see but rounding does; None if they are all equal."""
    targets = rows.targets
    spread = targets.amax(0) - targets.amin(0)
    if bool((spread <= _ROUNDING * targets.abs().amax(0)).all()):
        return None
    return targets - (rows.weights @ targets) / rows.weights.sum()


def _theta(shares: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Variances (G,) at a point of the search, z and u."""
    return shares * np.exp(point[:-1] + point[-1])


def _shares(values: np.ndarray, groups: int, name: str) -> np.ndarray:
    """Checked ratios (G,), of sum 1."""
    ratios = np.asarray(values, dtype=np.float64)
    if ratios.shape != (groups,):
        raise ValueError(f"{name} must hold one number for each of the {groups} kernels, got shape {ratios.shape}.")
    _check_positive(ratios, name)
    return ratios / ratios.sum()


def _check_positive(values: np.ndarray, name: str) -> None:
    """Raise ValueError unless all values are positive and finite."""
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"{name} must be positive and finite, got {values}.")
