"""Evaluation of the tail of a network, its tangents (forward mode) and its gradients (reverse mode).

Hides how a network is differentiated. A traced graph is walked node by node, with rules for the tangents of common
layers; a network that does not trace is differentiated by torch.func. All products share one evaluation of the network.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..runtime.arithmetic import DUAL_NUMBERS
from .activations import ELEMENTWISE, SATURATING, LeakyClamp, leaky_clamp_tangent
from .depthwise import is_wide_depthwise, weight_gradient
from .rewrite import CONVS, StaticPad, is_plain, plain_attention
from .statistics import Statistics

__all__ = ["GeneralTail", "TracedTail"]

# Operations without parameters that are linear in their only tensor: the same operation maps the tangent.
_LINEAR_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, StaticPad)
_LINEAR_FUNCTIONS = {
    torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.chunk,
    operator.getitem, torch.nn.functional.adaptive_avg_pool2d, torch.nn.functional.avg_pool2d, torch.roll,
}  # fmt: skip
_LINEAR_METHODS = {
    "reshape", "flatten", "permute", "transpose", "contiguous", "mean", "sum", "chunk", "squeeze",
    "unsqueeze", "expand", "unflatten", "unbind",
}  # fmt: skip


def _load_formulas() -> None:
    """Make torch compile its forward-mode formulas, whose first use warns about torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fwAD.dual_level():
            fwAD.make_dual(torch.zeros(1), torch.zeros(1))


_load_formulas()


def _dual_call(function: Callable[..., Any], args: tuple, dots: Sequence[Tensor | None]) -> Any:
    """Tangent of ``function(*args)`` by forward-mode differentiation of this single operation.

    ``args`` is a tree (pytree), and ``dots`` has a tangent for each of its leaves. None is a tangent of zero.
    """
    leaves, spec = pytree.tree_flatten(args)
    with DUAL_NUMBERS:
        try:
            with torch.no_grad(), fwAD.dual_level():
                duals = [leaf if dot is None else _dual(leaf, dot) for leaf, dot in zip(leaves, dots, strict=True)]
                out = function(*pytree.tree_unflatten(duals, spec))
                if isinstance(out, Tensor):
                    return fwAD.unpack_dual(out).tangent
                return pytree.tree_map(lambda o: fwAD.unpack_dual(o).tangent if isinstance(o, Tensor) else None, out)
        except RuntimeError as error:
            if not _is_of_forward_mode(error):
                raise
            return _double_vjp(lambda parts: function(*pytree.tree_unflatten(parts, spec)), leaves, dots)


def _is_of_forward_mode(error: RuntimeError) -> bool:
    """Whether an error says that there is no forward-mode derivative (until torch 2.13 also that of group_norm)."""
    return isinstance(error, NotImplementedError) or "view size is not compatible" in str(error)


def _dual(leaf: Tensor, dot: Tensor) -> Any:
    expanded = 0 in leaf.stride()  # several elements in one place: torch refuses it
    return fwAD.make_dual(leaf.detach().clone() if expanded else leaf.detach(), dot.to(leaf.dtype))


def _double_vjp(function: Callable[[list], Any], leaves: list, dots: Sequence[Tensor | None]) -> Any:
    """J t as the gradient of <J' u, t> with respect to u, by two reverse passes; for any differentiable operation."""
    with torch.enable_grad():
        inputs = [
            leaf.detach().requires_grad_(dot is not None) if isinstance(leaf, Tensor) else leaf
            for leaf, dot in zip(leaves, dots, strict=True)
        ]
        outputs, spec = pytree.tree_flatten(function(list(inputs)))
        moved = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        cotangents = [torch.zeros_like(o, requires_grad=True) for o in moved]
        pairs = [(x, dot) for x, dot in zip(inputs, dots, strict=True) if dot is not None]
        gradients = torch.autograd.grad(
            moved, [x for x, _ in pairs], cotangents, create_graph=True, materialize_grads=True
        )
        total = sum(((g * dot).sum() for g, (_, dot) in zip(gradients, pairs, strict=True)), torch.zeros(()))
        tangents = iter(torch.autograd.grad(total, cotangents, materialize_grads=True))
    return pytree.tree_unflatten(
        [next(tangents) if isinstance(o, Tensor) and o.requires_grad else None for o in outputs], spec
    )


