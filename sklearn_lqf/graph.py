"""From a backbone to a frozen trunk and a tangent tail.

Hides torch.fx: finding the head, the stages of a network, tracing, folding BatchNorm, leaky activations,
and the cut between what is evaluated once per image and what is linearized.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

__all__ = ["Attention", "LeakyClamp", "Split", "find_head", "remove_head", "split_network"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class LeakyClamp(nn.Module):
    """A saturating activation plus a leak: ``base(x) + slope * gain * (x - clamp(x, low, high))``.

    Leaves ``base`` unchanged on ``[low, high]`` and adds a slope where its derivative is zero.
    """

    def __init__(self, base: nn.Module, low: float, high: float, gain: float, slope: float):
        super().__init__()
        self.base, self.low, self.high = base, low, high
        self.leak = slope * gain

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.leak * (x - x.clamp(self.low, self.high))


class Attention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` written with Linear layers, which K-FAC can treat.

    The fused attention kernels have no forward-mode derivative; the plain formula has.
    """

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        dim, heads = source.embed_dim, source.num_heads
        if source.in_proj_weight is None or source.bias_k is not None or source.add_zero_attn:
            raise ValueError("only self-attention with one joint projection and no extra key is supported")
        self.heads, self.batch_first = heads, source.batch_first
        self.qkv = nn.Linear(dim, 3 * dim, bias=source.in_proj_bias is not None)
        self.qkv.weight = source.in_proj_weight
        if source.in_proj_bias is not None:
            self.qkv.bias = source.in_proj_bias
        self.proj = nn.Linear(dim, dim, bias=source.out_proj.bias is not None)
        self.proj.weight, self.proj.bias = source.out_proj.weight, source.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, **_: Any
    ) -> tuple:
        if key is not query or value is not query or need_weights:
            raise NotImplementedError("only self-attention without returned weights is supported")
        x = query if self.batch_first else query.transpose(0, 1)  # (B, T, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = _attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.proj(x)
        return (x if self.batch_first else x.transpose(0, 1)), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention by its formula (evaluation mode: dropout is ignored)."""
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = (
            logits.masked_fill(~attn_mask, float("-inf"))
            if attn_mask.dtype == torch.bool
            else logits + attn_mask
        )
    return logits.softmax(-1) @ value


fx.wrap("_attention")


# --------------------------------------------------------------------------------------------------- activations

# flat parts of a piecewise activation: (low, high, slope of the leak relative to the activation's own scale)
_FLAT: dict[type, tuple[float, float, float]] = {
    nn.ReLU6: (0.0, 6.0, 1.0),
    nn.Hardswish: (-3.0, float("inf"), 1.0),
    nn.Hardsigmoid: (-3.0, 3.0, 1.0 / 6.0),
}

# functional and method forms -> the module of the same name, so that later passes see one form
_ACTIVATIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    "tanh": nn.Tanh,
}


def _leaky(activation: nn.Module, slope: float) -> nn.Module | None:
    """The leaky form of a piecewise linear or saturating activation; None when it has none."""
    kind = type(activation)
    if kind is nn.ReLU:
        return nn.LeakyReLU(slope)
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return LeakyClamp(activation, activation.min_val, activation.max_val, 1.0, slope)
    if kind in _FLAT:
        low, high, gain = _FLAT[kind]
        return LeakyClamp(activation, low, high, gain, slope)
    return None


def _modularize_activations(graph: fx.GraphModule) -> None:
    """Rewrite functional and method activations as modules."""
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
            continue
        name = f"_activation_{node.name}"
        kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
        graph.add_submodule(name, _ACTIVATIONS[node.target](*node.args[1:], **kwargs))
        source = node.args[0] if node.args else node.kwargs["input"]
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (source,))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _swap_activations(graph: fx.GraphModule, slope: float) -> int:
    """Replace ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid by leaky forms; how many calls were changed."""
    swapped = 0
    for name in {n.target for n in graph.graph.nodes if n.op == "call_module"}:
        leaky = _leaky(graph.get_submodule(name), slope) if slope else None
        if leaky is not None:
            graph.set_submodule(name, leaky)
            swapped += sum(n.op == "call_module" and n.target == name for n in graph.graph.nodes)
    return swapped


# ------------------------------------------------------------------------------------------------ module surgery


def _replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    new.train(False)
    root.set_submodule(name, new) if name else None


class _StaticPad(nn.Module):
    """Zero padding by fixed amounts, as (left, right, top, bottom) of ``F.pad``."""

    def __init__(self, pad: tuple[int, ...]):
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad)


def _same_pad(conv: nn.Conv2d, size: Sequence[int]) -> tuple[int, ...]:
    """TensorFlow 'SAME' padding of one input size (H, W), in the order of ``F.pad``."""
    pad: list[int] = []
    for s, k, stride, d in zip(
        size[::-1], conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True
    ):
        total = max((-(-s // stride) - 1) * stride + (k - 1) * d + 1 - s, 0)
        pad += [total // 2, total - total // 2]
    return tuple(pad)


def _plain_conv(conv: nn.Conv2d, pad: tuple[int, ...]) -> nn.Module:
    """A 'SAME' convolution as a plain one with the padding of one input size."""
    symmetric = pad[0] == pad[1] and pad[2] == pad[3]
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, (pad[2], pad[0]) if symmetric else 0,
        conv.dilation, conv.groups, bias=conv.bias is not None, device="meta",
    )  # fmt: skip
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain if symmetric else nn.Sequential(_StaticPad(pad), plain)


def _make_explicit(module: nn.Module, example: Tensor) -> None:
    """Rewrite the modules that tracing cannot see through, in place on a private copy.

    timm's norm-plus-activation modules become a norm and an activation, its size-dependent 'SAME'
    convolutions get the padding of the image size in use, torch's attention becomes Linear layers, dropout
    and in-place operation are removed. Each rewrite leaves the function unchanged.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    same = {
        n: m
        for n, m in module.named_modules()
        if isinstance(m, nn.Conv2d) and type(m).__name__ == "Conv2dSame"
    }
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: sizes.__setitem__(n, tuple(args[0].shape[-2:])))
        for n, m in same.items()
    ]
    try:
        _forward(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, m in list(module.named_modules()):
        if name in sizes:
            _replace_module(module, name, _plain_conv(same[name], _same_pad(same[name], sizes[name])))
        elif type(m).__name__ == "BatchNormAct2d" and isinstance(m, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)
            norm.load_state_dict({k: v for k, v in m.state_dict().items() if k in norm.state_dict()})
            _replace_module(module, name, nn.Sequential(norm.to(example.dtype), m.act))
        elif type(m) is nn.MultiheadAttention and m.in_proj_weight is not None and m.bias_k is None:
            if not m.add_zero_attn:
                _replace_module(module, name, Attention(m))
        elif isinstance(m, _DROPOUTS) or type(m).__name__ in ("StochasticDepth", "DropPath"):
            _replace_module(module, name, nn.Identity())
        if getattr(m, "inplace", False):
            m.inplace = False


def _forward(module: nn.Module, example: Tensor) -> Any:
    """One forward pass without gradient; a failure says for which input."""
    try:
        with torch.no_grad():
            return module(example)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        shape = tuple(example.shape[1:])
        raise ValueError(
            f"The backbone cannot be evaluated on an input of shape {shape} (channels, height, width): "
            f"{error} If the size is the reason, set image_size (for example image_size=224 or "
            "image_size='backbone')."
        ) from error


# ---------------------------------------------------------------------------------------------------------- head


@dataclass(frozen=True)
class Head:
    """The classifier of a network: its module, and a ReLU behind it that a linear model must not have."""

    name: str
    activation: str | None = None


_PASS = (nn.Identity, nn.Flatten, *_DROPOUTS)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)


