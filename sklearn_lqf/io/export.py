"""The fitted model as one module of torch, for programs that do not use scikit-learn.

Hides trunk, tail, gradients and the linear map, and how gradients get into an exported program. An exported program has
forward operations only, so the backward passes are traced into such operations when the module is exported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import _disable_current_modes

from ..backbones.preprocessing import Preprocessing
from ..engine.features import GroupFeatures
from ..engine.fitted import FittedModel
from ..network.linearize import walker
from ..network.rewrite import plain_attention
from ..network.tails import TracedTail
from ..network.tracing import Split
from ..paper.model import PaperModel
from ..runtime.arithmetic import DUAL_NUMBERS, ordinary_arithmetic

__all__ = ["LinearizedModule", "to_module"]

_aten = torch.ops.aten
_ROWS = 3  # of the inputs of a trace: any number except 0 and 1, which torch treats as constants


class LinearizedModule(nn.Module):
    """A fitted model: images (B, C, H, W) in [0, 1], or vectors (B, n_features), to outputs (B, n_outputs).

    `to_module` makes it. It shares nothing with the model; all its numbers are in its ``state_dict``.

    Parameters
    ----------
    trunk : nn.Module
        Maps inputs (B, ...) to a tuple of activations, each (B, ...).
    features : nn.Module
        Maps these activations to the features (B, D) that the outputs are linear in.
    preprocessing : Preprocessing or None
        None for vectors.
    views : sequence of str
        Views of an image over which features are averaged.
    weight : Tensor of shape (n_outputs, D)
        Weights on the features, in the units of y.
    bias : Tensor of shape (n_outputs,)
        In the units of y.

    Notes
    -----
    Features along directions need backward passes, for which the module uses autograd, also under ``torch.no_grad`` and
    ``torch.inference_mode``; the outputs require no gradient. ``torch.export.export`` with ``strict=False`` makes a
    program without autograd from the module, for any number of images. The program contains the operations of each
    backward pass; with many layers the export takes several seconds for each direction. A network whose control flow
    depends on the values of its input cannot be exported. With the model of the paper, a network with layers whose
    tangent has no rule, such as LayerNorm, is exported for one number of images.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        features: _GroupFeatures | _WalkedFeatures,
        preprocessing: Preprocessing | None,
        views: Sequence[str],
        weight: Tensor,
        bias: Tensor,
        layout: torch.memory_format,
    ):
        super().__init__()
        self.trunk, self.features = trunk, features
        self._preprocessing, self._views = preprocessing, tuple(views)
        self._channels_last = layout is torch.channels_last
        self.register_buffer("weight", _own(weight))
        self.register_buffer("bias", _own(bias))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (B, n_outputs)."""
        if torch.compiler.is_compiling():  # torch.export, torch.compile
            return self._outputs(images, self.features.exported)
        with ordinary_arithmetic(), torch.no_grad():
            if self._channels_last:  # a compiler chooses by itself
                images = images.contiguous(memory_format=torch.channels_last)
            # Autograd refuses tensors that were made in inference mode.
            return self._outputs(images.clone() if images.is_inference() else images, self.features)

    def _outputs(self, images: Tensor, features: Callable[..., Tensor]) -> Tensor:
        x = images if self._preprocessing is None else self._preprocessing.normalize(images)
        views = [x.flip(-1) if view == "flip" else x for view in self._views]
        parts = [features(*self.trunk(view)) for view in views]
        mean = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
        return nn.functional.linear(mean, self.weight, self.bias)


class _Tail(nn.Module):
    """A tail that the module owns, and its walker, which evaluates and differentiates it."""

    def __init__(self, split: Split):
        super().__init__()
        self._split, self.tail = split, split.tail
        self._bind()

    def _bind(self) -> None:
        self._walker, _ = walker(self._split)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_walker"}  # its keys are nodes of the graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()


class _GroupFeatures(_Tail):
    """`features.GroupFeatures` as a module whose tensors are buffers: activations to (B, D)."""

    def __init__(self, split: Split, fitted: GroupFeatures):
        super().__init__(split)
        layers: dict[str, Any] = self._walker.layers()
        self._sketches = {
            name: replace(sketch, layer=layers[name], **self._kept(f"sketch_{i}", vars(sketch)))
            for i, (name, sketch) in enumerate(fitted._sketches.items())
        }
        # The walker and the sketches are those of the fitted network: each call puts in those of this module.
        self._fitted = copy.copy(fitted)
        vars(self._fitted).update(self._kept("features", vars(fitted)), _tail=None, _sketches={})

    def _kept(self, prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        """Register the tensors of an object as buffers; returns empty tensors to replace them."""
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            self.register_buffer(f"{prefix}_{name.strip('_')}", _own(value))
        return dict.fromkeys(tensors, torch.empty(0))

    def _now(self, prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        """The buffers of an object by the names of its attributes."""
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        return {name: self.get_buffer(f"{prefix}_{name.strip('_')}") for name in names}

    def forward(self, *activations: Tensor) -> Tensor:
        """Features (B, D)."""
        features = copy.copy(self._fitted)  # of this call: threads may share a module
        sketches = {
            name: replace(sketch, **self._now(f"sketch_{i}", vars(sketch)))
            for i, (name, sketch) in enumerate(self._sketches.items())
        }
        vars(features).update(self._now("features", vars(features)), _tail=self._walker, _sketches=sketches)
        return features(activations)

    def exported(self, *activations: Tensor) -> Tensor:
        """The same as ``forward`` in operations without autograd, within a trace of torch.export."""
        activations = tuple(z.contiguous() for z in activations)  # like those of the trace that is made here
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # the modes of that trace
            program = _without_autograd(self, state, activations)
        return program(state, activations)


class _WalkedFeatures(_Tail):
    """Last features and their tangent along a constant change d of the weights: activations to (B, 2 D)."""

    def __init__(self, split: Split, change: dict[str, Tensor]):
        super().__init__(split)
        self._names = list(change)
        for i, value in enumerate(change.values()):
            self.register_buffer(f"change_{i}", _own(value))

    def forward(self, *activations: Tensor) -> Tensor:
        """Features and tangents (B, 2 D)."""
        walker: Any = self._walker
        features, values = walker.primal(activations)
        direction = {name: self.get_buffer(f"change_{i}") for i, name in enumerate(self._names)}
        if not direction:
            return torch.cat([features, torch.zeros_like(features)], 1)
        # A traced tail has a walk without switches of autograd's mode, which would become part of the program.
        walk: Any = walker.walk if isinstance(walker, TracedTail) else walker.tangents
        return torch.cat([features, walk(values, direction)], 1)

    exported = forward  # the change is a constant, so the tangent needs forward operations only


# ------------------------------------------------------------------------------------------------- construction


@singledispatch
def to_module(model: Any) -> LinearizedModule:
    """Make a module of torch that computes the outputs of a fitted model.

    Parameters
    ----------
    model : FittedModel or PaperModel

    Returns
    -------
    LinearizedModule
        A copy, on the device and in the dtype of the network. Its dot products in float32 differ from those of
        ``model.outputs``, which are in float64, by about 1e-6 of the sum of the absolute values of their terms.

    Raises
    ------
    TypeError
        The model is of another type.
    """
    raise TypeError(f"There is no module for a {type(model).__name__}.")


@to_module.register
def _(model: FittedModel) -> LinearizedModule:
    network, split = model.network, _copied(model.network.split)
    weight, bias = (torch.tensor(v).to(network.device, network.dtype) for v in (model.weight, model.bias))
    features = _GroupFeatures(split, model.reader._built)
    return LinearizedModule(
        split.trunk, features, network.preprocessing, model.reader.views, weight.T, bias, network.layout
    )


@to_module.register
def _(model: PaperModel) -> LinearizedModule:
    linearized = model.linearized
    coef, unit = (torch.tensor(v).to(linearized.weight) for v in (model.coef, model.unit))
    body, weight, bias = linearized.views(coef)
    split = _copied(model.network.split)
    features = _WalkedFeatures(split, body if any(bool(v.any()) for v in body.values()) else {})
    # f_w0 + J d: the head and its change on the features, the head on their tangent.
    weight = unit[:, None] * torch.cat([linearized.weight + weight, linearized.weight], 1)
    bias = unit * (linearized.bias + bias)
    network = model.network
    return LinearizedModule(split.trunk, features, network.preprocessing, ("identity",), weight, bias, network.layout)


def _own(value: Tensor) -> Tensor:
    """A copy, contiguous, as stored programs require."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _copied(split: Split) -> Split:
    with DUAL_NUMBERS:  # other threads may use the same tail
        trunk, tail = copy.deepcopy((split.trunk, split.tail))
    for module in (trunk, tail):
        module.eval().requires_grad_(False)
        module.to(memory_format=torch.contiguous_format)  # exported programs keep this format
    return replace(split, trunk=trunk, tail=tail)


