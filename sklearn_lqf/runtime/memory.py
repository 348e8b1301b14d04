"""How much memory a computation may take, and what is done where it does not suffice.

Hides how much the machine, its container, a device and the folder of temporary files have. Functions that need room
take the bytes as an argument, whose default is one of these budgets.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "BATCH_BYTES", "PIECE_BYTES", "Recent", "device_budget", "disk_budget", "machine_memory", "memory_budget", "pieces",
    "with_smaller_batches",
]  # fmt: skip

T = TypeVar("T")

BATCH_BYTES = 1 << 28  # of activations of one batch on a CPU, which larger batches slow down
PIECE_BYTES = 1 << 27  # of an intermediate result that is made in pieces of rows, which larger pieces hardly speed up

_MEMORY_PART = 0.25  # of the memory of the machine for one large object; the rest is for the others and the user
_DEVICE_PART = 0.5  # of the free memory of a device
_DISK_PART = 0.5  # of the free space for temporary files
_UNKNOWN_MEMORY = 4 << 30  # bytes taken for the memory of a machine that does not tell


def machine_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of the machine, or of the container, whose limit is in a file."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        found = _UNKNOWN_MEMORY
    try:
        return min(found, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return found


def memory_budget() -> int:
    """Bytes that one large object may take: a quarter of the memory of the machine, or of the container."""
    return int(_MEMORY_PART * machine_memory())


def device_budget(device: torch.device) -> int:
    """Bytes that one large object may take on a device of its own memory; 0 of the CPU."""
    return int(_DEVICE_PART * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def disk_budget() -> int:
    """Bytes that temporary files may take; 0 without a folder for them."""
    try:
        return int(_DISK_PART * shutil.disk_usage(tempfile.gettempdir()).free)
    except OSError:
        return 0


def pieces(count: int, row_bytes: int, budget: int = PIECE_BYTES) -> list[slice]:
    """Rows in pieces whose intermediate results take at most a budget, or of one row.

    Parameters
    ----------
    count : int
        Of the rows.
    row_bytes : int
        That an intermediate result takes for each.
    budget : int
    """
    step = max(1, budget // max(row_bytes, 1))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


class Recent:
    """The last values that were made, by their keys; several threads may ask.

    Parameters
    ----------
    most : int
        Values that are kept.
    """

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._values: OrderedDict[Hashable, tuple[Any, list[warnings.WarningMessage]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not there; warnings of its making are repeated."""
        with self._lock:
            known = self._values.get(key)
            if known is not None:
                self._values.move_to_end(key)
        if known is None:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                known = make(), list(seen)
            with self._lock:
                self._values[key] = known
                while len(self._values) > self._most:
                    self._values.popitem(last=False)
        value, messages = known
        for message in messages:
            warnings.warn(message.message, stacklevel=2)
        return value


def with_smaller_batches(work: Callable[[int], T], batch_size: int) -> T:
    """``work(batch_size)``, repeated with half the size as long as memory does not suffice.

    Parameters
    ----------
    work : callable
        What is lost and done again is for it to keep small: one batch rather than all.
    batch_size : int

    Raises
    ------
    MemoryError
        When it does not suffice for single rows.
    """
    while True:
        try:
            return work(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise MemoryError(
                    f"There is not enough memory even for batches of one row ({error}). Remedies: a smaller "
                    "image_size, fewer tangent_layers, execution={'device': 'cpu'}, or a device with more memory."
                ) from error
        if torch.cuda.is_available():  # the frames that held the tensors are gone only here
            torch.cuda.empty_cache()
        batch_size = max(1, batch_size // 2)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator of the CPU
    )