def _flat_tangents(argument: Any, value: Any, dots: dict[fx.Node, Any]) -> list[Tensor | None]:
    """Tangents for the leaves of ``value``, the evaluated argument of a node; None for those without a tangent."""
    if isinstance(argument, fx.Node) and dots[argument] is not None:
        return pytree.tree_leaves(dots[argument])
    if isinstance(argument, tuple | list):
        return [t for a, v in zip(argument, value, strict=True) for t in _flat_tangents(a, v, dots)]
    if isinstance(argument, dict):
        return [t for key in argument for t in _flat_tangents(argument[key], value[key], dots)]
    return [None] * len(pytree.tree_leaves(value))


def _has_tensor(value: Any) -> bool:
    """Whether a value can have a tangent, unlike a shape, an index or a mask."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, tuple | list | dict) and any(map(_has_tensor, pytree.tree_leaves(value)))


class TracedTail:
    """Evaluation and derivatives of a traced tail, an ``fx.GraphModule``."""

    def __init__(self, module: fx.GraphModule, tangent: Sequence[str]):
        self.module = module
        self.tangent = set(tangent)
        *self.nodes, output = module.graph.nodes
        self.output = cast(fx.Node, output.args[0])
        self.modules = {str(n.target): module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self.own = {  # tangent parameters of each called module, by their local name
            name: [local for local, _ in m.named_parameters() if f"{name}.{local}" in self.tangent]
            for name, m in self.modules.items()
        }
        self.rules = {name: rule for name, m in self.modules.items() if (rule := _rule(m)) is not None}
        self.wide = {  # layers whose weight gradients are computed from the gradients of their outputs
            name: cast(nn.Conv2d, m)
            for name, m in self.layers().items()
            if self.own[name] and is_plain(m, (nn.Conv2d,)) and is_wide_depthwise(cast(nn.Conv2d, m))
        }
        last = {used: node for node in self.nodes for used in node.all_input_nodes if used is not self.output}
        self.done: dict[fx.Node, list[fx.Node]] = {}  # by node, the values that no later node needs
        for used, node in last.items():
            self.done.setdefault(node, []).append(used)
        called = [n for n in self.nodes if n.op == "call_module" and self.own[str(n.target)]]
        # Parameters are swapped while tangents are computed; during this no other thread may evaluate these modules.
        self._turn: Any = nullcontext() if all(map(self._has_rule, called)) else DUAL_NUMBERS

    def primal(self, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[fx.Node, Any]]:
        """Features (B, D) and the value of every node, with autograd's graph for backward passes."""
        values: dict[fx.Node, Any] = {}
        feed = iter(inputs)
        with self._turn:
            for node in self.nodes:
                if node.op == "placeholder":
                    values[node] = next(feed)
                elif node.op == "get_attr":
                    values[node] = operator.attrgetter(str(node.target))(self.module)
                else:
                    args, kwargs = _evaluated(node, values)
                    values[node] = self._function(node)(*args, **kwargs)
        return values[self.output], values

    def _has_rule(self, node: fx.Node) -> bool:
        return str(node.target) in self.rules and len(node.args) == 1 and not node.kwargs

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if callable(node.target):
            return node.target
        name = node.target
        if node.op == "call_module":
            return self.modules[name]
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)

    def tangents(self, values: dict[fx.Node, Any], direction: dict[str, Tensor]) -> Tensor | None:
        """Tangent of the features (B, D) along a direction of the parameters; None if it is zero."""
        with torch.no_grad():
            return self.walk(values, direction)

    def walk(self, values: dict[fx.Node, Any], direction: dict[str, Tensor]) -> Tensor | None:
        """The same without a change of autograd's mode, which would become a node of an exported program."""
        dots: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                dots[node] = direction.get(str(node.target))
            elif not (self._depends(node, dots) and _has_tensor(values[node])):
                dots[node] = None
            elif node.op == "call_module":
                dots[node] = self._module_tangent(node, values, dots, direction)
            else:
                dots[node] = self._function_tangent(node, values, dots)
            for used in self.done.get(node, ()):
                del dots[used]
        return dots[self.output]

    def _depends(self, node: fx.Node, dots: dict[fx.Node, Any]) -> bool:
        own = node.op == "call_module" and self.own[str(node.target)]
        return bool(own) or any(dots[n] is not None for n in node.all_input_nodes)

    def _module_tangent(self, node: fx.Node, values: dict, dots: dict, direction: dict[str, Tensor]) -> Any:
        name = str(node.target)
        module, own = self.modules[name], self.own[name]
        if self._has_rule(node):
            source = cast(fx.Node, node.args[0])
            weight, bias = (direction.get(f"{name}.{p}") for p in ("weight", "bias")) if own else (None, None)
            return self.rules[name](module, values[source], values[node], dots[source], weight, bias)
        with DUAL_NUMBERS:
            parameters = dict(module.named_parameters())

        def call(local: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
            return functional_call(module, local, args, kwargs)

        args, kwargs = _evaluated(node, values)
        own_dots = [direction.get(f"{name}.{p}") for p in own]
        with plain_attention():
            return _dual_call(
                call,
                ({p: parameters[p] for p in own}, args, kwargs),
                own_dots + _flat_tangents((node.args, node.kwargs), (args, kwargs), dots),
            )

    def _function_tangent(self, node: fx.Node, values: dict, dots: dict) -> Any:
        target = node.target
        linear = (node.op == "call_function" and target in _LINEAR_FUNCTIONS) or (
            node.op == "call_method" and target in _LINEAR_METHODS
        )
        args, kwargs = _evaluated(node, values)
        if linear and node.args and _one_tangent(node, dots):
            x_dot = dots[cast(fx.Node, node.args[0])]
            if isinstance(x_dot, tuple | list):  # an element of a tuple of tangents
                return x_dot[args[1]]
            return self._function(node)(x_dot, *args[1:], **kwargs)
        if target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
            pair = [dots[a] for a in node.args if isinstance(a, fx.Node)]
            if len(pair) == 2 and all(p is not None for p in pair):
                return pair[0] + pair[1]
        if target is torch.cat and len(node.args) == 2 and isinstance(node.args[0], tuple | list):
            moved = zip(node.args[0], args[0], strict=True)  # values without a tangent have a tangent of zero
            dim = cast(int, args[1])
            return torch.cat([torch.zeros_like(v) if dots[n] is None else dots[n] for n, v in moved], dim)
        function = self._function(node)
        return _dual_call(
            lambda a, k: function(*a, **k),
            (args, kwargs),
            _flat_tangents((node.args, node.kwargs), (args, kwargs), dots),
        )

    def gradients(
        self, features: Tensor, values: dict[fx.Node, Any], cotangent: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Gradients of <u, features> with respect to parameters, by name; parts of one gradient may come separately."""
        calls = [(name, *pair) for name in self.wide for pair in self.calls(values, name)]
        apart = {f"{name}.{p}" for name in self.wide for p in self.own[name]}
        direct = {n: p for n, p in parameters.items() if n not in apart}
        wanted = [*direct.values(), *(out for _, _, out in calls)]
        found = torch.autograd.grad(features, wanted, cotangent, retain_graph=True, allow_unused=True)
        yield from _present(direct, found[: len(direct)])
        for (name, x, _), gradient in zip(calls, found[len(direct) :], strict=True):
            if gradient is not None and "weight" in self.own[name]:
                yield f"{name}.weight", weight_gradient(self.wide[name], x.detach(), gradient)
            if gradient is not None and "bias" in self.own[name]:
                yield f"{name}.bias", gradient.sum((0, 2, 3))

    def layers(self) -> dict[str, nn.Module]:
        """The modules that are evaluated and whose parameters are used nowhere else, by name."""
        read = {str(n.target).rpartition(".")[0] for n in self.nodes if n.op == "get_attr"}
        return {name: m for name, m in self.modules.items() if name not in read}

    def calls(self, values: dict[fx.Node, Any], name: str) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of each evaluation of a layer."""
        found = []
        for node in self.nodes:
            if node.op == "call_module" and node.target == name:
                source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
                found.append((values[source], values[node]))
        return found


def _present(names: Iterable[str], gradients: Iterable[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The gradients that exist, those of parameters that the output depends on, with their names."""
    return ((name, g) for name, g in zip(names, gradients, strict=True) if g is not None)


def _evaluated(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a node, with nodes replaced by their values."""
    return fx.map_arg((node.args, node.kwargs), lambda n: values[n])


def _one_tangent(node: fx.Node, dots: dict[fx.Node, Any]) -> bool:
    """Whether the first argument of a node has a tangent, and no other argument has."""
    return [n for n in node.all_input_nodes if dots[n] is not None] == [node.args[0]]


# f(module, x, y, x_dot, weight_dot, bias_dot): tangent of a layer of one input.
_Rule = Callable[[Any, Tensor, Tensor, Any, Any, Any], Tensor]


def _rule(module: nn.Module) -> _Rule | None:
    """The rule for the tangent of a layer; None if it needs forward-mode differentiation."""
    if not is_plain(module, (type(module),)):
        return None
    if is_plain(module, (nn.Linear, *CONVS)):
        return _affine_tangent
    if type(module) in ELEMENTWISE:
        derivative = ELEMENTWISE[type(module)]
        return lambda m, x, y, x_dot, *_: derivative(m, x, y, x_dot)
    if type(module) is LeakyClamp and type(module.base) in SATURATING:
        return lambda m, x, y, x_dot, *_: leaky_clamp_tangent(m, x, y, x_dot)
    if is_plain(module, _LINEAR_MODULES):
        return lambda m, x, y, x_dot, *_: m(x_dot)
    return None


def _affine_tangent(
    module: nn.Module, x: Tensor, _: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Tangent of a Linear or convolution: W x_dot + W_dot x + b_dot."""

    def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if isinstance(module, nn.Linear):
            return nn.functional.linear(x, w, b)
        return cast(nn.Conv2d, module)._conv_forward(x, w, b)

    terms = []
    if x_dot is not None:
        terms.append(apply(x_dot, cast(Tensor, module.weight), bias if weight is None else None))
    if weight is not None:
        terms.append(apply(x, weight, bias))
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


class GeneralTail:
    """Evaluation and derivatives of a network that does not trace, by torch.func.

    ``read`` names layers, and says whether their channels are the last axis. The statistics of their inputs are
    appended to the features.
    """

    def __init__(self, module: nn.Module, tangent: Sequence[str], read: Sequence[tuple[str, bool]] = ()):
        self.module = module
        self.tangent = list(tangent)
        self.read = list(read)

    def primal(self, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Features and statistics (B, D), and the values that are kept: the inputs, and the calls of every layer."""
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        statistics: dict[str, Tensor] = {}
        last = dict(self.read)

        # A later operation may change the input and the output in place.
        def see(name: str, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            calls.setdefault(name, []).append((x, out))
            if name in last and name not in statistics:
                statistics[name] = Statistics(last[name])(x)
            return out.clone()

        with DUAL_NUMBERS:  # as in TracedTail
            hooks = [
                m.register_forward_hook(
                    lambda _, args, kwargs, out, name=name: see(name, args, kwargs, out), with_kwargs=True
                )
                for name, m in self.module.named_modules()
                if is_plain(m, (nn.Linear, *CONVS))
            ]
            try:
                features = self.module(*(x.clone() for x in inputs))  # it may change its input in place
            finally:
                for hook in hooks:
                    hook.remove()
        values = {"inputs": tuple(inputs), "calls": calls, "last": features}
        if missing := [name for name in last if name not in statistics]:
            raise ValueError(
                f"The backbone evaluates its layers {missing[:3]} for some images only, so that their inputs cannot be "
                "features: set tangents='network' or None, or pass a module that evaluates the same layers for all."
            )
        return torch.cat([features, *(statistics[name] for name in last)], 1), values

    def tangents(self, values: dict[str, Any], direction: dict[str, Tensor]) -> Tensor | None:
        """Tangent of the features along a direction of the parameters."""
        with DUAL_NUMBERS:
            parameters = dict(self.module.named_parameters())
        inputs = values["inputs"]
        with plain_attention():
            return _dual_call(
                lambda p, x: functional_call(self.module, p, x),
                ({n: parameters[n] for n in self.tangent}, tuple(x.clone() for x in inputs)),
                [*(direction[n] for n in self.tangent), *(None for _ in inputs)],
            )

    def gradients(
        self, features: Tensor, values: dict[str, Any], cotangent: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Gradients of <u, features> with respect to parameters, by name."""
        wanted = list(parameters.values())
        found = torch.autograd.grad(features, wanted, cotangent, retain_graph=True, allow_unused=True)
        return _present(parameters, found)

    def layers(self) -> dict[str, nn.Module]:
        """The modules that may be evaluated, by name."""
        # torch's attention uses the weight of its projection without calling it.
        silent = {id(m.out_proj) for m in self.module.modules() if isinstance(m, nn.MultiheadAttention)}
        return {name: m for name, m in self.module.named_modules() if id(m) not in silent}

    def calls(self, values: dict[str, Any], name: str) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of each evaluation of a layer."""
        return values["calls"].get(name, [])
