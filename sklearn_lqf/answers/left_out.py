"""What a fitted model says of its training rows, and how sure it is: functions of a problem, for all outputs at once.

Scale and prior are those of the fit; everything follows from one factorization. Answers for many new rows are made in
pieces, so that memory does not grow with their number but for the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..engine.problem import Problem, Solution
from ..engine.ridge import changes

__all__ = ["influence", "posterior_variance"]

_PIECE = 1 << 24  # elements of an intermediate result


def influence(
    problem: Problem, solution: Solution, features: np.ndarray, effect: Callable[[np.ndarray, slice], np.ndarray]
) -> np.ndarray:
    """The effect of leaving out each training row on new rows.

    Parameters
    ----------
    problem : Problem
        Of the n training rows, with the scale and prior of the solution.
    solution : Solution
    features : ndarray of shape (m, D)
        Raw features of the new rows.
    effect : callable
        (changes of the outputs (k, n, C), which of the m rows these are) -> (k, n) or (k, n, C).

    Returns
    -------
    ndarray of shape (m, n) or (m, n, C)
    """
    form = problem.factorization(solution.variances)
    targets, multiplicity = torch.from_numpy(problem.targets), torch.from_numpy(problem.multiplicity)
    found = []
    for rows in _pieces(len(features), targets.numel()):
        scaled = problem.scaled(features[rows], solution.variances)
        found.append(effect(changes(form, targets, multiplicity, scaled).numpy(), rows))
    return np.concatenate(found)


def posterior_variance(problem: Problem, solution: Solution, features: np.ndarray) -> np.ndarray:
    """Posterior variance of an output of new rows over that of the noise, (m,)."""
    form = problem.factorization(solution.variances)
    pieces = _pieces(len(features), max(features.shape[1], len(problem.targets)))
    return np.concatenate([form.variance(problem.scaled(features[p], solution.variances)).numpy() for p in pieces])


def _pieces(count: int, elements: int) -> list[slice]:
    """Rows in pieces, each with intermediate results of so many elements for a row."""
    step = max(1, _PIECE // max(elements, 1))
    return [slice(a, a + step) for a in range(0, count, step)]
