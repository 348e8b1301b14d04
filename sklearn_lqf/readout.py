"""Statistics of the activations behind each stage, beside the network's own features.

Outputs are linear in the weights on them, so they belong to the linear model exactly, and give it what the last layer
has thrown away. Hides which axes of an activation are positions, and how the statistics get into a traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .stages import channels_last

__all__ = ["Part", "PositionMean", "Statistics", "add_readout"]

_VARIANCE_FLOOR = 1e-5  # as in BatchNorm: the standard deviation of a constant channel has no derivative
_FEATURES_MAX = 8192  # of all parts together: solutions for many images take a square matrix of this size


class PositionMean(nn.Module):
    """Mean over the positions of an activation: (B, ...) -> (B, channels).

    Parameters
    ----------
    axes : sequence of int
        Axes of the positions; none of a vector.
    """

    def __init__(self, axes: Sequence[int]):
        super().__init__()
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes) if self.axes else x


class Statistics(nn.Module):
    """Mean and standard deviation over the positions of an activation: (B, ...) -> (B, 2 channels).

    Parameters
    ----------
    axes : sequence of int
        Axes of the positions.
    mean : bool
        False leaves the means out: (B, channels).
    """

    def __init__(self, axes: Sequence[int], mean: bool = True):
        super().__init__()
        self.axes, self.mean = tuple(axes), mean
        self._channels = 1 if 1 not in axes else -1

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.axes, keepdim=True)
        std = ((x - mean).square().mean(self.axes) + _VARIANCE_FLOOR).sqrt()  # faster here than torch.var_mean
        return torch.cat([mean.squeeze(self.axes), std], 1) if self.mean else std

    def tangent(self, x: Tensor, y: Tensor, x_dot: Tensor) -> Tensor:
        """Derivative along a tangent of the activation x with statistics y."""
        std = y[:, -x.shape[self._channels] :]
        std_dot = ((x - x.mean(self.axes, keepdim=True)) * x_dot).mean(self.axes) / std
        return torch.cat([x_dot.mean(self.axes), std_dot], 1) if self.mean else std_dot


@dataclass(frozen=True)
class Part:
    """Columns of the features that are read together.

    Attributes
    ----------
    name : str
        ``"last"``, or the last module of a stage and ``"mean"``, ``"deviation"`` or ``"tangents"``.
    size : int
    """

    name: str
    size: int


def add_readout(
    graph: fx.GraphModule,
    blocks: dict[str, fx.Node],
    inputs: Sequence[tuple[str, fx.Node, bool]],
    values: dict[fx.Node, Any],
    example: Tensor,
) -> list[Part]:
    """Append what is read of the stages to the features that a graph returns, in place.

    Of the outputs of blocks mean and deviation over the positions; of the inputs of layers the mean, which is the
    gradient of the mean of the layer's output by its weight: a tangent feature that needs no backward pass.

    Parameters
    ----------
    graph : fx.GraphModule
        Returns features (B, D).
    blocks : dict of str to fx.Node
        The outputs of the stages by name, first stage first. Those without positions are passed over, and some of the
        others where their statistics would be too many, evenly.
    inputs : sequence of (str, fx.Node, bool)
        The inputs of layers: name of the stage, and whether the channels come last.
    values : dict of fx.Node to value
        The value of every node for the example.
    example : Tensor of shape (B, ...)

    Returns
    -------
    list of Part
        The network's own features, then those of each block that is read, then those of each layer.
    """
    *_, output = graph.graph.nodes
    source = cast(fx.Node, output.args[0])
    features = values[source]
    found = [(k, n, m) for k, n in blocks.items() if (m := _statistics(values[n], features, example)) is not None]
    sizes = [m(values[n]).shape[1] for _, n, m in found]
    count = len(found)
    kept: list[int] = []
    while count:
        kept = [round((i + 1) * len(found) / count) - 1 for i in range(count)]  # evenly, up to the last
        if features.shape[1] + sum(sizes[i] for i in kept) <= _FEATURES_MAX:
            break
        count -= 1
    parts, nodes = [Part("last", features.shape[1])], [source]
    for i in kept[:count]:
        name, node, module = found[i]
        graph.add_submodule(f"_readout_{i}", module)
        with graph.graph.inserting_after(node):
            nodes.append(graph.graph.call_module(f"_readout_{i}", (node,)))
        statistics = ("mean", "deviation") if module.mean else ("deviation",)
        parts += [Part(f"{name} {statistic}", sizes[i] // len(statistics)) for statistic in statistics]
    for i, (name, node, last) in enumerate(inputs):
        x = values[node]
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != len(example):  # such as windows of images
            continue
        axes = range(1, x.ndim - 1) if last else range(2, x.ndim)
        graph.add_submodule(f"_input_{i}", PositionMean(list(axes)))
        with graph.graph.inserting_after(node):
            nodes.append(graph.graph.call_module(f"_input_{i}", (node,)))
        parts.append(Part(f"{name} tangents", x.shape[-1 if last else 1]))
    if len(nodes) > 1:
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.cat, (tuple(nodes), 1)),)
    return parts


def _statistics(activation: Tensor, features: Tensor, example: Tensor) -> Statistics | None:
    """The statistics of an activation (B, ...); None when it has no positions."""
    if not isinstance(activation, Tensor) or activation.ndim not in (3, 4):
        return None
    axes: tuple[int, ...] = (1,)  # tokens (B, T, channels)
    if activation.ndim == 4:
        axes = (1, 2) if channels_last(activation.shape, example) else (2, 3)
    if all(activation.shape[a] == 1 for a in axes):
        return None
    mean = activation.mean(axes)
    known = mean.shape == features.shape and torch.allclose(mean, features, rtol=1e-4, atol=1e-5)
    return Statistics(axes, mean=not known)
