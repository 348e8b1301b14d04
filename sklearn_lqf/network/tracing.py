"""From a backbone to a frozen trunk and a tail that is linearized.

Hides torch.fx: tracing at one size of the images, operations in place, and which parameters are linearized. A network
that does not trace is kept whole.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..runtime.arithmetic import TRACING
from .activations import LeakyClamp, leaky, modularize_activations, swap_activations
from .cut import NoTrunk, cut, node_values
from .fold import NotTracedError, fold_batch_norms, make_functional, simplify
from .rewrite import BATCH_NORMS, Output, StaticPad, evaluate, make_explicit, plain_attention, replace_module
from .stages import find_stages, refuse_tied, tangent_names, tangent_prefixes
from .statistics import Part, Statistics, add_readout, follows_batch, layer_inputs
from .tails import GeneralTail

__all__ = ["Split", "split_network"]


@dataclass
class Split:
    """A network in two parts: ``tail(*trunk(x))`` are its last features and the statistics of its stages, (B, D).

    Attributes
    ----------
    trunk : nn.Module
        Frozen part, which maps inputs (B, ...) to a tuple of tensors, each (B, ...).
    tail : nn.Module
        The rest; an ``fx.GraphModule`` if the network traces, else the whole network.
    tangent : list of str
        Names of the parameters of ``tail`` that are linearized.
    parts : list of Part
        Parts of the features: the network's own, then those of the stages that are read.
    stages : dict of str to list of str
        Names of the modules of each stage, first stage first. A stage is named by its last module.
    read : list of (str, bool)
        For a network that does not trace: the layers whose inputs are read, and whether their channels are the last
        axis.
    traced : bool
        False if the network does not trace and torch.func differentiates it.
    folded, swapped : int
        Number of BatchNorms that were folded, and of calls of activations that were made leaky.
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
        """Name of the stage of a module; the last stage for modules that are in none."""
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
        Network without head, (B, ...) -> (B, D). It is copied, not changed.
    example : Tensor of shape (B, ...), B >= 2
        Input of the size in use; the network is specialized to this size, and converted to this dtype.
    tangent_layers : {"head", "all"}, int, str or list of str
        What is linearized: only the head, everything, this many last stages, or named modules.
    negative_slope : float
        Slope of the leak of piecewise activations; 0 leaves them unchanged.
    read_stages : bool
        Whether to append the statistics of the inputs of the layers of every stage, see `statistics.add_readout`.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        A layer is unknown, a weight that is linearized is tied, or the cut is in the middle of a block.

    Warns
    -----
    UserWarning
        The network cannot be traced, or nothing is read of some stages.
    """
    explicit = _private_copy(module, example.dtype)
    reference = evaluate(explicit, example)
    prefixes = tangent_prefixes(explicit, example, tangent_layers)
    refuse_tied(explicit, prefixes)
    with plain_attention():  # torch's fused encoder layer requires its own attention module
        stages = {stage[-1]: stage for stage in find_stages(explicit, example, by_width=True)}
    make_explicit(explicit, example)
    try:
        graph, parts = _traced(explicit, example, reference, stages if read_stages else {})
    except NotTracedError as reason:
        _warn_untraced(reason)
        whole = _private_copy(module, example.dtype)
        swapped = _prepare_untraced(whole, example, reference, negative_slope)
        last = [Part("last", reference.shape[1])]
        split = Split(NoTrunk().eval(), whole, tangent_names(whole, prefixes), last, stages, False, 0, swapped)
        return _checked(_with_inputs(split, example), read_stages) if read_stages else split
    modularize_activations(graph)
    folded = fold_batch_norms(graph, example, prefixes)
    swapped = swap_activations(graph, negative_slope)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    trunk, tail = cut(graph, tangent_names(graph, prefixes), example)
    split = Split(trunk, tail, tangent_names(tail, prefixes), parts, stages, True, folded, swapped)
    return _checked(split, read_stages)


def _checked(split: Split, read_stages: bool) -> Split:
    """The same split; a warning names stages of which nothing is read."""
    read = {part.name.rpartition(" ")[0] for part in split.parts}
    # The input of the first layer are the pixels, which are not read.
    left_out = [stage for i, stage in enumerate(split.stages) if stage not in read and i] if read_stages else []
    if read_stages and len(split.parts) == 1:
        warnings.warn(
            "Nothing is read of the stages of the backbone, only its last features: no layer was found in them whose "
            "input has one row for each image.",
            UserWarning,
            stacklevel=3,
        )
    elif left_out:
        warnings.warn(
            f"Nothing is read of {len(left_out)} of {len(split.stages)} stages of the backbone ({left_out[:3]}): their "
            "layers' inputs do not have one row for each image.",
            UserWarning,
            stacklevel=3,
        )
    return split


def _with_inputs(split: Split, example: Tensor) -> Split:
    """The split of an untraced network, with the statistics of the inputs of its layers at their first call."""
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
    """Whether two values are equal except for the rounding errors of another order of operations."""
    atol = 1e-4 * float(reference.abs().nan_to_num().max())
    return torch.allclose(value, reference, rtol=1e-3, atol=atol, equal_nan=True)


def _warn_untraced(reason: NotTracedError) -> None:
    warnings.warn(
        f"The backbone cannot be traced by torch.fx ({reason}). It is linearized as a whole "
        "through torch.func: exact, but slower, without folding BatchNorm and without caching a frozen trunk.",
        UserWarning,
        stacklevel=3,
    )


def _prepare_untraced(module: nn.Module, example: Tensor, reference: Tensor, slope: float) -> int:
    """Make the activation modules of a private copy leaky, in place. Returns how many were changed."""
    in_place: list[Any] = [m for m in module.modules() if getattr(m, "inplace", False)]
    for m in in_place:
        m.inplace = False
    agrees = _agree(evaluate(module, example), reference)
    for m in in_place:
        m.inplace = not agrees  # if they differ, the network relies on the changed input
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


# ------------------------------------------------------------------------------------------------------ trace


class _Proxy(fx.Proxy):
    """Placeholder of a value during tracing, whose shape and other properties are those of the examples."""

    tracer: _Tracer

    def __getattr__(self, k: str) -> Any:
        values = self.tracer.values.get(self.node)
        value = None if values is None else values[0]
        if isinstance(value, Tensor) and hasattr(value, k) and not callable(getattr(value, k)):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __len__(self) -> int:
        one, other = (len(value) for value in self.tracer.values.get(self.node, ((), (0,))))
        if one != other:
            raise fx.proxy.TraceError("the length of a value is that of the batch")
        return one


class _Tracer(fx.Tracer):
    """A tracer for one size of the images: values that do not change with the number of images become constants.

    During tracing every operation is also evaluated for two batches. The values decide which way control flow goes. The
    tracer traces into all modules that timm does not declare opaque, and into torch's encoder layer.

    Attributes
    ----------
    values : dict of fx.Node to (value, value)
        Values for the examples, and for the examples with one row more.
    """

    def __init__(self, example: Tensor, leaves: tuple[type, ...], functions: tuple[Callable, ...]):
        super().__init__(autowrap_functions=functions)
        self.leaves = leaves
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        self._examples = (example.clone(), torch.cat([example, example[:1]]))
        self._thread = threading.get_ident()
        self._evaluates = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        values = self._values(made.node)
        if values is None:
            return made
        self.values[made.node] = values
        return self._constant(made, *values)

    def _values(self, node: fx.Node) -> tuple[Any, Any] | None:
        """The values of a node for both batches; None if they cannot be computed."""
        if node.op == "placeholder":
            return self._examples
        for other in node.all_input_nodes:
            if other.op == "get_attr" and other not in self.values:  # a constant, which has no proxy
                self.values[other] = (self._value(other, 0), self._value(other, 1))
        if node.op == "output" or any(n not in self.values for n in node.all_input_nodes):
            return None
        self._evaluates = True
        try:
            with torch.no_grad():
                return self._value(node, 0), self._value(node, 1)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):
            return None  # the network itself may never evaluate this operation
        finally:
            self._evaluates = False

    def _value(self, node: fx.Node, which: int) -> Any:
        if node.op == "get_attr":
            found: Any = self.root
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return found
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n][which])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Callable, node.target)(*args, **kwargs)

    def _constant(self, made: Any, one: Any, other: Any) -> Any:
        """The value itself if it is not a tensor and equal for both batches; in a shape, the sizes that are equal."""
        if isinstance(one, bool | int | float | str | torch.dtype | None) and type(one) is type(other) and one == other:
            return one
        if isinstance(one, torch.Size) and len(one) == len(other):
            return tuple(a if a == b else cast(Any, made)[i] for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return made

    def to_bool(self, obj: fx.Proxy) -> bool:
        one, other = self.values.get(obj.node, (None, None))
        if isinstance(one, bool) and one is other:
            return one
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator:
        one, other = self.values.get(obj.node, (None, None))
        if isinstance(one, Tensor | tuple | list) and len(one) == len(other):
            return (cast(Any, obj)[i] for i in range(len(one)))
        return super().iter(obj)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._evaluates or threading.get_ident() != self._thread:  # torch.fx intercepts modules in all threads
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._evaluates or threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*self.leaves, *BATCH_NORMS, LeakyClamp, StaticPad, Statistics)):
            return True
        opaque = super().is_leaf_module(m, module_qualified_name)
        return opaque and type(m) is not nn.TransformerEncoderLayer


def _traced(
    module: nn.Module, example: Tensor, reference: Tensor, stages: dict[str, list[str]]
) -> tuple[fx.GraphModule, list[Part]]:
    """A graph that computes the same as the network; modules that timm declares opaque stay so only if necessary."""
    opaque: list[tuple[tuple, tuple]] = [((), ())]
    if any(type(m).__module__.startswith("timm.") for m in module.modules()):
        from timm.models import get_notrace_functions, get_notrace_modules

        opaque.append((tuple(get_notrace_modules()), tuple(get_notrace_functions())))
    reasons = []
    for leaves, functions in opaque:
        try:
            graph, parts = _trace(module, example, stages, leaves, functions)
            found = evaluate(graph, example)
        except (NotTracedError, ValueError) as reason:
            traced = isinstance(reason, ValueError)
            reasons.append(NotTracedError("the traced graph cannot be evaluated") if traced else reason)
            continue
        if _agree(found[:, : reference.shape[1]], reference):
            return graph, parts
        reasons.append(NotTracedError("the traced graph computes something else"))
    raise reasons[-1]


def _trace(
    module: nn.Module,
    example: Tensor,
    stages: dict[str, list[str]],
    leaves: tuple[type, ...],
    functions: tuple[Callable, ...],
) -> tuple[fx.GraphModule, list[Part]]:
    """The graph of a network in evaluation mode, without assertions, dropout and operations in place.

    Statistics of the layers of the stages are appended to its features. Returns the graph and the parts of its
    features.
    """
    root = module if isinstance(module, Output) else Output(module)  # with one argument
    tracer = _Tracer(example, leaves, functions)
    try:
        with TRACING, plain_attention():  # the choice of a fused kernel depends on the input
            graph = fx.GraphModule(root, tracer.trace(root))
            values, longer = ({node: pair[k] for node, pair in tracer.values.items()} for k in (0, 1))
            if any(node not in values for node in graph.graph.nodes if node.op != "output"):
                values, longer = node_values(graph, example), node_values(graph, torch.cat([example, example[:1]]))
    except Exception as error:  # the network's own code may raise anything when it gets placeholders for values
        raise NotTracedError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    *_, last = graph.graph.nodes
    if not isinstance(last.args[0], fx.Node) or not isinstance(values.get(last.args[0]), Tensor):
        raise NotTracedError("the traced graph returns no tensor")
    inputs = [i for i in layer_inputs(graph, stages) if follows_batch(values[i.node], longer[i.node])]
    parts = add_readout(graph, inputs, values, example)
    for kept in (tracer.values, values, longer):  # they are large, and a tracer may live on
        kept.clear()
    make_functional(graph)
    _take_any_layout(graph)
    simplify(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, parts


def _take_any_layout(graph: fx.GraphModule) -> None:
    """Views of another shape become ``reshape``, in place: of tensors with the channels last torch may have none."""
    for node in graph.graph.nodes:
        if node.op == "call_method" and node.target == "view" and torch.dtype not in map(type, node.args):
            node.target = "reshape"
            node.kwargs = {{"size": "shape"}.get(name, name): value for name, value in node.kwargs.items()}
