"""Jacobian products of a network at its pre-trained weights.

Hides how a network is differentiated: a dual walk over the traced graph that shares one primal evaluation
between tangents and gradients, or torch.func for networks that do not trace. Every Jacobian product of the
package is made here. Outside, parameters, directions and gradients are one flat vector (P,).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx, nn
from torch.func import functional_call, jacrev, vmap

from .graph import Split, _is_plain

__all__ = ["LinearizedNetwork", "Point"]

_aten = torch.ops.aten
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Elementwise activations: derivative times tangent, from torch's own backward kernels, as f(module, x, y, x_dot).
_ELEMENTWISE: dict[type, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
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
# Operations without parameters that are linear in their one tensor: the tangent goes the same way.
_LINEAR_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d)
_LINEAR_FUNCTIONS = {
    torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.chunk,
    operator.getitem, torch.nn.functional.adaptive_avg_pool2d, torch.nn.functional.avg_pool2d, torch.roll,
}  # fmt: skip
_LINEAR_METHODS = {
    "view", "reshape", "flatten", "permute", "transpose", "contiguous", "mean", "sum", "chunk", "squeeze",
    "unsqueeze", "expand",
}  # fmt: skip


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch off TF32 in matrix products and convolutions, and restore the caller's setting."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def _dual_call(function: Callable[..., Any], args: Any, tangents: Any) -> Any:
    """Tangent of ``function(*args)`` by forward-mode differentiation of this one operation.

    ``args`` and ``tangents`` are trees of the same shape; a tangent of None is zero.
    """
    with torch.no_grad(), fwAD.dual_level():
        flat, spec = torch.utils._pytree.tree_flatten(args)
        dots = torch.utils._pytree.tree_flatten(tangents, is_leaf=lambda t: t is None)[0]
        duals = [
            fwAD.make_dual(a.detach(), t.to(a.dtype)) if isinstance(t, Tensor) else a
            for a, t in zip(flat, dots, strict=True)
        ]
        out = function(*torch.utils._pytree.tree_unflatten(duals, spec))
        return torch.utils._pytree.tree_map_only(Tensor, lambda o: fwAD.unpack_dual(o).tangent, out)


class _TracedTail:
    """Primal and tangent walks over an ``fx.GraphModule``."""

    def __init__(self, module: fx.GraphModule, tangent: Sequence[str]):
        self.module = module
        self.tangent = set(tangent)
        self.nodes = list(module.graph.nodes)
        self.modules = {n.target: module.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        self.own = {  # tangent parameters of each called module, by their local name
            name: [local for local, _ in m.named_parameters() if f"{name}.{local}" in self.tangent]
            for name, m in self.modules.items()
        }

    def primal(self, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[fx.Node, Any]]:
        """Features (B, D) and the value of every node, with the graph for the backward pass."""
        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self.module)
            elif node.op == "output":
                return values[node.args[0]], values
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = self._function(node)(*args, **kwargs)
        raise RuntimeError("the graph has no output")

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.modules[node.target]
        if node.op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, node.target)(*args, **kwargs)
        return node.target

    def tangents(self, values: dict[fx.Node, Any], direction: dict[str, Tensor]) -> Tensor | None:
        """Tangent of the features along a direction of the parameters; None when it is zero."""
        dots: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "get_attr":
                    dots[node] = direction.get(node.target)
                elif node.op == "output":
                    return dots[node.args[0]]
                elif node.op == "placeholder" or not (
                    any(dots[n] is not None for n in node.all_input_nodes)
                    or (node.op == "call_module" and self.own[node.target])
                ):
                    dots[node] = None
                elif node.op == "call_module":
                    dots[node] = self._module_tangent(node, values, dots, direction)
                else:
                    dots[node] = self._function_tangent(node, values, dots)
        raise RuntimeError("the graph has no output")

    def _module_tangent(self, node: fx.Node, values: dict, dots: dict, direction: dict[str, Tensor]) -> Any:
        module, own = self.modules[node.target], self.own[node.target]
        if len(node.args) == 1 and not node.kwargs:
            x, x_dot = values[node.args[0]], dots[node.args[0]]
            if _is_plain(module, (nn.Linear, *_CONVS)):
                weight, bias = (direction.get(f"{node.target}.{p}") for p in ("weight", "bias"))
                return _affine_tangent(module, x, x_dot, weight, bias)
            if type(module) in _ELEMENTWISE:
                return _ELEMENTWISE[type(module)](module, x, values[node], x_dot)
            if isinstance(module, _LINEAR_MODULES):
                return module(x_dot)
        parameters = dict(module.named_parameters())

        def call(local: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
            return functional_call(module, local, args, kwargs)

        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        args_dot, kwargs_dot = _tree_of_tangents((node.args, node.kwargs), (args, kwargs), dots)
        return _dual_call(
            call,
            ({p: parameters[p] for p in own}, args, kwargs),
            ({p: direction.get(f"{node.target}.{p}") for p in own}, args_dot, kwargs_dot),
        )

    def _function_tangent(self, node: fx.Node, values: dict, dots: dict) -> Any:
        target = node.target
        linear = (node.op == "call_function" and target in _LINEAR_FUNCTIONS) or (
            node.op == "call_method" and target in _LINEAR_METHODS
        )
        if linear and node.args and isinstance(node.args[0], fx.Node) and _one_tangent(node, dots):
            rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda n: values[n])
            x_dot = dots[node.args[0]]
            if isinstance(x_dot, tuple | list):  # an element of a tuple of tangents
                return x_dot[rest[0]]
            return self._function(node)(x_dot, *rest, **kwargs)
        if target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
            pair = [dots[a] for a in node.args if isinstance(a, fx.Node)]
            if len(pair) == 2 and all(p is not None for p in pair):
                return pair[0] + pair[1]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        args_dot, kwargs_dot = _tree_of_tangents((node.args, node.kwargs), (args, kwargs), dots)
        function = self._function(node)
        return _dual_call(lambda a, k: function(*a, **k), (args, kwargs), (args_dot, kwargs_dot))

    def calls(self, values: dict[fx.Node, Any], name: str) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of each evaluation of a layer."""
        found = []
        for node in self.nodes:
            if node.op == "call_module" and node.target == name:
                source = node.args[0] if node.args else node.kwargs["input"]
                found.append((values[source], values[node]))
        return found


