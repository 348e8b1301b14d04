"""The tangent kernel: inner products of the Jacobians of images, without the Jacobians.

Hides how a layer's part is cheapest. With inputs a (T, m) and output gradients g (T, o) of a layer at T positions, the
Jacobian of one output is J = g' a, and <J, J'> is the sum over pairs of positions of (a . a')(g . g'): products of
small matrices where positions are few, and of the Jacobians themselves where they are many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kfac import KroneckerBlock
from .linearize import LinearizedNetwork, _full_precision
from .objective import kronecker_blocks, layer_gradients

__all__ = ["tangent_kernel"]

Batch = Sequence[Tensor]
_PRODUCTS = 1 << 26  # elements of the largest intermediate result
_SIDES_BYTES = 1 << 30  # of patches and output gradients kept between products
_IMAGE_JACOBIANS = 1 << 20  # elements of the Jacobians of one image by one layer that are kept
_JACOBIANS = 16  # images whose Jacobians by other parameters are evaluated at once


def tangent_kernel(
    network: LinearizedNetwork,
    batches: Sequence[Batch],
    others: Sequence[Batch] | None = None,
    tail_scale: float = 1.0,
) -> Tensor:
    """K = J J' between the outputs of two sets of rows.

    Parameters
    ----------
    network : LinearizedNetwork
    batches : sequence of batches
        Trunk activations of n rows.
    others : sequence of batches or None
        Of m rows; None: the same.
    tail_scale : float
        Multiplies the Jacobian of the tail, beside the network's own.

    Returns
    -------
    Tensor of shape (n, C, m, C)
        In float64 on the CPU.
    """
    blocks, _ = kronecker_blocks(network, batches[0])
    rest = [n for n in network.names if n.rpartition(".")[0] not in blocks]
    rows = []
    with _full_precision():
        right = _Sides(network, batches if others is None else others, blocks, rest)
        for a, batch in enumerate(batches):
            first = right[a] if others is None else _Side(network, batch, blocks, rest)
            count = a + 1 if others is None else len(others)
            rows.append(torch.cat([_product(first, right[k], tail_scale) for k in range(count)], 2))
    if others is not None:
        return torch.cat(rows)
    width = sum(r.shape[0] for r in rows)
    full = torch.cat([torch.nn.functional.pad(r, (0, 0, 0, width - r.shape[2])) for r in rows])
    flat = full.flatten(2).flatten(0, 1).tril()
    return (flat + flat.tril(-1).T).view_as(full)


class _Side:
    """What a batch brings to the product: features, and for each layer patches and output gradients, or Jacobians.

    Jacobians (B C, parameters) are those of layers in groups, where they are small, and of parameters outside layers.
    """

    def __init__(self, network: LinearizedNetwork, batch: Batch, blocks: dict[str, KroneckerBlock], rest: list[str]):
        n_outputs = len(network.weight)
        point = network.at(batch, gradients=bool(blocks))
        self.features, self.n_outputs = point.features.double(), n_outputs
        self.layers: dict[str, tuple[Tensor, Tensor]] = {}
        self.jacobians: list[Tensor] = []
        if blocks:
            rows = len(self.features)
            eye = torch.eye(n_outputs, dtype=network.weight.dtype, device=network.weight.device)
            for name, inputs, gradients in layer_gradients(point, blocks, eye.unsqueeze(1).expand(-1, rows, -1)):
                a, g = blocks[name].positions(inputs, gradients, rows)
                # Judged by one image, for batches of all sizes alike.
                elements = g[0, ..., 0, :].numel() * a.shape[3]  # of its Jacobians
                if a.shape[1] > 1 and elements <= min(_IMAGE_JACOBIANS, 2 * (a[0].numel() + g[0].numel())):
                    self.jacobians.append(_jacobians(a, g))
                else:
                    self.layers[name] = a, g
        if rest:
            parts = zip(*(z.split(_JACOBIANS) for z in batch), strict=True)
            found = [network.sample_jacobians(part, rest) for part in parts]
            pieces = [torch.cat([j[n].reshape(*j[n].shape[:2], -1) for n in rest], 2) for j in found]
            self.jacobians.append(torch.cat(pieces).double().flatten(0, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps."""
        tensors = [*self.jacobians, *(x for pair in self.layers.values() for x in pair)]
        return sum(x.untyped_storage().nbytes() for x in tensors)


class _Sides:
    """The sides of several batches, kept between products as far as memory is meant for them."""

    def __init__(
        self,
        network: LinearizedNetwork,
        batches: Sequence[Batch],
        blocks: dict[str, KroneckerBlock],
        rest: list[str],
    ):
        self._make = lambda k: _Side(network, batches[k], blocks, rest)
        self._kept: dict[int, _Side] = {}
        self._free = _SIDES_BYTES

    def __getitem__(self, k: int) -> _Side:
        if k in self._kept:
            return self._kept[k]
        side = self._make(k)
        if side.nbytes <= self._free:
            self._free -= side.nbytes
            self._kept[k] = side
        return side


@torch.no_grad()
def _product(first: _Side, second: _Side, tail_scale: float) -> Tensor:
    """K between two batches, (B, C, B', C)."""
    c = first.n_outputs
    tail = torch.zeros(
        len(first.features), c, len(second.features), c, dtype=torch.float64, device=first.features.device
    )
    for name in first.layers:
        tail += _layer_product(*first.layers[name], *second.layers[name])
    for j, q in zip(first.jacobians, second.jacobians, strict=True):
        tail += (j @ q.T).view_as(tail)
    head = (first.features @ second.features.T + 1).view(len(tail), 1, -1, 1)
    return (head * torch.eye(c).to(tail).view(1, c, 1, c) + tail_scale**2 * tail).cpu()


def _layer_product(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Part of a layer: patches a (B, G, T, m), gradients g (B, G, C, T, o) of both batches."""
    (rows, groups, c, t, o), (columns, _, _, u, _) = g.shape, h.shape
    m = a.shape[3]
    total = torch.zeros(rows, c, columns, c, dtype=torch.float64, device=a.device)
    if groups > 1 or c * c * o * m <= t * u * (m + c * c * o):  # groups have few inputs and outputs
        step = max(1, _PRODUCTS // (max(rows, columns) * c * o * m))
        for k in range(0, groups, step):
            part = slice(k, k + step)
            j, q = (_jacobians(x[:, part], y[:, part]) for x, y in ((a, g), (b, h)))
            total += (j @ q.T).view_as(total)
        return total
    step = max(1, _PRODUCTS // (t * columns * u * c * c))
    right_a, right_g = b[:, 0].flatten(0, 1), h[:, 0].transpose(0, 1).flatten(0, 2)  # (B' U, m), (C B' U, o)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        x, y = a[part, 0].flatten(0, 1), g[part, 0].flatten(0, 2)  # (B T, m), (B C T, o)
        near = (x @ right_a.T).view(-1, 1, t, 1, columns, u)
        along = (y @ right_g.T).view(-1, c, t, c, columns, u)
        total[part] += (near * along).sum((2, 5)).transpose(2, 3).double()  # (B, C, C, B') to (B, C, B', C)
    return total


def _jacobians(a: Tensor, g: Tensor) -> Tensor:
    """J of some groups as rows, (B C, G o m)."""
    rows, groups, c, _, o = g.shape
    j = g.mT.flatten(2, 3) @ a  # (B, G, C o, m): one product for all outputs
    return j.view(rows, groups, c, o, -1).transpose(1, 2).reshape(rows * c, -1)
