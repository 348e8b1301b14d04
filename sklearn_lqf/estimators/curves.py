"""Displays of curves and bars, in scikit-learn's manner: how a fit converged, how scores depend on the penalty, what a
model reads of the network.

Holds what all displays share, too: matplotlib is imported by the functions that draw, and `pyplot` says how to install
it where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

__all__ = ["ConvergenceDisplay", "PriorDisplay", "RegularizationPathDisplay", "check_estimator", "pyplot"]

_TOL_GID = "sklearn_lqf.tol"  # marks the line of tol, which displays on one Axes share
# Label and color of each kind of features: those of several models can be compared.
_KINDS = {
    "last": ("last features", "tab:blue"), "tangents": ("local tangents", "tab:orange"),
    "deviation": ("deviations", "tab:green"), "directions": ("tangents along directions", "tab:red"),
}  # fmt: skip


class ConvergenceDisplay:
    """Convergence of the solver: relative norm of the gradient against iterations.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes. Several
    displays on one Axes compare solvers.

    Parameters
    ----------
    residual_norms : array-like of shape (n_iter + 1,)
        Norm of the gradient before the first and after each iteration, relative to its value at zero.
    tol : float, default=None
        Where the solver stops. None or 0: no line is drawn for it.
    estimator_name : str, default=None
        Name in the legend.

    Attributes
    ----------
    line_ : matplotlib Line2D
        The norms.
    tol_line_ : matplotlib Line2D or None
        The line of ``tol``; displays with one ``tol`` on one Axes share it.
    ax_ : matplotlib Axes
        Axes with the curve.
    figure_ : matplotlib Figure
        Figure with the curve.

    See Also
    --------
    ConvergenceDisplay.from_estimator : Draw the convergence of a fitted estimator.

    Examples
    --------
    >>> from sklearn_lqf.estimators.displays import ConvergenceDisplay
    >>> display = ConvergenceDisplay(residual_norms=[0.5, 0.06, 0.004], tol=0.01, estimator_name="pcg").plot()
    >>> display.ax_.get_yscale()
    'log'
    """

    def __init__(self, *, residual_norms: Any, tol: float | None = None, estimator_name: str | None = None):
        self.residual_norms = residual_norms
        self.tol = tol
        self.estimator_name = estimator_name

    def plot(self, ax: Any = None, *, name: str | None = None, **line_kw: Any) -> ConvergenceDisplay:
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
        display : ConvergenceDisplay
            The display itself.
        """
        plt = pyplot("ConvergenceDisplay.plot")
        from matplotlib.ticker import MaxNLocator

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        name = self.estimator_name if name is None else name
        norms = np.asarray(self.residual_norms, dtype=float)
        options = {"label": name, "marker": "o" if len(norms) <= 50 else None, "markersize": 4, **line_kw}
        (self.line_,) = ax.plot(np.arange(len(norms)), norms, **options)
        self.tol_line_ = self._tol_line(ax)
        ax.set(yscale="log", xlabel="Iteration", ylabel="Relative norm of the gradient")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _tol_line(self, ax: Any) -> Any:
        """The line of tol: that of another display if it is there already."""
        if not self.tol:
            return None
        for line in ax.lines:
            if line.get_gid() == _TOL_GID and line.get_ydata()[0] == self.tol:
                return line
        return ax.axhline(self.tol, color="tab:gray", linestyle="--", label=f"tol = {self.tol:g}", gid=_TOL_GID)

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, ax: Any = None, name: str | None = None, **line_kw: Any
    ) -> ConvergenceDisplay:
        """Draw the convergence of a fitted estimator.

        Parameters
        ----------
        estimator : estimator instance
            Fitted, with ``residual_norms_`` and ``tol``, such as `LQFClassifier`.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Name in the legend; that of the class if None.
        **line_kw : dict
            Passed to matplotlib's ``plot``.

        Returns
        -------
        display : ConvergenceDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            The estimator is of another kind.
        ValueError
            Its solution is in closed form.
        """
        pyplot("ConvergenceDisplay.from_estimator")
        check_estimator(cls, estimator, "residual_norms_", "tol")
        if not len(estimator.residual_norms_):
            raise ValueError(
                "ConvergenceDisplay needs a solver that iterates, but this solution is in closed form: fit with "
                "solver='pcg' to see its convergence."
            )
        name = type(estimator).__name__ if name is None else name
        display = cls(residual_norms=estimator.residual_norms_, tol=estimator.tol, estimator_name=name)
        return display.plot(ax, **line_kw)


