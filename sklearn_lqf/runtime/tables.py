"""Tables whose rows come batch by batch, kept in memory if there is room, else in a temporary file.

Hides where the rows are. The files have no name, so they vanish with the process, however it ends.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, cast

import numpy as np

from .memory import disk_budget, memory_budget, pieces

__all__ = ["RowFile", "RowTable", "TemporaryFileError", "amount", "copied_rows"]


class TemporaryFileError(OSError):
    """A temporary file cannot be written. It differs from an error of reading images, which has other remedies."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TemporaryFileError(error.errno, error.strerror or str(error)) from error


class RowFile:
    """Rows in a temporary file without a name.

    Parameters
    ----------
    shape : tuple of int
        Shape of a row.
    dtype : dtype of numpy

    Raises
    ------
    TemporaryFileError
        The file cannot be created or written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self._shape, self._dtype = shape, dtype
        with _writing():
            self._file = tempfile.TemporaryFile(prefix="sklearn_lqf-")  # noqa: SIM115, see finish

    def append(self, rows: np.ndarray) -> None:
        """Write rows (k, ...)."""
        # Written, not mapped: a full disk is then an error and not a signal that kills the process.
        with _writing():
            self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def finish(self) -> np.ndarray:
        """All rows (n, ...), mapped into memory; changes of the array do not change the file."""
        with _writing():
            self._file.flush()
            found = np.memmap(cast(Any, self._file), self._dtype, "c").reshape(-1, *self._shape)
            self._file.close()
        return np.asarray(found)

    def discard(self) -> None:
        """Close the file without finishing it."""
        with suppress(OSError):  # of what is still to be written
            self._file.close()


class RowTable:
    """A table with a given number of rows, whose shape and dtype are those of the first batch; a context manager.

    Parameters
    ----------
    n : int
        Number of rows.
    memory, disk : int or None
        Bytes that the rows may take in memory, and in the folder of temporary files; None: the budgets of this machine.

    Raises
    ------
    OSError
        The rows exceed the memory, and the folder of temporary files has no room for them.
    """

    def __init__(self, n: int, memory: int | None = None, disk: int | None = None):
        self._n, self._filled = n, 0
        self._memory = memory_budget() if memory is None else memory
        self._disk = disk
        self._rows: np.ndarray | None = None
        self._file: RowFile | None = None

    def __enter__(self) -> RowTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.discard()

    def append(self, rows: np.ndarray) -> None:
        """Add the next rows (k, ...)."""
        if self._rows is None and self._file is None:
            self._begin(rows)
        if self._rows is not None:
            self._rows[self._filled : self._filled + len(rows)] = rows
        else:
            assert self._file is not None
            with self._explained(rows):
                self._file.append(rows)
        self._filled += len(rows)

    def finish(self) -> np.ndarray:
        """All rows, (n, ...)."""
        if self._file is None:
            assert self._rows is not None
            return self._rows
        return self._file.finish()

    def _begin(self, rows: np.ndarray) -> None:
        if rows[:1].nbytes * self._n <= self._memory:
            self._rows = np.empty((self._n, *rows.shape[1:]), rows.dtype)
            return
        with self._explained(rows):
            room = disk_budget() if self._disk is None else self._disk
            if rows[:1].nbytes * self._n > room:
                raise TemporaryFileError(errno.ENOSPC, f"of which they may take {amount(room)}")
            self._file = RowFile(rows.shape[1:], rows.dtype)

    @contextmanager
    def _explained(self, rows: np.ndarray) -> Iterator[None]:
        try:
            yield
        except TemporaryFileError as error:
            size, folder = amount(rows[:1].nbytes * self._n), tempfile.gettempdir()
            raise OSError(
                error.errno,
                f"The features of {self._n} images take {size}, more than the {amount(self._memory)} of memory meant "
                f"for them, and there is no room in the folder of temporary files, {folder} ({error.strerror})"
                ": make room, point TMPDIR elsewhere, or use fewer features (tangents=None) or fewer images.",
            ) from error


def copied_rows(*sources: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Some rows of each of several tables, one after the other, in memory if there is room, else in a temporary file.

    Parameters
    ----------
    *sources : (ndarray of shape (n, ...), ndarray of int)
        A table, which may be mapped from a file, and which of its rows.
    """
    with RowTable(sum(len(chosen) for _, chosen in sources)) as table:
        for rows, chosen in sources:
            for part in pieces(len(chosen), rows[:1].nbytes):
                table.append(rows[chosen[part]])
        return table.finish()


def amount(size: float) -> str:
    """A number of bytes as text, such as ``"3.2 GiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
