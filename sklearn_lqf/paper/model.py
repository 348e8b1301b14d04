"""The model of the paper: one change d of all linearized weights, shared by all outputs, at a random head.

Hides how it is fitted: the targets of J d, the unit and the choice of the penalty, the preconditioner and the solver.
docs/method.md has the legend of symbols.
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
from ..runtime.arithmetic import float64_device
from .objective import Quadratic, build_kfac
from .solvers import Callback, SolverResult, pcg, sgd

__all__ = ["TARGET_SCALE", "PaperFit", "PaperModel", "fit_paper"]

# Target of the right class. The outputs f_w0 of the random head are kept. They are noise of the size of a feature,
# which is large in comparison with targets of size 1. Of the scales 1, 5 and 15 the noise had the least effect at this
# one; no file in benchmarks/results compares them.
TARGET_SCALE = 15.0
_DAMPING = 0.1  # of the trace for one output: it only changes the path of the solver
_EXACT_MAX = 256  # n C up to which the preconditioner uses all outputs of all rows; above, one probe for each row
_ALPHA_MIN = 1e-3  # of the unit of alpha: a smaller automatic penalty only takes more iterations


@dataclass(frozen=True)
class PaperModel:
    """A fitted model with the outputs ``unit (f_w0(x) + J(x) d)``.

    Attributes
    ----------
    network : PreparedNetwork
        Its features are the D last features only.
    head : ndarray of shape (C, D), float64
        Weight of the head at which the network is linearized; its bias is zero.
    coef : ndarray of shape (P,)
        d, the change of the tangent parameters, of the weight of the head, and of its bias, in this order.
    unit : ndarray of shape (C,), float64
        Factor of the outputs, so that they have the units of y.
    """

    network: PreparedNetwork
    head: np.ndarray
    coef: np.ndarray
    unit: np.ndarray

    @classmethod
    def at(cls, network: PreparedNetwork, seed: int, unit: np.ndarray, d: Tensor) -> PaperModel:
        """The model with the head that `fit_paper` draws from a seed, and a change d (P,) of its weights."""
        head = _random_head(len(unit), network.split.n_features, torch.Generator().manual_seed(seed))
        return cls(network, head, d.cpu().numpy(), np.asarray(unit, dtype=np.float64))

    @cached_property
    def linearized(self) -> LinearizedNetwork:
        """The network linearized at its head.

        Raises
        ------
        ValueError
            ``coef`` has another number of elements than the network has linearized weights.
        """
        found = _linearized(self.network, self.head)
        if self.coef.shape != (found.n_parameters,):
            raise ValueError(
                f"The model has a change of shape {self.coef.shape}, and the network {found.n_parameters} linearized "
                f"weights. {PREPARED_OTHERWISE}"
            )
        return found

    def evaluator(self, memory: Any) -> Callable[[Tensor], Tensor]:
        """Images to outputs in the units of y.

        Parameters
        ----------
        memory : joblib.Memory or None
            Keeps trunk activations; None: they are not kept.

        Returns
        -------
        callable
            Maps images (B, C, H, W) in [0, 1], or vectors (B, n_features), to a tensor (B, n_outputs) of float64.
        """
        activations, linearized = self.network.evaluator(memory), self.linearized
        d = torch.tensor(self.coef).to(linearized.weight)  # a copy: arrays of joblib may be read-only

        device = float64_device(self.network.device)
        unit = torch.tensor(self.unit, device=device)

        def evaluate(images: Tensor) -> Tensor:
            point = linearized.at(activations(images), gradients=False)
            return unit * (point.outputs + point.jvp(d)).to(device).double()

        return evaluate

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "linearized"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class PaperFit:
    """A model, and the course of its fit.

    Attributes
    ----------
    model : PaperModel
    result : SolverResult
    alpha : float
        lambda, the absolute penalty.
    relative_alpha : float
        lambda in units of the mean squared norm of the Jacobian of one output of one image.
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
        Trunk activations of the n rows; a batch is a sequence of tensors (B, ...).
    targets : ndarray of shape (n, C)
        In the units of y.
    weights : ndarray of shape (n,)
        s > 0 of the rows.
    unit : ndarray of shape (C,)
        Divides the targets, and multiplies the outputs: ``1 / TARGET_SCALE`` for classes.
    alpha : float or "auto"
        Penalty > 0 in units of the mean squared norm of the Jacobian. ``"auto"``: the penalty with which a ridge
        regression on the last features has the smallest leave-one-out error, but at least a thousandth of the unit.
    solver : {"pcg", "sgd"}
        Conjugate gradients, or the paper's stochastic gradient descent, with the same K-FAC preconditioner.
    tol : float
        The solver stops when the norm of the gradient, relative to its value at d = 0, is at most this. This does not
        bound the error of the outputs; for a bound, small penalties would take too many iterations.
    max_iter : int
        Largest number of iterations, or of epochs.
    seed : int
        Seeds the head and the order of the batches.
    multiplicity : ndarray of shape (n,) or None
        m >= 1, how many identical images a row stands for in leave-one-out; None: the weights, but at least 1.
    report : callable or None
        Called after each iteration with its number, the relative norm of the gradient and d; a true value stops.
    ridge_rows : int
        Largest number of rows from which an automatic penalty is chosen; the costs grow with its cube.

    Returns
    -------
    PaperFit

    Raises
    ------
    ValueError
        Features, derivatives or targets are not finite.

    Notes
    -----
    The head is drawn from N(0, 1/D), independent of labels, and has bias 0. The fit solves::

        minimize  sum_i s_i |f_w0(x_i) + J(x_i) d - y_i / unit|^2 + lambda |d|^2
        lambda = alpha tr(J' S J) / (C sum_i s_i)

    References
    ----------
    Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021 (arXiv 2012.11140),
    sections 3 and 4.
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
    """Numbers of at most ``most`` of n rows in ascending order, drawn with a constant seed."""
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
    s = weights / mean_weight  # the range of scales that is searched is made for weights of about 1
    x = features - np.average(features, axis=0, weights=s)
    energy = float(np.average((x**2).sum(1), weights=s))
    if energy == 0:  # the features do not vary, so that all penalties are alike
        return 0.0
    # The number of free outputs only multiplies the criterion, so that its hyper-prior has little effect.
    kernel = torch.from_numpy(x @ x.T / energy)[None]
    rows = Rows(
        kernel, torch.from_numpy(targets), torch.from_numpy(s), torch.from_numpy(multiplicity), targets.shape[1]
    )
    return mean_weight * energy / scale_prior(rows, np.ones(1))


def _probe_outputs(n_rows: int, n_outputs: int) -> Tensor:
    """Output directions for the curvature: all outputs, or if these are many one vector of random signs for each row.

    The seed is a constant, since they decide the preconditioner and the unit of alpha, which must not differ between
    fits.
    """
    if n_rows * n_outputs <= _EXACT_MAX:
        return torch.eye(n_outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (1, n_rows, n_outputs), generator=generator, dtype=torch.float64) * 2 - 1
