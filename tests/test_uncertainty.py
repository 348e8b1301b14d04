"""Standard deviations against the dense posterior."""

import numpy as np
import pytest
from images import make_images, tiny_net
from sklearn.exceptions import NotFittedError
from test_influence import jacobian

from sklearn_lqf import LQFClassifier, LQFRegressor, uncertainty

X, LABELS = make_images(15)
NEW, _ = make_images(4, seed=1)
TARGETS = np.c_[X[:, :6, :6, 0].mean((1, 2)), 0.01 * X[:, 6:, :6, 1].mean((1, 2))]
TARGETS += np.random.default_rng(0).normal(size=TARGETS.shape) * TARGETS.std(0) / 2
WEIGHTS = np.where(np.arange(15) % 5 == 1, 2.0, np.where(np.arange(15) % 7 == 3, 0.0, 1.0))
OPTIONS = {"dtype": "float64", "tol": 1e-12, "max_iter": 1000, "store_data": True}


def posterior(model, values: np.ndarray, weights: np.ndarray, views: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Covariance (m, C, C) of the outputs of NEW and variance of the noise, both in the units of the targets."""
    keep = weights > 0
    t = ((values - weights @ values / weights.sum()) / model._unit)[keep]
    rows = np.concatenate([jacobian(model, v[keep]) for v in views])
    s = np.tile(weights[keep] / len(views), len(views))
    t = np.tile(t, (len(views), 1))
    h = np.einsum("n,ncp,ncq->pq", s, rows, rows) + model.alpha_ * np.eye(rows.shape[2])
    b = np.einsum("n,ncp,nc->p", s, rows, t)
    d = np.linalg.solve(h, b)
    objective = (s * ((rows @ d - t) ** 2).sum(1)).sum() + model.alpha_ * d @ d
    noise = objective / (weights.sum() * values.shape[1])
    j = jacobian(model, NEW)
    covariance = noise * np.einsum("mcp,pq,mdq->mcd", j, np.linalg.inv(h), j)
    return covariance * np.outer(model._unit, model._unit), noise


def spread(covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))


def test_regression_equals_the_dense_posterior():
    model = LQFRegressor(tiny_net(), **OPTIONS).fit(X, TARGETS, WEIGHTS)
    covariance, noise = posterior(model, TARGETS, WEIGHTS, [X])
    mean, std = model.predict(NEW, return_std=True)
    np.testing.assert_array_equal(mean, model.predict(NEW))
    np.testing.assert_allclose(std, np.sqrt(spread(covariance) ** 2 + noise * model._unit**2), rtol=1e-7)
    one = LQFRegressor(tiny_net(), **OPTIONS).fit(X, TARGETS[:, 0])
    assert one.predict(NEW, return_std=True)[1].shape == (4,)


@pytest.mark.parametrize("views", ["identity", ("identity", "flip")])
def test_classification_equals_the_dense_posterior(views):
    model = LQFClassifier(tiny_net(), views=views, **OPTIONS).fit(X, LABELS)
    images = [X] if views == "identity" else [X, X[:, :, ::-1].copy()]
    values = (LABELS[:, None] == model.classes_).astype(float)
    covariance, _ = posterior(model, values, np.ones(15), images)
    decision, std = model.decision_function(NEW, return_std=True)
    np.testing.assert_array_equal(decision, model.decision_function(NEW))
    np.testing.assert_allclose(std, spread(covariance), rtol=1e-7)


def test_two_classes_and_several_labels():
    two = LABELS != "cow"
    model = LQFClassifier(tiny_net(), **OPTIONS).fit(X[two], LABELS[two])
    _, std = model.decision_function(NEW, return_std=True)
    full = model._output_covariance(NEW)
    np.testing.assert_allclose(std**2, full[:, 0, 0] + full[:, 1, 1] - 2 * full[:, 0, 1])
    labels = LQFClassifier(tiny_net(), **OPTIONS).fit(X, np.c_[LABELS == "ant", LABELS != "bee"].astype(int))
    assert labels.decision_function(NEW, return_std=True)[1].shape == (4, 2)


def test_the_preconditioner_stands_for_large_data(monkeypatch):
    model = LQFClassifier(tiny_net(), **OPTIONS).fit(X, LABELS)
    _, exact = model.decision_function(NEW, return_std=True)
    monkeypatch.setattr(uncertainty, "DUAL_MAX", 10)
    _, estimate = model.decision_function(NEW, return_std=True)
    assert 0 < np.abs(estimate / exact - 1).max() < 0.2
    assert np.array_equal(model.decision_function(NEW, return_std=True)[1], estimate)


def test_without_a_tail_the_preconditioner_is_exact(monkeypatch):
    model = LQFClassifier(tiny_net(), tangent_layers="head", **OPTIONS).fit(X, LABELS)
    _, exact = model.decision_function(NEW, return_std=True)
    monkeypatch.setattr(uncertainty, "DUAL_MAX", 10)
    np.testing.assert_allclose(model.decision_function(NEW, return_std=True)[1], exact, rtol=1e-8)


def test_coverage_of_noisy_targets():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 4))
    y = np.sin(rows[:, 0]) + rows[:, 1] / 2 + 0.3 * rng.normal(size=400)
    model = LQFRegressor(store_data=True).fit(rows[:200], y[:200])
    mean, std = model.predict(rows[200:], return_std=True)
    assert 0.88 <= (np.abs(mean - y[200:]) < 1.96 * std).mean() <= 0.99


def test_what_is_needed():
    with pytest.raises(NotFittedError):
        LQFRegressor(tiny_net(), **OPTIONS).predict(X, return_std=True)
    with pytest.raises(ValueError, match="store_data=True"):
        LQFClassifier(tiny_net(), tol=1e-2).fit(X, LABELS).decision_function(X, return_std=True)
    with pytest.raises(ValueError, match="orthogonal"):
        LQFClassifier(tiny_net(), head="ridge", store_data=True).fit(X, LABELS).decision_function(X, return_std=True)
