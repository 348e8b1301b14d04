"""Features less their weighted mean, in float64, read in pieces of rows.

Hides where the features are (memory, or a file that is mapped), their precision and scale, how many rows are held at
once, and which process holds which rows: sums are those over all processes, and rows come back in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..runtime.memory import PIECE_BYTES, pieces
from ..runtime.processes import ALONE, ProcessGroup

__all__ = ["CenteredRows", "Features", "ScaledFeatures"]

_BLOCKS = 16  # of a symmetric matrix, of which one half is computed: 1/32 of it is computed for nothing


class ScaledFeatures:
    """``(x - shift) * factor`` of stored features x, in float64, made when rows or columns are read.

    Parameters
    ----------
    stored : ndarray of shape (n, D)
        Of any precision; a memmap is read as far as it is needed.
    shift : ndarray of shape (D,)
    factor : ndarray of shape (D,)
    columns : ndarray of shape (D,), bool
        Those that are not left out.

    Attributes
    ----------
    shape : tuple of int
        (n, columns that are not left out).
    """

    def __init__(self, stored: np.ndarray, shift: np.ndarray, factor: np.ndarray, columns: np.ndarray):
        self._stored, self._columns = stored, np.flatnonzero(columns)
        self._shift, self._factor = shift[self._columns], factor[self._columns]
        self.shape = (len(stored), len(self._columns))

    def __getitem__(self, at: object) -> Tensor:
        """Rows, or (rows, a slice of the columns)."""
        rows, piece = at if isinstance(at, tuple) else (at, slice(None))
        columns, found = self._columns[piece], self._stored[rows]
        if len(columns) < found.shape[1]:
            found = found[:, columns]
        return torch.from_numpy((found - self._shift[piece]) * self._factor[piece])


Features = Tensor | np.ndarray | ScaledFeatures  # an ndarray may be a memmap


class CenteredRows:
    """Phi, and products with it.

    Parameters
    ----------
    features : Tensor, ndarray or ScaledFeatures of shape (n, D)
        Of any precision. Where processes share the rows, those of this process's share.
    weights : Tensor of shape (n,)
        s > 0, of the rows of all processes.
    piece : int
        Bytes of the rows that are held in float64 at once. One piece alone is kept.
    group : ProcessGroup
        The processes that share the rows.

    Attributes
    ----------
    weights : Tensor of shape (n,)
        In float64.
    total : Tensor of shape ()
        t, the sum of the weights.
    mean : Tensor of shape (D,)
        Of the features, with the weights.
    """

    def __init__(self, features: Features, weights: Tensor, piece: int = PIECE_BYTES, group: ProcessGroup = ALONE):
        self.weights = weights.double()
        self.total = self.weights.sum()
        self._group, self._own, self._piece = group, group.share(len(weights)), piece
        self._features: Features | None = features
        self._pieces = pieces(features.shape[0], 8 * features.shape[1], piece)
        self._kept: Tensor | None = None
        mean = torch.zeros(features.shape[1], dtype=torch.float64, device=weights.device)
        for part in self._pieces:
            mean += self.weights[self._own][part] @ self._double(features[part])
        self.mean = group.all_reduce(mean) / self.total

    def _double(self, rows: Tensor | np.ndarray) -> Tensor:
        """Rows in float64 on the device of the weights."""
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(np.array(rows, dtype=np.float64))  # a copy: a memmap may be read-only
        return rows.to(self.weights.device, torch.float64)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """This process's rows by pieces: which of all rows they are, and their Phi."""
        if self._kept is None and len(self._pieces) == 1:
            assert self._features is not None
            self._kept = self.center(self._features[self._pieces[0]])
            self._features = None
        start = self._own.start
        if self._kept is not None:
            yield self._own, self._kept
            return
        assert self._features is not None
        for part in self._pieces:
            yield slice(start + part.start, start + part.stop), self.center(self._features[part])

    def columns(self) -> Iterator[Tensor]:
        """This process's rows by pieces of columns, (rows, some columns)."""
        for part in pieces(len(self.mean), 8 * max(len(self.weights), 1), self._piece):
            if self._kept is not None:
                yield self._kept[:, part]
            else:
                assert self._features is not None
                yield self._double(self._features[:, part]) - self.mean[part]

    def at(self, rows: Tensor) -> Tensor:
        """Phi of some rows (k,) in ascending order: (k, D)."""
        mine = rows[(rows >= self._own.start) & (rows < self._own.stop)] - self._own.start
        if self._features is None:
            found = next(iter(self))[1][mine]
        else:
            by_numpy = not isinstance(self._features, Tensor)
            found = self.center(self._features[mine.cpu().numpy() if by_numpy else mine])
        return self._group.all_gather_rows(found)

    def center(self, features: Features) -> Tensor:
        """New rows (k, D) less the mean of these."""
        assert not isinstance(features, ScaledFeatures)
        return self._double(features) - self.mean

    def center_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (n, C) less their weighted mean, and that (C,)."""
        y = targets.to(self.weights)
        first = y[:1]  # taken away first, a constant leaves exactly nothing
        y = y - first
        mean = (self.weights @ y) / self.total
        return y - mean, mean + first[0]

    def sum(self, out: Tensor, add: Callable[[Tensor, slice, Tensor], object]) -> Tensor:
        """What ``add(out, rows, phi)`` adds to a tensor of zeros for each piece, over all processes."""
        for rows, phi in self:
            add(out, rows, phi)
        return self._group.all_reduce(out)

    def reduce(self, sums: Iterable[Tensor]) -> None:
        """Add up what each process has summed over its rows, in place."""
        for found in sums:
            self._group.all_reduce(found)

    def each(self, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """``function(rows, phi)``, (k, ...) for a piece of k rows, for the rows of all processes: (n, ...)."""
        return self._group.all_gather_rows(torch.cat([function(rows, phi) for rows, phi in self]))

    def fitted(self, coef: Tensor) -> Tensor:
        """Phi B, (n, C)."""
        return self.each(lambda rows, phi: phi @ coef)

    def transposed(self, values: Tensor) -> Tensor:
        """Phi' V for V (n, C): (D, C)."""
        zeros = torch.zeros(len(self.mean), values.shape[1], dtype=torch.float64, device=self.mean.device)
        return self.sum(zeros, lambda out, rows, phi: out.addmm_(phi.T, values[rows]))

    def product(self, vectors: Tensor) -> Tensor:
        """H V for V (D, C), in one pass."""

        def add(out: Tensor, rows: slice, phi: Tensor) -> None:
            out.addmm_(phi.T, self.weights[rows, None] * (phi @ vectors))

        return vectors + self.sum(torch.zeros_like(vectors), add)

    def norm(self, values: Tensor) -> Tensor:
        """Root of the weighted sum of squares of values (n, C): (C,)."""
        return (self.weights @ values.square()).sqrt()

    def agreed(self, values: Tensor) -> Tensor:
        """Values of the first process: what is decided by them is decided alike by all."""
        return self._group.of_the_first(values)

    def kernel(self) -> Tensor:
        """The lower triangle of Phi Phi', (n, n); what is above is of no meaning."""
        n, own = len(self.weights), self._own
        found = torch.zeros(own.stop - own.start, n, dtype=torch.float64, device=self.mean.device)
        for mine in self.columns():
            _add_lower(found, mine, self._group.all_gather_rows(mine), own.start)
        return self._group.all_gather_rows(found)

    def curvature(self) -> Tensor:
        """The lower triangle of Phi' S Phi, (D, D); what is above is of no meaning."""

        def add(out: Tensor, rows: slice, phi: Tensor) -> None:
            weighted = (phi * self.weights[rows, None].sqrt()).T
            _add_lower(out, weighted, weighted)

        d = len(self.mean)
        return self.sum(torch.zeros(d, d, dtype=torch.float64, device=self.mean.device), add)


def _add_lower(out: Tensor, left: Tensor, right: Tensor, start: int = 0) -> None:
    """Add L R' to some rows of a symmetric matrix, in its lower triangle and little above.

    Parameters
    ----------
    out : Tensor of shape (k, n)
        The rows from ``start``.
    left : Tensor of shape (k, d)
    right : Tensor of shape (n, d)
    start : int, default=0
    """
    step = max(1, -(-len(right) // _BLOCKS))
    for a in range(0, len(out), step):
        b = min(a + step, len(out))
        out[a:b, : start + b].addmm_(left[a:b], right[: start + b].T)
