"""Functions that all displays share. matplotlib is imported only when something is drawn."""

from __future__ import annotations

from typing import Any

from sklearn.utils.validation import check_is_fitted

__all__ = ["axes_of", "check_estimator", "legend", "pyplot"]


def pyplot(caller: str) -> Any:
    """matplotlib.pyplot, or an error that names the extra."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which the extra 'plot' brings: pip install 'sklearn-lqf[plot]'."
        ) from error
    return plt


def axes_of(caller: str, ax: Any, **figure: Any) -> Any:
    """The Axes to draw on: those given, or those of a new figure."""
    plt = pyplot(caller)
    return plt.subplots(layout="constrained", **figure)[1] if ax is None else ax


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


def legend(ax: Any) -> None:
    """A legend if anything has a name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
