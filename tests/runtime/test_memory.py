"""Budgets of memory, and work that is done again in smaller batches."""

import os
import tempfile

import pytest
import torch

from sklearn_lqf.runtime.memory import (
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
        if size > 2:
            raise error
        return 10 * size

    assert with_smaller_batches(work, 9) == 20
    assert tried == [9, 4, 2]


def test_another_error_is_raised_at_once():
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        with_smaller_batches(work, 4)
    assert tried == [4]