def find_head(module: nn.Module, example: Tensor) -> Head:
    """Find the classifier: the last Linear, or 1x1 convolution, whose output is the network's output.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; it is only evaluated.
    example : Tensor of shape (B, C, H, W) or (B, n_features)

    Returns
    -------
    Head

    Raises
    ------
    ValueError
        When the output does not come from one such layer. The message names what was found.
    """
    calls: list[tuple[str, nn.Module, Any]] = []
    hooks = [
        m.register_forward_hook(lambda m, _, out, n=n: calls.append((n, m, out)))
        for n, m in module.named_modules()
        if n and not any(m.children())
    ]
    try:
        output = _forward(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = (
            f"a tensor of shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise ValueError(
            f"The backbone must return one tensor of shape (batch, classes); it returns {found}."
        )
    if not calls:
        raise ValueError("The backbone has no layer: its output must come from one nn.Linear.")
    activation = None
    for i in range(len(calls) - 1, -1, -1):
        name, m, out = calls[i]
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)):
            shared = sum(n == name for n, _, _ in calls) > 1
            if (
                not shared
                and isinstance(out, Tensor)
                and _reaches(out, output, pooled=isinstance(m, nn.Conv2d))
            ):
                return Head(name, activation)
            break
        if type(m) is nn.ReLU:
            activation = name
        elif not isinstance(m, _PASS + _POOLS):
            break
    name, m, _ = calls[-1]
    raise ValueError(
        "The backbone's output must come from one nn.Linear (or 1x1 nn.Conv2d) that can be replaced by a new "
        f"head; the last layer evaluated is {name!r} ({type(m).__name__}), and the output is not its plain "
        "result. Pass a module that ends in one Linear layer."
    )


