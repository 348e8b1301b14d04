"""The classifier: targets are indicators of the classes, decision values their estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_y

from ..engine.problem import TrainingRows
from ..paper.model import TARGET_SCALE
from .base import LQFBase, stores_data
from .parameters import with_shared_parameters

__all__ = ["LQFClassifier", "fit_temperature"]

_THRESHOLD = 0.5  # of an estimated indicator
_TEMPERATURES = (0.05, 10.0)  # the lower one when all held-out images are right: no probability is 0


@with_shared_parameters
class LQFClassifier(ClassifierMixin, LQFBase):
    """Linear Quadratic Fine-tuning of a pre-trained image network.

    A linear model of what a network computes of an image: its last features, and for the layers of every stage the
    gradient by their weights and the deviation of their input. How much each of these groups counts is learned from
    the data, by the closed-form leave-one-out error; the weights follow in closed form, too. There is no learning rate,
    and nothing to tune.

    Parameters
    ----------
    <network parameters>
    <model parameter>
    prior : {"leave-one-out", "evidence", "equal", "last"}, dict or array-like, default="leave-one-out"
        Prior variances of the groups of features. ``"leave-one-out"``: those with the smallest squared leave-one-out
        error, under a hyper-prior that expects as much of the last features as of all statistics of layers together.
        ``"evidence"``: those with the largest marginal likelihood, under the same hyper-prior. ``"equal"``: one for all
        groups but those of directions; ``"last"``: the last features alone, a ridge regression. A dict of group names,
        as in ``prior_``, or a number for each group, gives relative variances.
    alpha : float or "auto", default="auto"
        Variance of label noise over the prior variance of an output: the L2 penalty, in a unit that serves every
        backbone. ``"auto"``: the one with the smallest squared leave-one-out error.
    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn. Not supported with several labels for each image.
    <fit parameters>

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Class labels; the numbers of the columns of y where it has several.
    temperature_ : float
        Divides the decision values before the softmax (logistic function, for several labels) of
        ``predict_proba``; fitted on leave-one-out outputs, as if there were two images more and one of them had another
        label. From 0.05 to 10.
    <attributes>

    See Also
    --------
    LQFClassifierCV : Chooses the penalty by cross-validation.
    LQFRegressor : The same for numeric targets.
    sklearn.linear_model.RidgeClassifier : The same loss on fixed features.

    Notes
    -----
    With psi_g(x) the features of group g, centered and of mean squared norm 1 on the training images, the outputs are

    ``f_c(x) = b_c + sum_g sqrt(theta_g) <psi_g(x), beta_gc>``,

    and beta minimizes ``sum_i s_i |f(x_i) - t_i|^2 + |beta|^2``, where s are sample weights and t one-hot targets.
    theta are the prior variances over that of noise. Tangent features of a layer are gradients by its weight W, so that
    weights on them are a change of W for each class, to first order [1]_: of the mean of the layer's own output
    (``tangents="local"``), or of ``u_k . phi(x)``, phi the last features, summed over ``n_directions`` directions u_k
    (``"network"``), as Kronecker sketches. The directions have the covariance of the network's features of synthetic
    images: they depend on no data.

    Layers are read at their own output because the expansion of a network is, to a good part, a linear model of its
    intermediate features [2]_.

    References
    ----------
    .. [1] Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021
       (arXiv 2012.11140), sections 3 and 4.
    .. [2] Evci, Dumoulin, Larochelle, Mozer, "Head2Toe: Utilizing Intermediate Representations for Better Transfer
       Learning", ICML 2022 (arXiv 2201.03529).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn_lqf import LQFClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> LQFClassifier(random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        download: bool = True,
        tangents: str | None = "local",
        tangent_layers: Any = 1,
        n_directions: int = 8,
        sketch_size: int | None = 16,
        model: str = "groups",
        prior: Any = "leave-one-out",
        alpha: float | str = "auto",
        class_weight: Any = None,
        negative_slope: float = 0.0,
        solver: str = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        memory: Any = None,
        store_data: bool = False,
        device: Any = "auto",
        distributed: bool = False,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ):
        super().__init__(
            backbone, weights=weights, download=download, tangents=tangents, tangent_layers=tangent_layers,
            n_directions=n_directions, sketch_size=sketch_size, model=model, prior=prior, alpha=alpha,
            negative_slope=negative_slope, solver=solver, max_iter=max_iter, tol=tol, views=views,
            image_shape=image_shape, image_size=image_size, channel_axis=channel_axis, preprocessing=preprocessing,
            batch_size=batch_size, memory=memory, store_data=store_data, device=device, distributed=distributed,
            dtype=dtype, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.class_weight = class_weight

    @available_if(stores_data)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> LQFClassifier:
        """Add training images to the model, as if all had been given to `fit`.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.
        y : array-like of shape (n,) or (n, n_classes)
            Their labels.
        classes : array-like of shape (n_classes,), default=None
            All classes; needed at the first call for a model that is not fitted. In later calls they must be the same.
        sample_weight : array-like of shape (n,), default=None
            As in `fit`.

        Returns
        -------
        self : LQFClassifier
            The estimator.

        Raises
        ------
        ValueError
            As `fit`; classes missing at the first call, or others than before.
        """
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            return self._fit(X, y, sample_weight, classes)
        if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes={classes!r} is not the same as in the calls before: {self.classes_.tolist()}.")
        return self._add(X, y, sample_weight)

    def decision_function(self, X: Any, *, return_std: bool = False) -> Any:
        """Compute the outputs of the linearized network.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.
        return_std : bool, default=False
            Whether to return the standard deviations, too; needs ``store_data=True``.

        Returns
        -------
        decision : ndarray of shape (n, n_classes), or (n,) for two classes
            Estimates of the class indicators (their difference for two classes; less 1/2 for several labels, so that
            positive values predict a label).
        std : ndarray of the same shape
            Of the posterior of these estimates, see Notes; only with ``return_std=True``.

        Notes
        -----
        The Gaussian posterior takes the squared loss for a likelihood, with the variance of noise that has the largest
        marginal likelihood; scale and prior are held fixed. The indicators of an image add up to one, which their
        covariance knows. Exact where ``solver_`` is not ``"estimate"``.
        """
        decision = self._decision(self._outputs(X))
        if not return_std:
            return decision
        variance, c = self._output_variance(X), len(self.classes_)
        if not self._multilabel:
            variance = variance * (2.0 if c == 2 else 1 - 1 / c)
        std = np.sqrt(np.maximum(variance, 0))
        return decision, std if decision.ndim == 1 else np.repeat(std[:, None], c, 1)

    def predict(self, X: Any) -> np.ndarray:
        """Predict class labels.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        labels : ndarray of shape (n,), or (n, n_classes) for several labels
            The class with the largest output, or all labels whose output is above 1/2.
        """
        outputs = self._outputs(X)
        if self._multilabel:
            return (outputs > _THRESHOLD).astype(np.int64)
        return self.classes_[outputs.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict probabilities of the classes.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes)
            Softmax of the outputs over ``temperature_``; the logistic function for several labels.
        """
        values = self._outputs(X)
        if self._multilabel:
            return expit((values - _THRESHOLD) / self.temperature_)
        return softmax(values / self.temperature_, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Predict logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        log_probabilities : ndarray of shape (n, n_classes)
            Logarithms of `predict_proba`.
        """
        values = self._outputs(X)
        if self._multilabel:
            return log_expit((values - _THRESHOLD) / self.temperature_)
        return log_softmax(values / self.temperature_, axis=1)

    # ------------------------------------------------------------------------------- what the targets are

    def _read_targets(self, y: Any, n: int) -> np.ndarray:
        y = _check_y(y.toarray() if hasattr(y, "toarray") else y, multi_output=True, estimator=self)
        check_consistent_length(np.empty(n), y)
        check_classification_targets(y)
        kind = type_of_target(y)
        if kind.endswith("multioutput"):
            raise ValueError(f"y with several columns must hold 0 and 1, for labels that are there or not; got {kind}.")
        return y if kind == "multilabel-indicator" else column_or_1d(y, warn=True)

    def _learn_targets(self, y: np.ndarray, classes: Any) -> np.ndarray:
        self._multilabel = y.ndim == 2
        self.classes_ = np.unique(y if classes is None else classes)
        if self._multilabel:
            self.classes_ = np.arange(y.shape[1])
            if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
                raise ValueError(f"y has {y.shape[1]} columns, whose numbers the classes must be, got {classes!r}.")
        if len(self.classes_) < 2:
            source = "the data contains" if classes is None else "classes names"
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes, but {source} only one class: "
                f"{self.classes_[0]!r}"
            )
        return self._known_targets(y, len(y), "y")

    def _known_targets(self, y: Any, n: int, name: str) -> np.ndarray:
        y = self._read_targets(y, n)
        if self._multilabel or y.ndim == 2:
            if not self._multilabel or y.shape[1:] != self.classes_.shape:
                raise ValueError(
                    f"{name} has the shape {y.shape}, but the model has "
                    f"{f'{len(self.classes_)} labels' if self._multilabel else 'one class'} for each image."
                )
            return y.astype(np.float64)
        unseen = np.setdiff1d(y, self.classes_)
        if len(unseen):
            raise ValueError(f"{name} has labels that are not among the classes of the fit: {unseen.tolist()[:5]}.")
        return np.eye(len(self.classes_))[np.searchsorted(self.classes_, y)]

    def _target_unit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.ones(values.shape[1])

    def _paper_unit(self, unit: np.ndarray) -> np.ndarray:
        return unit / TARGET_SCALE

    def _targets_are_indicators(self) -> bool:
        return not self._multilabel

    def _weigh_classes(self, values: np.ndarray, given: np.ndarray) -> np.ndarray:
        class_weight = self._fitted_class_weight
        if class_weight is None:
            return given
        if self._multilabel:
            raise ValueError("class_weight is not supported with several labels for each image: use sample_weight.")
        codes = values.argmax(1)
        total = np.bincount(codes, weights=given, minlength=len(self.classes_))
        if isinstance(class_weight, str) and class_weight == "balanced":
            factor = given.sum() / (np.count_nonzero(total) * np.where(total > 0, total, 1.0))
        else:
            factor = compute_class_weight(class_weight, classes=self.classes_, y=self.classes_[codes])
        weights = given * factor[codes]
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(
                f"class_weight must give finite and non-negative weights, not all zero; got {class_weight!r}."
            )
        return weights

    def _check_rest(self, values: np.ndarray) -> None:
        if len(values) < 2:
            raise ValueError(f"{len(values)} training image(s) would remain: at least 2 are needed.")
        gone = [] if self._multilabel else self.classes_[(values == 0).all(0)].tolist()
        if gone:
            raise ValueError(
                f"No training image of class(es) {gone[:5]} would remain: fit a new model without these classes."
            )

    def _learn_from_held_out(self, held_out: np.ndarray, rows: TrainingRows, weights: np.ndarray) -> None:
        count = float(rows.multiplicity.sum())
        self.temperature_ = fit_temperature(held_out, rows.targets, weights, count, self._multilabel)

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        if self._multilabel:
            return outputs - _THRESHOLD
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        if self._multilabel:
            return changes
        return np.take_along_axis(changes, outputs.argmax(1)[:, None, None], 2)[:, :, 0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def fit_temperature(
    outputs: np.ndarray, values: np.ndarray, weights: np.ndarray, count: float, multilabel: bool = False
) -> float:
    """The temperature with the smallest log-loss of held-out outputs (n, C), for indicators (n, C) of ``count`` images.

    As if one of two images more had another label (Platt, "Probabilistic outputs for support vector machines", 1999,
    section 2.2): few held-out images that are all right do not make probabilities of 0 and 1.
    """
    doubt = 1 / (count + 2)
    values = (1 - doubt) * values + doubt * (1 - values) / (1 if multilabel else values.shape[1] - 1)

    def loss(log_temperature: float) -> float:
        if multilabel:
            logits = (outputs - _THRESHOLD) / np.exp(log_temperature)
            log_p = values * log_expit(logits) + (1 - values) * log_expit(-logits)
        else:
            log_p = values * log_softmax(outputs / np.exp(log_temperature), axis=1)
        return -float(weights @ log_p.sum(1))

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded")
    return float(np.exp(found.x))
