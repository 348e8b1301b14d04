"""Modules rewritten so that tracing, differentiation and K-FAC support them.

Hides special modules of torch and timm: attention in one fused kernel, normalization and activation in one module,
padding that depends on the size of the input. Each rewrite leaves the function unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runtime.arithmetic import shared_by_threads

__all__ = [
    "BATCH_NORMS", "CONVS", "DROPOUTS", "Attention", "Output", "StaticPad", "attention", "evaluate", "is_plain",
    "make_explicit", "plain_attention", "replace_module", "watch",
]  # fmt: skip

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Compared by name, since timm may not be installed and torchvision does not export its class.
_STOCHASTIC_DEPTHS = ("StochasticDepth", "DropPath")


def is_plain(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module computes the function of one of these classes, from its own weight and bias only.

    False for subclasses with another forward, layers whose methods are replaced, parametrized or pruned weights, and
    layers with hooks.
    """
    return (
        any(isinstance(module, k) and _computes_as(module, k) for k in kinds)
        and all(name in ("weight", "bias") for name, _ in module.named_parameters())
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the methods that evaluate a module are those of a class."""
    return all(
        name not in vars(module) and getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward")
    )


def evaluate(module: nn.Module, example: Tensor) -> Any:
    """One forward pass without gradient.

    Raises
    ------
    ValueError
        The pass fails; the message states the shape of the input.
    """
    try:
        with torch.no_grad():
            return module(example.clone())  # some networks normalize their input in place
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        shape = tuple(example.shape[1:])
        message = f"The backbone cannot be evaluated on an input of shape {shape}"
        if len(shape) == 3:
            message += (
                f" (channels, height, width): {error} If the size is the reason, set image_size (for example "
                "image_size=224 or image_size='backbone')."
            )
        else:
            message += f": {error} If the rows of X are raveled images, set image_shape."
        raise ValueError(message) from error


def watch(
    module: nn.Module, example: Tensor, names: Iterable[str], see: Callable[[str, nn.Module, tuple, Any], None]
) -> Any:
    """Evaluate the network, and call ``see(name, module, inputs, output)`` at each call of a named module."""
    modules = dict(module.named_modules(remove_duplicate=False))
    hooks = [
        modules[name].register_forward_hook(lambda m, args, out, name=name: see(name, m, args, out)) for name in names
    ]
    try:
        return evaluate(module, example)
    finally:
        for hook in hooks:
            hook.remove()


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module of this name by a new one, in evaluation mode."""
    root.set_submodule(name, new.eval())


class Output(nn.Module):
    """A module that returns one tensor of the output of a network.

    It has the parameters and modules of the network under the same names. It calls the network with one argument, so
    that optional arguments have their defaults when it is traced.

    Parameters
    ----------
    network : nn.Module
        Shared, not copied.
    place : sequence of str or int
        Keys, attributes and indices that lead to the tensor; empty if the output is the tensor.
    tokens : {None, "first", "mean"}
        The vector is the first of the tokens (B, T, D), or their mean. None: there are no tokens.
    timm : bool
        Whether to evaluate by timm's ``forward_features`` and ``forward_head(pre_logits=True)``.
    options : mapping or None
        Values of optional arguments of the network that differ from the defaults.
    """

    def __init__(
        self,
        network: nn.Module,
        place: Sequence[str | int] = (),
        tokens: str | None = None,
        timm: bool = False,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[kind] = network.__dict__[kind]
        self.__dict__["_whole"] = network  # not registered as a module; underscores avoid names of the network
        self._place, self._tokens, self._timm, self._options = tuple(place), tokens, timm, dict(options or {})
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to vectors (B, D)."""
        network = self.__dict__["_whole"]
        if self._timm:
            return network.forward_head(network.forward_features(x), pre_logits=True)
        out = network.forward(x, **self._options)
        for key in self._place:
            out = getattr(out, key) if isinstance(key, str) and not isinstance(out, Mapping) else out[key]
        if self._tokens == "first":
            return out[:, 0]
        if self._tokens == "mean":
            return out.mean(1)
        return out.flatten(1) if self._place else out

    def train(self, mode: bool = True) -> Output:
        """Set the mode of this module and of the network."""
        super().train(mode)
        self.__dict__["_whole"].training = mode
        return self


# ----------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` written with Linear layers, which K-FAC supports.

    Parameters
    ----------
    source : nn.MultiheadAttention
        With one joint projection; its parameters are used, not copied.
    """

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        assert source.in_proj_weight is not None, "query, key and value have no joint projection"
        dim = source.embed_dim
        self.heads, self.batch_first = source.num_heads, source.batch_first
        # On the meta device nothing is drawn from the global generator.
        self.qkv = nn.Linear(dim, 3 * dim, bias=source.in_proj_bias is not None, device="meta")
        self.qkv.weight, self.qkv.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj = nn.Linear(dim, dim, bias=source.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Self-attention of one sequence without mask; ``make_explicit`` uses this module only for such calls."""
        x = query if self.batch_first else query.transpose(0, 1)  # (B, T, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.out_proj(x)
        return (x if self.batch_first else x.transpose(0, 1)), None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` by its formula, in evaluation mode: dropout is ignored.

    The fused kernels have no forward-mode derivative; the plain formula has.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1) @ value


fx.wrap("attention")  # one node of a traced graph


@shared_by_threads
@contextmanager
def plain_attention() -> Iterator[None]:
    """Make torch's attention modules compute by differentiable formulas; afterwards restore the caller's setting."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _is_self_attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call is self-attention of one sequence without mask, so that `Attention` computes the same."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = dict(zip(names, args, strict=False)) | kwargs
    return (
        given["key"] is given["query"]
        and given["value"] is given["query"]
        and given.get("key_padding_mask") is None
        and given.get("attn_mask") is None
        and not given.get("is_causal")
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


# ------------------------------------------------------------------------------------------------- padding


class StaticPad(nn.Module):
    """Zero padding by fixed amounts, as (left, right, top, bottom) of ``F.pad``."""

    def __init__(self, pad: tuple[int, ...]):
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad)


def _same_pad(conv: nn.Conv2d, size: Sequence[int]) -> tuple[int, ...]:
    """TensorFlow's padding 'SAME' for one input size (H, W), in the order of ``F.pad``."""
    pad: list[int] = []
    for s, k, stride, d in zip(size[::-1], conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True):
        total = max((-(-s // stride) - 1) * stride + (k - 1) * d + 1 - s, 0)
        pad += [total // 2, total - total // 2]
    return tuple(pad)


def _plain_conv(conv: nn.Conv2d, pad: tuple[int, ...]) -> nn.Module:
    """A 'SAME' convolution as an ordinary one with the padding for one input size."""
    symmetric = pad[0] == pad[1] and pad[2] == pad[3]
    pair = tuple[int, int]  # what torch declares as tuple[int, ...]
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, cast(pair, conv.kernel_size), cast(pair, conv.stride),
        (pad[2], pad[0]) if symmetric else 0, cast(pair, conv.dilation), conv.groups,
        bias=conv.bias is not None, device="meta",
    )  # fmt: skip
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain if symmetric else nn.Sequential(StaticPad(pad), plain)


# ----------------------------------------------------------------------------------------------- rewriting


def _observe(module: nn.Module, example: Tensor) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Input sizes of timm's 'SAME' convolutions, and names of the modules that compute plain self-attention."""
    sizes: dict[str, tuple[int, ...]] = {}
    plain: dict[str, bool] = {}

    def see_size(name: str, args: tuple) -> None:
        sizes[name] = tuple(args[0].shape[-2:])

    def see_attention(name: str, m: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> None:
        plain[name] = plain.get(name, True) and _is_self_attention(m, args, kwargs)

    hooks = []
    for name, m in module.named_modules():
        if isinstance(m, nn.Conv2d) and type(m).__name__ == "Conv2dSame":
            hooks.append(m.register_forward_pre_hook(lambda _, args, name=name: see_size(name, args)))
        elif type(m) is nn.MultiheadAttention:
            hooks.append(
                m.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: see_attention(name, m, args, kwargs), with_kwargs=True
                )
            )
    if not hooks:
        return sizes, set()
    try:
        with plain_attention():  # the fused encoder layer does not call its attention module
            evaluate(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes, {name for name, is_plain_call in plain.items() if is_plain_call}


def make_explicit(module: nn.Module, example: Tensor) -> None:
    """Rewrite the modules that torch.fx cannot trace into, in place on a private copy.

    timm's modules of normalization and activation become two modules. Its size-dependent 'SAME' convolutions get the
    padding for the image size in use. torch's attention becomes Linear layers, and its encoder a chain of layers.
    Dropout is removed.
    """
    sizes, self_attention = _observe(module, example)
    replaced: set[str] = set()
    for name, m in list(module.named_modules()):
        if not name or any(name.startswith(f"{other}.") for other in replaced):
            continue
        new = _explicit_form(m, sizes.get(name), name in self_attention)
        if new is not None:
            replace_module(module, name, new)
            if not isinstance(m, nn.TransformerEncoder):  # its layers keep their names
                replaced.add(name)


def _explicit_form(m: nn.Module, size: tuple[int, ...] | None, self_attention: bool) -> nn.Module | None:
    """The module that replaces a module; None if it stays."""
    if size is not None:
        conv = cast(nn.Conv2d, m)
        return _plain_conv(conv, _same_pad(conv, size))
    if type(m).__name__ == "BatchNormAct2d" and isinstance(m, nn.BatchNorm2d):
        norm = nn.BatchNorm2d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats, device="meta")
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, part, getattr(m, part))
        return nn.Sequential(norm, cast(nn.Module, m.act))
    if isinstance(m, nn.MultiheadAttention) and self_attention:
        return Attention(m)
    if type(m) is nn.TransformerEncoder:
        norm_or_none = m.norm if isinstance(m.norm, nn.Module) else nn.Identity()
        return nn.Sequential(OrderedDict(layers=nn.Sequential(*m.layers), norm=norm_or_none))
    if isinstance(m, DROPOUTS) or type(m).__name__ in _STOCHASTIC_DEPTHS:
        return nn.Identity()
    return None