def _reaches(out: Tensor, output: Tensor, pooled: bool) -> bool:
    """Whether the network's output is the layer's output, possibly after ReLU, pooling and flattening."""
    if not pooled:
        return out.shape == output.shape and torch.equal(out, output)
    mean = out.flatten(2).mean(2)
    rectified = out.relu().flatten(2).mean(2)
    return mean.shape == output.shape and (
        torch.allclose(mean, output, rtol=1e-4, atol=1e-5)
        or torch.allclose(rectified, output, rtol=1e-4, atol=1e-5)
    )


def remove_head(module: nn.Module, example: Tensor) -> None:
    """Turn a private copy of a classifier into its feature extractor, in place: (B, ...) -> (B, D)."""
    head = find_head(module, example)
    for name in (head.name, head.activation):
        if name is not None:
            _replace_module(module, name, nn.Identity())
    features = _forward(module, example)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(
            f"The input of the backbone's head {head.name!r} must be one vector for each image; without the head "
            f"the network returns {tuple(features.shape) if isinstance(features, Tensor) else type(features)}."
        )


# -------------------------------------------------------------------------------------------------------- stages


def _units(module: nn.Module, prefix: str = "", total: int | None = None) -> list[str]:
    """Names of the blocks that a network is a chain of: containers opened, blocks kept whole."""
    total = sum(p.numel() for p in module.parameters()) if total is None else total
    names = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        share = sum(p.numel() for p in child.parameters())
        container = isinstance(child, nn.Sequential | nn.ModuleList)
        nested = any(isinstance(m, nn.Sequential | nn.ModuleList) for m in child.children())
        if container or (nested and 2 * share > total):
            names += _units(child, f"{full}.", total)
        elif share:
            names.append(full)
    return names


