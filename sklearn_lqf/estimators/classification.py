"""What classifiers share: targets are indicators of the classes, decision values their estimates."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_y

from ..answers.uncertainty import THRESHOLD, fit_temperature
from ..engine.problem import TrainingRows
from ..paper.model import TARGET_SCALE
from ..runtime.arithmetic import in_ordinary_arithmetic
from .data import refuse_missing
from .fitting import LQFBase, stores_data

__all__ = ["ClassifierBase"]

Estimator = TypeVar("Estimator", bound="ClassifierBase")


class ClassifierBase(ClassifierMixin, LQFBase):
    """A classifier without its constructor; documented with those that are public."""

    _frozen: tuple[str, ...] = ("tol", "class_weight")
    class_weight: Any

    @available_if(stores_data)
    @in_ordinary_arithmetic
    def partial_fit(
        self: Estimator, X: Any, y: Any, classes: Any = None, sample_weight: Any = None, groups: Any = None
    ) -> Estimator:
        """Add training images to the model, as if all had been given to `fit`.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.
        y : array-like of shape (n,) or (n, n_classes)
            Their labels.
        classes : array-like of shape (n_classes,), default=None
            All classes; needed at the first call for a model that is not fitted. In later calls they may name more
            classes than before, but none less.
        sample_weight : array-like of shape (n,), default=None
            As in `fit`.
        groups : array-like of shape (n,), default=None
            As in `fit`; needed where the model was fitted with groups.

        Returns
        -------
        self : estimator
            The estimator.

        Raises
        ------
        ValueError
            As `fit`; classes missing at the first call, or some of those before missing later.
        """
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            return self._fit(X, y, sample_weight, groups, classes)
        known = self.classes_ if classes is None else np.unique(classes)
        if np.array_equal(known, self.classes_):
            return self._add(X, y, sample_weight, groups)
        gone = np.setdiff1d(self.classes_, known)
        if len(gone) or self._multilabel:
            raise ValueError(f"classes={classes!r} must name those of the calls before: {self.classes_.tolist()}.")
        twin = self._with_classes(known)._add(X, y, sample_weight, groups)
        self.__dict__.update(vars(twin))
        return self

    def _with_classes(self: Estimator, classes: np.ndarray) -> Estimator:
        """A copy that knows more classes, of which it has no image yet."""
        twin, model, rows = copy.copy(self), self._grouped("partial_fit"), self._stored_rows()
        targets = np.zeros((len(rows), len(classes)))
        targets[:, np.searchsorted(classes, self.classes_)] = rows.targets
        recipe = replace(model.recipe, free=len(classes) - 1)
        twin.classes_ = classes
        twin._model = replace(model, recipe=recipe, rows=replace(rows, targets=targets))
        return twin

    @in_ordinary_arithmetic
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
        restricted likelihood; scale and prior are held fixed. The indicators of an image add up to one, which their
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

    @in_ordinary_arithmetic
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
            return (outputs > THRESHOLD).astype(np.int64)
        return self.classes_[outputs.argmax(1)]

    @in_ordinary_arithmetic
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
            return expit((values - THRESHOLD) / self.temperature_)
        return softmax(values / self.temperature_, axis=1)

    @in_ordinary_arithmetic
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
            return log_expit((values - THRESHOLD) / self.temperature_)
        return log_softmax(values / self.temperature_, axis=1)

    # ------------------------------------------------------------------------------- what the targets are

    def _read_targets(self, y: Any, n: int) -> np.ndarray:
        refuse_missing(y)
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
                f"{self.classes_.tolist()[0]!r}"
            )
        return self._encode(y, "y")

    def _known_targets(self, y: Any, n: int, name: str) -> np.ndarray:
        return self._encode(self._read_targets(y, n), name)

    def _encode(self, y: np.ndarray, name: str) -> np.ndarray:
        """Indicators (n, C) of labels that were read."""
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
        class_weight = self._fitted_with["class_weight"]
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
        if self._multilabel:
            right = ((held_out > THRESHOLD) == (rows.targets > THRESHOLD)).all(1)
        else:
            right = held_out.argmax(1) == rows.targets.argmax(1)
        self.loo_score_ = float(np.average(right, weights=rows.given))

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        if self._multilabel:
            return outputs - THRESHOLD
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        if self._multilabel:
            return changes
        return np.take_along_axis(changes, outputs.argmax(1)[:, None, None], 2)[:, :, 0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
