"""From a backbone to a frozen trunk and a tangent tail.

Hides torch.fx: tracing, operations in place, folding BatchNorm, leaky activations, and which parameters are
linearized. A network that does not trace is kept whole.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..runtime.threads import TRACING
from .activations import LeakyClamp, leaky, modularize_activations, swap_activations
from .cut import NoTrunk, cut, node_values
from .rewrite import (
    BATCH_NORMS,
    CONVS,
    StaticPad,
    attention,
    evaluate,
    is_plain,
    make_explicit,
    plain_attention,
    replace_module,
)
from .stages import find_head, find_stages, remove_head, tangent_prefixes
from .statistics import LayerInput, Part, Statistics, add_readout
from .tails import GeneralTail

__all__ = ["Split", "find_head", "remove_head", "split_network"]

_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass
class Split:
    """A network in two parts: ``tail(*trunk(x))`` are its last features and what is read of its stages, (B, D).

    Attributes
    ----------
    trunk : nn.Module
        Frozen part, (B, ...) -> tuple of tensors, each with the batch first.
    tail : nn.Module
        The rest; an ``fx.GraphModule`` when the network traces, else the whole network.
    tangent : list of str
        Names of the parameters of ``tail`` that are linearized.
    parts : list of Part
        Of the features: the network's own, then those of the stages that are read.
    stages : dict of str to list of str
        Names of the modules of each stage, first stage first, by that of the last of them.
    read : list of (str, bool)
        Of a network that does not trace, the layers whose inputs are read, and whether their channels come last.
    traced : bool
        False when the network does not trace and torch.func serves.
    folded, swapped : int
        BatchNorms folded; activation calls made leaky.
    """

    trunk: nn.Module
    tail: nn.Module
    tangent: list[str]
    parts: list[Part]
    stages: dict[str, list[str]] = field(default_factory=dict)
    traced: bool = True
    folded: int = 0
    swapped: int = 0
    read: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def n_features(self) -> int:
        """D."""
        return sum(part.size for part in self.parts)

    def stage_of(self, name: str) -> str:
        """The stage of a module, by its name; the last one for modules that are in none."""
        for stage, blocks in self.stages.items():
            if any(name == block or name.startswith(f"{block}.") for block in blocks):
                return stage
        return next(reversed(self.stages), "network")


def split_network(
    module: nn.Module,
    example: Tensor,
    tangent_layers: Any = 2,
    negative_slope: float = 0.0,
    read_stages: bool = False,
) -> Split:
    """Prepare a feature extractor for linearization.

    Parameters
    ----------
    module : nn.Module
        Network without head, (B, ...) -> (B, D). A copy is worked on.
    example : Tensor of shape (B, ...), B >= 2
        Input of the size in use; the network is specialized to this size, and converted to this dtype.
    tangent_layers : {"head", "all"}, int, str or list of str
        What is linearized: nothing but the head, all, this many last stages, or named modules.
    negative_slope : float
        Slope of the leak of piecewise activations; 0 leaves them as they are.
    read_stages : bool
        Append the statistics of the inputs of the layers of every stage to the features, see `readout`.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        Unknown layers, tied weights, a cut through the middle of a block.

    Warns
    -----
    UserWarning
        When the network cannot be traced.
    """
    explicit = _private_copy(module, example.dtype)
    reference = evaluate(explicit, example)
    prefixes = tangent_prefixes(explicit, example, tangent_layers)
    _refuse_tied(explicit, prefixes)
    with plain_attention():  # torch's fused encoder layer looks for its own attention module
        stages = {stage[-1]: stage for stage in find_stages(explicit, example, by_width=True)}
    try:
        make_explicit(explicit, example)
        graph, parts = _trace(explicit, example, stages if read_stages else {})
        if not _agree(evaluate(graph, example)[:, : reference.shape[1]], reference):
            raise RuntimeError("the traced graph computes something else")
    except Exception as error:  # whatever tracing raises, the general engine serves
        _warn_untraced(error)
        whole = _private_copy(module, example.dtype)
        swapped = _prepare_untraced(whole, example, reference, negative_slope)
        split = Split(
            NoTrunk().eval(), whole, _tangent_names(whole, prefixes), [Part("last", reference.shape[1])], stages, False,
            0, swapped,
        )  # fmt: skip
        return _with_inputs(split, example) if read_stages else split
    modularize_activations(graph)
    folded = _fold_batch_norms(graph, example, prefixes)
    swapped = swap_activations(graph, negative_slope)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    trunk, tail = cut(graph, _tangent_names(graph, prefixes), example)
    return Split(trunk, tail, _tangent_names(tail, prefixes), parts, stages, True, folded, swapped)


def _with_inputs(split: Split, example: Tensor) -> Split:
    """The same untraced network with the statistics of the inputs of its layers, each at its first call."""
    tail = GeneralTail(split.tail, split.tangent)
    with torch.no_grad(), plain_attention():
        _, few = tail.primal([example])
        _, more = tail.primal([torch.cat([example, example[:1]])])
    parts, read, seen = list(split.parts), [], set[int]()
    for name, calls in few["calls"].items():
        layer, x = split.tail.get_submodule(name), calls[0][0]
        longer = more["calls"].get(name, calls)[0][0]
        grows = x.ndim > 1 and len(x) == len(example) and len(longer) == len(example) + 1
        if not grows or not isinstance(layer, nn.Linear | nn.Conv2d) or id(x) in seen or torch.equal(x, example):
            continue
        seen.add(id(x))
        last = isinstance(layer, nn.Linear)
        read.append((name, last))
        channels, stage = x.shape[-1 if last else 1], split.stage_of(name)
        parts.append(Part(f"{stage} tangents", channels))
        if x.ndim > 2:
            parts.append(Part(f"{stage} deviation", channels))
    return replace(split, parts=parts, read=read)


def _private_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype).eval().requires_grad_(False)


def _agree(value: Tensor, reference: Tensor) -> bool:
    """Equal up to the rounding of another order of operations."""
    atol = 1e-4 * float(reference.abs().nan_to_num().max())
    return torch.allclose(value, reference, rtol=1e-3, atol=atol, equal_nan=True)


def _warn_untraced(error: Exception) -> None:
    warnings.warn(
        f"The backbone cannot be traced by torch.fx ({type(error).__name__}: {error}). It is linearized as a whole "
        "through torch.func: exact, but slower, without folding BatchNorm and without caching a frozen trunk.",
        UserWarning,
        stacklevel=3,
    )


def _prepare_untraced(module: nn.Module, example: Tensor, reference: Tensor, slope: float) -> int:
    """Make the activation modules of a private copy leaky, in place; how many were changed."""
    in_place = [m for m in module.modules() if getattr(m, "inplace", False)]
    _set_in_place(in_place, False)
    if not _agree(evaluate(module, example), reference):
        _set_in_place(in_place, True)  # the network uses the input that was changed
    swapped = 0
    for name, m in list(module.named_modules()):
        new = leaky(m, slope) if slope and name else None
        if new is None:
            continue
        if getattr(m, "inplace", False):
            raise ValueError(
                f"The activation {name!r} works in place, and the backbone relies on it: it cannot be made "
                "leaky. Set negative_slope=0."
            )
        replace_module(module, name, new)
        swapped += 1
    return swapped


def _set_in_place(modules: list[Any], value: bool) -> None:
    for m in modules:
        m.inplace = value


# ------------------------------------------------------------------------------------------------- parameters


def _owned_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the first name of their module; tied parameters come several times."""
    for prefix, m in module.named_modules():
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{prefix}.{name}" if prefix else name), p