def find_stages(module: nn.Module, example: Tensor) -> list[list[str]]:
    """Stages of a network in order of evaluation: runs of blocks whose outputs have one spatial resolution.

    Blocks of a transformer (token sequences) and of a network on vectors are a stage each. Blocks without a
    weight matrix join the stage before them, and what follows the last pooling joins the last stage.

    Returns
    -------
    list of lists of str
        Module names, first stage first.
    """
    shapes: dict[str, torch.Size] = {}

    def record(name: str, output: Any) -> None:
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            shapes.pop(name, None)  # order of the last call
            shapes[name] = output.shape

    modules = dict(module.named_modules())
    hooks = [modules[n].register_forward_hook(lambda _, __, out, n=n: record(n, out)) for n in _units(module)]
    try:
        _forward(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    spatial = any(len(s) > 2 for s in shapes.values())
    stages: list[list[str]] = []
    last: Any = None
    for name, shape in shapes.items():
        weighted = any(p.ndim > 1 for p in modules[name].parameters())
        if len(shape) == 4:
            key: Any = tuple(shape[1:3]) if shape[1] == shape[2] != shape[3] else tuple(shape[2:])
        else:
            key = None
        pooled = spatial and (len(shape) == 2 or key == (1, 1))
        if stages and (not weighted or pooled or (key is not None and key == last)):
            stages[-1].append(name)
        else:
            stages.append([name])
        last = key if len(shape) == 4 else last
    return stages


def _tangent_prefixes(module: nn.Module, example: Tensor, layers: Any) -> list[str] | None:
    """Module names whose parameters are linearized, by ``tangent_layers``; None means all."""
    if layers == "all":
        return None
    if layers == "head":
        return []
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, int) and not isinstance(layers, bool):
        if layers < 0:
            raise ValueError(f"tangent_layers must be at least 0, got {layers}.")
        stages = find_stages(module, example)
        if layers >= len(stages):
            return None
        return [name for stage in stages[len(stages) - layers :] for name in stage]
    if isinstance(layers, Sequence) and all(isinstance(p, str) for p in layers):
        names = [n for n, _ in module.named_modules() if n]
        for prefix in layers:
            if not any(n == prefix or n.startswith(prefix + ".") for n in names):
                raise ValueError(
                    f"tangent_layers names {prefix!r}, which is no module of the backbone. Blocks: {_units(module)}."
                )
        return list(layers)
    raise ValueError(
        "tangent_layers must be 'head', 'all', an int (number of last stages) or a list of module names, "
        f"got {layers!r}."
    )


# ------------------------------------------------------------------------------------------------ trace and split


class _Tracer(fx.Tracer):
    def __init__(self, leaves: tuple[type, ...], functions: tuple[Callable, ...]):
        super().__init__(autowrap_functions=functions)
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return isinstance(m, (*self.leaves, LeakyClamp, _StaticPad)) or super().is_leaf_module(m, qualname)


def _trace(module: nn.Module) -> fx.GraphModule:
    leaves: tuple[type, ...] = ()
    functions: tuple[Callable, ...] = ()
    if any(type(m).__module__.startswith("timm.") for m in module.modules()):
        from timm.models._features_fx import get_notrace_functions, get_notrace_modules

        leaves, functions = tuple(get_notrace_modules()), tuple(get_notrace_functions())
    graph = _Tracer(leaves, functions).trace(module)
    return fx.GraphModule(module, graph)


_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


