"""LQFRegressor, and several labels for each image: equal to explicit least squares, in the units of y."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from support.data import make_images, merged, tiny_net

from sklearn_lqf import LQFClassifier, LQFRegressor

X, _ = make_images(20)
RNG = np.random.default_rng(0)
Y = X[:, :6, :6, 0].mean((1, 2)) + RNG.normal(0, 5, 20)  # of the order of 100
TWO = np.c_[Y, 1e-3 * X[:, 6:, :6, 1].mean((1, 2))]
LABELS = (np.c_[X[:, :6, :6, 0].mean((1, 2)), X[:, :6, 6:, 1].mean((1, 2)), X[:, 6:, :6, 2].mean((1, 2))] > 100) * 1
WEIGHTS = np.where(np.arange(20) % 5 == 1, 2.0, np.where(np.arange(20) % 7 == 3, 0.0, 1.0))
OPTIONS = {"execution": {"dtype": "float64", "batch_size": 7}}


def regressor(**parameters) -> LQFRegressor:
    return LQFRegressor(tiny_net(), **merged(OPTIONS, parameters))


def least_squares(model, values, weights, new) -> np.ndarray:
    """Outputs for new images of scikit-learn's ridge regression on the scaled features, without one image of a row."""
    theta = [model.prior_[group.name] / model.alpha_ for group in model._model.reader.groups]
    root = np.sqrt(np.repeat(theta, [group.size for group in model._model.reader.groups]))
    numbers = np.maximum(weights, weights > 0)  # of images that a row stands for
    s = weights * (numbers.sum() / weights.sum())
    return Ridge(1.0).fit(model.features(X) * root, values, s).predict(model.features(new) * root)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("y", [Y, TWO], ids=["one", "two"])
def test_predictions_equal_ridge_regression(y, weights):
    model = regressor().fit(X, y, weights)
    s = np.ones(20) if weights is None else weights
    new = make_images(5, seed=1)[0]
    assert model.predict(new).shape == (5, *y.shape[1:])
    np.testing.assert_allclose(model.predict(new), least_squares(model, y, s, new), rtol=1e-8)
    mean = np.average(y, axis=0, weights=s)
    np.testing.assert_allclose(model.intercept_, np.atleast_1d(mean))  # features have mean zero
    np.testing.assert_allclose(
        model.target_scale_, np.sqrt(np.atleast_1d(np.average((y - mean) ** 2, axis=0, weights=s)))
    )
    np.testing.assert_allclose(
        model.predict(new).reshape(5, -1), model.features(new) @ model.coef_.T + model.intercept_, rtol=1e-9
    )


def test_units_and_origin_of_y_do_not_matter():
    model = regressor().fit(X, Y)
    other = regressor().fit(X, 1e6 * Y - 1e3)
    np.testing.assert_allclose(other.predict(X), 1e6 * model.predict(X) - 1e3, rtol=1e-8)
    assert other.alpha_ == pytest.approx(model.alpha_, rel=1e-9)


def test_column_and_constant_targets():
    np.testing.assert_allclose(regressor().fit(X, np.full(20, 7.0)).predict(X), 7.0)
    np.testing.assert_allclose(regressor().fit(X, Y[:, None]).predict(X), regressor().fit(X, Y).predict(X)[:, None])


def test_in_scikit_learn():
    model = make_pipeline(FunctionTransformer(np.ascontiguousarray), regressor())
    assert model.fit(X, Y).score(X, Y) > 0.9
    assert cross_val_score(regressor(), X, Y, cv=4).mean() > 0.3
    search = GridSearchCV(regressor(), {"alpha": [1e-2, 10.0]}, cv=2).fit(X, Y)
    assert search.best_params_["alpha"] == 1e-2
    assert clone(regressor()).get_params()["execution__batch_size"] == 7


# --------------------------------------------------------------------------------------------- several labels


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(), **merged(OPTIONS, parameters))


@pytest.mark.parametrize("parameters", [{}, {"views": ("identity", "flip")}, {"tangents": "both"}])
def test_several_labels(parameters):
    model = classifier(**parameters).fit(X, LABELS)
    theta = [model.prior_[group.name] / model.alpha_ for group in model._model.reader.groups]
    features = model.features(X) * np.sqrt(np.repeat(theta, [group.size for group in model._model.reader.groups]))
    expected = Ridge(1.0).fit(features, LABELS).predict(features)
    np.testing.assert_allclose(model.decision_function(X) + 0.5, expected, atol=1e-8)
    np.testing.assert_array_equal(model.predict(X), model.decision_function(X) > 0)
    probabilities = model.predict_proba(X)
    assert probabilities.shape == LABELS.shape
    np.testing.assert_array_equal(probabilities > 0.5, model.predict(X) == 1)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), probabilities)
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.score(X, LABELS) > 0.7
