"""Simplification of a traced graph: functional operations only, no operation without effect, BatchNorm folded.

Hides how operations in place are written, and which normalizations can be folded into the layer before them.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .cut import node_values
from .rewrite import BATCH_NORMS, CONVS, attention, is_plain
from .stages import is_chosen

__all__ = ["NotTracedError", "fold_batch_norms", "make_functional", "simplify"]

_Layer = TypeVar("_Layer", bound=nn.Module)


class NotTracedError(Exception):
    """A network cannot be traced, or its graph cannot be made functional; the message says why."""


def make_functional(graph: fx.GraphModule) -> None:
    """Replace operations in place by those that return a new tensor; later uses of their input use this tensor.

    Changes through a view of a tensor are not followed. The caller finds them by comparing the graph with the network.
    """
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in order:
        if node.op == "call_module":
            writes = getattr(graph.get_submodule(str(node.target)), "inplace", False)
        else:
            writes = node.op in ("call_function", "call_method") and _out_of_place(node)
        source = node.args[0] if node.args else None
        if writes and isinstance(source, fx.Node):
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
    for m in graph.modules():
        if getattr(m, "inplace", False):
            cast(Any, m).inplace = False


def _out_of_place(node: fx.Node) -> bool:
    """Make a function or method return a new tensor. Returns whether it wrote into its first argument before."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        owners = [Tensor] if isinstance(target, str) else [o for o in (F, torch) if getattr(o, name, None) is target]
        new = getattr(owners[0], name[:-1], None) if owners else None
        if not callable(new):
            raise NotTracedError(f"the operation {name!r} works in place")
        node.target = name[:-1] if isinstance(target, str) else new
        return True
    if getattr(target, "__module__", None) != F.__name__ or isinstance(target, str):
        return False
    given = inspect.signature(target).bind(*node.args, **node.kwargs)
    writes = bool(given.arguments.get("inplace"))
    if writes:
        given.arguments["inplace"] = False
        node.args, node.kwargs = given.args, given.kwargs
    return writes


def simplify(graph: fx.GraphModule) -> None:
    """Remove assertions and operations without effect in evaluation mode; replace fused attention by its formula."""
    for node in list(graph.graph.nodes):
        target = node.target
        if node.op == "call_module":
            nothing = type(graph.get_submodule(target)) is nn.Identity
        else:
            nothing = target is F.dropout or getattr(target, "__name__", "") == "stochastic_depth"
        if nothing:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            graph.graph.erase_node(node)
        elif target is torch._assert:
            graph.graph.erase_node(node)
        elif target is F.scaled_dot_product_attention:
            node.target = attention


def fold_batch_norms(graph: fx.GraphModule, example: Tensor, prefixes: list[str] | None) -> int:
    """Fold each BatchNorm that is the only user of a convolution or Linear layer. Returns how many were folded.

    A BatchNorm that is to be linearized is folded only if the layer before it is linearized, too.
    """
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not node.args or not is_plain(graph.get_submodule(node.target), BATCH_NORMS):
            continue
        source = node.args[0]
        once = targets.count(source.target) == targets.count(node.target) == 1 and len(source.users) == 1
        if source.op != "call_module" or not once:
            continue
        if is_chosen(f"{node.target}.", prefixes) and not is_chosen(f"{source.target}.", prefixes):
            continue
        layer = graph.get_submodule(source.target)
        norm = cast(nn.modules.batchnorm._BatchNorm, graph.get_submodule(node.target))
        if not is_plain(layer, (*CONVS, nn.Linear)) or norm.running_mean is None:
            continue
        # On tokens (B, T, F) a Linear has its channels last, and BatchNorm normalizes the second axis.
        if isinstance(layer, nn.Linear) and node_values(graph, example)[source].ndim != 2:
            continue
        graph.set_submodule(source.target, _fused(layer, norm, norm.running_mean.dtype))
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
        folded += 1
    return folded


def _fused(layer: _Layer, norm: nn.modules.batchnorm._BatchNorm, dtype: torch.dtype) -> nn.Module:
    """The layer with the normalization in its weight and bias, computed in float64."""
    layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm).to(dtype)
    return fuse_conv_bn_eval(cast(nn.Conv2d, layer), norm).to(dtype)
