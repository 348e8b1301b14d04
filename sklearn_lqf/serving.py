"""The fitted linear model as one module of torch, for programs that know nothing of scikit-learn.

Hides trunk, tail and head: f_w0 and its tangent are one forward pass. Since the change of the weights is a constant,
that pass is made of plain operations, which torch can export.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, fx, nn

from .linearize import LinearizedNetwork
from .preprocessing import Preprocessing
from .tangents import GeneralTail, TracedTail
from .threads import DUAL_NUMBERS

__all__ = ["LinearizedModule", "ServingMixin"]


class LinearizedModule(nn.Module):
    """f_lin = offset + J d as a module: images (B, C, H, W) in [0, 1], or vectors, to outputs (B, n_outputs).

    Parameters
    ----------
    network : LinearizedNetwork
        Its modules are copied.
    preprocessing : Preprocessing or None
        None for vectors.
    coef : Tensor of shape (P,)
        d, in the units of the weights.
    intercept : Tensor of shape (n_outputs,) or None
        Stands for f_w0; None: the network's own output.
    unit : Tensor of shape (n_outputs,)
        What the outputs are multiplied by.
    """

    weight: Tensor  # (n_outputs, D), of the head on standardized features
    bias: Tensor
    gradient: Tensor  # (n_outputs, D), of the outputs by the features
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        network: LinearizedNetwork,
        preprocessing: Preprocessing | None,
        coef: Tensor,
        intercept: Tensor | None,
        unit: Tensor,
    ):
        super().__init__()
        with DUAL_NUMBERS:
            self.trunk, self.tail = copy.deepcopy((network.trunk, network.module))
        for module in (self.trunk, self.tail):
            module.eval().requires_grad_(False)
            module.to(memory_format=torch.contiguous_format)  # the one that exported programs keep
        self._preprocessing = preprocessing
        self._walker: Any = (
            TracedTail(cast(fx.GraphModule, self.tail), network.names)
            if isinstance(network.tail, TracedTail)
            else GeneralTail(self.tail, network.names)
        )
        body, weight, bias = network.views(coef)
        moved = any(bool(v.any()) for v in body.values())
        self._names = list(network.names) if moved else []
        for i, name in enumerate(self._names):
            self.register_buffer(f"change_{i}", body[name].clone())
        # f_w0 or what stands for it, the change of the head and the unit in one layer.
        if intercept is None:
            weight, bias = weight + network.weight, bias + network.bias
        else:
            bias = bias + intercept
        self.register_buffer("weight", unit.unsqueeze(1) * weight)
        self.register_buffer("bias", unit * bias)
        self.register_buffer("gradient", unit.unsqueeze(1) * network.feature_gradient)
        known = network.standardization
        self.register_buffer("shift", torch.zeros_like(unit[:1]) if known is None else known.shift.clone())
        self.register_buffer("scale", torch.ones_like(unit[:1]) if known is None else known.scale.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (B, n_outputs)."""
        x = images if self._preprocessing is None else self._preprocessing.normalize(images)
        features, values = self._walker.primal(self.trunk(x))
        outputs = nn.functional.linear((features - self.shift) / self.scale, self.weight, self.bias)
        if not self._names:
            return outputs
        direction = {name: getattr(self, f"change_{i}") for i, name in enumerate(self._names)}
        # Nothing here needs gradients, so that autograd need not be switched off, which would be part of a program.
        walk = self._walker.walk if isinstance(self._walker, TracedTail) else self._walker.tangents
        return outputs + nn.functional.linear(cast(Tensor, walk(values, direction)), self.gradient)


class ServingMixin:
    """`to_module`; for estimators with a linear model."""

    def to_module(self: Any) -> LinearizedModule:
        """Make a module of torch that computes the outputs of the fitted model.

        Returns
        -------
        module : nn.Module
            Maps images (B, C, H, W), channels first, of the size and dtype of the model and in [0, 1], or vectors
            (B, n_features), to outputs (B, n_outputs): estimates of the class indicators, or target values. It is a
            copy on the device of the model.

        Notes
        -----
        Resizing and the decision are the caller's: for more than two classes the outputs are those of
        ``decision_function``, the class is their argmax, and probabilities are their softmax over ``temperature_``.
        ``torch.export.export`` with ``strict=False`` makes a program of it, ``torch.onnx.export`` (extra ``onnx``) one
        for other runtimes; the number of images may be dynamic where every layer has a rule for its tangent, which
        convolutional networks do and LayerNorm does not.
        """
        check_is_fitted(self)
        model = self._model
        like = {"device": model.device, "dtype": model.dtype}
        intercept = None if self.intercept_ is None else torch.tensor(self.intercept_ / self._unit, **like)
        coef, unit = (torch.tensor(v, **like) for v in (self.coef_, self._unit))
        return LinearizedModule(model.network, model.preprocessing, coef, intercept, unit)
