"""Leaving out training rows: outputs for a row by the model without it, and the effect on the outputs for new rows.

These are functions of a fitted model and its training rows, for all outputs at once. With the scale of the features and
the prior of the fit held fixed they have a closed form, from one factorization. With `estimate.EstimatedForm` they are
estimates. docs/method.md has the legend of symbols.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..engine.fitted import FittedModel
from ..engine.problem import TrainingRows
from ..runtime.memory import PIECE_BYTES, pieces

__all__ = ["influence", "leave_one_out"]


def leave_one_out(model: FittedModel, rows: TrainingRows, weights: np.ndarray) -> np.ndarray:
    """Outputs for each training row by the model without it, or without its group.

    Parameters
    ----------
    model : FittedModel
        Its scale of the features and its prior are held fixed.
    rows : TrainingRows
        The n rows of the fit, in any order. Rows with ``groups`` are left out by groups.
    weights : ndarray of shape (n,), float64
        Weights of the rows, those of their classes included.

    Returns
    -------
    ndarray of shape (n, C), float64
        In the units of y.

    Raises
    ------
    ValueError
        The rows or weights are not those of the fit; there is only one group; or groups are to be left out, and the
        solution has no closed form.

    Notes
    -----
    ``y_i - r_i`` with ``r_i = alpha_i / (q_i M_ii + (1 - q_i) s_i)``: of a row that stands for m_i images one is left
    out, q_i = 1 / m_i. For a group g of rows the residuals are ``M_gg^-1 alpha_g``.

    References
    ----------
    D. M. Allen, "The relationship between variable selection and data augmentation and a method for prediction",
    Technometrics 16, 1974; C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006,
    section 5.4.2.
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
    """Effect of leaving out each training row on the outputs for new rows.

    Parameters
    ----------
    model : FittedModel
        Its scale of the features and its prior are held fixed.
    rows : TrainingRows
        The n rows of the fit, in any order.
    weights : ndarray of shape (n,), float64
        Weights of the rows, those of their classes included.
    features : ndarray of shape (m, D)
        Raw features of the new rows, before they are standardized.
    effect : callable
        Called for k of the m new rows at a time, with the changes of their outputs (k, n, C) in the units of y and the
        slice of the m rows that they are. Returns an ndarray (k, n) or (k, n, C).
    budget : int
        Bytes that the changes of k rows may take.

    Returns
    -------
    ndarray of shape (m, n) or (m, n, C)
        What ``effect`` returned, for all new rows. Only this result grows with m.

    Raises
    ------
    ValueError
        The rows or weights are not those of the fit.

    Notes
    -----
    The output for x changes by ``-B_xi q_i r_i``. One image is left out, also of a row that stands for several images,
    and also if the model was fitted with groups.

    References
    ----------
    R. D. Cook, "Detection of influential observation in linear regression", Technometrics 19, 1977.
    """
    problem, variances = model.problem(rows, weights), model.solution.variances
    form = problem.factorization(variances)
    found, removed = [], problem.removals(form)
    for piece in pieces(len(features), 8 * removed.numel(), budget):
        changed = -(form.hat(problem.scaled(features[piece], variances))[:, :, None] * removed).cpu().numpy()
        found.append(effect(changed * model.unit, piece))
    return np.concatenate(found)
