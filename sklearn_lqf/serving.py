"""The fitted model as one module of torch, for programs that know nothing of scikit-learn.

Hides trunk, tail, gradients and the linear map, and how gradients get into an exported program: programs hold forward
operations alone, so the backward passes are traced into such operations when the module is exported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .features import GroupFeatures
from .graph import Split
from .linearize import full_precision, walker
from .model import GroupedModel
from .paper import PaperModel
from .prepared import ordinary_arithmetic
from .preprocessing import Preprocessing
from .surgery import plain_attention
from .tangents import TracedTail
from .threads import DUAL_NUMBERS

__all__ = ["LinearizedModule", "to_module"]

_aten = torch.ops.aten
_ROWS = 3  # of the inputs of a trace; any number but 0 and 1, which torch takes for constants


class LinearizedModule(nn.Module):
    """A fitted model: images (B, C, H, W) in [0, 1], or vectors (B, n_features), to outputs (B, n_outputs).

    Made by `to_module`. It shares nothing with the model; all its numbers are in its ``state_dict``.

    Parameters
    ----------
    trunk : nn.Module
        (B, ...) -> tuple of activations.
    features : nn.Module
        Activations to what the outputs are linear in, (B, D).
    preprocessing : Preprocessing or None
        None for vectors.
    views : sequence of str
        Views of an image over which features are averaged.
    weight : Tensor of shape (n_outputs, D)
    bias : Tensor of shape (n_outputs,)

    Notes
    -----
    Called as a module it has gradients evaluated by autograd, under ``torch.no_grad`` and ``torch.inference_mode``
    too; its outputs require none. ``torch.export.export`` with ``strict=False`` makes a program without autograd of it,
    for any number of images; a network whose forward depends on the values of its input cannot be exported.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        features: _TangentFeatures | _WalkedFeatures,
        preprocessing: Preprocessing | None,
        views: Sequence[str],
        weight: Tensor,
        bias: Tensor,
    ):
        super().__init__()
        self.trunk, self.features = trunk, features
        self._preprocessing, self._views = preprocessing, tuple(views)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (B, n_outputs)."""
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():  # torch.export
            return self._outputs(images, self.features.exported)
        with ordinary_arithmetic(images.device), torch.no_grad(), full_precision():
            # Autograd refuses tensors that were made in inference mode.
            return self._outputs(images.clone() if images.is_inference() else images, self.features)

    def _outputs(self, images: Tensor, features: Callable[..., Tensor]) -> Tensor:
        x = images if self._preprocessing is None else self._preprocessing.normalize(images)
        views = [x.flip(-1) if view == "flip" else x for view in self._views]
        parts = [features(*self.trunk(view)) for view in views]
        mean = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
        return nn.functional.linear(mean, self.weight, self.bias)


class _Tail(nn.Module):
    """A tail of its own, with what walks over it."""

    def __init__(self, split: Split):
        super().__init__()
        self._split, self.tail = split, split.tail
        self._bind()

    def _bind(self) -> None:
        self._walker, self._default_layout = walker(self._split)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_walker"}  # has nodes of the graph for keys

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()


class _TangentFeatures(_Tail):
    """Last features, statistics of stages and tangent features: activations to (B, D)."""

    directions: Tensor

    def __init__(self, split: Split, fitted: GroupFeatures):
        super().__init__(split)
        self._fitted, self._names = copy.copy(fitted), fitted.layers
        self.register_buffer("directions", fitted._directions.clone())
        for i, sketch in enumerate(fitted._sketches.values()):
            self.register_buffer(f"left_{i}", sketch.left.clone())
            self.register_buffer(f"right_{i}", sketch.right.clone())
        # The tail is put in place at each call, and nothing of the fitted one is kept.
        self._sketches = [replace(s, layer=self._layer(n), **_NOTHING) for n, s in fitted._sketches.items()]
        self._fitted._tail, self._fitted._sketches = cast(Any, None), {}

    def _layer(self, name: str) -> Any:
        return self._walker.layers()[name]

    def forward(self, *activations: Tensor) -> Tensor:
        """Features (B, D)."""
        features = copy.copy(self._fitted)  # of this call: threads may share a module
        features._tail, features._directions = self._walker, self.directions
        features._sketches = {
            name: replace(sketch, left=self.get_buffer(f"left_{i}"), right=self.get_buffer(f"right_{i}"))
            for i, (name, sketch) in enumerate(zip(self._names, self._sketches, strict=True))
        }
        return features(activations)

    def exported(self, *activations: Tensor) -> Tensor:
        """The same in forward operations."""
        if not self._names:  # no mode of autograd is switched, which would be part of the program
            return self._walker.primal(activations)[0]
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with ThreadPoolExecutor(1) as other:  # the trace that is going on is one of this thread
            program = other.submit(_without_autograd, self, state, activations).result()
        return program(state, activations)


_NOTHING = {"left": torch.empty(0), "right": torch.empty(0)}


class _WalkedFeatures(_Tail):
    """Last features and their tangent along a constant change d of the weights: activations to (B, 2 D)."""

    def __init__(self, split: Split, change: dict[str, Tensor]):
        super().__init__(split)
        self._names = list(change)
        for i, value in enumerate(change.values()):
            self.register_buffer(f"change_{i}", value.clone())

    def forward(self, *activations: Tensor) -> Tensor:
        """Features and tangents (B, 2 D)."""
        features, values = self._walker.primal(activations)
        direction = {name: self.get_buffer(f"change_{i}") for i, name in enumerate(self._names)}
        if not direction:
            return torch.cat([features, torch.zeros_like(features)], 1)
        walk = self._walker.walk if isinstance(self._walker, TracedTail) else self._walker.tangents
        return torch.cat([features, cast(Tensor, walk(values, direction))], 1)

    exported = forward  # the change is a constant, so that forward operations are all there is


# ------------------------------------------------------------------------------------------------- construction


@singledispatch
def to_module(model: Any) -> LinearizedModule:
    """Make a module of torch that computes the outputs of a fitted model.

    Parameters
    ----------
    model : GroupedModel or PaperModel

    Returns
    -------
    LinearizedModule
        A copy, on the device and in the dtype of the network. Dot products of float32 differ from those of
        ``model.outputs``, which are of float64, by about 1e-6 of the sum of the absolute values of their terms.
    """
    raise TypeError(f"There is no module for a {type(model).__name__}.")


@to_module.register
def _(model: GroupedModel) -> LinearizedModule:
    network, like = model.network, {"device": model.network.device, "dtype": model.network.dtype}
    split = _copied(network.split)
    weight, bias = torch.tensor(model.weight.T, **like), torch.tensor(model.bias, **like)
    features = _TangentFeatures(split, model.reader._built)
    return LinearizedModule(split.trunk, features, network.preprocessing, model.reader.views, weight, bias)


@to_module.register
def _(model: PaperModel) -> LinearizedModule:
    linearized = model.linearized
    like = {"device": linearized.weight.device, "dtype": linearized.weight.dtype}
    body, weight, bias = linearized.views(torch.tensor(model.coef, **like))
    unit = torch.tensor(model.unit, **like)
    split = _copied(model.network.split)
    features = _WalkedFeatures(split, body if any(bool(v.any()) for v in body.values()) else {})
    # f_w0 + J d: the head and its change on the features, the head on their tangent.
    weight = unit[:, None] * torch.cat([linearized.weight + weight, linearized.weight], 1)
    bias = unit * (linearized.bias + bias)
    return LinearizedModule(split.trunk, features, model.network.preprocessing, ("identity",), weight, bias)


def _copied(split: Split) -> Split:
    with DUAL_NUMBERS:  # other threads may use the same tail
        trunk, tail = copy.deepcopy((split.trunk, split.tail))
    for module in (trunk, tail):
        module.eval().requires_grad_(False)
        module.to(memory_format=torch.contiguous_format)  # the one that exported programs keep
    return replace(split, trunk=trunk, tail=tail)


# ------------------------------------------------------------------------------------------- gradients in programs


def _without_autograd(
    module: nn.Module, state: dict[str, Tensor], inputs: Sequence[Tensor]
) -> Callable[[dict[str, Tensor], Sequence[Tensor]], Tensor]:
    """A function (state, inputs) of forward operations that computes a module with gradients, for any first dimension.

    Only shapes, dtypes and devices of the tensors are read.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(size: Sequence[int], like: Tensor, first: DimDynamic) -> Tensor:
        kinds = [DimDynamic.STATIC if i else first for i in range(len(size))]
        empty = torch.empty(size, dtype=like.dtype, device=like.device)
        return mode.from_tensor(empty, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    fake_state = {name: stand_in(x.shape, x, DimDynamic.STATIC) for name, x in state.items()}
    fake_inputs = [stand_in((_ROWS, *x.shape[1:]), x, DimDynamic.DYNAMIC) for x in inputs]
    trace = make_fx(lambda s, x: functional_call(module, s, tuple(x)), _backward_operations())
    with ordinary_arithmetic(inputs[0].device), plain_attention(), mode, enable_python_dispatcher():
        return trace(fake_state, fake_inputs)


def _backward_operations() -> dict[Any, Callable[..., Any]]:
    """Backward operations of torch in terms of forward ones."""
    known = {op: f for op, f in core_aten_decompositions().items() if "backward" in str(op)}
    return {**known, _aten.convolution_backward.default: _convolution_backward}


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