# ------------------------------------------------------------------------------------------- gradients in programs


def _without_autograd(
    module: nn.Module, state: dict[str, Tensor], inputs: Sequence[Tensor]
) -> Callable[[dict[str, Tensor], Sequence[Tensor]], Tensor]:
    """A module that uses gradients as a function (state, inputs) of forward operations, for any number of rows.

    Only shapes, dtypes and devices of the tensors are used.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(size: Sequence[int], like: Tensor, first: DimDynamic) -> Tensor:
        kinds = [DimDynamic.STATIC if i else first for i in range(len(size))]
        empty = torch.empty(size, dtype=like.dtype, device=like.device)
        return mode.from_tensor(empty, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    fake_state = {name: stand_in(x.shape, x, DimDynamic.STATIC) for name, x in state.items()}
    fake_inputs = [stand_in((_ROWS, *x.shape[1:]), x, DimDynamic.DYNAMIC) for x in inputs]
    trace = make_fx(lambda s, x: functional_call(module, s, tuple(x)), _backward_operations())
    with plain_attention(), mode, enable_python_dispatcher():
        return trace(fake_state, fake_inputs)


def _backward_operations() -> dict[Any, Callable[..., Any]]:
    """Backward operations of torch in terms of forward ones."""
    known = {op: f for op, f in core_aten_decompositions().items() if "backward" in str(op)}
    return {
        **known,
        _aten.convolution_backward.default: _convolution_backward,
        _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
        _aten.avg_pool2d_backward.default: _avg_pool_backward,
        _aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward,
    }


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """The gradient by the input alone: a transposed convolution, or a convolution if the layer was a transposed one."""
    if transposed:
        zeros = [0] * len(stride)
        return _aten.convolution(gradient, weight, None, stride, padding, dilation, False, zeros, groups), None, None
    rest = [  # rows of the input that no patch reaches
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(
            x.shape[2:], gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return _aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups), None, None


def _max_pool_backward(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Each element of the gradient (B, C, h, w) to the place in x (B, C, H, W) of its index, the last argument."""
    zeros = torch.zeros_like(x).flatten(2)
    return zeros.scatter_add(2, rest[-1].flatten(2), gradient.flatten(2)).view(x.shape)


