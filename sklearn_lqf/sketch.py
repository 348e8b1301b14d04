"""Tangent features: the gradients of a layer's weight along fixed directions in feature space, in few columns.

Hides how the gradient of an image is made small without being made. With inputs a (T, m) and output gradients g (T, o)
of a layer at T positions, the gradient of u . phi is G = g' a. Its Kronecker sketch is R_o' G R_a = (g R_o)' (a R_a),
with random matrices R_o (o, p) and R_a (m, q): the inner products of sketches have those of the gradients as their
expectation. The sketches of all directions, each with matrices of its own, are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LayerSketch", "draw_sketch", "sketch_size"]


@dataclass(frozen=True)
class LayerSketch:
    """The random matrices of one layer, for K directions.

    Attributes
    ----------
    layer : nn.Linear or nn.Conv2d
    left : Tensor of shape (K, o, p)
        R_o of each direction.
    right : Tensor of shape (K, m, q)
        R_a of each direction; m counts the inputs of a group of a convolution times the elements of its kernel.
    summed : bool
        Whether the sketches of the directions are summed. Identities in the place of random matrices make exact
        gradients, which stand side by side.
    """

    layer: nn.Linear | nn.Conv2d
    left: Tensor
    right: Tensor
    summed: bool = True

    @property
    def size(self) -> int:
        """Columns of the features."""
        each = self.left.shape[2] * self.right.shape[2]
        return each if self.summed else each * len(self.left)

    def inputs(self, x: Tensor, rows: int) -> Tensor:
        """What the input of a call brings, the same for all directions; see `features`.

        Parameters
        ----------
        x : Tensor
            Input of the layer, for ``rows`` images one after the other.
        rows : int

        Returns
        -------
        Tensor of shape (rows, T, K, q) or, of a convolution in groups, (rows, groups, m, T)
        """
        if isinstance(self.layer, nn.Linear):
            return (x.reshape(rows, -1, x.shape[-1]) @ self._beside(self.right)).unflatten(2, (len(self.right), -1))
        conv = self.layer
        if conv.groups > 1:
            return _patches(x, conv).view(rows, conv.groups, self.right.shape[1], -1)
        # The products of all patches with R_a are a convolution.
        kernel = self._beside(self.right).T.view(-1, conv.in_channels, *conv.kernel_size)
        padded = _padded(x, conv)
        found = nn.functional.conv2d(padded, kernel, None, conv.stride, 0, conv.dilation)
        return found.flatten(2).mT.unflatten(2, (len(self.right), -1))

    def features(self, inputs: Tensor, gradient: Tensor, k: int) -> Tensor:
        """R_o' G R_a for direction k, (rows, p q).

        Parameters
        ----------
        inputs : Tensor
            Of `inputs`, for this call of the layer.
        gradient : Tensor
            Gradient of u_k . phi with respect to the output of this call.
        k : int
        """
        rows, left = len(inputs), self.left[k]
        if isinstance(self.layer, nn.Linear):
            g = gradient.reshape(rows, -1, gradient.shape[-1])
            return ((g @ left).mT @ inputs[:, :, k]).flatten(1)
        if self.layer.groups == 1:
            g = gradient.flatten(2).mT  # (rows, T, o)
            return ((g @ left).mT @ inputs[:, :, k]).flatten(1)
        g = gradient.view(rows, self.layer.groups, -1, inputs.shape[3])
        whole = (g @ inputs.mT).flatten(1, 2)  # (rows, o, m): in groups the gradient itself is small
        return (left.T @ whole @ self.right[k]).flatten(1)

    @staticmethod
    def _beside(matrices: Tensor) -> Tensor:
        """(K, m, q) as (m, K q)."""
        return matrices.transpose(0, 1).flatten(1)

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerSketch:
        """The same on a device."""
        return LayerSketch(self.layer, self.left.to(device, dtype), self.right.to(device, dtype), self.summed)


def sketch_size(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """(o, m): rows and columns of the weight as a matrix."""
    return layer.weight.shape[0], layer.weight[0].numel()


def draw_sketch(
    layer: nn.Linear | nn.Conv2d, n_directions: int, size: int | None, generator: torch.Generator
) -> LayerSketch:
    """The sketch of one layer.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
    n_directions : int
        K.
    size : int or None
        Columns of the random matrices. A side of the weight that is not larger is kept as it is. None: all sides,
        and the exact gradients of all directions side by side.
    generator : torch.Generator
        Of the CPU.

    Returns
    -------
    LayerSketch
        In float64 on the CPU.
    """
    o, m = sketch_size(layer)
    summed = size is not None
    sides = [_side(d, n_directions, size, generator) for d in (o, m)]
    if summed and o <= size and m <= size:  # neither is random: signs keep the directions apart
        signs = torch.randint(0, 2, (n_directions, 1, 1), generator=generator).double() * 2 - 1
        sides[0] = sides[0] * signs
    return LayerSketch(layer, *sides, summed)


def _side(d: int, k: int, size: int | None, generator: torch.Generator) -> Tensor:
    """Matrices (k, d, min(d, size)) whose products R R' are the identity, or have it as expectation."""
    if size is None:
        return torch.eye(d, dtype=torch.float64).expand(k, d, d)
    if d <= size:
        # A random rotation for each direction: exact, and sums over directions do not mix their gradients.
        return torch.linalg.qr(torch.randn(k, d, d, generator=generator, dtype=torch.float64))[0]
    return torch.randn(k, d, size, generator=generator, dtype=torch.float64) / size**0.5


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The input with the padding of the convolution around it."""
    if conv.padding_mode == "zeros" and not any(conv._reversed_padding_repeated_twice):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


def _patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Patches (rows, in_channels kernel, T)."""
    return nn.functional.unfold(_padded(x, conv), conv.kernel_size, conv.dilation, 0, conv.stride)