class RegularizationPathDisplay:
    """Scores against the penalty ``alpha``, and the value chosen.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    alphas : array-like of shape (n_alphas,)
        Penalties, in any order.
    scores : array-like of shape (n_alphas,)
        Mean score of each.
    best_alpha : float, default=None
        The penalty chosen. None: no marker is drawn.
    score_name : str, default="Score"
        Label of the axis of the scores.
    scores_std : array-like of shape (n_alphas,), default=None
        Standard deviation of each score, drawn as a band. None: no band.
    estimator_name : str, default=None
        Name in the legend.

    Attributes
    ----------
    line_ : matplotlib Line2D
        The scores.
    fill_between_ : matplotlib PolyCollection or None
        The band of one standard deviation.
    best_ : matplotlib Line2D or None
        The marker at ``best_alpha``.
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
    >>> from sklearn_lqf.estimators.displays import RegularizationPathDisplay
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
        """
        plt = pyplot("RegularizationPathDisplay.plot")
        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
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
        _legend(ax)
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
            A fitted `LQFClassifierCV`, or a search of scikit-learn over ``alpha`` (of a step of a pipeline, too). Of
            several parameters the others are held at the best combination; values of ``alpha`` that are no number,
            such as ``"auto"``, are left out.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Name in the legend; none if None.
        score_name : str, default=None
            Label of the axis of the scores. None: the name of the scoring.
        **line_kw : dict
            Passed to matplotlib's ``plot``.

        Returns
        -------
        display : RegularizationPathDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            The estimator is of another kind.
        ValueError
            The search had no ``alpha``, several of them, or no numeric value of it.
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


class PriorDisplay:
    """What a model reads of its network: shares of the prior variance of an output, over the depth of the network.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    prior : dict of str to float
        Share of each group of features, as ``prior_`` of an estimator: names are ``"last"``, or that of the last module
        of a stage and ``"tangents"``, ``"deviation"`` or ``"directions"``.
    estimator_name : str, default=None
        Title.

    Attributes
    ----------
    bars_ : dict of str to matplotlib BarContainer
        Of each kind of features.
    ax_ : matplotlib Axes
        Axes with the bars.
    figure_ : matplotlib Figure
        Figure with the bars.

    See Also
    --------
    PriorDisplay.from_estimator : Draw the prior of a fitted estimator.

    Examples
    --------
    >>> from sklearn_lqf.estimators.displays import PriorDisplay
    >>> prior = {"conv1 tangents": 0.1, "conv1 deviation": 0.2, "conv2 tangents": 0.3, "last": 0.4}
    >>> display = PriorDisplay(prior=prior).plot()
    >>> [text.get_text() for text in display.ax_.get_yticklabels()]
    ['conv1', 'conv2', 'last']
    """

    def __init__(self, *, prior: Mapping[str, float], estimator_name: str | None = None):
        self.prior = prior
        self.estimator_name = estimator_name

    def plot(self, ax: Any = None, *, name: str | None = None, **bar_kw: Any) -> PriorDisplay:
        """Draw the bars, the first stage at the top.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Title; ``estimator_name`` if None.
        **bar_kw : dict
            Passed to matplotlib's ``barh``.

        Returns
        -------
        display : PriorDisplay
            The display itself.
        """
        plt = pyplot("PriorDisplay.plot")
        kinds = _by_kind(self.prior)
        places = list(dict.fromkeys(group.rpartition(" ")[0] or group for group in self.prior))
        if ax is None:
            ax = plt.subplots(figsize=(6.4, 1.4 + 0.3 * len(places)), layout="constrained")[1]
        before = np.zeros(len(places))
        self.bars_ = {}
        for kind, found in kinds.items():
            if found:
                label, color = _KINDS[kind]
                rows, widths = [places.index(place) for place in found], np.array(list(found.values()))
                style = {"label": label, "color": color, **bar_kw}
                self.bars_[kind] = ax.barh(rows, widths, left=before[rows], **style)
                before[rows] += widths
        ax.set_yticks(range(len(places)), places)
        if not ax.yaxis_inverted():
            ax.invert_yaxis()
        ax.set(xlabel="Share of the prior variance of an output", ylabel="Last module of the stage")
        # Above the bars, which may be anywhere; the title makes room for it.
        ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), borderaxespad=0.1, ncols=len(self.bars_), frameon=False,
            fontsize="small", handlelength=1, columnspacing=1.2,
        )  # fmt: skip
        ax.set_title((self.estimator_name if name is None else name) or "", pad=24)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, name: str | None = None, **bar_kw: Any) -> PriorDisplay:
        """Draw the prior of a fitted estimator.

        Parameters
        ----------
        estimator : estimator instance
            Fitted, with ``prior_``, such as `LQFClassifier`.
        ax : matplotlib Axes, default=None
            Axes to draw on. None: those of a new figure.
        name : str, default=None
            Title; that of the class if None.
        **bar_kw : dict
            Passed to matplotlib's ``barh``.

        Returns
        -------
        display : PriorDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            The estimator is of another kind.
        ValueError
            It was fitted with ``model="paper"``, which has no prior of groups.
        """
        pyplot("PriorDisplay.from_estimator")
        check_estimator(cls, estimator, "prior_")
        if not estimator.prior_:
            raise ValueError("PriorDisplay needs groups of features, which model='paper' does not have.")
        name = type(estimator).__name__ if name is None else name
        return cls(prior=estimator.prior_, estimator_name=name).plot(ax, **bar_kw)


