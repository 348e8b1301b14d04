"""What older supported versions of libraries lack: there, tests that need it are skipped."""

import functools

import pytest
import torch
from torch import fx


@functools.cache
def _sizes_are_arguments() -> bool:
    try:
        fx.symbolic_trace(lambda x: torch.arange(x.shape[0]))
    except TypeError:
        return False
    return True


def needs_sizes_as_arguments() -> None:
    """Skip where functions of torch refuse traced sizes, as in torch 2.6: networks that pass them stay untraced."""
    if not _sizes_are_arguments():
        pytest.skip("functions of this torch refuse sizes that are being traced")
