"""scikit-learn's own suite of checks, run for real: on two-dimensional data, without expected failures."""

import pytest
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

from sklearn_lqf import LQFClassifier

ESTIMATORS = [
    LQFClassifier(),
    LQFClassifier(solver="sgd"),
    LQFClassifier(damping=0.0, target_scale=15.0, negative_slope=0.1, tangent_layers="all"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["default", "sgd", "others"])
def test_every_check_passes(estimator):
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert not failed
    # skipped by scikit-learn itself without array API support, or on versions without the check
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert sum(r["status"] == "passed" for r in results) >= 55


def test_nothing_is_excused():
    tags = LQFClassifier().__sklearn_tags__()
    assert not tags.non_deterministic
    assert not tags.no_validation
    assert not tags._skip_test
    assert tags.input_tags.two_d_array
    checks = list(estimator_checks_generator(LQFClassifier()))
    assert len(checks) >= 55
