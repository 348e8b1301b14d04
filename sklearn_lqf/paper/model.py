"""The model of the paper: one change d of all linearized weights, shared by all outputs, at a random head.

Hides how it is fitted: targets of J d, the unit and the choice of the penalty, the preconditioner and the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.conjugate_gradients import Status
from ..engine.prior import Rows, scale_prior
from ..images.cache import TrunkCache
from ..network.linearize import LinearizedNetwork
from ..network.prepared import PREPARED_OTHERWISE, PreparedNetwork
from .objective import Quadratic, build_kfac
from .solvers import Callback, SolverResult, pcg, sgd

__all__ = ["TARGET_SCALE", "PaperFit", "PaperModel", "fit_paper"]

# Target of the right class. f_w0 of the random head is kept; it is noise of the size of a feature, beside which targets
# of one are small. Of the scales 1, 5 and 15, which docs/accuracy.md compares, it is felt least at this one.
TARGET_SCALE = 15.0
_DAMPING = 0.1  # of the trace for one output: it changes the path of the solver alone
_EXACT_MAX = 256  # outputs of all rows up to which the preconditioner takes them all; above, one probe for each row
_ALPHA_MIN = 1e-3  # of the unit of alpha: below, an automatic penalty only costs iterations


@dataclass(frozen=True)
class PaperModel:
    """A fitted network: outputs are ``unit (f_w0(x) + J(x) d)``.

    Attributes
    ----------
    network : PreparedNetwork
        Its features are the last ones alone.
    head : ndarray of shape (C, D)
        Weight of the head at which the network is linearized; its bias is zero.
    coef : ndarray of shape (P,)
        d: change of the tangent parameters, of the weight of the head, and of its bias.
    unit : ndarray of shape (C,)
        What outputs are multiplied by.
    """

    network: PreparedNetwork
    head: np.ndarray
    coef: np.ndarray
    unit: np.ndarray

    @classmethod
    def at(cls, network: PreparedNetwork, seed: int, unit: np.ndarray, d: Tensor) -> PaperModel:
        """The network with the head that `fit_paper` draws by a seed, and a change d of its weights."""
        head = _random_head(len(unit), network.split.n_features, torch.Generator().manual_seed(seed))
        return cls(network, head, d.cpu().numpy(), np.asarray(unit, dtype=np.float64))

    @cached_property
    def linearized(self) -> LinearizedNetwork:
        """The network with its head."""
        found = _linearized(self.network, self.head)
        if self.coef.shape != (found.n_parameters,):
            raise ValueError(
                f"The model has a change of shape {self.coef.shape}, and the network {found.n_parameters} linearized "
                f"weights. {PREPARED_OTHERWISE}"
            )
        return found

    def evaluator(self, memory: Any) -> Callable[[Tensor], np.ndarray]:
        """Images to outputs in the units of y.

        Parameters
        ----------
        memory : joblib.Memory or None
            Keeps trunk activations; None: of nothing.

        Returns
        -------
        callable
            Images (B, C, H, W) in [0, 1], or vectors (B, n_features), to an ndarray (B, C) of float64.
        """
        activations, linearized = self.network.evaluator(memory), self.linearized
        d = torch.tensor(self.coef).to(linearized.weight)  # a copy: arrays of joblib may be read-only

        def evaluate(images: Tensor) -> np.ndarray:
            point = linearized.at(activations(images), gradients=False)
            outputs = point.outputs + point.jvp(d)
            return self.unit * outputs.double().cpu().numpy()

        return evaluate

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "linearized"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class PaperFit:
    """A model and how it was found.

    Attributes
    ----------
    model : PaperModel
    result : SolverResult
    alpha : float
        lambda, the absolute penalty.
    relative_alpha : float
        The same in units of the mean squared norm of the Jacobian of one output of one image.
    """

    model: PaperModel
    result: SolverResult
    alpha: float
    relative_alpha: float


def fit_paper(
    network: PreparedNetwork,
    batches: TrunkCache | Sequence[Sequence[Tensor]],
    targets: np.ndarray,
    weights: np.ndarray,
    unit: np.ndarray,
    *,
    alpha: float | str,
    solver: str,
    tol: float,
    max_iter: int,
    seed: int,
    multiplicity: np.ndarray | None = None,
    report: Callback | None = None,
    ridge_rows: int = 1000,
) -> PaperFit:
    """Fit the model of the paper.

    Parameters
    ----------
    network : PreparedNetwork
        Prepared without ``read_stages``.
    batches : sequence of batches
        Trunk activations of n rows.
    targets : ndarray of shape (n, C)
        In the units of y.
    weights : ndarray of shape (n,)
        s > 0 of the rows.
    unit : ndarray of shape (C,)
        What targets are divided by, and outputs multiplied by: ``1 / TARGET_SCALE`` for classes.
    alpha : float or "auto"
        Penalty in units of the mean squared norm of the Jacobian. ``"auto"``: that of the ridge regression on the last
        features with the smallest leave-one-out error, but at least a thousandth of the unit.
    solver : {"pcg", "sgd"}
        Conjugate gradients, or stochastic gradient descent, with the same K-FAC preconditioner.
    tol : float
        Norm of the gradient, relative to its value at d = 0, at which the solver stops. It does not bound the error of
        the outputs, for which a smaller penalty takes more iterations than are worth it.
    max_iter : int
        Iterations, or epochs.
    seed : int
        Of the head, and of the order of the batches.
    multiplicity : ndarray of shape (n,) or None
        How many identical images a row stands for, at least 1, in leave-one-out; None: weights above 1.
    report : callable or None
        Called with the number of each iteration, the relative gradient and d; true stops.
    ridge_rows : int
        From which an automatic penalty is chosen, which costs the cube of their number.

    Returns
    -------
    PaperFit

    Raises
    ------
    ValueError
        If features, derivatives or targets are not finite.

    Notes
    -----
    With the head drawn from N(0, 1/D), which sees no label, and bias 0::

        minimize  sum_i s_i |f_w0(x_i) + J(x_i) d - y_i / unit|^2 + lambda |d|^2
        lambda = alpha tr(J' S J) / (C sum_i s_i)

    References
    ----------
    Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021.
    """
    generator = torch.Generator().manual_seed(seed)
    head = _random_head(targets.shape[1], network.split.n_features, generator)
    linearized = _linearized(network, head)
    multiplicity = np.maximum(weights, 1.0) if multiplicity is None else multiplicity
    rows = _some_rows(len(targets), ridge_rows) if alpha == "auto" else np.arange(0)
    offset, features = _evaluate(linearized, batches, rows)
    scaled = targets / unit
    residual, s = (torch.tensor(v).to(linearized.weight) for v in (scaled - offset, weights))
    kfac = build_kfac(linearized, batches, s, _probe_outputs(*targets.shape).to(s))
    one = kfac.output_trace / float(weights.sum())  # the unit of alpha
    if alpha == "auto":
        least = _ALPHA_MIN * one * float(weights.sum() / multiplicity.sum())  # follows the scale of weights
        absolute = max(_ridge_alpha(features, scaled[rows], weights[rows], multiplicity[rows]), least)
    else:
        absolute = one * float(alpha)
    kfac.factorize(absolute, network.dtype, _DAMPING * kfac.output_trace)
    quadratic = Quadratic(linearized, batches, residual, s, absolute)
    observe = (lambda number, relative, d: None) if report is None else report
    if solver == "pcg":
        result = pcg(quadratic.matvec, quadratic.rhs(), kfac, tol, max_iter, observe)
    else:
        result = sgd(
            quadratic.matvec, quadratic.batch_matvec, len(batches), quadratic.rhs(), kfac, tol, max_iter, generator,
            observe,
        )  # fmt: skip
    if result.status is Status.NOT_FINITE:
        raise ValueError(f"There is no solution. {result.status.value}")
    model = PaperModel(network, head, result.x.cpu().numpy(), np.asarray(unit, dtype=np.float64))
    return PaperFit(model, result, absolute, absolute / one)


def _linearized(network: PreparedNetwork, head: np.ndarray) -> LinearizedNetwork:
    """A prepared network at a head (C, D) without bias."""
    weight = torch.tensor(head).to(network.device, network.dtype)
    return LinearizedNetwork(network.split, weight, weight.new_zeros(len(weight)))


def _random_head(n_outputs: int, n_features: int, generator: torch.Generator) -> np.ndarray:
    """Rows drawn from N(0, 1/D), (C, D) in float64."""
    drawn = torch.randn(n_outputs, n_features, generator=generator, dtype=torch.float64)
    return (drawn / n_features**0.5).numpy()


def _some_rows(n: int, most: int) -> np.ndarray:
    """All rows, or as many as there may be, by a constant seed and in their order."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def _evaluate(
    linearized: LinearizedNetwork, batches: Sequence[Sequence[Tensor]], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """f_w0 of all rows (n, C) and the features of some (m, D), in float64; one pass over the batches."""
    outputs, features, start = [], [], 0
    for z in batches:
        point = linearized.at(z, gradients=False)
        stop = start + len(point.outputs)
        mine = torch.as_tensor(rows[(rows >= start) & (rows < stop)] - start)
        outputs.append(point.outputs.double().cpu().numpy())
        features.append(point.features[mine.to(point.features.device)].double().cpu().numpy())
        start = stop
    found = np.concatenate(outputs), np.concatenate(features)
    if not all(np.isfinite(v).all() for v in found):
        raise ValueError(
            "The backbone's features of the training images are not all finite: check its weights and "
            "preprocessing, or use execution={'dtype': 'float64'}."
        )
    return found


def _ridge_alpha(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, multiplicity: np.ndarray) -> float:
    """Penalty of the ridge regression with intercept on features (m, D) with the smallest leave-one-out error."""
    mean_weight = float(weights.sum() / multiplicity.sum())
    s = weights / mean_weight  # the scales that are searched are meant for weights of about one
    x = features - np.average(features, axis=0, weights=s)
    energy = float(np.average((x**2).sum(1), weights=s))
    if energy == 0:  # nothing to choose by
        return 0.0
    # The number of free outputs multiplies the criterion, beside which its hyper-prior hardly counts.
    rows = Rows((x @ x.T / energy)[None], targets, s, multiplicity, targets.shape[1])
    return mean_weight * energy / scale_prior(rows, np.ones(1))


def _probe_outputs(n_rows: int, n_outputs: int) -> Tensor:
    """Output directions for the curvature: all outputs, or one of random signs for each row when there are many.

    Seeded by a constant: they shape the preconditioner and the unit of alpha, and must not differ between fits.
    """
    if n_rows * n_outputs <= _EXACT_MAX:
        return torch.eye(n_outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (1, n_rows, n_outputs), generator=generator, dtype=torch.float64) * 2 - 1
