"""Kronecker-factored preconditioner (K-FAC) of the Gauss-Newton matrix.

Hides the layout of layers (convolutions as patches, groups, biases as a column of ones) and the damped inverse. It
knows no network and no data: callers pass inputs and output gradients of layers.

For one layer with inputs a (T, m) and output gradients g (T, o) at T positions, the Jacobian of one output is J = g' a,
and the block of the Gauss-Newton matrix is the sum of vec(J) vec(J)' over images and outputs. It is approximated by
L (x) R / tau with the partial traces L = sum J J' (o, o) and R = sum J' J (m, m), and tau = sum |J|^2. This has the
same trace. With one position it is trace-restricted K-FAC (Gao et al. 2021); then it is exact for one image, and for
gradients that do not depend on the image. With several positions it keeps the correlations between them, which the
usual factors sum g g' and sum a a' neglect.

Axes: B images, G groups, K probes (directions in the space of outputs), T positions, m inputs and o outputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..network.depthwise import are_few, image_gradients, is_wide_depthwise

__all__ = ["KFAC", "HeadBlock", "KroneckerBlock", "Sizes", "SmallBlock"]


@dataclass(frozen=True)
class Sizes:
    """Sizes that decide how the curvature of a layer is computed.

    Attributes
    ----------
    diagonalized : int
        Largest number of rows of a factor that is diagonalized. Larger factors are inverted by Cholesky, which is 20
        times faster.
    whole : int
        Largest number of rows of a factor that is kept whole. Of larger factors the Nyström approximation is kept.
    rank : int
        Rank of the Nyström approximation. Solvers take as many iterations with this rank as with whole factors.
    exact : int
        Largest number of parameters of one group of a convolution whose block is exact (depthwise).
    chunk : int
        Elements of the largest intermediate result of an update.
    """

    diagonalized: int = 256
    whole: int = 512
    rank: int = 128
    exact: int = 64
    chunk: int = 1 << 25


_SIZES = Sizes()


class KroneckerBlock:
    """Curvature of the weight and bias of one Linear or Conv2d, accumulated over batches.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Gives the geometry; each of its groups has a block of its own.
    weight : slice
        Place of the weight in a flat vector (P,).
    bias : slice or None
        Place of the bias; None: it is not linearized.
    sizes : Sizes
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: slice, bias: slice | None, sizes: Sizes = _SIZES):
        self.layer, self.weight, self.bias, self.sizes = layer, weight, bias, sizes
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.o = layer.weight.shape[0] // self.groups
        self.m = layer.weight[0].numel() + (bias is not None)
        self.exact = self.o * self.m <= sizes.exact and self.groups > 1
        if self.exact:
            self.block = self._zeros(self.o * self.m, self.o * self.m)
        else:
            self.left, self.right = (_Factor(self.groups, size, layer.weight, sizes) for size in (self.o, self.m))
            self.tau = self._zeros()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.groups, *shape, dtype=torch.float64, device=self.layer.weight.device)

    def update(self, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], weights: Tensor) -> None:
        """Add the curvature of one batch.

        Parameters
        ----------
        inputs : sequence of Tensor
            Input of each evaluation of the layer (several if it is called more than once). Linear: (B, ..., features),
            Conv2d: (B, channels, height, width). Each image may have several consecutive rows.
        gradients : sequence over probes of sequence over evaluations of Tensor
            Gradients with respect to the output of the layer, in its shape.
        weights : Tensor of shape (B,)
            s of the images.
        """
        batch = len(weights)
        images, probes = _by_image(inputs, gradients, batch)
        positions = sum(g[0].numel() for g in probes[0]) // (self.groups * self.o)
        by_gram = not self.exact and self._prefers_gram(positions, len(probes))
        elements = self.groups * max(
            positions * self.m, len(probes) * positions * self.o, positions**2 if by_gram else self.o * self.m
        )
        rows = max(1, self.sizes.chunk // elements)
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            x = [x[part] for x in images]
            g = [[g[part] for g in probe] for probe in probes]
            root = weights[part].sqrt()
            if self.exact:
                self._accumulate_exact(x, g, root)
                continue
            a, joint = self._positions(x, g)
            self._accumulate(a, joint * root.view(-1, 1, 1, 1, 1), by_gram)

    def _positions(self, images: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Patches (B, G, T, m) and output gradients (B, G, K, T, o), one evaluation of the layer after the other."""
        a = torch.cat([self._patches(x) for x in images], 2)
        return a, torch.cat([self._outputs([p[i] for p in probes]) for i in range(len(images))], 3)

    def _prefers_gram(self, positions: int, probes: int) -> bool:
        """Whether products between positions are cheaper than the Jacobians themselves."""
        t, k, o, m = positions, probes, self.o, self.m
        left, right = self.left.width, self.right.width
        return 2 * t * t * (m + k * o) + t * (k * o * left + m * right) < k * o * m * (t + left + right)

    def _accumulate(self, a: Tensor, g: Tensor, by_gram: bool) -> None:
        """Add patches (B, G, T, m) and gradients (B, G, K, T, o)."""
        batch, groups, k, positions, o = g.shape
        if by_gram:
            joint = g.transpose(2, 3).reshape(batch, groups, positions, k * o)
            weighted = ((a @ a.mT) @ joint).view(batch, groups, positions, k, o).transpose(2, 3)
            self.tau += (g * weighted).sum((0, 2, 3, 4), dtype=torch.float64)
            self.left.add(g.flatten(2, 3), weighted.flatten(2, 3))
            self.right.add(a, (joint @ joint.mT) @ a)
        else:
            for i in range(k):
                j = g[:, :, i].mT @ a  # (B, G, o, m)
                self.tau += j.square().sum((0, 2, 3), dtype=torch.float64)
                self.left.add(j.mT, j.mT)
                self.right.add(j, j)

    def _accumulate_exact(self, inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], root: Tensor) -> None:
        """Add outer products of each image's gradient of a group."""
        batch, kernel = len(root), self.layer.weight[0].numel()
        for probe in gradients:
            j = root.new_zeros(batch, self.groups, self.o, self.m)
            for x, g in zip(inputs, probe, strict=True):
                found = self._image_gradients(x.flatten(0, 1), g.flatten(0, 1))
                for part in found.view(batch, -1, self.groups, self.o, kernel).unbind(1):
                    j[..., :kernel] += part
                if self.bias is not None:
                    j[..., -1] += g.sum((1, 3, 4)).view(batch, self.groups, self.o)
            j = (j * root.view(-1, 1, 1, 1)).transpose(0, 1).reshape(self.groups, batch, -1)
            self.block += j.mT @ j

    def _image_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of the weight of a convolution for each image; by torch, images are groups of one convolution."""
        layer = cast(nn.Conv2d, self.layer)
        if is_wide_depthwise(layer) and are_few(x, g):
            return image_gradients(layer, x, g)
        groups = len(x) * self.groups
        shape = torch.Size((groups * self.o, *layer.weight.shape[1:]))
        x = self._padded(x)
        return conv2d_weight(
            x.reshape(1, -1, *x.shape[2:]), shape, g.reshape(1, -1, *g.shape[2:]),
            layer.stride, 0, layer.dilation, groups,
        )  # fmt: skip

    def _padded(self, x: Tensor) -> Tensor:
        """Images with the convolution's own padding, which may be asymmetric or not zero."""
        layer = cast(nn.Conv2d, self.layer)
        pad = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, pad, mode=mode) if any(pad) else x

    def _patches(self, x: Tensor) -> Tensor:
        """Inputs of each position, (B, G, T, m), with a last column of ones for the bias."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            a = x.reshape(x.shape[0], 1, -1, x.shape[-1])
        else:
            batch, padded = x.shape[0], self._padded(x.flatten(0, 1))
            if layer.kernel_size == (1, 1):
                a = padded[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
            else:
                a = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # (B, G m, T)
            a = a.reshape(batch, -1, self.groups, layer.weight[0].numel(), a.shape[-1])
            a = a.permute(0, 2, 1, 4, 3).flatten(2, 3)
        return a if self.bias is None else F.pad(a, (0, 1), value=1.0)

    def _outputs(self, gradients: Sequence[Tensor]) -> Tensor:
        """Output gradients of each position for all probes, (B, G, K, T, o)."""
        g = torch.stack(list(gradients), 1)
        if isinstance(self.layer, nn.Linear):
            return g.reshape(g.shape[0], 1, g.shape[1], -1, self.o)
        g = g.reshape(*g.shape[:3], self.groups, self.o, -1)
        return g.permute(0, 3, 1, 2, 5, 4).flatten(3, 4)

    @property
    def trace(self) -> float:
        """tau, the trace of the block of the Gauss-Newton matrix; exact even if the factors are approximations."""
        return float((_trace(self.block) if self.exact else self.tau).sum())

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        """The sums that were accumulated."""
        return (self.block,) if self.exact else (self.left.sum, self.right.sum, self.tau)

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        """Prepare the inverse of the block plus ``ridge`` times the identity; the factors are released."""
        if not all(bool(torch.isfinite(part).all()) for part in self._sums):
            raise ValueError(
                "The curvature is not finite: the network's derivatives overflow. Use "
                "execution={'dtype': 'float64'}, or check its weights."
            )
        if self.exact:
            self.solve = _dense_solve(self.block, ridge, dtype)
            del self.block
        else:
            diagonalized = max(self.o, self.m) <= self.sizes.diagonalized
            self.solve = _kronecker_solve(self.left, self.right, self.tau, ridge, dtype, diagonalized)
            del self.left, self.right, self.tau

    def apply(self, vector: Tensor, out: Tensor) -> None:
        """Write the inverse times the layer's part of ``vector`` into ``out``, both (P,)."""
        v = vector[self.weight].view(self.groups, self.o, -1)
        if self.bias is not None:
            v = torch.cat([v, vector[self.bias].view(self.groups, self.o, 1)], 2)
        v = self.solve(v)
        if self.bias is not None:
            out[self.bias] = v[:, :, -1].reshape(-1)
            v = v[:, :, :-1]
        out[self.weight] = v.reshape(-1)


class _Factor:
    """A symmetric positive semi-definite matrix M (n, n) for each group, accumulated over batches.

    Of a large matrix only M Omega is kept, with a random test matrix Omega (n, r). It gives the Nyström approximation
    of M (Frangella, Tropp & Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44, 2023).

    Parameters
    ----------
    groups, size : int
    like : Tensor
        Gives the dtype of what is added, and the device.
    sizes : Sizes

    Attributes
    ----------
    sum : Tensor of shape (G, n, n) or (G, n, r)
        M or M Omega, in float64.
    test : Tensor of shape (n, r) or None
        Omega.
    """

    def __init__(self, groups: int, size: int, like: Tensor, sizes: Sizes):
        self.test = None
        if size > sizes.whole:  # seeded by a constant: the same in all fits and processes
            generator = torch.Generator().manual_seed(0)
            self.test = (torch.randn(size, sizes.rank, generator=generator) / math.sqrt(size)).to(like)
        columns = size if self.test is None else sizes.rank
        self.sum = torch.zeros(groups, size, columns, dtype=torch.float64, device=like.device)

    @property
    def width(self) -> int:
        """Multiplications for each element of what is added."""
        return self.sum.shape[2] * (1 if self.test is None else 2)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the sum of x' y over images and positions, for (B, G, T, n) each."""
        y = y if self.test is None else y @ self.test
        x, y = (z.transpose(0, 1).flatten(1, 2) for z in (x, y))
        self.sum += x.mT @ y

    def damped(self, ridge: Tensor, trace: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Product of (G, k, n) with (M + ridge I)^-1, for ridge (G,) and the trace (G,) of M.

        Outside the range of its Nyström approximation M is taken for a multiple of the identity, with the rest of its
        trace.
        """
        if self.test is None:
            inverse = _inverse(self.sum, ridge).to(dtype)
            return lambda v: v @ inverse
        values, basis = self._nystrom()
        n, rank = basis.shape[1:]
        rest = ((trace - values.sum(1)) / (n - rank)).clamp_min(0)
        outside = (1 / (rest + ridge)).view(-1, 1, 1)
        within = (1 / (values + ridge.unsqueeze(1))).unsqueeze(1) - outside  # (G, 1, r)
        basis, within, outside = basis.to(dtype), within.to(dtype), outside.to(dtype)
        return lambda v: outside * v + (v @ basis * within) @ basis.mT

    def _nystrom(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (G, r) and eigenvectors (G, n, r) of M Omega (Omega' M Omega)^-1 Omega' M."""
        test, image = cast(Tensor, self.test), self.sum
        norm = image.norm(dim=(1, 2))
        shift = torch.finfo(test.dtype).eps * torch.where(norm > 0, norm, 1.0).view(-1, 1, 1)
        test = test.double()
        while True:  # the shift makes the core positive in spite of rounding; it is subtracted below
            shifted = image + shift * test
            core = test.T @ shifted
            factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
            if not info.any():
                break
            shift = 10 * shift
        root = torch.linalg.solve_triangular(factor, shifted.mT, upper=False)  # (G, r, n)
        squares, vectors = torch.linalg.eigh(root @ root.mT)
        squares = torch.maximum(squares, shift[:, 0])  # not below in exact arithmetic
        return squares - shift[:, 0], (root.mT @ vectors) / squares.sqrt().unsqueeze(1)


class HeadBlock:
    """Exact curvature of the head on features x (B, D): ``sum_i s_i [x_i 1]' [x_i 1]``, the same for each output.

    Parameters
    ----------
    n_outputs, n_features : int
    weight, bias : slice
        Places of the parameters in a flat vector (P,).
    """

    def __init__(self, n_outputs: int, n_features: int, weight: slice, bias: slice):
        self.n_outputs, self.weight, self.bias = n_outputs, weight, bias
        self.size = n_features + 1
        self.rows: list[Tensor] = []  # (B, D + 1), kept while they are fewer than the columns
        self.right: Tensor | None = None

    def update(self, features: Tensor, weights: Tensor) -> None:
        """Add one batch: features (B, D), weights (B,)."""
        self.rows.append(F.pad(features.double(), (0, 1), value=1.0) * weights.double().sqrt().unsqueeze(1))
        if self.right is not None or sum(map(len, self.rows)) >= self.size:
            x = torch.cat(self.rows)
            self.right = x.T @ x if self.right is None else self.right.addmm_(x.T, x)
            self.rows = []

    @property
    def trace(self) -> float:
        """Trace of the block of the Gauss-Newton matrix."""
        total = sum(float(x.square().sum()) for x in self.rows)
        return self.n_outputs * (total if self.right is None else float(_trace(self.right)))

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        """Prepare the inverse of the block plus ``ridge`` times the identity; what was accumulated is released."""
        if self.right is not None:
            inverse = _inverse(self.right, self.right.new_tensor(ridge)).to(dtype)
            self.solve = lambda v: v @ inverse
            self.right = None
        else:
            # (X'X + r I)^-1 = (I - X' (XX' + r I)^-1 X) / r
            x = torch.cat(self.rows)
            half = _inverse(x @ x.T, x.new_tensor(ridge)) @ x
            self.solve = lambda v: ((v.double() - (v.double() @ x.T) @ half) / ridge).to(dtype)
            self.rows = []

    def apply(self, vector: Tensor, out: Tensor) -> None:
        """Write the inverse times the head's part of ``vector`` into ``out``, both (P,)."""
        v = torch.cat([vector[self.weight].view(self.n_outputs, -1), vector[self.bias].unsqueeze(1)], 1)
        v = self.solve(v)
        out[self.weight], out[self.bias] = v[:, :-1].reshape(-1), v[:, -1]


class SmallBlock:
    """Curvature of other parameters (normalization, position embeddings and the like): a dense block, or its diagonal.

    Parameters
    ----------
    slices : sequence of slice
        Places of the parameters in a flat vector (P,); they share one block.
    device : torch.device
    dense_max : int
        Largest number of parameters of a dense block; of larger blocks only the diagonal is kept.
    """

    def __init__(self, slices: Sequence[slice], device: torch.device, dense_max: int = 512):
        self.slices = list(slices)
        self.sizes = [s.stop - s.start for s in self.slices]
        size = sum(self.sizes)
        self.dense = size <= dense_max
        self.block = torch.zeros(size, *((size,) if self.dense else ()), dtype=torch.float64, device=device)

    def update(self, jacobians: Sequence[Tensor], weights: Tensor) -> None:
        """Add one batch: Jacobians (B, K, ...) of each parameter, weights (B,)."""
        j = torch.cat([j.reshape(*j.shape[:2], -1) for j in jacobians], 2).double()
        j = (j * weights.double().sqrt().view(-1, 1, 1)).flatten(0, 1)  # (B K, size)
        self.block += j.T @ j if self.dense else j.square().sum(0)

    @property
    def trace(self) -> float:
        """Trace of the block of the Gauss-Newton matrix."""
        return float(_trace(self.block) if self.dense else self.block.sum())

    def factorize(self, ridge: float, dtype: torch.dtype) -> None:
        """Prepare the inverse of the block plus ``ridge`` times the identity; the block is released."""
        if self.dense:
            self.solve = _dense_solve(self.block, ridge, dtype)
        else:
            scale = (1 / (self.block + ridge)).to(dtype)
            self.solve = lambda v: scale * v
        del self.block

    def apply(self, vector: Tensor, out: Tensor) -> None:
        """Write the inverse times the parameters' part of ``vector`` into ``out``, both (P,)."""
        v = self.solve(torch.cat([vector[s] for s in self.slices]))
        for s, piece in zip(self.slices, v.split(self.sizes), strict=True):
            out[s] = piece


class KFAC:
    """Block-diagonal preconditioner: ``P v ~ (G + alpha I)^-1 v`` for the Gauss-Newton matrix G.

    Parameters
    ----------
    blocks : sequence of KroneckerBlock, SmallBlock and HeadBlock
        Each parameter belongs to exactly one of them.

    References
    ----------
    Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016.
    Gao et al., "A trace-restricted Kronecker-factored approximation to natural gradient", AAAI 2021.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock | SmallBlock | HeadBlock]):
        self.blocks = list(blocks)

    @property
    def trace(self) -> float:
        """Trace of the Gauss-Newton matrix."""
        return sum(b.trace for b in self.blocks)

    @property
    def output_trace(self) -> float:
        """Trace of the Gauss-Newton matrix of one output, as a mean over outputs."""
        return self.trace / next(b.n_outputs for b in self.blocks if isinstance(b, HeadBlock))

    def factorize(self, alpha: float, dtype: torch.dtype, damping: float = 0.0) -> KFAC:
        """Invert the blocks, once, in float64; the accumulated factors are released.

        Parameters
        ----------
        alpha : float
            The penalty lambda > 0.
        dtype : torch.dtype
            Type of the vectors to which the inverse will be applied.
        damping : float
            Tikhonov damping >= 0, added to ``alpha`` in all blocks except the head's, which is exact.

        Returns
        -------
        KFAC
            Itself.

        Raises
        ------
        ValueError
            The curvature, ``alpha`` or ``damping`` is not finite, ``alpha`` is not positive, or ``damping`` is
            negative.
        """
        trace = self.trace
        if not (math.isfinite(trace) and 0 < alpha < math.inf and 0 <= damping < math.inf):
            raise ValueError(
                f"The curvature has trace {trace:g}, the penalty is {alpha:g} and the damping {damping:g}; all must "
                "be finite, and the penalty positive. Check that the network's outputs and gradients are finite "
                "and not all zero, or use execution={'dtype': 'float64'}."
            )
        for block in self.blocks:
            block.factorize(alpha if isinstance(block, HeadBlock) else alpha + damping, dtype)
        return self

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply the inverse to a flat vector (P,)."""
        out = torch.empty_like(vector)
        for block in self.blocks:
            block.apply(vector, out)
        return out


def _by_image(
    inputs: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], batch: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The rows of each image on an axis of their own, (B, rows, ...)."""
    images = [x.unflatten(0, (batch, -1)) for x in inputs]
    return images, [[g.unflatten(0, (batch, -1)) for g in probe] for probe in gradients]


def _trace(matrix: Tensor) -> Tensor:
    """Traces of matrices (..., n, n)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _dense_solve(block: Tensor, ridge: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """(M + ridge I)^-1 as a function of tensors whose elements, in their order, are vectors (..., n)."""
    inverse = _inverse(block, block.new_tensor(ridge)).to(dtype)
    return lambda v: (inverse @ v.reshape(*inverse.shape[:-1], 1)).view(v.shape)


def _kronecker_solve(
    left: _Factor, right: _Factor, tau: Tensor, ridge: float, dtype: torch.dtype, diagonalized: bool
) -> Callable[[Tensor], Tensor]:
    """(L (x) R / tau + ridge I)^-1 as a function of (G, o, m), for tau (G,)."""
    o, m = left.sum.shape[1], right.sum.shape[1]
    norm = torch.where(tau > 0, tau, 1.0)  # tau is 0 if no gradient reaches the layer: the inverse is then 1 / ridge
    if diagonalized:
        (l_values, l_basis), (r_values, r_basis) = _eigh(left.sum / norm.view(-1, 1, 1)), _eigh(right.sum)
        values = (1 / (l_values.unsqueeze(2) * r_values.unsqueeze(1) + ridge)).to(dtype)  # (G, o, m)
        l_basis, r_basis = l_basis.to(dtype), r_basis.to(dtype)
        return lambda v: l_basis @ (values * (l_basis.mT @ v @ r_basis)) @ r_basis.mT
    # Factored Tikhonov damping with the mean eigenvalues balanced: Martens & Grosse 2015, section 6.3.
    pi = torch.where(tau > 0, tau * o / m, 1.0).sqrt()
    by_left = left.damped(math.sqrt(ridge) / pi * norm, tau, dtype)  # of L, so tau times that of L / tau
    by_right = right.damped(math.sqrt(ridge) * pi, tau, dtype)
    norm = norm.to(dtype).view(-1, 1, 1)
    return lambda v: by_left(by_right(norm * v).mT).mT


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at zero, and eigenvectors of symmetric positive (G, n, n)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(0), vectors


def _inverse(matrix: Tensor, ridge: Tensor) -> Tensor:
    """(M + ridge I)^-1 of symmetric positive matrices (..., n, n), for ridge (...)."""
    matrix = (matrix + matrix.mT) / 2
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # With a ridge below its rounding errors the matrix may be indefinite: then the ridge is increased.
    floor = torch.finfo(matrix.dtype).eps * _trace(matrix)
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + ridge[..., None, None] * eye)
        if not info.any():
            return torch.cholesky_inverse(factor)
        ridge, floor = torch.where(info > 0, torch.maximum(ridge, floor), ridge), 10 * floor
