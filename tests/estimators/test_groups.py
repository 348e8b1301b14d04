"""Groups of images that belong together are left out together."""

import numpy as np
import pytest
import sklearn
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_validate
from support.data import make_images, tiny_net

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor

X, Y = make_images(24)
GROUPS = np.array([f"object {i // 3}" for i in range(len(X))])
TARGET = np.random.default_rng(0).normal(size=len(X)) + X.mean((1, 2, 3)) / 50
DOUBLE = {"execution": {"dtype": "float64"}}


@pytest.mark.parametrize("columns", [False, True])
def test_held_out_outputs_are_those_of_refits(columns):
    rows = np.repeat(np.arange(len(X)), 3) if columns else np.arange(15)  # of 16 features
    images, y, groups = X[rows], TARGET[rows], GROUPS[rows]
    reg = LQFRegressor(tiny_net(), prior={"last": 1.0}, alpha=0.1, store_data=True, **DOUBLE)
    reg.fit(images, y, groups=groups)
    assert reg.solver_ == ("columns" if columns else "rows")
    features, wanted = reg.features(images)[:, slice(*reg.groups_["last"])], np.empty(len(y))
    for group in np.unique(groups):
        out = groups == group
        ridge = Ridge(reg.alpha_).fit(features[~out], y[~out])
        wanted[out] = ridge.predict(features[out])
    assert_allclose(reg.leave_one_out(), wanted, atol=1e-8)
    order = np.random.default_rng(0).permutation(len(y))
    assert_allclose(reg.leave_one_out(images[order], y[order], groups=groups[order]), wanted[order], atol=1e-8)


def test_groups_of_one_image_are_no_groups():
    alone = LQFClassifier(tiny_net(), **DOUBLE).fit(X, Y, groups=np.arange(len(X)))
    plain = LQFClassifier(tiny_net(), **DOUBLE).fit(X, Y)
    assert_allclose(alone.decision_function(X), plain.decision_function(X), atol=1e-7)


@pytest.mark.parametrize("prior", ["leave-one-out", "equal", {"last": 1.0}])
def test_copies_in_one_group_do_not_fool_the_prior(prior):
    noise = np.random.default_rng(1).normal(size=len(X))
    rows, groups = np.repeat(np.arange(len(X)), 3), np.repeat(np.arange(len(X)), 3)
    fooled = LQFRegressor(tiny_net(), prior=prior, **DOUBLE).fit(X[rows], noise[rows])
    honest = LQFRegressor(tiny_net(), prior=prior, **DOUBLE).fit(X[rows], noise[rows], groups=groups)
    assert honest.alpha_ > 10 * fooled.alpha_


def test_the_search_leaves_out_groups_by_any_splitter():
    cv = GroupKFold(2)
    given = LQFClassifierCV(tiny_net(), alphas=[0.1, 1.0], cv=list(cv.split(X, Y, GROUPS)), **DOUBLE)
    routed = LQFClassifierCV(tiny_net(), alphas=[0.1, 1.0], cv=cv, **DOUBLE).fit(X, Y, groups=GROUPS)
    given.fit(X, Y, groups=GROUPS)
    assert_allclose(routed.cv_results_["mean_test_score"], given.cv_results_["mean_test_score"])
    with sklearn.config_context(enable_metadata_routing=True):  # through nested searches
        inner = clone(routed).set_fit_request(groups=True)
        found = cross_validate(inner, X, Y, params={"groups": GROUPS}, cv=GroupKFold(2), error_score="raise")
    assert len(found["test_score"]) == 2


def test_updates_keep_groups(tmp_path):
    clf = LQFClassifier(tiny_net(), store_data=True, **DOUBLE).fit(X[:-6], Y[:-6], groups=GROUPS[:-6])
    clf.save(tmp_path / "model")
    clf = LQFClassifier.load(tmp_path / "model", backbone=tiny_net())
    clf.partial_fit(X[-6:], Y[-6:], groups=GROUPS[-6:])
    whole = LQFClassifier(tiny_net(), store_data=True, **DOUBLE).fit(X, Y, groups=GROUPS)
    assert_allclose(clf.leave_one_out(), whole.leave_one_out(), atol=1e-6)
    with pytest.raises(ValueError, match="fitted with groups"):
        clf.partial_fit(X[:1], Y[:1])
    with pytest.raises(ValueError, match="fitted with groups"):
        whole.leave_one_out(X, Y)


def test_bad_groups():
    for groups, message in ((GROUPS[:-1], "labels for"), (np.zeros(len(X)), "use at least two groups")):
        with pytest.raises(ValueError, match=message):
            LQFClassifier(tiny_net()).fit(X, Y, groups=groups)


def test_the_score_of_what_was_left_out():
    clf = LQFClassifier(tiny_net(), store_data=True, **DOUBLE).fit(X, Y)
    assert clf.loo_score_ == np.mean(clf.classes_[clf.leave_one_out().argmax(1)] == Y)
    reg = LQFRegressor(tiny_net(), store_data=True, **DOUBLE).fit(X, TARGET)
    assert reg.loo_score_ == pytest.approx(r2_score(TARGET, reg.leave_one_out()))
