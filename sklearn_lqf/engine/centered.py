"""Features less their weighted mean, in float64, read in pieces of rows.

Hides where the features are (memory, or a file that is mapped), their precision, and how many rows are held at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..runtime.memory import PIECE_BYTES, pieces

__all__ = ["CenteredRows", "Features"]

Features = Tensor | np.ndarray  # an ndarray may be a memmap


class CenteredRows:
    """Phi, and products with it.

    Parameters
    ----------
    features : Tensor or ndarray of shape (n, D)
        Of any precision.
    weights : Tensor of shape (n,)
        s > 0.
    budget : int
        Bytes of the rows that are held in float64 at once. One piece alone is kept.

    Attributes
    ----------
    weights : Tensor of shape (n,)
        In float64.
    total : Tensor of shape ()
        t, the sum of the weights.
    mean : Tensor of shape (D,)
        Of the features, with the weights.
    """

    def __init__(self, features: Features, weights: Tensor, budget: int = PIECE_BYTES):
        self.weights = weights.double()
        self.total = self.weights.sum()
        self._features: Features | None = features
        self._pieces = pieces(features.shape[0], 8 * features.shape[1], budget)
        self._kept: Tensor | None = None
        self.mean = torch.zeros(features.shape[1], dtype=torch.float64, device=weights.device)
        for rows in self._pieces:
            self.mean += self.weights[rows] @ _double(features[rows])
        self.mean /= self.total

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if self._kept is None and len(self._pieces) == 1:
            self.whole()
        if self._kept is not None:
            yield slice(0, len(self._kept)), self._kept
            return
        assert self._features is not None
        for rows in self._pieces:
            yield rows, self.center(self._features[rows])

    def whole(self) -> Tensor:
        """Phi, (n, D), which is kept in the place of the features."""
        if self._kept is None:
            assert self._features is not None
            self._kept = _double(self._features).sub(self.mean)
            self._features = None
        return self._kept

    def at(self, rows: Tensor) -> Tensor:
        """Phi of some rows (k,): (k, D)."""
        if self._features is None:
            return next(iter(self))[1][rows]
        chosen = rows.cpu().numpy() if isinstance(self._features, np.ndarray) else rows
        return self.center(self._features[chosen])

    def center(self, features: Features) -> Tensor:
        """New rows (k, D) less the mean of these."""
        return _double(features) - self.mean

    def center_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (n, C) less their weighted mean, and that (C,)."""
        y = targets.double()
        first = y[:1]  # taken away first, a constant leaves exactly nothing
        y = y - first
        mean = (self.weights @ y) / self.total
        return y - mean, mean + first[0]

    def fitted(self, coef: Tensor) -> Tensor:
        """Phi B, (n, C)."""
        return torch.cat([phi @ coef for _, phi in self])

    def moment(self, values: Tensor) -> Tensor:
        """Phi' S V for V (n, C): (D, C)."""
        found = torch.zeros(len(self.mean), values.shape[1], dtype=torch.float64, device=self.mean.device)
        for rows, phi in self:
            found.addmm_(phi.T, self.weights[rows, None] * values[rows])
        return found

    def product(self, vectors: Tensor) -> Tensor:
        """H V for V (D, C), in one pass."""
        found = vectors.clone()
        for rows, phi in self:
            found.addmm_(phi.T, self.weights[rows, None] * (phi @ vectors))
        return found

    def norm(self, values: Tensor) -> Tensor:
        """Root of the weighted sum of squares of values (n, C): (C,)."""
        return (self.weights @ values.square()).sqrt()


def _double(features: Features) -> Tensor:
    """Rows in float64."""
    if isinstance(features, np.ndarray):
        return torch.from_numpy(np.array(features, dtype=np.float64))  # a copy: a memmap may be read-only
    return features.double()
