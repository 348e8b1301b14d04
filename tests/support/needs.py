"""What older supported versions of libraries lack: there, tests that need it are skipped."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import fx, nn


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


@functools.cache
def _forward_mode_is_exported() -> bool:
    class Doubled(nn.Module):
        def forward(self, x):
            with torch.no_grad(), fwAD.dual_level():
                return fwAD.unpack_dual(2 * fwAD.make_dual(x, x)).tangent

    try:
        torch.export.export(Doubled(), (torch.ones(2),), strict=False).module()(torch.ones(2))
    except RuntimeError:
        return False
    return True


def needs_export_of_forward_mode() -> None:
    """Skip where torch.export knows no forward-mode derivatives, as in torch 2.6: networks with LayerNorm stay here."""
    if not _forward_mode_is_exported():
        pytest.skip("this torch exports no forward-mode derivatives")
