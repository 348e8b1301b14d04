"""Tangent features: the gradients of a layer's weight along fixed directions in feature space, in few columns.

Hides how the gradient of an image is made small without being made. With inputs a (T, m) and output gradients g (T, o)
of a layer at T positions, the gradient of u . phi is G = g' a. Its Kronecker sketch is R_o' G R_a = (g R_o)' (a R_a),
with random matrices R_o (o, p) and R_a (m, q): the inner products of sketches have those of the gradients as their
expectation. The sketches of all directions, each with matrices of its own, are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
            Input of the layer, for ``rows`` images one after the other; each may have several rows, as of windows.
        rows : int

        Returns
        -------
        Tensor of shape (rows, T, K, q) or, of a convolution in groups, (rows, groups, m, T)
        """
        layer, beside = self.layer, self.right.transpose(0, 1).flatten(1)  # (m, K q)
        if isinstance(layer, nn.Linear):
            found = x.reshape(rows, -1, x.shape[-1]) @ beside
        elif layer.groups > 1:
            return _by_image(_patches(x, layer), rows).unflatten(1, (layer.groups, -1))
        else:  # the products of all patches with R_a are a convolution
            kernel = beside.T.view(-1, layer.in_channels, *layer.kernel_size)
            found = nn.functional.conv2d(_padded(x, layer), kernel, None, layer.stride, 0, layer.dilation)
            found = _by_image(found.flatten(2), rows).mT
        return found.unflatten(2, (len(self.right), -1))

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
        rows, left = inputs.shape[0], self.left[k]
        if isinstance(self.layer, nn.Linear):
            g = gradient.reshape(rows, -1, gradient.shape[-1])
        else:
            g = _by_image(gradient.flatten(2), rows).mT  # (rows, T, o)
            if self.layer.groups > 1:
                grouped = g.mT.unflatten(1, (self.layer.groups, -1))
                whole = (grouped @ inputs.mT).flatten(1, 2)  # (rows, o, m): in groups the gradient itself is small
                return (left.T @ whole @ self.right[k]).flatten(1)
        return ((g @ left).mT @ inputs[:, :, k]).flatten(1)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Columns (rows, size) of the `features` of each direction."""
        return torch.stack(list(parts)).sum(0) if self.summed else torch.cat(list(parts), 1)

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerSketch:
        """The same on a device."""
        return replace(self, left=self.left.to(device, dtype), right=self.right.to(device, dtype))


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
    left, right = (_side(d, n_directions, size, generator) for d in (o, m))
    if size is not None and max(o, m) <= size:
        # Unlike that of normal matrices, the mean of rotations from a QR decomposition is not zero: signs make it so.
        left = left * (torch.randint(0, 2, (n_directions, 1, 1), generator=generator).double() * 2 - 1)
    return LayerSketch(layer, left, right, size is not None)


def _side(d: int, k: int, size: int | None, generator: torch.Generator) -> Tensor:
    """Matrices (k, d, min(d, size)) whose products R R' are the identity, or have it as expectation."""
    if size is None:
        return torch.eye(d, dtype=torch.float64).expand(k, d, d)
    if d <= size:
        # A random rotation for each direction: exact, and sums over directions do not mix their gradients.
        return torch.linalg.qr(torch.randn(k, d, d, generator=generator, dtype=torch.float64))[0]
    return torch.randn(k, d, size, generator=generator, dtype=torch.float64) / size**0.5


def _by_image(x: Tensor, rows: int) -> Tensor:
    """(rows W, c, T) as (rows, c, W T)."""
    return x if x.shape[0] == rows else x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The input with the padding of the convolution around it."""
    if conv.padding_mode == "zeros" and not any(conv._reversed_padding_repeated_twice):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


def _patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Patches (B, in_channels * elements of a kernel, T)."""
    return nn.functional.unfold(_padded(x, conv), conv.kernel_size, conv.dilation, 0, conv.stride)
