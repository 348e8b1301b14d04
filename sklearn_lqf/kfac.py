"""Kronecker-factored preconditioner of the Gauss-Newton matrix.

Hides the layout of layers: convolutions as patches, groups, biases as a column of ones, and the damped
inverse. Knows no network and no data: it is fed inputs and output gradients of layers.

For one layer with inputs a (T, m) and output gradients g (T, o) at T positions, the Jacobian of one output is
J = g' a, and the block of the Gauss-Newton matrix is the sum of vec(J) vec(J)' over images and outputs. It is
approximated by L (x) R / tau with the partial traces L = sum J J' (o, o), R = sum J' J (m, m) and
tau = sum |J|^2. This is K-FAC wherever K-FAC is exact (one position, one datum, gradients that do not depend on
the data); over several positions it keeps the correlations between them, which the usual factors
sum g g' and sum a a' neglect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HeadBlock", "KFAC", "KroneckerBlock", "SmallBlock"]

_EIGH_MAX = 2560  # rows up to which a factor is diagonalized; above, the inverse is by Cholesky
_DENSE_MAX = 8192  # rows above which a factor is replaced by its diagonal
_EXACT_MAX = 64  # parameters of one group of a convolution up to which its block is exact (depthwise)
_CHUNK = 1 << 25  # elements of patches unfolded at once


class KroneckerBlock:
    """Curvature of the weight and bias of one Linear or Conv2d, accumulated over batches.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Gives the geometry; groups have blocks of their own.
    weight, bias : slice or None
        Where the parameters lie in a flat vector (P,); None: not linearized.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: slice, bias: slice | None):
        self.layer, self.weight, self.bias = layer, weight, bias
        self.groups = getattr(layer, "groups", 1)
        out, rest = layer.weight.shape[0], layer.weight[0].numel()
        self.o, self.m = out // self.groups, rest + (bias is not None)
        self.exact = self.o * self.m <= _EXACT_MAX and self.groups > 1
        zeros = {"dtype": torch.float64, "device": layer.weight.device}
        self.diagonal = self.m > _DENSE_MAX
        if self.exact:
            self.block = torch.zeros(self.groups, self.o * self.m, self.o * self.m, **zeros)
        else:
            self.left = torch.zeros(self.groups, self.o, self.o, **zeros)
            self.right = torch.zeros(self.groups, self.m, *(() if self.diagonal else (self.m,)), **zeros)

    def update(
        self, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], weights: Tensor
    ) -> None:
        """Add one batch.

        Parameters
        ----------
        inputs : sequence of Tensor
            Input of each evaluation of the layer (several when it is shared), (B, ..., features).
        gradients : sequence over outputs of sequence over evaluations
            Gradient with respect to the layer's output, one for each of the network's outputs or probes.
        weights : Tensor of shape (B,)
        """
        if self.exact:
            self._accumulate_exact(inputs, gradients, weights)
            return
        size = sum(g[0].numel() for g in gradients[0]) // self.o * self.m
        rows = max(1, min(len(weights), _CHUNK // max(size, 1)))
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            a = torch.cat([self._patches(x[part]) for x in inputs], 2)  # (B, G, T, m)
            g = torch.cat([self._outputs([g[i][part] for g in gradients]) for i in range(len(inputs))], 3)
            self._accumulate(a, g * weights[part].sqrt().view(-1, 1, 1, 1, 1))

    def _accumulate(self, a: Tensor, g: Tensor) -> None:
        """Add patches (B, G, T, m) and gradients (B, G, K, T, o)."""
        batch, groups, k, positions, o = g.shape
        if positions * (self.m + k * o) < k * o * self.m and not self.diagonal:
            gram = a @ a.mT  # (B, G, T, T)
            joint = g.transpose(2, 3).reshape(batch, groups, positions, k * o)
            weighted = (gram @ joint).view(batch, groups, positions, k, o).transpose(2, 3)
            self.left += _contract(g.flatten(2, 3), weighted.flatten(2, 3))
            self.right += _contract(a, (joint @ joint.mT) @ a)
        else:
            for j in (g[:, :, i].mT @ a for i in range(k)):  # (B, G, o, m)
                self.left += _contract(j.mT, j.mT)
                self.right += j.double().square().sum((0, 2)) if self.diagonal else _contract(j, j)

    def _accumulate_exact(
        self, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], weights: Tensor
    ) -> None:
        """Add the outer products of each image's own gradient of a group: images become groups of one convolution."""
        layer, batch = self.layer, len(weights)
        shape = torch.Size((batch * layer.weight.shape[0], *layer.weight.shape[1:]))
        padded = [p.reshape(1, -1, *p.shape[2:]) for p in map(self._padded, inputs)]
        for probe in gradients:
            j = torch.zeros(batch, self.groups, self.o, self.m, dtype=weights.dtype, device=weights.device)
            for x, g in zip(padded, probe, strict=True):
                folded = g.reshape(1, -1, *g.shape[2:])
                grad = torch.nn.grad.conv2d_weight(
                    x, shape, folded, layer.stride, 0, layer.dilation, batch * self.groups
                )
                j[..., : shape[1:].numel()] += grad.view(batch, self.groups, self.o, -1)
                if self.bias is not None:
                    j[..., -1] += g.sum((2, 3)).view(batch, self.groups, self.o)
            j = (j * weights.sqrt().view(-1, 1, 1, 1)).transpose(0, 1).reshape(self.groups, batch, -1)
            self.block += j.mT @ j

    def _padded(self, x: Tensor) -> Tensor:
        pad = self.layer._reversed_padding_repeated_twice
        mode = "constant" if self.layer.padding_mode == "zeros" else self.layer.padding_mode
        return F.pad(x, pad, mode=mode) if any(pad) else x

    def _patches(self, x: Tensor) -> Tensor:
        """Inputs of each position, (B, G, T, m), with a last column of ones for the bias."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            a = x.reshape(x.shape[0], 1, -1, x.shape[-1])
        else:
            x = self._padded(x)
            if layer.kernel_size == (1, 1):
                a = x[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
            else:
                a = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # (B, G m, T)
            a = a.view(x.shape[0], self.groups, -1, a.shape[-1]).transpose(2, 3)
        if self.bias is None:
            return a
        out = a.new_ones(*a.shape[:3], self.m)
        out[..., :-1] = a
        return out

    def _outputs(self, gradients: Sequence[Tensor]) -> Tensor:
        """Output gradients of each position for all probes, (B, G, K, T, o)."""
        g = torch.stack(list(gradients), 1)
        if isinstance(self.layer, nn.Linear):
            return g.reshape(g.shape[0], 1, g.shape[1], -1, g.shape[-1])
        g = g.reshape(g.shape[0], g.shape[1], self.groups, self.o, -1)
        return g.permute(0, 2, 1, 4, 3)

    @property
    def trace(self) -> float:
        """tau: trace of the block of the Gauss-Newton matrix (exact, whatever the factors)."""
        source = self.block if self.exact else self.left
        return float(source.diagonal(dim1=-2, dim2=-1).sum())

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        """Prepare the inverse of the block plus ``ridge`` times the identity, in float64."""
        if self.exact:
            values, self.basis = _eigh(self.block)
            self.values = (1 / (values + ridge)).to(dtype)  # (G, o m)
            self.basis = self.basis.to(dtype)
            del self.block
            return
        tau = self.left.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)  # (G,)
        left, right = self.left / tau.view(-1, 1, 1), self.right
        del self.left, self.right
        self.cholesky = not self.diagonal and max(self.o, self.m) > _EIGH_MAX
        if self.cholesky:
            # factored Tikhonov damping with the traces balanced: Martens & Grosse 2015, section 6.3
            mean = right.diagonal(dim1=-2, dim2=-1).mean(-1) / left.diagonal(dim1=-2, dim2=-1).mean(-1)
            pi = mean.clamp_min(1e-300).sqrt()
            self.left_inverse = _inverse(left, ridge**0.5 / pi).to(dtype)
            self.right_inverse = _inverse(right, ridge**0.5 * pi).to(dtype)
            return
        l_values, l_basis = _eigh(left)
        r_values, r_basis = (right, None) if self.diagonal else _eigh(right)
        self.left_basis, self.right_basis = l_basis.to(dtype), None if r_basis is None else r_basis.to(dtype)
        self.values = (1 / (l_values.unsqueeze(2) * r_values.unsqueeze(1) + ridge)).to(dtype)  # (G, o, m)

    def apply(self, vector: Tensor, out: Tensor) -> None:
        """Write the inverse times the layer's part of ``vector`` into ``out``, both (P,)."""
        v = vector[self.weight].view(self.groups, self.o, -1)
        if self.bias is not None:
            v = torch.cat([v, vector[self.bias].view(self.groups, self.o, 1)], 2)
        if self.exact:
            v = self.basis @ (self.values.unsqueeze(2) * (self.basis.mT @ v.reshape(self.groups, -1, 1)))
            v = v.view(self.groups, self.o, self.m)
        elif self.cholesky:
            v = self.left_inverse @ v @ self.right_inverse
        elif self.right_basis is None:
            v = self.left_basis @ (self.values * (self.left_basis.mT @ v))
        else:
            v = self.values * (self.left_basis.mT @ v @ self.right_basis)
            v = self.left_basis @ v @ self.right_basis.mT
        if self.bias is not None:
            out[self.bias] = v[:, :, -1].reshape(-1)
            v = v[:, :, :-1]
        out[self.weight] = v.reshape(-1)


class HeadBlock:
    """Curvature of the head on features (B, D): exact, ``sum_i s_i [x 1]' [x 1]`` once for each output."""

    def __init__(self, n_outputs: int, n_features: int, weight: slice, bias: slice, device: torch.device):
        self.n_outputs, self.weight, self.bias = n_outputs, weight, bias
        self.right = torch.zeros(n_features + 1, n_features + 1, dtype=torch.float64, device=device)

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Add one batch: features (B, D), weights (B,)."""
        x = F.pad(features, (0, 1), value=1.0) * weights.sqrt().unsqueeze(1)
        self.right += (x.T @ x).double()

    @property
    def trace(self) -> float:
        return self.n_outputs * float(self.right.diagonal().sum())

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        self.inverse = _inverse(self.right, self.right.new_tensor(ridge)).to(dtype)
        del self.right

    def apply(self, vector: Tensor, out: Tensor) -> None:
        v = torch.cat([vector[self.weight].view(self.n_outputs, -1), vector[self.bias].unsqueeze(1)], 1)
        v = v @ self.inverse
        out[self.weight], out[self.bias] = v[:, :-1].reshape(-1), v[:, -1]


class SmallBlock:
    """Curvature of any other parameters (norms, position embeddings ...): an exact block, or its diagonal.

    Parameters
    ----------
    slices : sequence of slice
        Where the parameters lie in a flat vector; they share one block.
    dense_max : int
        Number of parameters up to which the block is dense.
    """

    def __init__(self, slices: Sequence[slice], device: torch.device, dense_max: int = 512):
        self.slices = list(slices)
        size = sum(s.stop - s.start for s in slices)
        self.dense = size <= dense_max
        self.block = torch.zeros(size, *((size,) if self.dense else ()), dtype=torch.float64, device=device)

    def update(self, jacobians: Sequence[Tensor], weights: Tensor) -> None:
        """Add one batch: Jacobians (B, C, ...) of each parameter, weights (B,)."""
        j = torch.cat([j.flatten(2) for j in jacobians], 2) * weights.sqrt().view(-1, 1, 1)
        j = j.flatten(0, 1).double()  # (B C, size)
        self.block += j.T @ j if self.dense else j.square().sum(0)

    @property
    def trace(self) -> float:
        return float(self.block.diagonal().sum() if self.dense else self.block.sum())

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        if self.dense:
            values, basis = _eigh(self.block)
            self.values, self.basis = (1 / (values + ridge)).to(dtype), basis.to(dtype)
        else:
            self.values = (1 / (self.block + ridge)).to(dtype)
        del self.block

    def apply(self, vector: Tensor, out: Tensor) -> None:
        v = torch.cat([vector[s] for s in self.slices])
        v = self.basis @ (self.values * (self.basis.T @ v)) if self.dense else self.values * v
        for s, piece in zip(self.slices, v.split([s.stop - s.start for s in self.slices]), strict=True):
            out[s] = piece


class KFAC:
    """Block-diagonal preconditioner: ``P v ~ (G + ridge I)^-1 v`` for the Gauss-Newton matrix G.

    Parameters
    ----------
    blocks : sequence of KroneckerBlock, SmallBlock and HeadBlock
        Together they own every parameter once.

    References
    ----------
    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock | SmallBlock | HeadBlock]):
        self.blocks = list(blocks)

    @property
    def trace(self) -> float:
        """Trace of the Gauss-Newton matrix."""
        return sum(b.trace for b in self.blocks)

    def factorize(self, ridge: float, dtype: torch.dtype) -> KFAC:
        """Invert the damped blocks, once; the accumulated factors are released."""
        for block in self.blocks:
            block.factorize(ridge, dtype)
        return self

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply the inverse to a flat vector (P,)."""
        out = torch.empty_like(vector)
        for block in self.blocks:
            block.apply(vector, out)
        return out


def _contract(x: Tensor, y: Tensor) -> Tensor:
    """sum over images and positions of x' y for (B, G, T, p) and (B, G, T, q): (G, p, q) in float64."""
    groups, p, q = x.shape[1], x.shape[3], y.shape[3]
    return (x.transpose(0, 1).reshape(groups, -1, p).mT @ y.transpose(0, 1).reshape(groups, -1, q)).double()


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at zero) and eigenvectors of symmetric positive matrices (..., n, n)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(0), vectors


def _inverse(matrix: Tensor, ridge: Tensor) -> Tensor:
    """(M + ridge I)^-1 of symmetric positive matrices (..., n, n), ridge (...)."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_inverse(
        torch.linalg.cholesky((matrix + matrix.mT) / 2 + ridge[..., None, None] * eye)
    )
