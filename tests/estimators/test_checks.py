"""scikit-learn's own suite of checks, run for real: on two-dimensional data, without expected failures."""

import pytest
from sklearn.utils.estimator_checks import check_estimator

from sklearn_lqf import ImageFeatures, LQFClassifier, LQFClassifierCV, LQFRegressor

# The number of checks that apply to each, which must not fall unseen.
ESTIMATORS = {
    "classifier": (LQFClassifier(), 55),
    "iterative": (LQFClassifier(solver="pcg", prior="last"), 55),
    "paper": (LQFClassifier(model="paper", tangent_layers="head"), 55),
    "others": (
        LQFClassifierCV(alphas=[0.1], tangents="both", n_directions=2, negative_slope=0.1, store_data=True), 56
    ),
    "regressor": (LQFRegressor(store_data=True), 50),
    "features": (ImageFeatures(), 45),
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_check_passes(name):
    estimator, count = ESTIMATORS[name]
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert not failed
    # skipped by scikit-learn itself without array API support, or on versions without the check
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert sum(r["status"] == "passed" for r in results) >= count
    tags = estimator.__sklearn_tags__()
    assert tags.input_tags.two_d_array
    assert not (tags.non_deterministic or tags.no_validation or tags._skip_test)
