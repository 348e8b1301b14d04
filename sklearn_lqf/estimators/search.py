"""The penalty by cross-validation or leave-one-out, from features that are evaluated once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import StrOptions

from ..engine.fitted import FeatureReader, FittedModel
from ..engine.problem import Problem, Recipe, TrainingRows
from .classification import ClassifierBase
from .parameters import check_number, with_shared_parameters

__all__ = ["LQFClassifierCV"]


def _holds_folds(cv: Any) -> bool:
    """Whether cv is an iterable, of rows of X."""
    return not (cv is None or isinstance(cv, Integral) or hasattr(cv, "split"))


class _OfOutputs(ClassifierBase):
    """A classifier whose images are its outputs, for scorers."""

    def _outputs(self, X: Any) -> np.ndarray:
        return X


@with_shared_parameters
class LQFClassifierCV(ClassifierBase):
    """Linear Quadratic Fine-tuning with the penalty chosen by cross-validation.

    The features of an image are evaluated once for all folds and penalties; scale and prior are fitted once for each
    fold.

    Parameters
    ----------
    <network parameters>
    prior : {"leave-one-out", "evidence", "equal", "last"}, dict or array-like, default="leave-one-out"
        As in `LQFClassifier`.
    alphas : array-like of float, default=(1e-05, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
        Penalties to choose from, positive, each once, in the units of the ``alpha`` of `LQFClassifier`.
    cv : int, cross-validation generator, iterable or None, default=None
        Folds, as in scikit-learn, of the images with a positive weight; an iterable counts all rows of X. None:
        leave-one-out in closed form.
    scoring : str, callable or None, default=None
        A scorer as in scikit-learn, of predictions for images left out. None: the accuracy of folds, and the negative
        squared error of leave-one-out.
    class_weight : dict, "balanced" or None, default=None
        As in `LQFClassifier`.
    <fit parameters>

    Attributes
    ----------
    best_alpha_ : float
        The member of ``alphas`` that was chosen.
    best_score_ : float
        Its mean score.
    best_index_ : int
        Where it stands in ``alphas``.
    cv_results_ : dict of str to ndarray of shape (n_alphas,)
        ``"alpha"``, ``"mean_test_score"``, ``"rank_test_score"``, and for folds ``"split{k}_test_score"`` and
        ``"std_test_score"``.
    n_splits_ : int
        Number of folds; of images for leave-one-out.
    classes_ : ndarray of shape (n_classes,)
        Class labels; the numbers of the columns of y where it has several.
    temperature_ : float
        As in `LQFClassifier`.
    <attributes>

    See Also
    --------
    LQFClassifier : With one penalty; its ``alpha="auto"`` is chosen by leave-one-out, at no cost.
    sklearn.linear_model.RidgeClassifierCV : The same on fixed features.

    Notes
    -----
    Folds are fitted as `LQFClassifier` would fit them: `GridSearchCV` over ``alpha`` makes the same choice. ``cv`` may
    be a splitter of groups, which are given to `fit`. Leave-one-out holds scale and prior fixed, see
    `leave_one_out`. Among equal scores the first penalty wins. Sample weights count in fits and, where the scorer takes
    them, in scores. Vectors are standardized for the built-in network once, by all of them.

    References
    ----------
    .. [1] Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021
       (arXiv 2012.11140).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn_lqf import LQFClassifierCV
    >>> X, y = load_iris(return_X_y=True)
    >>> clf = LQFClassifierCV(alphas=[0.01, 0.1, 1.0]).fit(X, y)
    >>> clf.best_alpha_ in clf.alphas
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **ClassifierBase._parameter_constraints,
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
    }
    _frozen: tuple[str, ...] = ("tol", "class_weight", "alphas", "cv", "scoring")

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
        prior: Any = "leave-one-out",
        alphas: Sequence[float] = (1e-05, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        cv: Any = None,
        scoring: Any = None,
        class_weight: Any = None,
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
        self.prior = prior
        self.alphas = alphas
        self.cv = cv
        self.scoring = scoring
        self.class_weight = class_weight
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

    def _check_parameters(self, n_processes: int) -> None:
        super()._check_parameters(n_processes)
        if n_processes > 1 and self.cv is not None:
            raise ValueError(
                f"cv={self.cv!r} does not support distributed=True with several processes: set cv=None, which scores "
                "by leave-one-out in closed form."
            )
        try:
            alphas = np.asarray(self.alphas, dtype=np.float64)
        except (TypeError, ValueError):
            alphas = np.empty(0)
        if alphas.ndim != 1 or not len(alphas) or len(np.unique(alphas)) != len(alphas):
            raise ValueError(f"alphas must be some different numbers, got {self.alphas!r}.")
        for alpha in alphas:
            check_number("Each of alphas", float(alpha), positive=True)

    def _frozen_value(self, name: str) -> Any:
        value = getattr(self, name)
        # An iterator of folds would be at its end when images are added.
        return copy.deepcopy(list(value) if name == "cv" and _holds_folds(value) else value)

    @property
    def _alphas(self) -> np.ndarray:
        return np.asarray(self._fitted_with["alphas"], dtype=np.float64)

    def _choose_alpha(
        self, problem: Problem, recipe: Recipe, rows: TrainingRows, reader: FeatureReader, keep: np.ndarray, n: int
    ) -> float:
        """Choose by scores of images left out."""
        if self._fitted_with["cv"] is None:
            self.n_splits_, results = len(rows), self._score_left_out(problem, rows)
        else:
            splits = self._splits(rows, keep, n)
            self.n_splits_, results = len(splits), self._score_folds(recipe, rows, splits, reader)
        mean = results["mean_test_score"]
        if np.isnan(mean).all():
            scoring = self._fitted_with["scoring"]
            raise ValueError(f"There is no score to choose by: scoring={scoring!r} gives nan for each of alphas.")
        ranked = np.where(np.isnan(mean), -np.inf, mean)
        self.best_index_ = int(ranked.argmax())
        self.best_alpha_, self.best_score_ = float(self._alphas[self.best_index_]), float(mean[self.best_index_])
        rank = 1 + (ranked[None] > ranked[:, None]).sum(1)
        self.cv_results_ = {"alpha": self._alphas, **results, "rank_test_score": rank}
        return self.best_alpha_

    def _score_left_out(self, problem: Problem, rows: TrainingRows) -> dict[str, np.ndarray]:
        """Scores of the leave-one-out outputs for all penalties."""
        weights, scores = self._weigh_classes(rows.targets, rows.given), []
        for _, outputs in problem.path(self._alphas):
            if self._fitted_with["scoring"] is None:
                scores.append(-float(np.average(((outputs - rows.targets) ** 2).mean(1), weights=weights)))
            else:
                judge = self._judge(outputs, rows, weights)
                scores.append(self._score(judge, outputs, rows.targets, rows.given))
        return {"mean_test_score": np.array(scores)}

    def _splits(self, rows: TrainingRows, keep: np.ndarray, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Which of the rows each fold is fitted to, and which it predicts; ``keep`` are the rows among n of X."""
        y = rows.targets if self._multilabel else rows.targets.argmax(1)
        cv = self._fitted_with["cv"]
        splitter = check_cv(cv, y, classifier=True)
        splits = list(splitter.split(np.empty(len(y)), y, rows.groups))
        if not splits:
            raise ValueError(f"cv={cv!r} yields no folds; an iterator yields them once: make it a list.")
        place = np.arange(len(y))
        if _holds_folds(cv):  # what is given counts rows without a weight
            place = np.full(n, -1)
            place[keep] = np.arange(len(keep))
        parts = ((place[train], place[test]) for train, test in splits)  # of indices, or masks
        found = [(train[train >= 0], test[test >= 0]) for train, test in parts]
        for k, (train, test) in enumerate(found):
            if not len(train) or not len(test):
                raise ValueError(
                    f"Fold {k} of cv has {len(train)} images to fit to and {len(test)} to predict that have a positive "
                    "weight: each needs some."
                )
        return found

    def _update(self, rows: TrainingRows) -> Any:
        if _holds_folds(self._fitted_with["cv"]):
            raise ValueError(
                "cv was given as folds of the rows of fit, which are not those of the changed set: fit with an int or "
                "a splitter."
            )
        return super()._update(rows)

    def _score_folds(
        self, recipe: Recipe, rows: TrainingRows, splits: Sequence[tuple[np.ndarray, np.ndarray]], reader: FeatureReader
    ) -> dict[str, np.ndarray]:
        """Scores of all folds and penalties."""
        alphas, unit = self._alphas, np.ones(rows.targets.shape[1])
        scores = np.zeros((len(splits), len(alphas)))
        for k, (train, test) in enumerate(splits):
            weights = self._weigh_classes(rows.targets[train], rows.given[train])
            part, weights = rows.taking(train[weights > 0]), weights[weights > 0]
            held_out, problem = rows.taking(test), Problem(part, reader.groups, weights, unit, recipe)
            for i, (solution, left_out) in enumerate(problem.path(alphas)):
                outputs = FittedModel(reader, solution, unit, recipe, "").outputs(held_out.features)
                judge = self._judge(left_out, part, weights)
                scores[k, i] = self._score(judge, outputs, held_out.targets, held_out.given)
        found = {f"split{k}_test_score": s for k, s in enumerate(scores)}
        return {**found, "mean_test_score": scores.mean(0), "std_test_score": scores.std(0)}

    def _judge(self, held_out: np.ndarray, rows: TrainingRows, weights: np.ndarray) -> _OfOutputs:
        """What a scorer sees of a model: the classes, and the temperature."""
        judge = _OfOutputs()
        judge.classes_, judge._multilabel = self.classes_, self._multilabel
        judge._learn_from_held_out(held_out, rows, weights)
        return judge

    def _score(self, judge: _OfOutputs, outputs: np.ndarray, values: np.ndarray, given: np.ndarray) -> float:
        """The score of outputs (m, C) for indicators (m, C), with weights (m,) where the scorer takes them."""
        y = values.astype(np.int64) if self._multilabel else self.classes_[values.argmax(1)]
        scoring = self._fitted_with["scoring"] or "accuracy"
        scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
        taken = inspect.signature(getattr(scorer, "_score_func", scorer)).parameters
        weights = {"sample_weight": given} if "sample_weight" in taken and (given != 1).any() else {}
        return float(scorer(judge, outputs, y, **weights))
