"""Display of the learned prior: the share of each group of features, over the depth of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .figures import check_estimator, pyplot

__all__ = ["PriorDisplay"]

# Label and color of each kind of features, the same in all figures, so that models can be compared.
_KINDS = {
    "last": ("last features", "tab:blue"), "tangents": ("local tangents", "tab:orange"),
    "deviation": ("deviations", "tab:green"), "directions": ("tangents along directions", "tab:red"),
}  # fmt: skip


class PriorDisplay:
    """Shares of the groups of features in the prior variance of an output, over the depth of the network.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes.

    Parameters
    ----------
    prior : dict of str to float
        Share of each group of features, not negative, as ``prior_`` of an estimator. A name is ``"last"``, or the name
        of the last module of a stage, a space, and ``"tangents"``, ``"deviation"`` or ``"directions"``.
    estimator_name : str, default=None
        Title of the figure.

    Attributes
    ----------
    bars_ : dict of str to matplotlib BarContainer
        Bars of each kind of features that ``prior`` has.
    ax_ : matplotlib Axes
        Axes with the bars.
    figure_ : matplotlib Figure
        Figure with the bars.

    See Also
    --------
    PriorDisplay.from_estimator : Draw the prior of a fitted estimator.

    Examples
    --------
    >>> from sklearn_lqf import PriorDisplay
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

        Raises
        ------
        ValueError
            ``prior`` has a name of another kind.
        ImportError
            matplotlib is not installed.
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
            A fitted estimator with ``prior_``, such as `LQFClassifier`.
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
            The estimator has no ``prior_``.
        ValueError
            The estimator was fitted with ``model="paper"``, which has no prior of groups.
        sklearn.exceptions.NotFittedError
            The estimator is not fitted.
        ImportError
            matplotlib is not installed.
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