def _one_tangent(node: fx.Node, dots: dict[fx.Node, Any]) -> bool:
    """Whether only the first argument of a node carries a tangent."""
    return [n for n in node.all_input_nodes if dots[n] is not None] == [node.args[0]]


def _tree_of_tangents(nodes: Any, values: Any, dots: dict[fx.Node, Any]) -> Any:
    """Tangents in the shape of the values of a node's arguments; None where there is none."""

    def pair(node: Any, value: Any) -> Any:
        if isinstance(node, fx.Node):
            dot = dots[node]
            return dot if dot is not None else torch.utils._pytree.tree_map(lambda _: None, value)
        if isinstance(node, tuple | list):
            return type(value)(pair(n, v) for n, v in zip(node, value, strict=True))
        if isinstance(node, dict):
            return {k: pair(node[k], value[k]) for k in node}
        return torch.utils._pytree.tree_map(lambda _: None, value)

    return pair(nodes, values)


def _affine_tangent(
    module: nn.Module, x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Tangent of a Linear or convolution: W x_dot + W_dot x + b_dot."""

    def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return (
            nn.functional.linear(x, w, b) if isinstance(module, nn.Linear) else module._conv_forward(x, w, b)
        )

    terms = []
    if x_dot is not None:
        terms.append(apply(x_dot, module.weight, bias if weight is None else None))
    if weight is not None:
        terms.append(apply(x, weight, bias))
    if not terms:
        raise RuntimeError("a bias cannot be linearized without its weight or an input tangent")
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


class _GeneralTail:
    """The same walks through torch.func, for a network that does not trace."""

    def __init__(self, module: nn.Module, tangent: Sequence[str]):
        self.module = module
        self.tangent = list(tangent)

    def primal(self, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Features (B, D); the inputs and the evaluations of every layer are kept."""
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        hooks = [
            m.register_forward_hook(lambda _, args, out, n=n: calls.setdefault(n, []).append((args[0], out)))
            for n, m in self.module.named_modules()
            if _is_plain(m, (nn.Linear, *_CONVS))
        ]
        try:
            features = self.module(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return features, {"inputs": tuple(inputs), "calls": calls}

    def tangents(self, values: dict[str, Any], direction: dict[str, Tensor]) -> Tensor | None:
        if not direction:
            return None
        parameters = dict(self.module.named_parameters())
        return _dual_call(
            lambda p, x: functional_call(self.module, p, x),
            ({n: parameters[n] for n in self.tangent}, values["inputs"]),
            (direction, tuple(None for _ in values["inputs"])),
        )

    def calls(self, values: dict[str, Any], name: str) -> list[tuple[Tensor, Tensor]]:
        return values["calls"].get(name, [])


class Point:
    """A network linearized on one batch: the primal is evaluated once, products share it.

    Attributes
    ----------
    features : Tensor of shape (B, D)
        Input of the head at w0.
    outputs : Tensor of shape (B, C)
        f_w0, detached.
    """

    def __init__(self, network: LinearizedNetwork, inputs: Sequence[Tensor], gradients: bool):
        self._network = network
        with torch.set_grad_enabled(gradients):
            self._graph, self._values = network.tail.primal(inputs)
        self.features = self._graph.detach()
        self.outputs = torch.nn.functional.linear(self.features, network.weight, network.bias)

    def jvp(self, direction: Tensor) -> Tensor:
        """J d for a direction (P,): shape (B, C)."""
        net = self._network
        body, weight, bias = net.views(direction)
        out = torch.nn.functional.linear(self.features, weight, bias)
        dot = net.tail.tangents(self._values, body) if body else None
        return out if dot is None else out + torch.nn.functional.linear(dot, net.weight)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J' u for a cotangent (B, C): shape (P,). The graph is kept for further products."""
        net = self._network
        parts = []
        if net.parameters:
            if self._graph.requires_grad:
                grads = torch.autograd.grad(
                    self._graph, net.parameters, cotangent @ net.weight, retain_graph=True, allow_unused=True
                )
            else:
                grads = (None,) * len(net.parameters)
            parts = [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(grads, net.parameters, strict=True)
            ]
        return torch.cat([*parts, (cotangent.T @ self.features).reshape(-1), cotangent.sum(0)])

    def layer_calls(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of each evaluation of a layer of the tail."""
        return self._network.tail.calls(self._values, name)

    def output_gradients(self, outputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
        """Gradients of <u, f> with respect to the outputs of layers, in their shapes."""
        grads = torch.autograd.grad(
            self._graph, list(outputs), cotangent @ self._network.weight, retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True)]


class LinearizedNetwork:
    """f_lin(x; d) = f_w0(x) + J(x) d of a head on the features of a split network.

    Parameters
    ----------
    split : Split
        Trunk and tail; modules are used as they are and must not be shared.
    weight : Tensor of shape (C, D)
        Head weight at which the network is linearized.
    bias : Tensor of shape (C,)

    Attributes
    ----------
    n_parameters : int
        P: tangent parameters of the tail in the order of ``names``, then head weight, then head bias.
    slices : dict of str to slice
        Where each parameter lies in a flat vector; the head's are ``"head.weight"`` and ``"head.bias"``.

    References
    ----------
    Achille et al., "LQF: Linear Quadratic Fine-Tuning", CVPR 2021, section 3 (arXiv 2012.11140).
    """

    def __init__(self, split: Split, weight: Tensor, bias: Tensor):
        self.trunk = split.trunk
        self.weight, self.bias = weight, bias
        owned = dict(split.tail.named_parameters())
        self.names = list(split.tangent)
        self.parameters = [owned[n].requires_grad_(True) for n in self.names]
        self.module = split.tail
        self.tail: _TracedTail | _GeneralTail = (
            _TracedTail(split.tail, self.names) if split.traced else _GeneralTail(split.tail, self.names)
        )
        self._shapes = [p.shape for p in self.parameters] + [weight.shape, bias.shape]
        offsets = [0, *itertools.accumulate(s.numel() for s in self._shapes)]
        keys = [*self.names, "head.weight", "head.bias"]
        self.slices = {k: slice(a, b) for k, (a, b) in zip(keys, itertools.pairwise(offsets), strict=True)}
        self.n_parameters = offsets[-1]

    def at(self, inputs: Sequence[Tensor], gradients: bool = True) -> Point:
        """Evaluate the tail on one batch of trunk activations; ``gradients=False`` saves memory when only
        tangents are asked for."""
        return Point(self, inputs, gradients)

    def views(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """A flat vector (P,) as tail parameters by name, head weight (C, D) and head bias (C,)."""
        pieces = [vector[s].view(shape) for s, shape in zip(self.slices.values(), self._shapes, strict=True)]
        return dict(zip(self.names, pieces[:-2], strict=True)), pieces[-2], pieces[-1]

    def kronecker_layers(self) -> dict[str, nn.Module]:
        """Linear and two-dimensional convolution layers whose weight is linearized, by name."""
        return {
            name: m
            for name, m in self.module.named_modules()
            if f"{name}.weight" in self.slices and _is_plain(m, (nn.Linear, nn.Conv2d))
        }

    def sample_jacobians(self, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Jacobians of each image's outputs with respect to some parameters of the tail.

        Returns
        -------
        dict of str to Tensor of shape (B, C, *parameter.shape)
        """
        chosen = {n: p.detach() for n, p in zip(self.names, self.parameters, strict=True) if n in set(names)}

        def outputs(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
            features = functional_call(self.module, parameters, tuple(r.unsqueeze(0) for r in row))
            return torch.nn.functional.linear(features, self.weight, self.bias).squeeze(0)

        return vmap(jacrev(outputs), in_dims=(None, *(0 for _ in inputs)))(chosen, *inputs)
