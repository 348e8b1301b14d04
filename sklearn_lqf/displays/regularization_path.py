"""Display of a search over the penalty: scores against ``alpha``."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from .figures import axes_of, check_estimator, legend, pyplot

__all__ = ["RegularizationPathDisplay"]


class RegularizationPathDisplay:
    """Scores against the penalty ``alpha``, and the value chosen.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    alphas : array-like of shape (n_alphas,)
        Penalties, positive, in any order.
    scores : array-like of shape (n_alphas,)
        Mean score of each penalty.
    best_alpha : float, default=None
        The penalty that was chosen. None: no marker is drawn.
    score_name : str, default="Score"
        Label of the axis of the scores.
    scores_std : array-like of shape (n_alphas,), default=None
        Standard deviation of each score, drawn as a band. None: no band.
    estimator_name : str, default=None
        Name in the legend.

    Attributes
    ----------
    line_ : matplotlib Line2D
        Curve of the scores.
    fill_between_ : matplotlib PolyCollection or None
        Band of one standard deviation on each side of the curve.
    best_ : matplotlib Line2D or None
        Marker at ``best_alpha``.
    ax_ : matplotlib Axes
        Axes with the curve.
    figure_ : matplotlib Figure
        Figure with the curve.

    See Also
    --------
    RegularizationPathDisplay.from_estimator : Draw what a fitted search found.
    sklearn.model_selection.ValidationCurveDisplay : The same for any parameter, without a search.

    Examples
    --------
    >>> from sklearn_lqf import RegularizationPathDisplay
    >>> display = RegularizationPathDisplay(alphas=[0.1, 1, 10], scores=[0.8, 0.9, 0.7], best_alpha=1).plot()
    >>> display.ax_.get_xscale()
    'log'
    """

    def __init__(
        self,
        *,
        alphas: Any,
        scores: Any,
        best_alpha: float | None = None,
        score_name: str = "Score",
        scores_std: Any = None,
        estimator_name: str | None = None,
    ):
        self.alphas = alphas
        self.scores = scores
        self.best_alpha = best_alpha
        self.score_name = score_name
        self.scores_std = scores_std
        self.estimator_name = estimator_name

    def plot(self, ax: Any = None, *, name: str | None = None, **line_kw: Any) -> RegularizationPathDisplay:
        """Draw the curve.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Name in the legend; ``estimator_name`` if None.
        **line_kw : dict
            Passed to matplotlib's ``plot``.

        Returns
        -------
        display : RegularizationPathDisplay
            The display itself.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        ax = axes_of("RegularizationPathDisplay.plot", ax)
        order = np.argsort(self.alphas)
        alphas, scores = (np.asarray(values, dtype=float)[order] for values in (self.alphas, self.scores))
        label = self.estimator_name if name is None else name
        (self.line_,) = ax.plot(alphas, scores, **{"label": label, "marker": "o", "markersize": 4, **line_kw})
        color = self.line_.get_color()
        self.fill_between_ = self.best_ = None
        if self.scores_std is not None:
            std = np.asarray(self.scores_std, dtype=float)[order]
            self.fill_between_ = ax.fill_between(
                alphas, scores - std, scores + std, color=color, alpha=0.2, linewidth=0
            )
        if self.best_alpha is not None:
            height = np.interp(np.log(self.best_alpha), np.log(alphas), scores)
            marker = {"marker": "*", "markersize": 14, "markeredgecolor": "black", "linestyle": "none"}
            chosen = f"chosen: alpha = {self.best_alpha:.3g}"
            (self.best_,) = ax.plot([self.best_alpha], [height], color=color, label=chosen, **marker)
        ax.set(xscale="log", xlabel="alpha", ylabel=self.score_name)
        legend(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, ax: Any = None, name: str | None = None, score_name: str | None = None, **line_kw: Any
    ) -> RegularizationPathDisplay:
        """Draw what a fitted search over ``alpha`` found.

        Parameters
        ----------
        estimator : estimator instance
            A fitted `LQFClassifierCV`, or a fitted search of scikit-learn over ``alpha``, also of a step of a pipeline.
            If the search has further parameters, they are held at the best combination. Values of ``alpha`` that are
            not numbers, such as ``"auto"``, are left out. Successive halving scores some values several times, of which
            the last is drawn.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Name in the legend. None: no name.
        score_name : str, default=None
            Label of the axis of the scores. None: the name of the score.
        **line_kw : dict
            Passed to matplotlib's ``plot``.

        Returns
        -------
        display : RegularizationPathDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            The estimator has no ``cv_results_``.
        ValueError
            The search has no ``alpha``, several of them, or no numeric value of it; or it has several scores and
            ``refit`` names none of them.
        sklearn.exceptions.NotFittedError
            The estimator is not fitted.
        ImportError
            matplotlib is not installed.
        """
        pyplot("RegularizationPathDisplay.from_estimator")
        check_estimator(cls, estimator, "cv_results_")
        rows, alphas, best, metric = _alphas_searched(estimator)
        results = estimator.cv_results_
        std = results.get(f"std_test_{metric}")
        display = cls(
            alphas=alphas,
            scores=np.asarray(results[f"mean_test_{metric}"])[rows],
            best_alpha=best,
            score_name=_score_name(estimator, metric) if score_name is None else score_name,
            scores_std=None if std is None else np.asarray(std)[rows],
            estimator_name=name,
        )
        return display.plot(ax, **line_kw)


