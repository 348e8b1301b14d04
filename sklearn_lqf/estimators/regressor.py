"""The regressor: squared loss is the likelihood of what it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_y

from ..engine.problem import TrainingRows
from ..runtime.arithmetic import in_ordinary_arithmetic
from .data import refuse_missing
from .fitting import LQFBase, stores_data
from .parameters import with_shared_parameters

__all__ = ["LQFRegressor"]


@with_shared_parameters
class LQFRegressor(MultiOutputMixin, RegressorMixin, LQFBase):
    """Regression on images by a linearized pre-trained network.

    The model and the solver of `LQFClassifier`, for one or several numeric targets.

    Parameters
    ----------
    <network parameters>
    <model parameter>
    prior : {"leave-one-out", "evidence", "equal", "last"}, dict or array-like, default="leave-one-out"
        As in `LQFClassifier`.
    alpha : float or "auto", default="auto"
        Variance of noise over the prior variance of a target, as in `LQFClassifier`.
    <fit parameters>

    Attributes
    ----------
    target_scale_ : ndarray of shape (n_targets,)
        Standard deviation of each target, in units of which the model is fitted.
    <attributes>

    See Also
    --------
    LQFClassifier : The same for classes.
    sklearn.linear_model.Ridge : The same loss on fixed features.

    Notes
    -----
    Minimizes what is stated with `LQFClassifier`, where t are the targets, each scaled to variance 1. Several targets
    share one prior and one penalty.

    References
    ----------
    .. [1] Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021
       (arXiv 2012.11140), sections 3 and 4.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn_lqf import LQFRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> LQFRegressor().fit(X, y).score(X, y) > 0.4
    True
    """

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        output: Any = None,
        tangents: str | None = "local",
        tangent_layers: Any = 1,
        n_directions: int = 8,
        sketch_size: int | None = 16,
        model: str = "groups",
        prior: Any = "leave-one-out",
        alpha: float | str = "auto",
        negative_slope: float = 0.0,
        solver: str = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = "auto",
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        store_data: bool = False,
        random_state: Any = 0,
        verbose: int = 0,
        execution: Mapping[str, Any] | None = None,
    ):
        self.backbone = backbone
        self.weights = weights
        self.output = output
        self.tangents = tangents
        self.tangent_layers = tangent_layers
        self.n_directions = n_directions
        self.sketch_size = sketch_size
        self.model = model
        self.prior = prior
        self.alpha = alpha
        self.negative_slope = negative_slope
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.store_data = store_data
        self.random_state = random_state
        self.verbose = verbose
        self.execution = execution

    @available_if(stores_data)
    @in_ordinary_arithmetic
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> LQFRegressor:
        """Add training images to the model, as if all had been given to `fit`.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.
        y : array-like of shape (n,) or (n, n_targets)
            Their targets.
        sample_weight : array-like of shape (n,), default=None
            As in `fit`.
        groups : array-like of shape (n,), default=None
            As in `fit`; needed where the model was fitted with groups.

        Returns
        -------
        self : LQFRegressor
            The estimator.

        Raises
        ------
        ValueError
            As `fit`.
        """
        if hasattr(self, "coef_"):
            return self._add(X, y, sample_weight, groups)
        return self._fit(X, y, sample_weight, groups)

    @in_ordinary_arithmetic
    def predict(self, X: Any, *, return_std: bool = False) -> Any:
        """Predict targets.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.
        return_std : bool, default=False
            Whether to return the standard deviations, too; needs ``store_data=True``.

        Returns
        -------
        targets : ndarray of shape (n,) or (n, n_targets)
            In the shape of y.
        std : ndarray of the same shape
            Of the predictive distribution of a new target, its noise included; only with ``return_std=True``.

        Notes
        -----
        The posterior of the weights is Gaussian, with the variance of noise that has the largest restricted likelihood,
        the same for all targets in units of ``target_scale_``; scale and prior are held fixed. Exact where ``solver_``
        is not ``"estimate"``.
        """
        outputs = self._outputs(X)
        if not return_std:
            return self._decision(outputs)
        variance = np.maximum(self._output_variance(X), 0) + self.noise_variance_
        std = np.sqrt(variance)[:, None] * self.target_scale_
        return self._decision(outputs), self._decision(std)

    # ------------------------------------------------------------------------------- what the targets are

    def _read_targets(self, y: Any, n: int) -> np.ndarray:
        if issparse(y):
            raise TypeError(f"y is sparse ({type(y).__name__}), but dense targets are required: pass y.toarray().")
        refuse_missing(y)
        y = _check_y(y, multi_output=True, y_numeric=True, estimator=self)
        check_consistent_length(np.empty(n), y)
        return y

    def _learn_targets(self, y: np.ndarray, classes: Any) -> np.ndarray:
        self._one_target = y.ndim == 1
        values = y.reshape(len(y), -1).astype(np.float64)
        if len(values) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 samples, got n_samples={len(values)}.")
        self._n_targets = values.shape[1]
        return values

    def _known_targets(self, y: Any, n: int, name: str) -> np.ndarray:
        values = self._read_targets(y, n).reshape(n, -1).astype(np.float64)
        if values.shape[1] != self._n_targets:
            raise ValueError(f"{name} has {values.shape[1]} targets, but the model was fitted on {self._n_targets}.")
        return values

    def _target_unit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        mean = np.average(values, axis=0, weights=weights)
        scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        constant = scale <= 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
        scale[constant] = 1.0
        self.target_scale_ = scale
        return scale

    def _check_rest(self, values: np.ndarray) -> None:
        if len(values) < 2:
            raise ValueError(f"{len(values)} training image(s) would remain: at least 2 are needed.")

    def _learn_from_held_out(self, held_out: np.ndarray, rows: TrainingRows, weights: np.ndarray) -> None:
        self.loo_score_ = float(r2_score(rows.targets, held_out, sample_weight=rows.given))

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 0] if self._one_target else outputs

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        return changes[:, :, 0] if self._one_target else changes
