"""Budgets of memory, and work that is done again in smaller batches."""

import os
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sklearn_lqf.runtime.memory import (
    Recent,
    device_budget,
    disk_budget,
    machine_memory,
    memory_budget,
    pieces,
    with_smaller_batches,
)


def test_memory_of_machine_and_container(monkeypatch, tmp_path):
    whole = machine_memory(tmp_path / "absent")
    assert whole > 1 << 28
    (tmp_path / "limit").write_text("1000000\n")
    assert machine_memory(tmp_path / "limit") == 1000000
    (tmp_path / "limit").write_text("max\n")
    assert machine_memory(tmp_path / "limit") == whole
    assert 0 < memory_budget() <= whole / 4
    monkeypatch.delattr(os, "sysconf")
    assert machine_memory(tmp_path / "absent") >= 1 << 30


def test_room_elsewhere(monkeypatch):
    assert device_budget(torch.device("cpu")) == 0
    assert disk_budget() > 0

    def absent() -> str:
        raise FileNotFoundError("No folder")

    monkeypatch.setattr(tempfile, "gettempdir", absent)
    assert disk_budget() == 0


@pytest.mark.parametrize(
    ("count", "row_bytes", "sizes"), [(7, 10, [3, 3, 1]), (2, 1, [2]), (2, 99, [1, 1]), (2, 0, [2]), (0, 1, [])]
)
def test_pieces(count, row_bytes, sizes):
    found = pieces(count, row_bytes, budget=30)
    assert [p.stop - p.start for p in found] == sizes
    assert [i for p in found for i in range(count)[p]] == list(range(count))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batches_are_halved(error):
    tried = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 1:
            raise error
        return 10 * size

    assert with_smaller_batches(work, 9) == 10
    assert tried == [9, 4, 2, 1]


def test_another_error_is_raised_at_once():
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        with_smaller_batches(work, 4)
    assert tried == [4]


def test_values_made_in_threads_leave_the_warnings_as_they_were():
    recent, before = Recent(2), warnings.filters[:]
    within, within_both, done = (threading.Event() for _ in range(3))

    def first() -> int:
        within.set()
        within_both.wait(0.3)  # in vain, since threads take turns
        return 1

    def second() -> int:
        within_both.set()
        done.wait(5)
        return 2

    with ThreadPoolExecutor() as threads:
        one = threads.submit(recent.get, "a", first)
        assert within.wait(5)
        other = threads.submit(recent.get, "b", second)
        assert one.result() == 1
        done.set()
        assert other.result() == 2
    assert warnings.filters == before