def _avg_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """P_h' g P_w with the matrices P of the means along the two axes."""
    sides = []
    for axis in (2, 3):
        n, (k, s, p) = x.shape[axis], (v[-1] if axis == 3 else v[0] for v in (kernel, stride or kernel, padding))
        first = torch.arange(gradient.shape[axis], device=x.device) * s - p
        last = (first + k).clamp(max=n + p)
        count = last - first if count_include_pad else last.clamp(max=n) - first.clamp(min=0)
        sides.append(_means(first, last, torch.ones_like(count) if divisor_override else count, x, axis))
    found = sides[0].mT @ gradient @ sides[1]
    return found / divisor_override if divisor_override else found


def _adaptive_avg_pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The same where windows follow from the sizes."""
    sides = []
    for axis in (2, 3):
        n, m = x.shape[axis], gradient.shape[axis]
        i = torch.arange(m, device=x.device)
        first, last = i * n // m, ((i + 1) * n + m - 1) // m
        sides.append(_means(first, last, last - first, x, axis))
    return sides[0].mT @ gradient @ sides[1]


def _means(first: Tensor, last: Tensor, count: Tensor, x: Tensor, axis: int) -> Tensor:
    """The matrix (m, n) of sums over windows from ``first`` to before ``last`` of an axis of x, over a count each."""
    at = torch.arange(x.shape[axis], device=x.device)
    inside = (at >= first[:, None]) & (at < last[:, None])
    return inside.to(x.dtype) / count[:, None]
