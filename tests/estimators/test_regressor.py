"""LQFRegressor, and several labels for each image: equal to explicit least squares, in the units of y."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning
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


def least_squares(model, values, weights, new, without=None) -> np.ndarray:
    """Outputs for new images of scikit-learn's ridge regression on the scaled features, without one image of a row."""
    theta = [model.prior_[group.name] / model.alpha_ for group in model._model.reader.groups]
    root = np.sqrt(np.repeat(theta, [group.size for group in model._model.reader.groups]))
    numbers = np.maximum(weights, weights > 0)  # of images that a row stands for
    s = weights * (numbers.sum() / weights.sum())
    if without is not None and weights[without]:
        s[without] *= 1 - 1 / numbers[without]
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


@pytest.mark.parametrize("prior", ["equal", "last"])
def test_a_prior_that_is_given(prior):
    model = regressor(prior=prior, alpha=0.1).fit(X, Y)
    assert model.alpha_ == pytest.approx(0.1)
    ends = np.cumsum([group.size for group in model._model.reader.groups])
    names = [group.name for group in model._model.reader.groups]
    columns = slice(None) if prior == "equal" else slice(0, ends[names.index("last")])
    features = model.features(X)[:, columns] / np.sqrt(len(names) if prior == "equal" else 1)
    assert names[0] == "last"
    np.testing.assert_allclose(model.predict(X), Ridge(0.1).fit(features, Y).predict(features), rtol=1e-8)


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
        f = least_squares(model, TWO, WEIGHTS, X[[i, 0, 1]], without=i)
        np.testing.assert_allclose(held_out[i], f[0], rtol=1e-7)
        np.testing.assert_allclose(effect[:, i], f[1:] - before, rtol=1e-5, atol=1e-9)
        expected = ((f[1:] - TWO[:2]) ** 2).sum(1) - ((before - TWO[:2]) ** 2).sum(1)
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-6, atol=1e-6)
    one = regressor().fit(X, Y)
    assert one.influence(X, Y, X[:3]).shape == (3, 20)
    assert one.leave_one_out(X, Y).shape == (20,)


@pytest.mark.parametrize("y", [Y, TWO], ids=["one", "two"])
def test_predictive_deviation(y):
    """Against Bayesian linear regression on the scaled features."""
    model = regressor(store_data=True).fit(X, y)
    new = make_images(5, seed=1)[0]
    mean, std = model.predict(new, return_std=True)
    assert mean.shape == std.shape == (5, *y.shape[1:])
    np.testing.assert_array_equal(mean, model.predict(new))
    theta = [model.prior_[group.name] / model.alpha_ for group in model._model.reader.groups]
    root = np.sqrt(np.repeat(theta, [group.size for group in model._model.reader.groups]))
    phi, phi_new = (np.c_[model.features(Z) * root, np.ones(len(Z))] for Z in (X, new))
    inverse = np.linalg.inv(phi.T @ phi + np.diag(np.append(np.ones(len(root)), 0)))  # of free intercept
    t = ((y - y.mean(0)) / y.std(0)).reshape(20, -1)
    noise = np.trace(t.T @ (t - phi @ inverse @ phi.T @ t)) / (19 * t.shape[1])
    assert model.noise_variance_ == pytest.approx(noise, rel=1e-8)
    variance = ((phi_new @ inverse) * phi_new).sum(1)
    expected = np.sqrt(noise * (1 + variance))[:, None] * np.atleast_1d(y.std(0))
    np.testing.assert_allclose(std.reshape(5, -1), expected, rtol=1e-8)


def test_updates_equal_a_fit():
    model = regressor(store_data=True).fit(X[:12], TWO[:12]).partial_fit(X[12:], TWO[12:])
    np.testing.assert_allclose(model.predict(X), regressor().fit(X, TWO).predict(X), rtol=1e-6)
    model.forget([0, 5])
    rest = np.delete(np.arange(20), [0, 5])
    np.testing.assert_allclose(model.predict(X), regressor().fit(X[rest], TWO[rest]).predict(X), rtol=1e-6)
    np.testing.assert_allclose(
        regressor(store_data=True).partial_fit(X, Y).predict(X), regressor().fit(X, Y).predict(X)
    )


def test_in_scikit_learn():
    model = make_pipeline(FunctionTransformer(np.ascontiguousarray), regressor())
    assert model.fit(X, Y).score(X, Y) > 0.9
    assert cross_val_score(regressor(), X, Y, cv=4).mean() > 0.3
    search = GridSearchCV(regressor(), {"alpha": [1e-2, 10.0]}, cv=2).fit(X, Y)
    assert search.best_params_["alpha"] == 1e-2
    assert clone(regressor()).get_params()["batch_size"] == 7


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