def _chosen(name: str, prefixes: list[str] | None) -> bool:
    return prefixes is None or any(name.startswith(f"{prefix}.") for prefix in prefixes)


def _tangent_names(module: nn.Module, prefixes: list[str] | None) -> list[str]:
    """Names of the parameters that are linearized."""
    return [name for name, _ in _owned_parameters(module) if _chosen(name, prefixes)]


def _refuse_tied(module: nn.Module, prefixes: list[str] | None) -> None:
    """Raise when a parameter to linearize is used under two names, chosen or not."""
    owners: dict[int, str] = {}
    for name, p in _owned_parameters(module):
        other = owners.setdefault(id(p), name)
        if other != name and (_chosen(name, prefixes) or _chosen(other, prefixes)):
            raise ValueError(
                f"Parameters {other!r} and {name!r} are tied (one tensor). Tied weights cannot be linearized "
                "apart: untie them, or choose tangent_layers that leave them in the frozen trunk."
            )


# ------------------------------------------------------------------------------------------------------ trace


class _Tracer(fx.Tracer):
    """Sees through what timm does not declare opaque, and through torch's encoder layer."""

    def __init__(self, leaves: tuple[type, ...], functions: tuple[Callable, ...]):
        super().__init__(autowrap_functions=functions)
        self.leaves = leaves
        self.outputs: dict[str, Any] = {}  # of every module that was called, by name
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:  # torch.fx sees the modules of all threads
            return forward(*args, **kwargs)
        out = super().call_module(m, forward, args, kwargs)
        self.outputs[self.path_of_module(m)] = out
        return out

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*self.leaves, *BATCH_NORMS, LeakyClamp, StaticPad, Statistics)):
            return True
        opaque = super().is_leaf_module(m, module_qualified_name)
        return opaque and type(m) is not nn.TransformerEncoderLayer


