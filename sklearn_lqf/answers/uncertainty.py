"""Uncertainty of a fitted model: the posterior variance of an output, and the temperature of probabilities."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from ..engine.fitted import FittedModel
from ..engine.problem import TrainingRows
from ..runtime.memory import PIECE_BYTES, pieces

__all__ = ["THRESHOLD", "fit_temperature", "output_variance"]

THRESHOLD = 0.5  # of an estimated indicator, above which its label is predicted
_TEMPERATURES = (0.05, 10.0)  # bounds; the lower one is reached when all left-out images are right: no probability is 0


def output_variance(
    model: FittedModel, rows: TrainingRows, weights: np.ndarray, features: np.ndarray, budget: int = PIECE_BYTES
) -> np.ndarray:
    """Posterior variance of an output for new rows, in units of the square of ``model.unit``.

    Parameters
    ----------
    model : FittedModel
        Its scale of the features, its prior and its variance of the noise are held fixed.
    rows : TrainingRows
        The n rows of the fit, in any order.
    weights : ndarray of shape (n,), float64
        Weights of the rows, those of their classes included.
    features : ndarray of shape (m, D)
        Raw features of the new rows, before they are standardized.
    budget : int
        Bytes that an intermediate result may take.

    Returns
    -------
    ndarray of shape (m,), float64
        The same for all outputs, without the noise of a new target. For indicators of classes this is the variance as
        if they were independent; that they add up to one is left to the caller.

    Raises
    ------
    ValueError
        The rows or weights are not those of the fit.

    Notes
    -----
    ``v (k_xx - k_x' A^-1 k_x + (1 - 1' A^-1 k_x)^2 / (1' A^-1 1))``, the intercept having a flat prior. With
    `estimate.EstimatedForm` it is an estimate.

    References
    ----------
    C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, section 2.7.
    """
    problem, variances = model.problem(rows, weights), model.solution.variances
    form = problem.factorization(variances)
    parts = pieces(len(features), 8 * max(features.shape[1], len(rows)), budget)
    found = [form.variance(problem.scaled(features[p], variances)).cpu().numpy() for p in parts]
    return model.solution.noise * np.concatenate(found)


def fit_temperature(
    outputs: np.ndarray, values: np.ndarray, weights: np.ndarray, count: float, multilabel: bool = False
) -> float:
    """Temperature with the smallest log-loss of leave-one-out outputs.

    Parameters
    ----------
    outputs : ndarray of shape (n, C)
        Outputs for each row by the model without it.
    values : ndarray of shape (n, C)
        0 or 1: indicators of the classes, C >= 2, or of labels.
    weights : ndarray of shape (n,)
        Weights of the rows in the log-loss.
    count : float
        N, the number of images that the rows stand for.
    multilabel : bool, default=False
        Whether an image may have several labels: logistic function instead of softmax.

    Returns
    -------
    float
        T, from 0.05 to 10.

    Notes
    -----
    Minimizes the log-loss ``-sum_i w_i sum_c t_ic log p_ic`` over log T, with p the softmax of f / T [2]_. The target t
    of the class of an image is 1 - d, and those of the other classes share d = 1 / (N + 2): as if there were two images
    more, one of them with another label [1]_. So a few left-out images that are all right do not lead to probabilities
    of 0 and 1. For several labels the log-loss is that of the logistic function of (f - 1/2) / T, summed over the
    labels, with the targets 1 - d and d.

    References
    ----------
    .. [1] J. C. Platt, "Probabilistic outputs for support vector machines and comparisons to regularized likelihood
       methods", 1999, section 2.2.
    .. [2] C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017,
       section 4.2.
    """
    doubt = 1 / (count + 2)
    values = (1 - doubt) * values + doubt * (1 - values) / (1 if multilabel else values.shape[1] - 1)

    def loss(log_temperature: float) -> float:
        if multilabel:
            logits = (outputs - THRESHOLD) / np.exp(log_temperature)
            log_p = values * log_expit(logits) + (1 - values) * log_expit(-logits)
        else:
            log_p = values * log_softmax(outputs / np.exp(log_temperature), axis=1)
        return -float(weights @ log_p.sum(1))

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded")
    return float(np.exp(found.x))
