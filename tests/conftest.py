"""For every test: none asks for a GPU where there is none, and none leaves a global flag changed."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

# Before any test imports matplotlib, and for the processes that tests start: figures without a display.
os.environ["MPLBACKEND"] = "Agg"


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return partial(getattr, owner, name), partial(setattr, owner, name)


# Global state of torch: name, how to read it, how to put it back.
_FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.get_num_threads()": (torch.get_num_threads, torch.set_num_threads),
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.get_default_dtype()": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.are_deterministic_algorithms_enabled()": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.backends.cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "torch.backends.cudnn.allow_tf32": _attribute(torch.backends.cudnn, "allow_tf32"),
    "torch.backends.cuda.matmul.allow_tf32": _attribute(torch.backends.cuda.matmul, "allow_tf32"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def torch_flags_unchanged():
    """Fail the test that leaves a flag changed, and put the flag back for those that follow."""
    before = {name: read() for name, (read, _) in _FLAGS.items()}
    yield
    changed = {}
    for name, (read, write) in _FLAGS.items():
        if (after := read()) != before[name]:
            changed[name] = f"{before[name]} became {after}"
            write(before[name])
    assert not changed, f"the test left torch's global flags changed: {changed}"


@pytest.fixture
def global_generators_unchanged():
    """No test may move a global generator, whatever it loads; those that build networks fork first."""
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_equal(np.random.get_state(), numpy_before)  # noqa: NPY002