def _trace(module: nn.Module, example: Tensor, stages: dict[str, list[str]]) -> tuple[fx.GraphModule, list[Part]]:
    """The graph of a network in evaluation mode, without assertions, dropout and operations in place.

    What is read of the layers of stages is appended to its features; these parts are returned, too.
    """
    leaves: tuple[type, ...] = ()
    functions: tuple[Callable, ...] = ()
    if any(type(m).__module__.startswith("timm.") for m in module.modules()):
        from timm.models import get_notrace_functions, get_notrace_modules

        leaves, functions = tuple(get_notrace_modules()), tuple(get_notrace_functions())
    with TRACING, plain_attention():  # the choice of a fused kernel depends on the input
        tracer = _Tracer(leaves, functions)
        graph = fx.GraphModule(module, tracer.trace(module))
    inputs, values = _layer_inputs(graph, stages), node_values(graph, example)
    if inputs:
        longer = node_values(graph, torch.cat([example, example[:1]]))
        inputs = [i for i in inputs if _follows_batch(values[i.node], longer[i.node])]
    parts = add_readout(graph, inputs, values, example)
    _make_functional(graph)
    _simplify(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, parts


def _layer_inputs(graph: fx.GraphModule, stages: dict[str, list[str]]) -> list[LayerInput]:
    """The inputs of the layers of the stages, each once."""
    found, seen = [], set()
    for node in graph.graph.nodes:
        if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        layer, source = graph.get_submodule(node.target), node.args[0]
        stage = next((s for s, blocks in stages.items() if _chosen(f"{node.target}.", blocks)), None)
        if stage is None or source in seen or source.op == "placeholder":
            continue
        if is_plain(layer, (nn.Linear, nn.Conv2d)):
            found.append(LayerInput(stage, source, isinstance(layer, nn.Linear)))
            seen.add(source)
    return found


def _follows_batch(value: Any, longer: Any) -> bool:
    """Whether a value has one row more when the batch has; not so a table of constants, or rows of windows."""
    return isinstance(value, Tensor) and value.ndim > 0 and longer.shape == (len(value) + 1, *value.shape[1:])


def _make_functional(graph: fx.GraphModule) -> None:
    """Let every operation in place return a new tensor; what reads its input later reads this tensor.

    Changes through a view of a tensor are not followed; they are seen by comparing the graph with the network.
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
    """Let a function or method return a new tensor; whether it wrote into its first argument before."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        owners = [Tensor] if isinstance(target, str) else [o for o in (F, torch) if getattr(o, name, None) is target]
        new = getattr(owners[0], name[:-1], None) if owners else None
        if not callable(new):
            raise RuntimeError(f"the operation {name!r} works in place")
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


def _simplify(graph: fx.GraphModule) -> None:
    """Remove assertions, and what does nothing in evaluation mode; write attention by its formula."""
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


# ------------------------------------------------------------------------------------------------------- fold


def _fold_batch_norms(graph: fx.GraphModule, example: Tensor, prefixes: list[str] | None) -> int:
    """Fold each BatchNorm that is the only use of a convolution or Linear; how many were folded.

    One that is to be linearized stays unless its convolution is, too.
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
        if _chosen(f"{node.target}.", prefixes) and not _chosen(f"{source.target}.", prefixes):
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
