"""Leaky forms of piecewise activations, and derivatives of activations.

Hides in how many ways an activation can be written (module, function, method) and what its leaky form is. ReLU becomes
Leaky-ReLU. Saturating activations keep their values between their bounds and get a slope outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = [
    "ELEMENTWISE", "SATURATING", "LeakyClamp", "leaky", "leaky_clamp_tangent", "modularize_activations",
    "swap_activations",
]  # fmt: skip


class LeakyClamp(nn.Module):
    """A saturating activation plus a leak: ``base(x) + leak * (x - clamp(x, low, high))``.

    Leaves ``base`` unchanged on ``[low, high]`` and adds a slope where its derivative is zero.

    Parameters
    ----------
    base : nn.Module
    low, high : float
        Bounds between which the activation is not flat.
    leak : float
        Slope that is added outside the bounds.
    """

    def __init__(self, base: nn.Module, low: float, high: float, leak: float):
        super().__init__()
        self.base, self.low, self.high, self.leak = base, low, high, leak

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.leak * (x - x.clamp(self.low, self.high))


# Bounds between which saturating activations are not flat, and their mean slope there: (low, high, gain).
_SATURATING: dict[type, tuple[float, float, float]] = {
    nn.Hardswish: (-3.0, float("inf"), 1.0),
    nn.Hardsigmoid: (-3.0, 3.0, 1.0 / 6.0),
}

# Functions and methods -> the module that computes the same, so that later passes see one form only. The
# signatures are those of torch. Operations in place were made functional before.
_MODULES: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
}


def leaky(activation: nn.Module, slope: float) -> nn.Module | None:
    """The leaky form of a piecewise linear or saturating activation; None for other modules.

    Parameters
    ----------
    activation : nn.Module
    slope : float
        Slope where the activation is flat, relative to its slope elsewhere.
    """
    kind = type(activation)
    if kind is nn.ReLU:
        return nn.LeakyReLU(slope)
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return LeakyClamp(activation, activation.min_val, activation.max_val, slope)
    if kind in _SATURATING:
        low, high, gain = _SATURATING[kind]
        return LeakyClamp(activation, low, high, slope * gain)
    return None


def modularize_activations(graph: fx.GraphModule) -> None:
    """Rewrite functional and method activations as modules, in place."""
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _MODULES:
            continue
        name = f"_activation_{node.name}"
        kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
        graph.add_submodule(name, _MODULES[node.target](*node.args[1:], **kwargs).eval())
        source = node.args[0] if node.args else node.kwargs["input"]
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (source,))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def swap_activations(graph: fx.GraphModule, slope: float) -> int:
    """Make ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid leaky, in place.

    Parameters
    ----------
    graph : fx.GraphModule
    slope : float
        0 changes nothing.

    Returns
    -------
    int
        Number of calls that were changed; a module that is called twice counts twice.
    """
    if not slope:
        return 0
    swapped = 0
    targets = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    for name in set(targets):
        new = leaky(graph.get_submodule(name), slope)
        if new is not None:
            graph.set_submodule(name, new.eval())
            swapped += targets.count(name)
    return swapped


# -------------------------------------------------------------------------------------------- derivatives

_aten = torch.ops.aten

# f(module, x, y, x_dot): the derivative of an elementwise activation y(x), times the tangent of x.
Elementwise = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

# These are torch's own backward kernels, so that tangents and gradients use the same derivative to the last bit.
ELEMENTWISE: dict[type, Elementwise] = {
    nn.ReLU: lambda m, x, y, t: _aten.threshold_backward(t, y, 0),
    nn.LeakyReLU: lambda m, x, y, t: _aten.leaky_relu_backward(t, x, m.negative_slope, False),
    nn.ReLU6: lambda m, x, y, t: _aten.hardtanh_backward(t, x, 0.0, 6.0),
    nn.Hardtanh: lambda m, x, y, t: _aten.hardtanh_backward(t, x, m.min_val, m.max_val),
    nn.Hardswish: lambda m, x, y, t: _aten.hardswish_backward(t, x),
    nn.Hardsigmoid: lambda m, x, y, t: _aten.hardsigmoid_backward(t, x),
    nn.SiLU: lambda m, x, y, t: _aten.silu_backward(t, x),
    nn.GELU: lambda m, x, y, t: _aten.gelu_backward(t, x, approximate=m.approximate),
    nn.Sigmoid: lambda m, x, y, t: _aten.sigmoid_backward(t, y),
    nn.Tanh: lambda m, x, y, t: _aten.tanh_backward(t, y),
}
SATURATING = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)


def leaky_clamp_tangent(m: LeakyClamp, x: Tensor, y: Tensor, x_dot: Tensor) -> Tensor:
    """Tangent of a saturating activation with a leak; the kernels of its base depend on x only."""
    inside = ELEMENTWISE[type(m.base)](m.base, x, y, x_dot)
    return inside.add_(x_dot * ((x < m.low) | (x > m.high)), alpha=m.leak)
