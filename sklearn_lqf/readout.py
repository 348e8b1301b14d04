"""What the head reads: the network's own features, and statistics of the activations of each stage.

Outputs are linear in the head's weights on them, so they belong to the linear model exactly, and give it what the
last layer has thrown away. Hides which axes of an activation are positions, how the statistics get into a traced
graph, and the scale of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .stages import channels_last

__all__ = ["Standardization", "Statistics", "add_readout", "fit_standardization"]

_VARIANCE_FLOOR = 1e-5  # as in BatchNorm: the standard deviation of a constant channel has no derivative
_FEATURES_MAX = 8192  # of all parts together: the head's factor is a square matrix of this size


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
class Standardization:
    """Features less their mean, each part over one scale: ``(x - shift) / scale``, both (D,).

    One scale for all features of a part keeps their proportions, which carry meaning.
    """

    shift: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.shift) / self.scale


def fit_standardization(features: Tensor, weights: Tensor, sizes: Sequence[int]) -> Standardization:
    """Mean 0, and mean squared norm 1 of each part.

    Parameters
    ----------
    features : Tensor of shape (n, D)
    weights : Tensor of shape (n,)
        Not all zero.
    sizes : sequence of int
        Features of each part, D in all.
    """
    x = features.double()
    s = weights.double() / weights.double().sum()
    mean = s @ x
    parts = (s @ (x - mean).square()).split(list(sizes))
    # The variance of constant features is rounding.
    noise = 10 * torch.finfo(features.dtype).eps * float(x.abs().max())
    norms = [float(v.sum()) ** 0.5 for v in parts]
    scale = torch.cat([torch.full_like(v, n if n > noise else 1.0) for v, n in zip(parts, norms, strict=True)])
    return Standardization(mean.to(features), scale.to(features))


def add_readout(
    graph: fx.GraphModule, blocks: Sequence[fx.Node], values: dict[fx.Node, Any], example: Tensor
) -> list[int]:
    """Append the statistics of the outputs of blocks to the features that a graph returns, in place.

    Parameters
    ----------
    graph : fx.GraphModule
        Returns features (B, D).
    blocks : sequence of fx.Node
        The outputs of the stages, first stage first. Those without positions are passed over, and some of the
        others where their statistics would be too many, evenly.
    values : dict of fx.Node to value
        The value of every node for the example.
    example : Tensor of shape (B, ...)

    Returns
    -------
    list of int
        Features of each part: the network's own, then those of each block that is read.
    """
    *_, output = graph.graph.nodes
    source = cast(fx.Node, output.args[0])
    features = values[source]
    found = [(n, m) for n in blocks if (m := _statistics(values[n], features, example)) is not None]
    sizes = [m(values[n]).shape[1] for n, m in found]
    count = len(found)
    kept: list[int] = []
    while count:
        kept = [round((i + 1) * len(found) / count) - 1 for i in range(count)]  # evenly, up to the last
        if features.shape[1] + sum(sizes[i] for i in kept) <= _FEATURES_MAX:
            break
        count -= 1
    parts = [source]
    for i in kept[:count]:
        node, module = found[i]
        graph.add_submodule(f"_readout_{i}", module)
        with graph.graph.inserting_after(node):
            parts.append(graph.graph.call_module(f"_readout_{i}", (node,)))
    if len(parts) > 1:
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.cat, (tuple(parts), 1)),)
    return [features.shape[1], *(sizes[i] for i in kept[:count])]


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
