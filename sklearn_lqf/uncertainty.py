"""How sure the linear model is: the Gaussian posterior whose mode the quadratic is.

With the prior N(0, sigma^2 / lambda) of each weight, in the units of the penalty, and noise of variance sigma^2 / s_i
on the targets of an image of weight s_i, the objective is, up to constants, 2 sigma^2 times the negative logarithm of
the posterior of d. Its covariance is sigma^2 H^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .influence import DUAL_MAX, Dual, one_by_one
from .linearize import LinearizedNetwork, _full_precision

__all__ = ["UncertaintyMixin", "diagonal_roots"]


class UncertaintyMixin:
    """Posterior covariance of outputs; for estimators that store their data."""

    def _output_covariance(self: Any, X: Any) -> np.ndarray:
        """Posterior covariance of f_lin of m new images, in units of y, (m, C, C): exact up to `DUAL_MAX` outputs."""
        data, cache, _, _ = self._fitted_on(None, None, None)
        rows = self._in_batches(list, self._read_new_data(X))
        n, c = data.targets.shape
        if n * c * len(self._view_names()) <= DUAL_MAX:
            dual = Dual(self._kernel(cache), data, self.alpha_)
            prior = torch.stack([self._kernel([image]).view(c, c) for image in one_by_one(rows)])
            found = (prior - dual.explained(self._kernel(rows, cache))) / self.alpha_
        else:
            network, inverse = self._inverse_curvature(data, cache, False)
            found = _covariance(network, inverse, rows)
        unit = torch.from_numpy(self._unit)
        return (self._noise * unit.unsqueeze(1) * unit * found).numpy()


def _covariance(network: LinearizedNetwork, inverse: Callable, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """J P J' with an approximation P of H^-1, (m, C, C)."""
    eye = torch.eye(len(network.weight)).to(network.weight)
    found = []
    with _full_precision():
        for image in one_by_one(rows):
            point = network.at(image)
            gradients = torch.stack([point.vjp(u.unsqueeze(0)) for u in eye])  # (C, P)
            found.append((gradients @ torch.stack([inverse(g) for g in gradients]).T).double().cpu())
    return torch.stack(found)


def diagonal_roots(covariance: np.ndarray) -> np.ndarray:
    """Standard deviations (m, C) of covariances (m, C, C)."""
    return np.sqrt(np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0))
