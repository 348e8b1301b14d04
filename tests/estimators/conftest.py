"""Fixtures of several tests of the estimators."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Of torch in each thread: those of the tests may be more than the cores, and rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
