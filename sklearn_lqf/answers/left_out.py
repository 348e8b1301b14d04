"""What the model would be without a training row: held-out outputs, and the effect on others.

Functions of a fitted model and its training rows, for all outputs at once, in closed form from one factorization. Scale
and prior are those of the fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..engine.fitted import FittedModel
from ..engine.problem import TrainingRows
from ..engine.ridge import removals
from ..runtime.memory import PIECE_BYTES, pieces

__all__ = ["influence", "leave_one_out"]


def leave_one_out(model: FittedModel, rows: TrainingRows, weights: np.ndarray) -> np.ndarray:
    """Outputs for each training row of the model without it.

    Parameters
    ----------
    model : FittedModel
    rows : TrainingRows
        Those of the fit, in any order.
    weights : ndarray of shape (n,)
        Those of their classes included.

    Returns
    -------
    ndarray of shape (n, C)
        In the units of y.
    """
    return model.problem(rows, weights).held_out("auto") * model.unit


def influence(
    model: FittedModel,
    rows: TrainingRows,
    weights: np.ndarray,
    features: np.ndarray,
    effect: Callable[[np.ndarray, slice], np.ndarray],
    budget: int = PIECE_BYTES,
) -> np.ndarray:
    """The effect of leaving out each training row on new rows.

    Parameters
    ----------
    model : FittedModel
    rows : TrainingRows
        The n rows of the fit, in any order.
    weights : ndarray of shape (n,)
        Those of their classes included.
    features : ndarray of shape (m, D)
        Raw features of the new rows.
    effect : callable
        (changes of the outputs in the units of y (k, n, C), which of the m rows these are) -> (k, n) or (k, n, C).
    budget : int
        Bytes of the changes of k rows.

    Returns
    -------
    ndarray of shape (m, n) or (m, n, C)
        Made in pieces of rows, so that only the result grows with m.
    """
    problem, variances = model.problem(rows, weights), model.solution.variances
    form = problem.factorization(variances)
    targets, multiplicity = torch.from_numpy(problem.targets), torch.from_numpy(problem.multiplicity)
    found = []
    removed = removals(form, form.solve(targets), multiplicity)
    for piece in pieces(len(features), 8 * targets.numel(), budget):
        changed = -(form.hat(problem.scaled(features[piece], variances))[:, :, None] * removed).numpy()
        found.append(effect(changed * model.unit, piece))
    return np.concatenate(found)
