"""ImageFeatures: the features of the estimators, for others."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from sklearn.compose import make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from support.data import make_images, tiny_net
from support.images import as_files

from sklearn_lqf import ImageFeatures, LQFClassifier, LQFRegressor
from sklearn_lqf.estimators import data

X, Y = make_images(15)
NEW_X, _ = make_images(3, seed=1)
DOUBLE = {"execution": {"dtype": "float64"}}


def test_groups_are_those_of_the_classifier():
    transformer, clf = ImageFeatures(tiny_net(), **DOUBLE).fit(X), LQFClassifier(tiny_net(), **DOUBLE).fit(X, Y)
    assert_allclose(transformer.transform(NEW_X), clf.features(NEW_X), atol=1e-10)
    assert transformer.groups_ == clf.groups_
    assert_allclose(transformer.fit_transform(X), transformer.transform(X), atol=1e-10)
    assert len(transformer.get_feature_names_out()) == transformer.transform(X).shape[1]


def test_a_ridge_regression_on_tuned_features_is_the_regressor():
    y = np.random.default_rng(0).normal(size=len(X)) + X.mean((1, 2, 3)) / 50
    reg = LQFRegressor(tiny_net(), **DOUBLE).fit(X, y)
    tuned = ImageFeatures(tiny_net(), prior="leave-one-out", **DOUBLE)
    groups = len(reg.prior_)
    ridge = Ridge(alpha=len(X) * reg.alpha_ * groups / len(X)).fit(tuned.fit_transform(X, y), y)
    assert_allclose(ridge.predict(tuned.transform(NEW_X)), reg.predict(NEW_X), atol=1e-8)
    assert_allclose(list(tuned.prior_.values()), list(reg.prior_.values()))
    with pytest.raises(ValueError, match="learned from y, which is None"):
        tuned.fit(X)


def test_beside_columns_of_a_table(tmp_path):
    table = pd.DataFrame({"path": [str(p) for p in as_files(X, tmp_path)], "size": np.arange(len(X), dtype=float)})
    both = make_column_transformer(
        (ImageFeatures(tiny_net(), **DOUBLE), ["path"]), ("passthrough", ["size"]), verbose_feature_names_out=False
    ).set_output(transform="pandas")
    found = both.fit_transform(table)
    assert list(found.columns)[-1] == "size"
    assert_allclose(found.to_numpy()[:, :-1], ImageFeatures(tiny_net(), **DOUBLE).fit_transform(X), atol=1e-6)
    assert make_pipeline(both, Ridge()).fit(table, np.arange(len(X))).predict(table).shape == (len(X),)


@pytest.mark.parametrize("weights", [None, np.arange(len(X)) % 4])
def test_images_are_read_once_by_fit_transform(weights, monkeypatch):
    read, evaluate = [], data.evaluate_rows
    monkeypatch.setattr(data, "evaluate_rows", lambda *args: (read.append(len(args[2])), evaluate(*args))[1])
    found = ImageFeatures(tiny_net(), prior="leave-one-out", **DOUBLE)
    features = found.fit_transform(X, Y, sample_weight=weights)
    if weights is None:
        assert read == [len(X)]
    assert_allclose(features, found.transform(X), atol=1e-10)


def test_nothing_of_an_earlier_fit_remains():
    frame = pd.DataFrame(X.reshape(len(X), -1)).rename(columns=str)
    found = ImageFeatures(tiny_net(), prior="evidence", image_shape=(12, 12, 3), **DOUBLE).fit(frame, Y)
    assert len(found.feature_names_in_) == 432
    assert found.fit(frame.to_numpy(), Y).transform(frame.to_numpy()).shape == (len(X), 48)
    for prior in ("evidence", None):
        found.set_params(prior=prior, image_shape=None).fit(X, Y)
        with pytest.raises(ValueError, match="Negative"):
            found.fit(X[:, :8], Y, sample_weight=-np.ones(len(X)))
        with pytest.raises(NotFittedError):
            found.transform(X)
