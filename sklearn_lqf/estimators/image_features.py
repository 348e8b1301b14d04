"""What a network reads of images as features for any other estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import TransformerMixin
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted

from ..engine.features import Standardization, fit_standardization
from ..engine.fitted import FeatureReader
from ..runtime.arithmetic import choose_device, in_ordinary_arithmetic
from .classifier import LQFClassifier
from .data import Inputs
from .parameters import with_shared_parameters
from .progress import Bars
from .regressor import LQFRegressor

__all__ = ["ImageFeatures"]

# What a fit leaves beside attributes that end in "_".
_STATE = ("_model", "_standardization", "_scale", "_image_options", "_size")


@with_shared_parameters
class ImageFeatures(TransformerMixin, Inputs):
    """Features of a pre-trained network, in groups, for any estimator.

    The features that `LQFClassifier` puts a linear model on: the last features of a network, and for the layers of
    every stage local tangents and deviations. Each group is centered, and of mean squared norm 1 on the training
    images, or scaled by what was learned to count.

    Parameters
    ----------
    <network parameters>
    prior : {"leave-one-out", "evidence"} or None, default=None
        None: all groups have the same scale, and y is not used. Else groups are scaled by the root of their share in
        the prior that `LQFClassifier` or `LQFRegressor` learns from y, so that one penalty on all weights is that of
        this model.
    views : str or sequence of str, default="identity"
        As in `LQFClassifier`.
    image_shape : tuple of int or None, default=None
        As in `LQFClassifier`.
    image_size : int, tuple of int, "auto", "backbone" or None, default="auto"
        As in `LQFClassifier`.
    channel_axis : int, default=-1
        As in `LQFClassifier`.
    preprocessing : dict or None, default=None
        As in `LQFClassifier`.
    random_state : int, RandomState instance or None, default=0
        As in `LQFClassifier`.
    execution : dict or None, default=None
        As in `LQFClassifier`, but for ``"distributed"``.

    Attributes
    ----------
    groups_ : dict of str to (int, int)
        First column of each group of features, and the one behind its last.
    prior_ : dict of str to float
        Share of each group in the sum of squares of the result, in the order of their depth.
    n_features_in_ : int
        Columns of vectors or raveled rows; values of one image otherwise.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of a DataFrame; defined only when they are all strings.
    image_shape_ : tuple of int or None
        (H, W, C) of one image as given; None for vectors.

    See Also
    --------
    LQFClassifier : A linear model on these features.
    ImageReader : Only reads images.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn_lqf import ImageFeatures
    >>> X, y = load_iris(return_X_y=True)
    >>> features = ImageFeatures().fit(X)
    >>> features.transform(X).shape[1] == len(features.get_feature_names_out())
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Inputs._parameter_constraints,
        "prior": [StrOptions({"leave-one-out", "evidence"}), None],
    }
    _model: FeatureReader
    _standardization: Standardization

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
        prior: str | None = None,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = "auto",
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        random_state: Any = 0,
        execution: Mapping[str, Any] | None = None,
    ):
        self.backbone = backbone
        self.weights = weights
        self.output = output
        self.tangents = tangents
        self.tangent_layers = tangent_layers
        self.n_directions = n_directions
        self.sketch_size = sketch_size
        self.prior = prior
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.random_state = random_state
        self.execution = execution

    @in_ordinary_arithmetic
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> ImageFeatures:
        """Prepare the network, and learn the scale of its features.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `LQFClassifier`.
        y : array-like of shape (n,) or (n, n_outputs), default=None
            Labels or targets; only used, and needed, with ``prior``.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights.

        Returns
        -------
        self : ImageFeatures
            The transformer.
        """
        self._fit(X, y, sample_weight)
        return self

    @in_ordinary_arithmetic
    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Fit, and compute the features of the same images, which are read once.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `LQFClassifier`.
        y : array-like of shape (n,) or (n, n_outputs), default=None
            As in `fit`.
        sample_weight : array-like of shape (n,), default=None
            As in `fit`.

        Returns
        -------
        features : ndarray of shape (n, n_features)
            As `transform` gives them.
        """
        found = self._fit(X, y, sample_weight)
        return self.transform(X) if found is None else self._scaled(found)

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> np.ndarray | None:
        """Raw features (n, D), or None where not all were evaluated; a fit that raises leaves nothing fitted."""
        try:
            self._check_parameters(1)
            return (self._fit_scale if self.prior is None else self._fit_prior)(X, y, sample_weight)
        except BaseException:
            for name in [n for n in vars(self) if n in _STATE or (n.endswith("_") and not n.startswith("_"))]:
                delattr(self, name)
            raise

    def _fit_scale(self, X: Any, y: Any, sample_weight: Any) -> np.ndarray:
        """Learn the scale of the groups alone."""
        device = choose_device(self._execution.device)
        rows, backbone = self._read_training_rows(X, None)
        given = self._given_weights(sample_weight, len(rows))
        every = np.arange(len(rows))
        with Bars(self.verbose) as bars:
            with bars.step("preparing"):
                self._model = self._reader(backbone, rows, every, given, device)
            features, _ = self._evaluate(self._model, rows, every, bars)
        self._standardization = fit_standardization(features, given, self._model.groups)
        self._set_groups(np.ones(len(self._model.groups)))
        return features

    def _fit_prior(self, X: Any, y: Any, sample_weight: Any) -> np.ndarray | None:
        """Take everything from a model that is fitted to y; what it read, as `_fit`."""
        if y is None:
            raise ValueError(f"prior={self.prior!r} is learned from y, which is None: give labels or targets.")
        kind = type_of_target(y.toarray() if issparse(y) else y)
        parameters = {name: getattr(self, name) for name in self._get_param_names()}
        fitted: Any = (LQFRegressor if kind.startswith("continuous") else LQFClassifier)(**parameters, store_data=True)
        fitted.fit(X, y, sample_weight)
        for name in ("n_features_in_", "feature_names_in_", "image_shape_", "_size", "_image_options"):
            self.__dict__.pop(name, None)  # of an earlier fit
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))
        model = fitted._model
        self._model, self._standardization = model.reader, model.solution.standardization
        self._set_groups(model.solution.variances)
        every = sample_weight is None or np.all(np.asarray(sample_weight) > 0)
        return model.rows.features if every else None

    def _set_groups(self, variances: np.ndarray) -> None:
        """Scale, shares and columns of the groups of these variances (G,)."""
        self._scale = np.repeat(np.sqrt(variances / variances.mean()), self._model.sizes)
        self.prior_, self.groups_ = self._model.shares(variances), self._model.columns

    @in_ordinary_arithmetic
    def transform(self, X: Any) -> np.ndarray:
        """Compute the features of images.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `LQFClassifier`.

        Returns
        -------
        features : ndarray of shape (n, n_features)
            The groups side by side, in float64; ``groups_`` has the columns of each.
        """
        check_is_fitted(self)
        rows = self._read_new_data(X)
        return self._scaled(self._in_batches(self._model.reading(self._execution.folder), rows))

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return self._standardization(features) * self._scale

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Name the columns of the result.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Ignored.

        Returns
        -------
        feature_names_out : ndarray of str objects
            ``{group}_{number}``.
        """
        check_is_fitted(self)
        names = [f"{group.name}_{i}" for group in self._model.groups for i in range(group.size)]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.prior is not None
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64"]
        return tags
