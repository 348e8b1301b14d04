"""A block-diagonal approximation of the inverse of ``H = Phi' S Phi + I``.

Hides which blocks are exact and which are Kronecker products, how wide ones are split, and how each is inverted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .centered import CenteredRows

__all__ = ["Block", "KroneckerPreconditioner"]

_WIDEST = 2048  # columns of an exact block, or of a factor of a Kronecker product: their square matrices are inverted


@dataclass(frozen=True)
class Block:
    """Columns of the preconditioner that are inverted together.

    Attributes
    ----------
    columns : slice
        With a start and a stop.
    sides : tuple of int or None
        (p, q): the features are matrices of p rows and q columns, row by row, whose curvature is taken for a Kronecker
        product. None: the block is exact.
    """

    columns: slice
    sides: tuple[int, int] | None = None


class KroneckerPreconditioner:
    """The inverse P of a block-diagonal approximation of H, a function of vectors (D, C).

    Parameters
    ----------
    rows : CenteredRows
    blocks : sequence of Block
        That cover the columns, in their order.
    widest : int
        Columns of the largest square matrix; wider blocks are split.

    Raises
    ------
    ValueError
        The blocks do not cover the columns, or sides do not fit them.

    Notes
    -----
    An exact block is ``Phi_g' S Phi_g + I`` with its Cholesky factor. For features that are matrices F_i the curvature
    is approximated by ``L (x) R / tr L`` with ``L = sum_i s_i F_i F_i'`` and ``R = sum_i s_i F_i' F_i``, of the same
    trace, and inverted with the identity by two eigendecompositions: trace-restricted K-FAC (Gao et al., "A
    trace-restricted Kronecker-factored approximation to natural gradient", AAAI 2021). It is exact for
    rows of one Kronecker direction: F_i = c_i u v'.
    """

    def __init__(self, rows: CenteredRows, blocks: Sequence[Block], widest: int = _WIDEST):
        _check_blocks(blocks, len(rows.mean))
        self._blocks = [part for block in blocks for part in _split(block, widest)]
        sums = [_zeros(block, rows.mean) for block in self._blocks]
        for at, phi in rows:
            for block, found in zip(self._blocks, sums, strict=True):
                _add_curvature(found, phi[:, block.columns], rows.weights[at], block.sides)
        rows.reduce(found for block in sums for found in block)
        self._factors = [_factor(found, block.sides) for found, block in zip(sums, self._blocks, strict=True)]

    def __call__(self, vectors: Tensor) -> Tensor:
        """P v for vectors (D, C)."""
        out = torch.empty_like(vectors)
        for i, block in enumerate(self._blocks):
            out[block.columns] = self._solve(i, vectors[block.columns])
        return out

    @property
    def trace(self) -> float:
        """tr P."""
        exact = (torch.cholesky_inverse(f[0]).trace() for f in self._factors if len(f) == 1)
        products = ((1 / f[2]).sum() for f in self._factors if len(f) == 3)
        return float(sum(exact)) + float(sum(products))

    def odds(self, features: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """What the blocks think of the variance of rows (k, D) before these were seen with weights (k,): (k,).

        That is the sum over blocks of ``s h / (c - s h)``, ``h = phi_g' P_g phi_g``, for an exact block; c (k,) is what
        the intercept leaves. Those of Kronecker products, where s h may be above c, add ``s h``.
        """
        found = torch.zeros_like(share)
        for i, block in enumerate(self._blocks):
            phi = features[:, block.columns]
            leverage = weights * (self._solve(i, phi.T).T * phi).sum(1)
            if block.sides is None:
                leverage = leverage / (share - leverage).clamp_min(torch.finfo(torch.float64).eps)
            found += leverage
        return found

    def _solve(self, i: int, vectors: Tensor) -> Tensor:
        """P_g v for vectors (d, C) of the i-th block."""
        sides, factors = self._blocks[i].sides, self._factors[i]
        if sides is None:
            return torch.cholesky_solve(vectors, factors[0])
        left, right, eigenvalues = factors
        x = vectors.T.reshape(-1, *sides)  # (C, p, q)
        return (left @ ((left.T @ x @ right) / eigenvalues) @ right.T).flatten(1).T


def _check_blocks(blocks: Sequence[Block], d: int) -> None:
    """Raise unless blocks cover d columns, once and in order."""
    stop = 0
    for block in blocks:
        start, end = block.columns.start, block.columns.stop
        if start != stop or end < start:
            raise ValueError(f"Blocks must cover the columns in order; {block} follows column {stop}.")
        if block.sides is not None and math.prod(block.sides) != end - start:
            raise ValueError(f"{block} has sides of {math.prod(block.sides)} features for {end - start} columns.")
        stop = end
    if stop != d:
        raise ValueError(f"Blocks must cover all {d} columns; they end at column {stop}.")


def _split(block: Block, widest: int) -> list[Block]:
    """A block in parts whose square matrices are small enough."""
    start, stop, width, sides = block.columns.start, block.columns.stop, widest, block.sides
    if sides is not None and sides[1] <= widest:
        width *= sides[1]  # whole rows of the matrices
    else:
        sides = None
    parts = [slice(a, min(a + width, stop)) for a in range(start, stop, width)]
    return [Block(part, sides and ((part.stop - part.start) // sides[1], sides[1])) for part in parts]


def _zeros(block: Block, like: Tensor) -> list[Tensor]:
    """Where the curvature of a block is summed: (d, d), or (p, p) and (q, q)."""
    return [like.new_zeros(k, k) for k in block.sides or (block.columns.stop - block.columns.start,)]


def _add_curvature(sums: list[Tensor], phi: Tensor, weights: Tensor, sides: tuple[int, int] | None) -> None:
    """Add some rows (k, d) to the block itself, or to its two factors."""
    weighted = phi * weights[:, None]
    if sides is None:
        sums[0].addmm_(weighted.T, phi)
        return
    f, weighted = phi.reshape(-1, *sides), weighted.view(-1, *sides)
    sums[0] += torch.einsum("npq,nrq->pr", weighted, f)
    sums[1] += torch.einsum("npq,npr->qr", weighted, f)


def _factor(sums: list[Tensor], sides: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """What the inverse of a block, with the identity of the prior, is applied by."""
    if sides is None:
        sums[0].diagonal().add_(1)
        return (torch.linalg.cholesky(sums[0]),)
    (a, left), (b, right) = (torch.linalg.eigh(m) for m in sums)
    trace = a.sum()
    product = torch.outer(a, b) / torch.where(trace > 0, trace, 1.0)
    return left, right, product.clamp_min(0) + 1
