"""How sure a fitted model is: the posterior of an output, and the temperature of probabilities."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from ..engine.fitted import FittedModel
from ..engine.problem import TrainingRows
from ..runtime.memory import PIECE_BYTES, pieces

__all__ = ["THRESHOLD", "fit_temperature", "output_variance"]

THRESHOLD = 0.5  # of an estimated indicator
_TEMPERATURES = (0.05, 10.0)  # the lower one when all held-out images are right: no probability is 0


def output_variance(
    model: FittedModel, rows: TrainingRows, weights: np.ndarray, features: np.ndarray, budget: int = PIECE_BYTES
) -> np.ndarray:
    """Posterior variance of an output for new rows, over the square of its unit.

    Parameters
    ----------
    model : FittedModel
    rows : TrainingRows
        The n rows of the fit, in any order.
    weights : ndarray of shape (n,)
        Those of their classes included.
    features : ndarray of shape (m, D)
        Raw features of the new rows.
    budget : int
        Bytes of an intermediate result.

    Returns
    -------
    ndarray of shape (m,)
        Of the indicators of classes before they add up to one.
    """
    problem, variances = model.problem(rows, weights), model.solution.variances
    form = problem.factorization(variances)
    parts = pieces(len(features), 8 * max(features.shape[1], len(rows)), budget)
    found = [form.variance(problem.scaled(features[p], variances)).numpy() for p in parts]
    return model.solution.noise * np.concatenate(found)


def fit_temperature(
    outputs: np.ndarray, values: np.ndarray, weights: np.ndarray, count: float, multilabel: bool = False
) -> float:
    """The temperature with the smallest log-loss of held-out outputs.

    Parameters
    ----------
    outputs, values : ndarray of shape (n, C)
        Held-out outputs; indicators of the classes, or of labels.
    weights : ndarray of shape (n,)
    count : float
        How many images the rows stand for.
    multilabel : bool, default=False

    Returns
    -------
    float
        From 0.05 to 10.

    Notes
    -----
    As if one of two images more had another label (Platt, "Probabilistic outputs for support vector machines", 1999,
    section 2.2): few held-out images that are all right do not make probabilities of 0 and 1.
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