def _clean(graph: fx.GraphModule) -> None:
    """Remove assertions and dropout, make in-place operators functional."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            graph.graph.erase_node(node)
        elif node.op == "call_module" and type(graph.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.op == "call_function" and node.target is F.dropout:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            graph.graph.erase_node(node)
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth":
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            node.target = _attention
        elif node.op == "call_function" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    graph.graph.eliminate_dead_code()


def _fold_batch_norms(graph: fx.GraphModule) -> int:
    """Fold each BatchNorm whose input is the only use of a convolution or Linear; how many were folded."""
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    folded = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(graph.get_submodule(node.target), _BATCH_NORMS):
            continue
        source = node.args[0]
        norm = graph.get_submodule(node.target)
        if (
            source.op != "call_module"
            or len(source.users) > 1
            or calls[source.target] > 1
            or calls[node.target] > 1
        ):
            continue
        layer = graph.get_submodule(source.target)
        if norm.running_mean is None or not _is_plain(layer, (*_CONVS, nn.Linear)):
            continue
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        dtype = layer.weight.dtype
        fused = fuse(copy.deepcopy(layer).double(), copy.deepcopy(norm).double()).to(dtype)
        graph.set_submodule(source.target, fused)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
        folded += 1
    return folded


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether the module is one of these layers with the forward of the class (no weight standardization ...)."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


@dataclass
class Split:
    """A network in two parts: ``tail(*trunk(x))`` are its features, shape (B, D).

    Attributes
    ----------
    trunk : callable
        Frozen part, (B, ...) -> tuple of tensors, each with the batch first.
    tail : nn.Module
        The rest; an ``fx.GraphModule`` when the network traces, else the whole network.
    tangent : list of str
        Names of the parameters of ``tail`` that are linearized.
    n_features : int
        D.
    traced : bool
        False when the network does not trace and torch.func serves.
    folded, swapped : int
        BatchNorms folded; activation calls made leaky.
    """

    trunk: nn.Module
    tail: nn.Module
    tangent: list[str]
    n_features: int
    traced: bool = True
    folded: int = 0
    swapped: int = 0
    notes: list[str] = field(default_factory=list)


class _NoTrunk(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def split_network(
    module: nn.Module, example: Tensor, tangent_layers: Any = 2, negative_slope: float = 0.0
) -> Split:
    """Prepare a feature extractor for linearization.

    Parameters
    ----------
    module : nn.Module
        Network without head, (B, ...) -> (B, D), in evaluation mode. A copy is worked on.
    example : Tensor of shape (B, ...), B >= 2
        Input of the size in use; the network is specialized to this size.
    tangent_layers : {"head", "all"}, int or list of str
        What is linearized: nothing but the head, all, this many last stages, or named modules.
    negative_slope : float
        Slope of the leak of piecewise activations; 0 leaves them as they are.

    Returns
    -------
    Split

    Raises
    ------
    ValueError
        Unknown layers, tied weights, a cut through the middle of a block.
    """
    module = copy.deepcopy(module).to(example.dtype).eval().requires_grad_(False)
    _make_explicit(module, example)
    prefixes = _tangent_prefixes(module, example, tangent_layers)
    reference = _forward(module, example)
    try:
        graph = _trace(module)
        _clean(graph)
        with torch.no_grad():
            value = graph(example)
        if not torch.allclose(value, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())):
            raise RuntimeError("the traced graph computes something else")
    except Exception as error:  # noqa: BLE001 - whatever tracing raises, the general engine serves
        return _untraced(module, prefixes, negative_slope, reference.shape[1], error)
    _modularize_activations(graph)
    folded = _fold_batch_norms(graph)
    swapped = _swap_activations(graph, negative_slope)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    tangent = _tangent_names(graph, prefixes)
    trunk, tail = _cut(graph, tangent, example)
    tangent = [n for n, _ in tail.named_parameters() if n in set(tangent)]
    return Split(trunk, tail, tangent, reference.shape[1], True, folded, swapped)


def _untraced(
    module: nn.Module, prefixes: list[str] | None, slope: float, n_features: int, error: Exception
) -> Split:
    warnings.warn(
        f"The backbone cannot be traced by torch.fx ({type(error).__name__}: {error}). It is linearized as a whole "
        "through torch.func: exact, but slower, without folding BatchNorm and without caching a frozen trunk.",
        UserWarning,
        stacklevel=2,
    )
    swapped = 0
    for name, m in list(module.named_modules()):
        leaky = _leaky(m, slope) if slope and name else None
        if leaky is not None:
            _replace_module(module, name, leaky)
            swapped += 1
    return Split(_NoTrunk(), module, _tangent_names(module, prefixes), n_features, False, 0, swapped)


def _tangent_names(module: nn.Module, prefixes: list[str] | None) -> list[str]:
    """Names of the chosen parameters; parameters shared by several modules are refused."""
    owners: dict[int, str] = {}
    names = []
    for name, p in module.named_parameters(remove_duplicate=False):
        if prefixes is not None and not any(name.startswith(prefix + ".") for prefix in prefixes):
            continue
        if id(p) in owners:
            raise ValueError(
                f"Parameters {owners[id(p)]!r} and {name!r} are tied (one tensor). Tied weights cannot be linearized "
                "apart: untie them, or choose tangent_layers that leave them in the frozen trunk."
            )
        owners[id(p)] = name
        names.append(name)
    return names


def _dependent(graph: fx.GraphModule, tangent: set[str]) -> set[fx.Node]:
    """Nodes whose value changes with a tangent parameter."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            own = node.target in tangent
        elif node.op == "call_module":
            names = (f"{node.target}.{n}" for n, _ in graph.get_submodule(node.target).named_parameters())
            own = any(n in tangent for n in names)
        else:
            own = False
        if own or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


