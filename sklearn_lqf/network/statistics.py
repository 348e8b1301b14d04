"""Statistics of the inputs of the layers of a network: mean and standard deviation over the positions.

They are features beside the last ones, with information that the last features have lost. The mean of the input of a
layer is the gradient of the mean of its output with respect to a row of its weight, and needs no backward pass. This is
exact for Linear layers and 1 x 1 kernels; for wider kernels it neglects the borders and the stride. Hides which axes of
an activation are positions, and how the statistics get into a traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .stages import is_chosen

__all__ = ["LayerInput", "Part", "Statistics", "add_readout", "follows_batch", "layer_inputs"]

_LAYERS = {F.linear: True, F.conv2d: False}  # functions of layers, and whether their channels are the last axis
_VARIANCE_FLOOR = 1e-5  # as in BatchNorm: without it the deviation of a constant channel has no derivative


class Statistics(nn.Module):
    """Mean and standard deviation over the positions of an activation: (B, ...) -> (B, 2 channels).

    Parameters
    ----------
    last : bool
        Whether the channels are the last axis, as for Linear layers; else they are the second. An activation without
        positions, (B, channels), is returned unchanged.
    """

    def __init__(self, last: bool):
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x
        tokens = x.flatten(1, -2) if self.last else x.flatten(2).mT  # (B, T, channels)
        mean = tokens.mean(1, keepdim=True)
        centered = tokens - mean
        variance = torch.linalg.vecdot(centered, centered, dim=1) / tokens.shape[1]  # the fastest way on a CPU
        return torch.cat([mean.squeeze(1), (variance + _VARIANCE_FLOOR).sqrt()], 1)


@dataclass(frozen=True)
class Part:
    """A range of columns of the features, which belongs to one group.

    Attributes
    ----------
    name : str
        ``"last"``, or the name of the last module of a stage, a space, and ``"tangents"`` or ``"deviation"``.
    size : int
        Number of columns.
    """

    name: str
    size: int


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer of a traced network.

    Attributes
    ----------
    stage : str
        Name of the stage of the layer.
    layer : fx.Node
        Node of the layer.
    node : fx.Node
        Node of the input.
    last : bool
        Whether its channels are the last axis.
    """

    stage: str
    layer: fx.Node
    node: fx.Node
    last: bool


def follows_batch(value: Any, longer: Any) -> bool:
    """Whether a value has one row more if the batch has; a table of constants or rows of windows have not."""
    return isinstance(value, Tensor) and value.ndim > 0 and longer.shape == (len(value) + 1, *value.shape[1:])


def layer_inputs(graph: fx.GraphModule, stages: dict[str, list[str]]) -> list[LayerInput]:
    """The inputs of the layers of the stages, each once; layers may also be functions such as ``F.linear``."""
    found, seen = [], set()
    for node in graph.graph.nodes:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or source in seen or source.op == "placeholder":
            continue
        if node.op == "call_module":
            name, layer = str(node.target), graph.get_submodule(node.target)
            last = isinstance(layer, nn.Linear) if isinstance(layer, nn.Linear | nn.Conv2d) else None
        else:
            last = _LAYERS.get(node.target) if node.op == "call_function" else None
            name = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
        stage = next((s for s, blocks in stages.items() if is_chosen(f"{name}.", blocks)), None)
        if last is not None and stage is not None:
            found.append(LayerInput(stage, node, source, last))
            seen.add(source)
    return found


def add_readout(
    graph: fx.GraphModule, inputs: Sequence[LayerInput], values: dict[fx.Node, Any], example: Tensor
) -> list[Part]:
    """Append the statistics of the inputs of layers to the features that a graph returns, in place.

    Parameters
    ----------
    graph : fx.GraphModule
        Returns features (B, D).
    inputs : sequence of LayerInput
        Inputs that do not have one row for each image, such as windows, are skipped.
    values : dict of fx.Node to value
        Value of every node for the example.
    example : Tensor of shape (B, ...)

    Returns
    -------
    list of Part
        The network's own features, then those of each layer: means ("tangents"), and deviations if the input has
        positions.
    """
    *_, output = graph.graph.nodes
    source = cast(fx.Node, output.args[0])
    parts, nodes = [Part("last", values[source].shape[1])], [source]
    for i, found in enumerate(inputs):
        x = values[found.node]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) != len(example):
            continue
        graph.add_submodule(f"_readout_{i}", Statistics(found.last))
        with graph.graph.inserting_before(found.layer):  # an operation in place may have changed the input by then
            nodes.append(graph.graph.call_module(f"_readout_{i}", (found.node,)))
        channels = x.shape[-1 if found.last else 1]
        parts.append(Part(f"{found.stage} tangents", channels))
        if x.ndim > 2:
            parts.append(Part(f"{found.stage} deviation", channels))
    if len(nodes) > 1:
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.cat, (tuple(nodes), 1)),)
    return parts
