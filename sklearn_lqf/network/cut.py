"""The cut of a traced network into a trunk, which is evaluated once for each image, and a tail, which is linearized.

Hides which values cross the cut. Activations with one row for each image are cached, values that do not depend on the
images become constants, and sizes follow the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["NoTrunk", "cut", "node_values"]


def node_values(graph: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    """The value of every node of a graph."""
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.env


class NoTrunk(nn.Module):
    """The trunk of a network that is linearized as a whole: it returns its input."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def cut(graph: fx.GraphModule, tangent: Collection[str], example: Tensor) -> tuple[nn.Module, fx.GraphModule]:
    """Split a graph into the nodes that depend on a tangent parameter, and those before.

    Parameters
    ----------
    graph : fx.GraphModule
        The parts share its modules.
    tangent : collection of str
        Names of the parameters that are linearized.
    example : Tensor of shape (B, ...), B >= 2

    Returns
    -------
    trunk : nn.Module
        Maps inputs (B, ...) to a tuple of the tensors that cross the cut, each (B, ...).
    tail : fx.GraphModule
        Maps these tensors to the output of ``graph``.

    Raises
    ------
    ValueError
        A value that crosses the cut has neither one row for each image nor is a constant.
    """
    later = _dependent(graph, set(tangent))
    crossing = [n for n in graph.graph.nodes if n not in later and any(u in later for u in n.users)]
    values = _Values(graph, example)
    # If nothing is linearized, only the features cross, which have one row for each image.
    cached = [n for n in crossing if not tangent or values.batched(n)]
    tail = _tail(graph, later, crossing, cached, values)
    if len(cached) == 1 and cached[0].op == "placeholder":
        return NoTrunk().eval(), tail
    return _trunk(graph, later, cached), tail


def _dependent(graph: fx.GraphModule, tangent: set[str]) -> set[fx.Node]:
    """Nodes whose value changes with a tangent parameter, and the output."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            own = node.target in tangent
        elif node.op == "call_module":
            names = (f"{node.target}.{n}" for n, _ in graph.get_submodule(node.target).named_parameters())
            own = any(n in tangent for n in names)
        else:
            own = node.op == "output"
        if own or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


class _Values:
    """The value of every node for two batches, which shows how it depends on the batch.

    The graph is evaluated when a value is first needed.
    """

    def __init__(self, graph: fx.GraphModule, example: Tensor):
        self.size = example.shape[0]
        self._graph, self._example = graph, example

    @cached_property
    def _first(self) -> dict[fx.Node, Any]:
        return node_values(self._graph, self._example)

    @cached_property
    def _longer(self) -> dict[fx.Node, Any]:
        # The added row differs from the others, so that reductions over the batch change.
        return node_values(self._graph, torch.cat([self._example, -self._example[:1]]))

    def of(self, node: fx.Node) -> tuple[Any, Any]:
        """Value for B rows and for B + 1 rows."""
        return self._first[node], self._longer[node]

    def batched(self, node: fx.Node) -> bool:
        """Whether a value is a tensor with one row for each image; False for constants."""
        value, longer = self.of(node)
        if not isinstance(value, Tensor) or torch.equal(value, longer):
            return False
        rows = self.size
        if value.ndim and value.shape[0] == rows and longer.shape == (rows + 1, *value.shape[1:]):
            return True
        raise ValueError(
            "tangent_layers cuts the network where an activation does not have one row for each image "
            f"(shape {tuple(value.shape)} for {rows} images): choose whole blocks, or 'all'."
        )


def _tail(
    graph: fx.GraphModule,
    later: set[fx.Node],
    crossing: list[fx.Node],
    cached: list[fx.Node],
    values: _Values,
) -> fx.GraphModule:
    tail = fx.Graph()
    new: dict[fx.Node, Any] = {n: tail.placeholder(f"cached_{i}") for i, n in enumerate(cached)}
    constants: dict[str, Tensor] = {}
    sizes = _Sizes(tail, new[cached[0]] if cached else None, values.size)
    for node in crossing:
        if node in new:
            continue
        value, longer = values.of(node)
        if isinstance(value, Tensor):
            name = f"_constant_{node.name}"
            constants[name] = value.detach().clone()
            new[node] = tail.get_attr(name)
        else:
            new[node] = sizes.follow(value, longer, node.name)
    attributes: dict[str, Any] = {}
    for node in graph.graph.nodes:
        if node in later:
            new[node] = tail.node_copy(node, lambda n: new[n])
            if node.op in ("call_module", "get_attr"):
                attributes[node.target] = operator.attrgetter(node.target)(graph)
    root = fx.GraphModule(attributes | constants, tail).eval()
    for name, constant in constants.items():  # as buffers, they move to a device with the module
        delattr(root, name)
        root.register_buffer(name, constant)
    root.graph.eliminate_dead_code()
    root.recompile()
    return root


class _Sizes:
    """Rewrites sizes and devices that cross the cut as constants, or as the batch size and the device in the tail."""

    def __init__(self, tail: fx.Graph, cached: fx.Node | None, rows: int):
        self._tail, self._cached, self._rows = tail, cached, rows

    def follow(self, value: Any, longer: Any, name: str) -> Any:
        """The value of a node, from those for B and for B + 1 rows."""
        if isinstance(value, tuple | list):
            return tuple(self.follow(a, b, name) for a, b in zip(value, longer, strict=True))
        if isinstance(value, torch.device) and self._cached is not None:
            return self._tail.call_function(getattr, (self._cached, "device"))
        if value == longer:
            return value
        if value == self._rows and longer == self._rows + 1 and self._cached is not None:
            return self._tail.call_method("size", (self._cached, 0))
        raise ValueError(f"tangent_layers cuts the network at {name!r}, whose value cannot be cached ({value!r}).")


def _trunk(graph: fx.GraphModule, later: set[fx.Node], cached: list[fx.Node]) -> nn.Module:
    first = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node not in later:
            new[node] = first.node_copy(node, lambda n: new[n])
    first.output(tuple(new[n] for n in cached))
    trunk = fx.GraphModule(graph, first).eval()
    trunk.graph.eliminate_dead_code()
    trunk.delete_all_unused_submodules()
    trunk.recompile()
    return trunk.requires_grad_(False)