class _Recorder(fx.Interpreter):
    """Evaluates a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)

    def values(self, x: Tensor) -> dict[fx.Node, Any]:
        with torch.no_grad():
            self.run(x)
        return self.env


def _cut(graph: fx.GraphModule, tangent: list[str], example: Tensor) -> tuple[nn.Module, fx.GraphModule]:
    """Split at the border of what depends on a tangent parameter.

    The values that cross it are of three kinds: tensors with the batch first (cached), tensors that do not
    depend on the batch (stored as constants), and sizes (constants, or the batch size).
    """
    nodes = list(graph.graph.nodes)
    tail_nodes = _dependent(graph, set(tangent))
    output = next(n for n in nodes if n.op == "output")
    tail_nodes.add(output)
    crossing = [n for n in nodes if n not in tail_nodes and any(u in tail_nodes for u in n.users)]
    two, three = _Recorder(graph).values(example), _Recorder(graph).values(torch.cat([example, example[:1]]))
    b = example.shape[0]
    cached = [
        n
        for n in crossing
        if isinstance(two[n], Tensor) and n.op != "get_attr" and _batched(two[n], three[n], b)
    ]
    tail = fx.Graph()
    new: dict[fx.Node, Any] = {n: tail.placeholder(f"cached_{i}") for i, n in enumerate(cached)}
    constants: dict[str, Tensor] = {}
    size: fx.Node | None = None
    for node in crossing:
        if node in new:
            continue
        if isinstance(two[node], Tensor):
            name = f"_constant_{node.name}"
            constants[name] = two[node].detach().clone()
            new[node] = tail.get_attr(name)
        else:
            if size is None and cached:
                size = tail.call_method("size", (new[cached[0]], 0))
            new[node] = _static(two[node], three[node], b, size, node)
    for node in nodes:
        if node in tail_nodes and node is not output:
            new[node] = tail.node_copy(node, lambda n: new[n])
    tail.output(fx.map_arg(output.args[0], lambda n: new[n]))
    root = fx.GraphModule({n: m for n, m in _referenced(graph, tail_nodes)} | constants, tail)
    for name, value in constants.items():
        delattr(root, name)
        root.register_buffer(name, value)
    root.graph.eliminate_dead_code()
    root.recompile()
    if len(cached) == 1 and cached[0].op == "placeholder":
        return _NoTrunk(), root
    head = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in tail_nodes:
            env[node] = head.node_copy(node, lambda n: env[n])
    head.output(tuple(env[n] for n in cached))
    trunk = fx.GraphModule(graph, head)
    trunk.graph.eliminate_dead_code()
    trunk.delete_all_unused_submodules()
    trunk.recompile()
    return trunk.requires_grad_(False), root


def _referenced(graph: fx.GraphModule, nodes: set[fx.Node]) -> list[tuple[str, Any]]:
    """Modules and parameters that a set of nodes names."""
    named: list[tuple[str, Any]] = []
    for node in nodes:
        if node.op == "call_module":
            named.append((node.target, graph.get_submodule(node.target)))
        elif node.op == "get_attr":
            named.append((node.target, operator.attrgetter(node.target)(graph)))
    return named


def _batched(two: Tensor, three: Any, b: int) -> bool:
    """Whether a value has the batch as its first axis, from evaluations with b and b + 1 rows."""
    if two.shape == three.shape:
        return False
    if two.ndim and two.shape[0] == b and three.shape[0] == b + 1 and two.shape[1:] == three.shape[1:]:
        return True
    raise ValueError(
        "tangent_layers cuts the network where an activation does not have one row for each image "
        f"(shape {tuple(two.shape)} for {b} images): choose whole blocks, or 'all'."
    )


def _static(two: Any, three: Any, b: int, size: fx.Node | None, node: fx.Node) -> Any:
    """A size that crosses the cut: a constant, or the batch size of the tail."""
    if isinstance(two, tuple | list | torch.Size):
        return tuple(_static(x, y, b, size, node) for x, y in zip(two, three, strict=True))
    if two == three:
        return two
    if two == b and three == b + 1 and size is not None:
        return size
    raise ValueError(
        f"tangent_layers cuts the network at {node.name!r}, whose value cannot be cached ({two!r})."
    )
