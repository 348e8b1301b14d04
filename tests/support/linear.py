"""Rows for tests of the linear algebra, its forms by name, and dense oracles in numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from sklearn_lqf.engine.estimate import EstimatedForm
from sklearn_lqf.engine.preconditioner import Block
from sklearn_lqf.engine.ridge import Factorization, factorize

# Of closed forms against dense oracles, relative: condition numbers below 1e4 times the rounding unit, with a margin.
ACCURACY = 1e-9
TOL = 1e-13  # of conjugate gradients that are compared with closed forms
BUDGET = 1 << 30


class Data:
    """Rows with uneven weights and multiplicities, features with a mean, targets with a large one, and new rows."""

    def __init__(self, n: int = 12, d: int = 5, outputs: int = 3, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((n, d)) * rng.uniform(0.5, 2.0, d) + 3.0
        self.y = self.x @ rng.standard_normal((d, outputs)) + rng.standard_normal((n, outputs)) + 100.0
        self.s = rng.uniform(0.2, 3.0, n)
        self.m = np.where(rng.random(n) < 0.5, 1.0, rng.uniform(1.0, 4.0, n))
        self.new = rng.standard_normal((4, d)) + 3.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features, weights, targets, multiplicities and new rows."""
        x, s, y, m, new = (torch.from_numpy(a) for a in (self.x, self.s, self.y, self.m, self.new))
        return x, s, y, m, new


def make(method: str, x: Tensor, s: Tensor, multiplicity: Tensor | None = None, blocks=None) -> Factorization:
    """A form by its name; without blocks the estimate has one exact block, with which it is exact too."""
    if method == "estimate":
        blocks = blocks or [Block(slice(0, x.shape[1]))]
        return EstimatedForm(x, s, blocks, tol=TOL, max_iter=300, multiplicity=multiplicity)
    return factorize(x, s, BUDGET, form=method)


def close(found: Tensor | np.ndarray | float, expected: np.ndarray | float, accuracy: float = ACCURACY) -> None:
    """Equal relative to the largest number."""
    scale = np.abs(expected).max() if np.size(expected) else 1.0
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=accuracy * max(float(scale), 1e-300))


def refit(x: np.ndarray, y: np.ndarray, s: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Outputs (k, C) of scikit-learn's Ridge for new rows (k, D)."""
    if not x.shape[1]:
        return np.tile(np.average(y, axis=0, weights=s), (len(new), 1))
    kept = s > 0
    model = Ridge(alpha=1.0, solver="svd").fit(x[kept], y[kept], sample_weight=s[kept])
    return np.asarray(model.predict(new)).reshape(len(new), -1)


def dense_m(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """M by its definition."""
    a = np.linalg.inv(x @ x.T + np.diag(1 / s))
    one = a.sum(1)
    return a - np.outer(one, one) / one.sum()


def augmented(x: np.ndarray, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B and b by least squares on the rows, a column of ones, and rows for the penalty of B alone."""
    root = np.sqrt(s)[:, None]
    rows = np.vstack([root * np.hstack([x, np.ones((len(x), 1))]), np.eye(x.shape[1], x.shape[1] + 1)])
    found = np.linalg.lstsq(rows, np.vstack([root * y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return found[:-1], found[-1]
