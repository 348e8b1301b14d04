"""Jacobian products of a network at its pre-trained weights.

Hides the head, which is not part of the tail, and the layout of parameters. Every Jacobian product of the package is
computed here. For other modules parameters, directions and gradients are one flat vector (P,).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils import _pytree as pytree

from ..runtime.arithmetic import DUAL_NUMBERS
from .rewrite import is_plain, plain_attention
from .tails import GeneralTail, TracedTail
from .tracing import Split

__all__ = ["LinearizedNetwork", "Point", "walker"]

# Until torch 2.13 group_norm has no forward-mode derivative for channels-last input, and gradients with respect to its
# parameters without that of its input end the process. Tails that have or may have it are evaluated in torch's default
# layout.
_GROUP_NORM_IS_CHANNELS_LAST = torch.__version__ >= "2.14"  # compared as versions, not as texts


def _may_norm_groups(split: Split) -> bool:
    """Whether the tail evaluates, or may evaluate, group_norm; a tail that does not trace may."""
    if not split.traced or any(isinstance(m, nn.GroupNorm) for m in split.tail.modules()):
        return True
    functions = (torch.group_norm, torch.nn.functional.group_norm)
    return any(node.target in functions for node in cast(fx.GraphModule, split.tail).graph.nodes)


def walker(split: Split) -> tuple[TracedTail | GeneralTail, bool]:
    """The walker that evaluates and differentiates the tail, and whether its inputs need torch's default layout."""
    default_layout = not _GROUP_NORM_IS_CHANNELS_LAST and _may_norm_groups(split)
    if default_layout:
        split.tail.to(memory_format=torch.contiguous_format)
    if split.traced:
        return TracedTail(cast(fx.GraphModule, split.tail), split.tangent), default_layout
    return GeneralTail(split.tail, split.tangent, split.read), default_layout


