"""What a user sees of a long fit: a progress bar when verbose, scikit-learn's callbacks when it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

try:  # scikit-learn >= 1.9
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # older: fit runs without callbacks

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin where the installed version has none."""

    def with_callbacks(method: Callable) -> Callable:
        return method


__all__ = ["CallbackSupportMixin", "Progress", "with_callbacks"]

T = TypeVar("T")


class Progress:
    """Progress of one fit.

    Parameters
    ----------
    estimator : estimator
        Its callbacks are called once for the fit and once for each iteration.
    verbose : int
        0 is silent; above, bars by tqdm.
    max_iter : int
    X, y : array-like
        The training data, handed to callbacks.
    """

    def __init__(self, estimator: Any, verbose: int, max_iter: int, X: Any, y: Any):
        self._estimator = estimator
        self._data = {"X": X, "y": y}
        self._tqdm: Any = None
        if verbose:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError(
                    'verbose needs tqdm: pip install "sklearn-lqf[progress]", or set verbose=0.'
                ) from error
            self._tqdm = tqdm
        self._bar: Any = None
        self._max_iter = max_iter
        self._context = (
            estimator._init_callback_context(max_subtasks=max_iter)
            if hasattr(estimator, "_init_callback_context")
            else None
        )
        if self._context is not None:
            self._context.call_on_fit_task_begin(estimator=estimator, **self._data)

    def over(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """The items, with a bar while they are consumed."""
        return items if self._tqdm is None else self._tqdm(items, total=total, desc=what, leave=False)

    def iteration(self, number: int, residual: float, reconstruct: Callable[[], dict[str, Any]]) -> bool:
        """Report one iteration; true when a callback asks to stop.

        ``reconstruct`` gives the attributes of the estimator as if fit had stopped here.
        """
        if self._tqdm is not None:
            if self._bar is None:
                self._bar = self._tqdm(total=self._max_iter, desc="solve", leave=False)
            self._bar.set_postfix_str(f"relative gradient {residual:.1e}")
            self._bar.update(number - self._bar.n)
        if self._context is None or not getattr(self._estimator, "_skl_callbacks", None):
            return False
        task = self._context.subcontext(task_name="iteration")
        task.call_on_fit_task_begin(estimator=self._estimator, **self._data)
        return bool(
            task.call_on_fit_task_end(estimator=self._estimator, reconstruction_attributes=reconstruct, **self._data)
        )

    def close(self) -> None:
        """End of the fit."""
        if self._bar is not None:
            self._bar.close()
        if self._context is not None:
            self._context.call_on_fit_task_end(estimator=self._estimator, reconstruction_attributes={}, **self._data)
