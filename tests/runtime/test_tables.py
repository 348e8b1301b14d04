"""Rows in memory or in a temporary file."""

import errno
import os
import tempfile

import numpy as np
import pytest

from sklearn_lqf.runtime import tables
from sklearn_lqf.runtime.tables import RowTable, amount, copied_rows

ROWS = np.arange(44, dtype=np.float32).reshape(11, 2, 2)


def filled(memory: int, disk: int | None = None) -> np.ndarray:
    with RowTable(len(ROWS), memory, disk) as table:
        for start in range(0, len(ROWS), 4):
            table.append(ROWS[start : start + 4].transpose(0, 2, 1))  # in another order of memory
        return table.finish()


@pytest.mark.parametrize("memory", [ROWS.nbytes, ROWS.nbytes - 1], ids=["in memory", "in a file"])
def test_all_rows_come_back(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = filled(memory)
    np.testing.assert_array_equal(found, ROWS.transpose(0, 2, 1))
    assert type(found) is np.ndarray and found.dtype == ROWS.dtype
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("memory", [ROWS.nbytes, 0])
def test_some_rows_of_several_tables(monkeypatch, memory):
    monkeypatch.setattr(tables, "memory_budget", lambda: memory)
    chosen = np.array([7, 0, 7, 10])
    found = copied_rows((ROWS, chosen), (filled(0), np.arange(2)), (ROWS, chosen[:0]))
    np.testing.assert_array_equal(found, np.concatenate([ROWS[chosen], ROWS.transpose(0, 2, 1)[:2]]))
    found[0] = 0  # a copy
    assert ROWS[7].all()


class FullDisk:
    closed = False

    def __init__(self, prefix): ...

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        FullDisk.closed = True


def test_no_room_is_an_error_that_says_what_to_do(monkeypatch):
    with pytest.raises(
        OSError, match=r"11 images take 176 bytes, more than the 8 bytes.*take 99 bytes.*TMPDIR"
    ) as caught:
        filled(8, disk=99)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(OSError, match=r"11 images take 176 bytes.*No space left.*tangents=None") as caught:
        filled(8)
    assert caught.value.errno == errno.ENOSPC and FullDisk.closed


@pytest.mark.parametrize(("size", "text"), [(12, "12 bytes"), (3 << 20, "3 MiB"), (5 << 31, "10.0 GiB")])
def test_amounts(size, text):
    assert amount(size) == text
