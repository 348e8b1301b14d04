"""What the threads of a process share: settings of torch, and the parts of torch that only one of them may use.

Hides that torch keeps these for the whole process, so that fits and predictions in several threads would leave the
settings of the caller changed, or meet each other's traces and dual numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

__all__ = ["DUAL_NUMBERS", "GENERATOR", "TRACING", "shared_by_threads"]

Setting = Callable[[], AbstractContextManager]

TRACING = threading.RLock()  # torch.fx replaces nn.Module.__call__ while it traces
DUAL_NUMBERS = threading.RLock()  # forward-mode differentiation has one level; functional_call swaps parameters
GENERATOR = threading.RLock()  # torch's global generator, while it is seeded and until it is put back


def shared_by_threads(setting: Setting) -> Setting:
    """Let any number of threads be in a context, which the first of them enters and the last one leaves.

    Parameters
    ----------
    setting : callable
        Returns the context manager that changes a setting of the process and puts it back.
    """
    lock, undo, inside = threading.RLock(), ExitStack(), 0

    @contextmanager
    def enter() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                undo.enter_context(setting())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    undo.close()

    return enter