class Point:
    """A network linearized on one batch. The network is evaluated once, and all products share this evaluation.

    Attributes
    ----------
    features : Tensor of shape (B, D)
        Input of the head at w0.
    outputs : Tensor of shape (B, C)
        f_w0, without a graph of derivatives.
    """

    def __init__(self, network: LinearizedNetwork, inputs: Sequence[Tensor], gradients: bool):
        self._network, self._gradients = network, gradients
        self._values: dict[Any, Any]
        with torch.set_grad_enabled(gradients):
            self._graph, self._values = network.tail.primal(network.laid_out(inputs))
        self.features = self._graph.detach()
        self.outputs = torch.nn.functional.linear(self.features, network.weight, network.bias)

    def jvp(self, direction: Tensor) -> Tensor:
        """J d for a direction (P,): shape (B, C)."""
        net = self._network
        body, weight, bias = net.views(direction)
        out = torch.nn.functional.linear(self.features, weight, bias)
        dot = net.tail.tangents(self._values, body) if any(bool(v.any()) for v in body.values()) else None
        return out if dot is None else out + torch.nn.functional.linear(dot, net.weight)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J' u for a cotangent (B, C): shape (P,). The graph is kept for further products."""
        return self.add_vjp(cotangent, cotangent.new_zeros(self._network.n_parameters))

    def add_vjp(self, cotangent: Tensor, total: Tensor) -> Tensor:
        """Add J' u to a vector (P,) in place, without a copy of the gradients."""
        net = self._network
        if not self._gradients:
            raise RuntimeError("the network was evaluated with gradients=False, for jvp alone")
        body, weight, bias = net.views(total)
        if self._graph.requires_grad:
            parameters = dict(zip(net.names, net.parameters, strict=True))
            found = net.tail.gradients(self._graph, self._values, cotangent @ net.weight, parameters)
            for name, gradient in found:
                body[name].add_(gradient)
        weight.addmm_(cotangent.T, self.features)
        bias.add_(cotangent.sum(0))
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of the activations that the point keeps."""
        tensors = (v for v in pytree.tree_leaves(list(self._values.values())) if isinstance(v, Tensor))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

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
        Trunk and tail; their modules are used without a copy and must not be shared.
    weight : Tensor of shape (C, D)
        Head weight at which the network is linearized.
    bias : Tensor of shape (C,)

    Attributes
    ----------
    n_parameters : int
        P. A flat vector has the tangent parameters of the tail in the order of ``names``, then head weight, then head
        bias.
    slices : dict of str to slice
        Place of each parameter in a flat vector; those of the head are ``"head.weight"`` and ``"head.bias"``.

    References
    ----------
    Achille et al., "LQF: Linear Quadratic Fine-Tuning", CVPR 2021, section 3 (arXiv 2012.11140).
    """

    def __init__(self, split: Split, weight: Tensor, bias: Tensor):
        self.trunk = split.trunk
        self.weight, self.bias = weight, bias
        self.names = list(split.tangent)
        with DUAL_NUMBERS:  # other threads may use the same tail
            owned = dict(split.tail.named_parameters())
            self.parameters = [owned[n].requires_grad_(True) for n in self.names]
        self.module = split.tail
        self.tail, self._default_layout = walker(split)
        self._shapes = [p.shape for p in self.parameters] + [weight.shape, bias.shape]
        offsets = [0, *itertools.accumulate(s.numel() for s in self._shapes)]
        keys = [*self.names, "head.weight", "head.bias"]
        self.slices = {k: slice(a, b) for k, (a, b) in zip(keys, itertools.pairwise(offsets), strict=True)}
        self.n_parameters = offsets[-1]

    def at(self, inputs: Sequence[Tensor], gradients: bool = True) -> Point:
        """Evaluate the tail on one batch of trunk activations.

        Parameters
        ----------
        inputs : sequence of Tensor
            Each of shape (B, ...).
        gradients : bool
            False saves memory if only `Point.jvp` is needed.
        """
        return Point(self, inputs, gradients)

    def laid_out(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Trunk activations in the layout of memory in which the tail is evaluated."""
        return [z.contiguous() for z in inputs] if self._default_layout else inputs

    def views(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """A flat vector (P,) as tail parameters by name, head weight (C, D) and head bias (C,)."""
        pieces = [vector[s].view(shape) for s, shape in zip(self.slices.values(), self._shapes, strict=True)]
        return dict(zip(self.names, pieces[:-2], strict=True)), pieces[-2], pieces[-1]

    def kronecker_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Linear and two-dimensional convolution layers whose weight is linearized, by name."""
        return {
            name: cast("nn.Linear | nn.Conv2d", m)
            for name, m in self.tail.layers().items()
            if f"{name}.weight" in self.slices and is_plain(m, (nn.Linear, nn.Conv2d))
        }

    def sample_jacobians(self, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Jacobians of each image's outputs with respect to some parameters of the tail.

        Parameters
        ----------
        inputs : sequence of Tensor
            Trunk activations, each of shape (B, ...).
        names : sequence of str

        Returns
        -------
        dict of str to Tensor of shape (B, C, *parameter.shape)
        """
        inputs = self.laid_out(inputs)
        if isinstance(self.tail, GeneralTail):
            return self._jacobians_one_by_one(inputs, names)
        chosen = {n: p.detach() for n, p in zip(self.names, self.parameters, strict=True) if n in set(names)}

        def outputs(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
            features = functional_call(self.module, parameters, tuple(r.unsqueeze(0) for r in row))
            return torch.nn.functional.linear(features, self.weight).squeeze(0)

        # Gradients inside jacrev do not depend on the outer no_grad, which keeps the result free of a graph.
        with DUAL_NUMBERS, torch.no_grad(), plain_attention(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # users cannot avoid it
            return vmap(jacrev(outputs), in_dims=(None, *(0 for _ in inputs)))(chosen, *inputs)

    def _jacobians_one_by_one(self, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The same without vmap, which forbids control flow that depends on the data."""
        chosen = {n: p for n, p in zip(self.names, self.parameters, strict=True) if n in set(names)}
        found: dict[str, list[Tensor]] = {n: [] for n in chosen}
        for row in zip(*inputs, strict=True):
            with torch.enable_grad():
                features, _ = self.tail.primal([z.unsqueeze(0) for z in row])
            for w in self.weight:
                grads = torch.autograd.grad(
                    features, list(chosen.values()), w.unsqueeze(0), retain_graph=True, materialize_grads=True
                )
                for name, g in zip(chosen, grads, strict=True):
                    found[name].append(g.detach())  # in older torch the zeros that are filled in require gradients
        return {n: torch.stack(g).view(-1, len(self.weight), *chosen[n].shape) for n, g in found.items()}