def _alphas_searched(estimator: Any) -> tuple[np.ndarray, np.ndarray, float | None, str]:
    """Rows of cv_results_ to be drawn, their alphas, the one chosen (None: no number), and the name of the score."""
    results = estimator.cv_results_
    if "alpha" in results:
        alphas = np.asarray(results["alpha"], dtype=float)
        return np.arange(len(alphas)), alphas, float(estimator.best_alpha_), "score"
    names = [
        name for name in results if name == "param_alpha" or (name.startswith("param_") and name.endswith("__alpha"))
    ]
    if len(names) != 1:
        raise ValueError(
            f"The search must have one parameter alpha, found {[n.removeprefix('param_') for n in names]}."
        )
    refit = getattr(estimator, "refit", None)
    metric = refit if isinstance(refit, str) and f"mean_test_{refit}" in results else "score"
    if f"mean_test_{metric}" not in results or not hasattr(estimator, "best_index_"):
        raise ValueError("The search has several scores and none to choose by: set refit to the name of one.")
    name, params = names[0].removeprefix("param_"), results["params"]
    best = params[estimator.best_index_]

    def drawn(other: Mapping[str, Any]) -> bool:
        rest = other.keys() == best.keys() and all(_same(other[key], best[key]) for key in best if key != name)
        return rest and _is_number(other.get(name))

    # Successive halving scores some penalties again, on more of the data: the last score counts.
    last = {float(other[name]): i for i, other in enumerate(params) if drawn(other)}
    if not last:
        raise ValueError("The search has no alpha that is a number.")
    chosen = best.get(name)
    return np.array(list(last.values())), np.array(list(last)), chosen if _is_number(chosen) else None, metric


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Whether two values of a grid are one: arrays and networks are not compared by content."""
    return a is b or bool(np.isscalar(a) and np.isscalar(b) and a == b)


def _score_name(estimator: Any, metric: str) -> str:
    """The name of the scoring for people."""
    results = estimator.cv_results_
    scoring = getattr(estimator, "_fitted_with", {}).get("scoring", getattr(estimator, "scoring", None))
    if scoring is None and "alpha" in results:  # the defaults of LQFClassifierCV
        return "Accuracy" if "std_test_score" in results else "Negative squared error"
    name = scoring if metric == "score" and isinstance(scoring, str) else metric
    return name.replace("neg_", "negative_").replace("_", " ").capitalize()
