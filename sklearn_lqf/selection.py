"""The penalty by cross-validation or leave-one-out, from activations and curvature that are computed once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer
from sklearn.model_selection import check_cv

from .cache import TrunkCache
from .classifier import LQFClassifier
from .forgetting import StoredData
from .influence import DUAL_MAX, Dual, TrainingSet
from .kernel import tangent_kernel
from .model import LinearModel
from .parameters import check_number, with_shared_parameters
from .problem import Problem, TrainingRows

__all__ = ["LQFClassifierCV"]

_FOLDS = 5  # where leave-one-out in closed form would be too large


class _OfOutputs(LQFClassifier):
    """A classifier whose images are its outputs, for scorers."""

    def _outputs(self, X: Any) -> np.ndarray:
        return X


@with_shared_parameters
class LQFClassifierCV(LQFClassifier):
    """Linear Quadratic Fine-tuning with the penalty chosen by cross-validation.

    The trunk is evaluated once for all folds and penalties, the curvature once for each fold, and each solution starts
    at the minimum over all directions of those before.

    Parameters
    ----------
    <network parameters>
    alphas : array-like of float, default=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
        Penalties to choose from, positive, each once, in the units of the ``alpha`` of `LQFClassifier`.
    cv : int, cross-validation generator, iterable or None, default=None
        Folds, as in scikit-learn, of the images with a positive weight; an iterable counts all rows of X. None:
        leave-one-out in closed form, up to 6000 outputs of all images and views; 5 folds beyond.
    scoring : str, callable or None, default=None
        A scorer as in scikit-learn, of predictions for images left out. None: the accuracy of folds, and the negative
        squared error of leave-one-out.
    target_scale : float, default=1.0
        As in `LQFClassifier`.
    class_weight : dict, "balanced" or None, default=None
        As in `LQFClassifier`.
    <fit parameters>

    Attributes
    ----------
    best_alpha_ : float
        The member of ``alphas`` that was chosen; ``alpha_`` is its absolute value.
    best_score_ : float
        Its mean score.
    best_index_ : int
        Where it stands in ``alphas``.
    cv_results_ : dict of str to ndarray of shape (n_alphas,)
        ``"alpha"``, ``"mean_test_score"``, ``"rank_test_score"``, and for folds ``"split{k}_test_score"``,
        ``"std_test_score"`` and ``"mean_n_iter"``, iterations of the solver.
    n_splits_ : int
        Number of folds; of images for leave-one-out.
    classes_ : ndarray of shape (n_classes,)
        Class labels; the numbers of the columns of y where it has several.
    intercept_ : ndarray of shape (n_classes,) or None
        Mean of the indicators, when centered; else None.
    temperature_ : float
        As in `LQFClassifier`.
    <attributes>

    See Also
    --------
    LQFClassifier : With one penalty; its ``alpha="auto"`` is chosen by the head alone, at no cost.
    sklearn.linear_model.RidgeClassifierCV : The same on fixed features.

    Notes
    -----
    Folds are fitted as `LQFClassifier` would fit them, to the same tolerance: `GridSearchCV` over ``alpha`` makes the
    same choice, but for images that ``tol`` decides. Groups are given as folds:
    ``cv=list(GroupKFold().split(X, y, groups))``. Leave-one-out is exact for the quadratic of all images, see
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

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        download: bool = True,
        tangent_layers: Any = 1,
        readout: str = "stages",
        head: str = "orthogonal",
        alphas: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        cv: Any = None,
        scoring: Any = None,
        target_scale: float = 1.0,
        class_weight: Any = None,
        tail_weight: float | None = 0.03,
        negative_slope: float = 0.0,
        center: bool | str = "auto",
        damping: float = 0.1,
        solver: str = "pcg",
        max_iter: int = 200,
        tol: float = 1e-2,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        cache: str = "auto",
        memory: Any = None,
        store_data: bool = False,
        device: Any = "auto",
        distributed: bool = False,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ):
        super().__init__(
            backbone, weights=weights, download=download, tangent_layers=tangent_layers, readout=readout, head=head,
            target_scale=target_scale, class_weight=class_weight, tail_weight=tail_weight,
            negative_slope=negative_slope, center=center, damping=damping, solver=solver, max_iter=max_iter, tol=tol,
            views=views, image_shape=image_shape, image_size=image_size, channel_axis=channel_axis,
            preprocessing=preprocessing, batch_size=batch_size, cache=cache, memory=memory, store_data=store_data,
            device=device, distributed=distributed, dtype=dtype, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        del self.alpha  # not a parameter here: the absolute one that is chosen is alpha_
        self.alphas = alphas
        self.cv = cv
        self.scoring = scoring

    def _check_parameters(self, n_processes: int) -> None:
        super()._check_parameters(n_processes)
        if n_processes > 1:
            raise ValueError("LQFClassifierCV does not support distributed=True with several processes.")
        for alpha in self._alphas():
            check_number("Each of alphas", float(alpha), 0, strict=True)
        if isinstance(self.scoring, str):
            get_scorer(self.scoring)
        elif self.scoring is not None and not callable(self.scoring):
            raise ValueError(f"scoring must be the name of a scorer, a callable or None, got {self.scoring!r}.")
        if self.cv is None and self.head == "ridge":
            raise ValueError("head='ridge' has seen the labels, which leave-one-out does not allow for: set cv.")

    def _check_alpha(self) -> None:
        """There is none."""

    def _alphas(self) -> np.ndarray:
        try:
            alphas = np.asarray(self.alphas, dtype=np.float64)
        except (TypeError, ValueError):
            alphas = np.empty(0)
        if alphas.ndim != 1 or not len(alphas) or len(np.unique(alphas)) != len(alphas):
            raise ValueError(f"alphas must be some different numbers, got {self.alphas!r}.")
        return alphas

    def _penalty(self, problem: Problem, model: LinearModel) -> float:
        """Choose by scores of images left out."""
        values = problem.rows.targets.cpu().numpy() * self._unit
        n = len(values)
        if self.cv is None and values.size * problem.rows.views <= DUAL_MAX:
            self.n_splits_, results = n, self._score_left_out(problem, values)
        else:
            splits = self._splits(problem.rows, values)
            self.n_splits_, results = len(splits), self._score_folds(problem.rows, values, splits, model)
        mean = results["mean_test_score"]
        if np.isnan(mean).all():
            raise ValueError(f"There is no score to choose by: scoring={self.scoring!r} gives nan for each of alphas.")
        ranked = np.where(np.isnan(mean), -np.inf, mean)
        self.best_index_ = int(ranked.argmax())
        self.best_alpha_, self.best_score_ = float(self._alphas()[self.best_index_]), float(mean[self.best_index_])
        rank = 1 + (ranked[None] > ranked[:, None]).sum(1)
        self.cv_results_ = {"alpha": self._alphas(), **results, "rank_test_score": rank}
        return problem.alpha(self.best_alpha_)

    def _score_left_out(self, problem: Problem, values: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of the leave-one-out outputs for all penalties."""
        kernel = tangent_kernel(problem.network, problem.rows.cache)
        rows = problem.rows
        t, s, m, given = (v.cpu() for v in (rows.targets, rows.weights, rows.multiplicity, rows.given))
        data = TrainingSet(t, s, m, None if self._centered() else problem.offset.cpu())
        scores, judge = [], self._judge(problem)
        for alpha in self._alphas():
            outputs = Dual(kernel, data, problem.alpha(alpha)).leave_one_out()[0].numpy() * self._unit
            if self.scoring is None:
                scores.append(-float(np.average(((outputs - values) ** 2).mean(1), weights=s.numpy())))
            else:
                scores.append(self._score(judge, outputs, values, given.numpy()))
        return {"mean_test_score": np.array(scores)}

    def _has_given_folds(self) -> bool:
        """Whether cv is an iterable, of rows of X."""
        return not (self.cv is None or isinstance(self.cv, Integral) or hasattr(self.cv, "split"))

    def _splits(self, rows: TrainingRows, values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Which of the rows each fold is fitted to, and which it predicts."""
        y = values if self._multilabel else values.argmax(1)
        splitter = check_cv(_FOLDS if self.cv is None else self.cv, y, classifier=True)
        splits = list(splitter.split(np.empty(len(y)), y))
        if not splits:
            raise ValueError(f"cv={self.cv!r} yields no folds; an iterator yields them once: make it a list.")
        place = np.arange(len(y))
        if rows.kept is not None and self._has_given_folds():
            place = np.where(rows.kept, np.cumsum(rows.kept) - 1, -1)  # what is given counts rows without a weight
        parts = ((place[train], place[test]) for train, test in splits)  # of indices, or masks
        found = [(train[train >= 0], test[test >= 0]) for train, test in parts]
        for k, (train, test) in enumerate(found):
            if not len(train) or not len(test):
                raise ValueError(
                    f"Fold {k} of cv has {len(train)} images to fit to and {len(test)} to predict that have a positive "
                    "weight: each needs some."
                )
        return found

    def _update(self, stored: StoredData, warm_start: bool) -> Any:
        if self._has_given_folds():
            raise ValueError(
                "cv holds folds of the rows of fit, which are not those of the changed set: set it to an int or a "
                "splitter."
            )
        return super()._update(stored, warm_start)

    def _score_folds(
        self,
        rows: TrainingRows,
        values: np.ndarray,
        splits: Sequence[tuple[np.ndarray, np.ndarray]],
        model: LinearModel,
    ) -> dict[str, np.ndarray]:
        """Scores of all folds and penalties."""
        alphas = self._alphas()
        order = np.argsort(-alphas)
        scores, iterations, missed = *np.zeros((2, len(splits), len(alphas))), 0
        for k, (train, test) in enumerate(splits):
            weights = self._weigh_classes(values[train], rows.given.cpu().numpy()[train])
            train, weights = train[weights > 0], weights[weights > 0]
            part = rows.taking(train).weighted(torch.tensor(weights).to(rows.weights))
            fold = Problem(model.again(), part, self._recipe())
            judge = self._judge(fold)
            held_out = rows.taking(test)
            truth, given = held_out.targets.cpu().numpy() * self._unit, held_out.given.cpu().numpy()
            path = fold.path([fold.alpha(a) for a in alphas[order]], self.tol, self.max_iter)
            for i, result in zip(order, path, strict=True):
                outputs = fold.outputs(result.x, _first_view(held_out)).cpu().numpy() * self._unit
                scores[k, i], iterations[k, i] = self._score(judge, outputs, truth, given), result.n_iter
                missed += not result.converged
        if missed:
            warnings.warn(
                f"{missed} of {scores.size} solutions for folds did not reach tol={self.tol:g}; their scores are of "
                "where the solver stopped: increase max_iter, or the smallest of alphas, or accept a larger tol.",
                ConvergenceWarning,
                stacklevel=2,
            )
        found = {f"split{k}_test_score": s for k, s in enumerate(scores)}
        return {
            **found, "mean_test_score": scores.mean(0), "std_test_score": scores.std(0),
            "mean_n_iter": iterations.mean(0),
        }  # fmt: skip

    def _judge(self, problem: Problem) -> _OfOutputs:
        """What a scorer sees of the model of a problem: the classes, and the temperature."""
        judge = _OfOutputs(target_scale=self.target_scale)
        judge.classes_, judge._multilabel = self.classes_, self._multilabel
        judge._learn_from_held_out(problem, self._unit)
        return judge

    def _score(self, judge: _OfOutputs, outputs: np.ndarray, values: np.ndarray, given: np.ndarray) -> float:
        """The score of outputs (m, C) for indicators (m, C), with weights (m,) where the scorer takes them."""
        y = values.astype(np.int64) if self._multilabel else self.classes_[values.argmax(1)]
        scoring = "accuracy" if self.scoring is None else self.scoring
        scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
        taken = inspect.signature(getattr(scorer, "_score_func", scorer)).parameters
        weights = {"sample_weight": given} if "sample_weight" in taken and (given != 1).any() else {}
        return float(scorer(judge, outputs, y, **weights))


def _first_view(rows: TrainingRows) -> TrunkCache:
    """Activations of the images as they are."""
    return rows.cache.taking(torch.arange(len(rows.targets)))
