"""LQFRegressor, and several labels for each image: equal to explicit least squares, in the units of y."""

import numpy as np
import pytest
from images import make_images, tiny_net
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from test_influence import jacobian

from sklearn_lqf import LQFClassifier, LQFRegressor

X, _ = make_images(20)
RNG = np.random.default_rng(0)
Y = X[:, :6, :6, 0].mean((1, 2)) + RNG.normal(0, 5, 20)  # of the order of 100
TWO = np.c_[Y, 1e-3 * X[:, 6:, :6, 1].mean((1, 2))]
LABELS = (np.c_[X[:, :6, :6, 0].mean((1, 2)), X[:, :6, 6:, 1].mean((1, 2)), X[:, 6:, :6, 2].mean((1, 2))] > 100) * 1
WEIGHTS = np.where(np.arange(20) % 5 == 1, 2.0, np.where(np.arange(20) % 7 == 3, 0.0, 1.0))
OPTIONS = {"dtype": "float64", "tol": 1e-12, "max_iter": 1000, "batch_size": 7}


def regressor(**parameters) -> LQFRegressor:
    return LQFRegressor(tiny_net(), **{**OPTIONS, **parameters})


def least_squares(model, values: np.ndarray, weights: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Outputs for new images of the explicit least squares solution, by the dense Jacobian."""
    mean = weights @ values / weights.sum()
    unit = model._unit
    keep = weights > 0
    rows = jacobian(model, X[keep])
    t, s = ((values - mean) / unit)[keep], weights[keep]
    h = np.einsum("n,ncp,ncq->pq", s, rows, rows) + model.alpha_ * np.eye(rows.shape[2])
    d = np.linalg.solve(h, np.einsum("n,ncp,nc->p", s, rows, t))
    return mean + unit * (jacobian(model, new) @ d)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("y", [Y, TWO], ids=["one", "two"])
def test_predictions_equal_least_squares(y, weights):
    model = regressor().fit(X, y, weights)
    s = np.ones(20) if weights is None else weights
    new = make_images(5, seed=1)[0]
    expected = least_squares(model, y.reshape(20, -1), s, new).reshape(5, *y.shape[1:])
    np.testing.assert_allclose(model.predict(new), expected, rtol=1e-8)
    assert model.predict(new).shape == (5, *y.shape[1:])
    mean = np.average(y, axis=0, weights=s)
    np.testing.assert_allclose(model.intercept_, np.atleast_1d(mean))
    np.testing.assert_allclose(
        model.target_scale_, np.sqrt(np.atleast_1d(np.average((y - mean) ** 2, axis=0, weights=s)))
    )


def test_units_and_origin_of_y_do_not_matter():
    model = regressor().fit(X, Y)
    other = regressor().fit(X, 1e6 * Y - 1e3)
    np.testing.assert_allclose(other.predict(X), 1e6 * model.predict(X) - 1e3, rtol=1e-8)
    assert other.alpha_ == pytest.approx(model.alpha_, rel=1e-9)


def test_head_only_equals_ridge():
    model = regressor(tangent_layers="head").fit(X, Y)
    features = np.c_[model.features(X), np.ones(20)]  # the bias has the penalty of the weights
    ridge = Ridge(model.alpha_, fit_intercept=False).fit(features, Y - Y.mean())
    np.testing.assert_allclose(model.predict(X), Y.mean() + ridge.predict(features), rtol=1e-8)


def test_column_and_row_of_targets():
    np.testing.assert_allclose(regressor().fit(X, Y[:, None]).predict(X), regressor().fit(X, Y).predict(X)[:, None])


def test_leave_one_out_and_influence_are_in_the_units_of_y():
    model = regressor().fit(X, TWO, WEIGHTS)
    held_out = model.leave_one_out(X, TWO, WEIGHTS)
    effect = model.influence(X, TWO, X[:2], sample_weight=WEIGHTS)
    losses = model.influence(X, TWO, X[:2], TWO[:2], WEIGHTS)
    assert effect.shape == (2, 20, 2)
    before = model.predict(X[:2])
    for i in (0, 1, 6):
        without = WEIGHTS.copy()
        without[i] -= min(1.0, without[i])
        f = least_squares(model, TWO, without, X[[i, 0, 1]])
        np.testing.assert_allclose(held_out[i], f[0], rtol=1e-7)
        np.testing.assert_allclose(effect[:, i], f[1:] - before, rtol=1e-5, atol=1e-9)
        expected = ((f[1:] - TWO[:2]) ** 2).sum(1) - ((before - TWO[:2]) ** 2).sum(1)
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-6, atol=1e-6)
    one = regressor().fit(X, Y)
    assert one.influence(X, Y, X[:3]).shape == (3, 20)
    assert one.leave_one_out(X, Y).shape == (20,)


def test_in_scikit_learn():
    model = make_pipeline(FunctionTransformer(np.ascontiguousarray), regressor(tol=1e-3))
    assert model.fit(X, Y).score(X, Y) > 0.9
    assert cross_val_score(regressor(tol=1e-3), X, Y, cv=4).mean() > 0.3
    search = GridSearchCV(regressor(tol=1e-3), {"alpha": [1e-2, 1.0]}, cv=2).fit(X, Y)
    assert search.best_params_["alpha"] == 1e-2
    assert clone(regressor()).get_params()["tol"] == 1e-12


def test_bad_targets():
    with pytest.raises(ValueError, match="NaN"):
        regressor().fit(X, np.full(20, np.nan))
    with pytest.raises(ValueError, match="inconsistent"):
        regressor().fit(X, Y[:5])
    with pytest.raises(ValueError, match="n_samples=1"):
        regressor().fit(X[:1], Y[:1])
    model = regressor().fit(X, TWO)
    with pytest.raises(ValueError, match="1 targets, but the model was fitted on 2"):
        model.leave_one_out(X, Y)
    with pytest.raises(ValueError, match="'auto' or a number > 0"):
        regressor(alpha=0).fit(X, Y)


def test_a_constant_target_is_predicted():
    np.testing.assert_allclose(regressor().fit(X, np.full(20, 7.0)).predict(X), 7.0)


# --------------------------------------------------------------------------------------------- several labels


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(), **{**OPTIONS, **parameters})


@pytest.mark.parametrize("parameters", [{}, {"target_scale": 15.0}, {"views": ("identity", "flip")}])
def test_several_labels(parameters):
    model = classifier(**parameters).fit(X, LABELS)
    if "views" not in parameters:
        expected = least_squares(model, LABELS.astype(float), np.ones(20), X)
        np.testing.assert_allclose(model.decision_function(X) + 0.5, expected, atol=1e-8)
    np.testing.assert_array_equal(model.predict(X), model.decision_function(X) > 0)
    probabilities = model.predict_proba(X)
    assert probabilities.shape == LABELS.shape
    np.testing.assert_array_equal(probabilities > 0.5, model.predict(X) == 1)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), probabilities)
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.score(X, LABELS) > 0.7
    assert model.leave_one_out(X, LABELS).shape == LABELS.shape
    assert model.influence(X, LABELS, X[:2]).shape == (2, 20, 3)
    assert model.influence(X, LABELS, X[:2], LABELS[:2]).shape == (2, 20)


def test_labels_that_do_not_fit():
    model = classifier().fit(X, LABELS)
    with pytest.raises(ValueError, match="3 labels for each image"):
        model.leave_one_out(X, LABELS[:, :2])
    with pytest.raises(ValueError, match="3 labels for each image"):
        model.leave_one_out(X, LABELS[:, 0])
    with pytest.raises(ValueError, match="one class for each image"):
        classifier().fit(X, LABELS[:, 0]).leave_one_out(X, LABELS)
    with pytest.raises(ValueError, match="class_weight is not supported"):
        classifier(class_weight="balanced").fit(X, LABELS)
    with pytest.raises(ValueError, match=r"0 and 1.*multiclass-multioutput"):
        classifier().fit(X, LABELS + np.arange(3))
    with pytest.warns(DataConversionWarning):
        classifier().fit(X, LABELS[:, :1])
