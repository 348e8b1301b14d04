"""What a user sees of long work: a bar for each phase when verbose, scikit-learn's callbacks when it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

try:  # scikit-learn >= 1.9
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # older: fit runs without callbacks

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin where the installed version has none."""

    def with_callbacks(method: Callable) -> Callable:
        return method


__all__ = ["Bars", "CallbackSupportMixin", "Progress", "with_callbacks"]


class Bars:
    """A progress bar for each phase; a context, at whose end nothing is left of them.

    Parameters
    ----------
    verbose : int
        0 is silent; above, bars by tqdm.
    """

    def __init__(self, verbose: int):
        self._tqdm: Any = None
        self._shown: Any
        if verbose:
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError(
                    'verbose needs tqdm: pip install "sklearn-lqf[progress]", or set verbose=0.'
                ) from error
            self._tqdm = tqdm
        self._phase, self._shown = "", None

    def _bar(self, what: str, total: int) -> Any:
        if what != self._phase:
            self.close()
            self._phase, self._shown = what, self._tqdm(total=total, desc=what, leave=False)
        return self._shown

    def close(self) -> None:
        """Remove the bar of the present phase."""
        if self._shown is not None:
            self._shown.close()
        self._phase, self._shown = "", None

    def rows(self, count: int, total: int) -> None:
        """Report images that have been read, and evaluated by the network."""
        if self._tqdm is not None:
            self._bar("reading", total).update(count)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A phase whose steps are not known beforehand."""
        if self._tqdm is None:
            yield
            return
        bar = self._bar(what, 1)
        yield
        bar.update(1)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Progress(Bars):
    """Progress of one fit: bars, and the callbacks of the estimator.

    Parameters
    ----------
    estimator : estimator
        Its callbacks are called once for the fit and once for each iteration.
    verbose : int
        As in `Bars`.
    max_iter : int
    X, y : array-like
        The training data, handed to callbacks.
    """

    def __init__(self, estimator: Any, verbose: int, max_iter: int, X: Any, y: Any):
        super().__init__(verbose)
        self._estimator = estimator
        self._data = {"X": X, "y": y}
        self._max_iter = max_iter
        self._context = (
            estimator._init_callback_context(max_subtasks=max_iter)
            if hasattr(estimator, "_init_callback_context")
            else None
        )
        if self._context is not None:
            self._context.call_on_fit_task_begin(estimator=estimator, **self._data)

    def iteration(self, number: int, residual: float, reconstruct: Callable[[], dict[str, Any]]) -> bool:
        """Report one iteration; true when a callback asks to stop.

        ``reconstruct`` gives the attributes of the estimator as if fit had stopped here.
        """
        if self._tqdm is not None:
            bar = self._bar("solving", self._max_iter)
            bar.set_postfix_str(f"residual {residual:.1e}")
            bar.update(number - bar.n)
        if self._context is None or not getattr(self._estimator, "_skl_callbacks", None):
            return False
        task = self._context.subcontext(task_name="iteration")
        task.call_on_fit_task_begin(estimator=self._estimator, **self._data)
        return bool(
            task.call_on_fit_task_end(estimator=self._estimator, reconstruction_attributes=reconstruct, **self._data)
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        super().__exit__(kind, error, _)
        if self._context is not None and error is None:
            self._context.call_on_fit_task_end(estimator=self._estimator, reconstruction_attributes={}, **self._data)
