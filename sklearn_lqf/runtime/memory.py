"""How much memory a computation may take, and how it goes on if memory does not suffice.

Hides how much memory the machine, its container and a device have, and how much room the folder of temporary files has.
Functions that need room take the number of bytes as an argument, whose default is one of these budgets.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "BATCH_BYTES", "LAYER_BYTES", "PIECE_BYTES", "Recent", "device_budget", "disk_budget", "machine_memory",
    "memory_budget", "pieces", "with_smaller_batches",
]  # fmt: skip

T = TypeVar("T")

BATCH_BYTES = 1 << 28  # of the activations of one batch that are kept for derivatives on a CPU
# Of the largest activation of a batch in one thread of a CPU: larger ones leave the caches, and their memory is given
# back to the system after each layer. See docs/speed.md.
LAYER_BYTES = 12 << 20
PIECE_BYTES = 1 << 27  # of an intermediate result that is made in pieces of rows; larger pieces are hardly faster

_MEMORY_PART = 0.25  # of the memory of the machine, for one large object; the rest is for other objects and the user
_DEVICE_PART = 0.5  # of the free memory of a device
_DISK_PART = 0.5  # of the free space for temporary files
_UNKNOWN_MEMORY = 4 << 30  # bytes assumed for a machine whose memory cannot be read


def machine_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of the machine, or of the container if it has less; ``limit`` is the file with its limit."""
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
    """Bytes that one large object may take in the memory of a CUDA device; 0 for other devices."""
    return int(_DEVICE_PART * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def disk_budget() -> int:
    """Bytes that temporary files may take; 0 if there is no folder for them."""
    try:
        return int(_DISK_PART * shutil.disk_usage(tempfile.gettempdir()).free)
    except OSError:
        return 0


def pieces(count: int, row_bytes: int, budget: int = PIECE_BYTES) -> list[slice]:
    """Split rows into pieces whose intermediate results fit into a budget; a piece has at least one row.

    Parameters
    ----------
    count : int
        Number of rows.
    row_bytes : int
        Bytes of the intermediate result for each row.
    budget : int
        Bytes of the intermediate result for each piece.

    Returns
    -------
    list of slice
        In order.
    """
    step = max(1, budget // max(row_bytes, 1))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


_RECORDING = threading.RLock()  # warnings are recorded for the whole process: one thread at a time may do that


class Recent:
    """A cache of the values that were used last, by their keys; it may be used from several threads, which take turns.

    Parameters
    ----------
    most : int
        Number of values that are kept.
    """

    def __init__(self, most: int):
        self._most = most
        self._values: dict[Hashable, tuple[Any, list[warnings.WarningMessage]]] = {}  # the last one used is the last

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, computed by ``make`` if it is not kept; the warnings of ``make`` are shown each time."""
        with _RECORDING:
            known = self._values.pop(key, None)
            if known is None:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    known = make(), list(seen)
            self._values[key] = known
            while len(self._values) > self._most:
                del self._values[next(iter(self._values))]
        value, messages = known
        for message in messages:
            warnings.warn(message.message, stacklevel=2)
        return value


def with_smaller_batches(work: Callable[[int], T], batch_size: int) -> T:
    """``work(batch_size)``, repeated with half the batch size as long as memory does not suffice.

    Parameters
    ----------
    work : callable
        Takes a batch size. It should do little at a time (one batch instead of all), since it is repeated as a whole.
    batch_size : int
        At least 1.

    Returns
    -------
    object
        What ``work`` returned.

    Raises
    ------
    MemoryError
        Memory does not suffice even for a batch of one row.
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
        if torch.cuda.is_available():  # here the frames that held the tensors are gone
            torch.cuda.empty_cache()
        batch_size = max(1, batch_size // 2)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator of the CPU
    )
