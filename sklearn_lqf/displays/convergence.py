"""Display of the convergence of an iterative solver: the quantity that `tol` bounds, by iteration."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import axes_of, check_estimator, legend, pyplot

__all__ = ["ConvergenceDisplay"]

_TOL_GID = "sklearn_lqf.tol"  # marks the line of tol, which all displays on one Axes share


class ConvergenceDisplay:
    """Convergence of an iterative solver: the quantity that ``tol`` bounds, against iterations.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes. Several
    displays on one Axes compare solvers.

    Parameters
    ----------
    residual_norms : array-like of shape (n_iter + 1,)
        Values before the first and after each iteration. They are a bound on the root mean squared error of the outputs
        for the training images, relative to the standard deviation of the targets, the largest over the outputs; with
        ``model="paper"`` the norm of the gradient, relative to its value at zero.
    tol : float, default=None
        Value at which the solver stops. None or 0: no line is drawn for it.
    estimator_name : str, default=None
        Name in the legend.

    Attributes
    ----------
    line_ : matplotlib Line2D
        Curve of ``residual_norms``.
    tol_line_ : matplotlib Line2D or None
        Line at ``tol``; displays with the same ``tol`` on one Axes share it.
    ax_ : matplotlib Axes
        Axes with the curve.
    figure_ : matplotlib Figure
        Figure with the curve.

    See Also
    --------
    ConvergenceDisplay.from_estimator : Draw the convergence of a fitted estimator.

    Examples
    --------
    >>> from sklearn_lqf import ConvergenceDisplay
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

        Raises
        ------
        ImportError
            matplotlib is not installed.
        """
        ax = axes_of("ConvergenceDisplay.plot", ax)
        from matplotlib.ticker import MaxNLocator

        name = self.estimator_name if name is None else name
        norms = np.asarray(self.residual_norms, dtype=float)
        options = {"label": name, "marker": "o" if len(norms) <= 50 else None, "markersize": 4, **line_kw}
        (self.line_,) = ax.plot(np.arange(len(norms)), norms, **options)
        self.tol_line_ = self._tol_line(ax)
        ax.set(yscale="log", xlabel="Iteration", ylabel="Relative error, at most")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(ax)
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
            A fitted estimator with ``residual_norms_`` and ``tol``, such as `LQFClassifier`.
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
            The estimator has no ``residual_norms_`` or ``tol``.
        ValueError
            The solution of the estimator is in closed form.
        sklearn.exceptions.NotFittedError
            The estimator is not fitted.
        ImportError
            matplotlib is not installed.
        """
        pyplot("ConvergenceDisplay.from_estimator")
        check_estimator(cls, estimator, "residual_norms_", "tol")
        if not len(estimator.residual_norms_):
            raise ValueError(
                "ConvergenceDisplay needs a solver that iterates, but this solution is in closed form: fit with "
                "solver='pcg' to see its convergence."
            )
        name = type(estimator).__name__ if name is None else name
        display = cls(residual_norms=estimator.residual_norms_, tol=estimator._fitted_with["tol"], estimator_name=name)
        return display.plot(ax, **line_kw)