def _by_kind(prior: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Shares by kind of features, and by stage."""
    kinds: dict[str, dict[str, float]] = {kind: {} for kind in _KINDS}
    for group, share in prior.items():
        place, _, kind = group.rpartition(" ")
        kind = kind if place else "last"
        if kind not in kinds:
            raise ValueError(f"prior names {group!r}, which is neither 'last' nor ends in one of {list(kinds)[1:]}.")
        kinds[kind][place or group] = float(share)
    return kinds


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

    rows = np.array([i for i, other in enumerate(params) if drawn(other)], dtype=int)
    if not len(rows):
        raise ValueError("The search has no alpha that is a number.")
    chosen = best.get(name)
    return rows, np.array([float(params[i][name]) for i in rows]), chosen if _is_number(chosen) else None, metric


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Whether two values of a grid are one: arrays and networks are not compared by content."""
    return a is b or bool(np.isscalar(a) and np.isscalar(b) and a == b)


def _score_name(estimator: Any, metric: str) -> str:
    """The name of the scoring for people."""
    results, scoring = estimator.cv_results_, getattr(estimator, "scoring", None)
    if scoring is None and "alpha" in results:  # the defaults of LQFClassifierCV
        return "Accuracy" if "std_test_score" in results else "Negative squared error"
    name = scoring if metric == "score" and isinstance(scoring, str) else metric
    return name.replace("neg_", "negative_").replace("_", " ").capitalize()


def pyplot(caller: str) -> Any:
    """matplotlib.pyplot, or an error that names the extra."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which the extra 'plot' brings: pip install 'sklearn-lqf[plot]'."
        ) from error
    return plt


def check_estimator(display: type, estimator: Any, *attributes: str) -> None:
    """Raise unless an estimator is fitted and has some attributes."""
    check_is_fitted(estimator)
    missing = [name for name in attributes if not hasattr(estimator, name)]
    if missing:
        raise TypeError(
            f"{display.__name__} needs a fitted estimator with {' and '.join(attributes)}, but "
            f"{type(estimator).__name__} has no {' and no '.join(missing)}: of a pipeline give the last step, of a "
            "search best_estimator_."
        )


def _legend(ax: Any) -> None:
    """A legend if anything has a name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
