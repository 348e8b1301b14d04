"""From features to the solution: scale, prior, its rows, and which form is taken.

The features are random numbers, in four groups of which one is a pair of sketches; no network is needed. Held-out
outputs are compared with scikit-learn's Ridge in tests/answers/test_left_out.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from sklearn_lqf.engine.features import Group
from sklearn_lqf.engine.prior import CRITERIA, Rows, learn_prior, scale_prior
from sklearn_lqf.engine.problem import Problem, Recipe, Solution, TrainingRows

N, C = 16, 3
GROUPS = [
    Group("last", (5,)), Group("a tangents", (4,)), Group("a deviation", (3,)),
    Group("b directions", (4, 6), ((2, 2), (2, 3))),
]  # fmt: skip
SIZES = [g.size for g in GROUPS]
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, sum(SIZES))) * np.repeat([1.0, 30.0, 4.0, 0.01, 5.0], [5, 4, 3, 4, 6]) + 3
CODES = np.arange(N) % C
FEATURES[:, :3] += 1.5 * np.eye(C)[CODES]
FEATURES[:, 5:8] += 40 * np.eye(C)[CODES]
DIGESTS = RNG.integers(0, 256, (N, 16), dtype=np.uint8)
GIVEN = np.where(np.arange(N) % 4 == 1, 2.0, np.where(np.arange(N) % 5 == 2, 0.6, 1.0))
ROWS = TrainingRows(FEATURES, np.eye(C)[CODES], GIVEN, DIGESTS)
RECIPE = Recipe("leave-one-out", "auto", "auto", 1e-12, 500, C - 1, True, 1 << 30)


def pose(rows: TrainingRows = ROWS, fitted: Solution | None = None, **recipe) -> Problem:
    return Problem(rows, GROUPS, rows.given, np.ones(rows.targets.shape[1]), replace(RECIPE, **recipe), fitted)


def seen_by_prior(found: Problem, used: np.ndarray) -> Rows:
    """Kernels of the standardized groups in use."""
    parts = np.split(found.standardization(FEATURES), np.cumsum(SIZES)[:-1], 1)
    kernels = np.stack([x @ x.T for x, is_used in zip(parts, used, strict=True) if is_used])
    of_rows = (found.targets, found.weights, np.maximum(GIVEN, 1))
    return Rows(*(torch.from_numpy(v) for v in (kernels, *of_rows)), C - 1)


# -------------------------------------------------------------------------------------------------------- scale


def test_groups_are_standardized_with_the_weights():
    found = pose()
    psi, s = found.standardization(FEATURES), found.weights
    assert s.sum() == pytest.approx(np.maximum(GIVEN, 1).sum())  # the number of images
    np.testing.assert_allclose(s / GIVEN, s[0] / GIVEN[0])
    np.testing.assert_allclose(s @ psi, 0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- prior

GIVEN_PRIORS = {
    "equal": ("equal", [1, 1, 1, 0]),
    "last": ("last", [1, 0, 0, 0]),
    "dict": ({"b directions": 3.0, "last": 1.0}, [1, 0, 0, 3]),
    "array": (np.array([0.2, 0.4, 0.6, 0.8]), [1, 2, 3, 4]),
    "list": ([2, 4, 6, 8], [1, 2, 3, 4]),
}


@pytest.mark.parametrize("case", GIVEN_PRIORS)
def test_shares_are_given_and_the_scale_is_learned(case):
    prior, shares = GIVEN_PRIORS[case]
    found = pose(prior=prior)
    theta = found.variances
    np.testing.assert_allclose(theta / theta.sum(), np.divide(shares, np.sum(shares)), rtol=1e-12)
    used = np.array(shares) > 0
    assert theta.sum() == pytest.approx(scale_prior(seen_by_prior(found, used), theta[used]), rel=1e-6)
    np.testing.assert_allclose(pose(prior=prior).solve("auto")[0].weight[np.repeat(shares, SIZES) == 0], 0)


@pytest.mark.parametrize("kind", CRITERIA)
def test_the_last_features_count_as_much_as_all_other_statistics_before_they_are_seen(kind):
    found = pose(prior=kind)
    expected = learn_prior(seen_by_prior(found, np.ones(4, bool)), np.array([2.0, 1.0, 1.0, 1.0]), kind=kind)
    np.testing.assert_allclose(found.variances, expected, rtol=1e-4)


# ----------------------------------------------------------------------------------------- the rows of the prior


@pytest.fixture(scope="module")
def prior_rows():
    """Which rows a prior would be learned from; none is."""
    fitted = pose(prior="last").solve("auto")[0]
    return lambda rows, **recipe: pose(rows, fitted, **recipe)._prior_rows()


def many(codes: np.ndarray) -> TrainingRows:
    n = len(codes)
    digests = np.random.default_rng(1).integers(0, 256, (n, 16), dtype=np.uint8)
    return TrainingRows(np.zeros((n, sum(SIZES))), np.eye(codes.max() + 1)[codes], np.ones(n), digests)


def test_rows_of_the_prior_are_some_of_each_class_chosen_by_content(prior_rows):
    rows = many(np.repeat([0, 1, 2], [700, 300, 100]))
    chosen = prior_rows(rows)
    assert np.bincount(rows.targets[chosen].argmax(1)).tolist() == [200, 200, 100]
    assert len(np.unique(chosen)) == 500
    plain = prior_rows(rows, stratified=False)
    assert len(plain) == 500 and np.bincount(rows.targets[plain].argmax(1))[0] > 270
    order = np.random.default_rng(2).permutation(1100)
    assert set(chosen) == set(order[prior_rows(rows.taking(order))])
    grown = rows.joined(replace(rows.taking(order[:1]), digests=np.full((1, 16), 255, np.uint8)))
    assert len(set(prior_rows(grown)) - set(chosen)) <= 1  # one image more hardly changes the choice
    twice = np.r_[np.arange(1100), chosen[::3]]
    assert set(twice[prior_rows(rows.taking(twice))]) == set(chosen)
    assert len(prior_rows(rows.taking(twice))) == 500 + len(chosen[::3])  # copies stand together


def test_rows_of_the_prior_are_of_several_groups(prior_rows):
    """However uneven these are: one of them has to be left out."""
    codes, groups = np.arange(3000) % 2, np.zeros(3000, int)
    groups[[5, 70, 800]] = 1
    rows = replace(many(codes), groups=groups)
    chosen = prior_rows(rows)
    assert {5, 70, 800} <= set(chosen)
    assert np.bincount(codes[chosen]).tolist() == [250, 250]
    chosen = prior_rows(replace(rows, groups=np.arange(3000) // 3))
    assert [len(np.unique(chosen[codes[chosen] == c] // 3)) for c in (0, 1)] == [250, 250]


def test_with_many_classes_more_rows_are_taken(prior_rows):
    codes = np.arange(1100) % 150
    assert np.bincount(codes[prior_rows(many(codes))]).tolist() == [4] * 150
    rows = many(np.arange(2400) % 600)
    assert len(prior_rows(rows)) == 2000
    assert len(prior_rows(rows, stratified=False)) == 500


# ----------------------------------------------------------------------------------------------------- solutions


@pytest.mark.parametrize(
    ("prior", "method", "side"), [("leave-one-out", "rows", N), ({"last": 1.0, "b directions": 3.0}, "columns", 15)]
)
def test_solutions_are_those_of_ridge_and_estimated_where_the_form_does_not_fit(prior, method, side):
    found = pose(prior=prior, budget=8 * side**2)
    closed, estimate = found.solve("auto")[0], pose(prior=prior, budget=1000).solve("auto")[0]
    assert (closed.method, estimate.method) == (method, "estimate")
    root = np.sqrt(np.repeat(found.variances, SIZES))
    ridge = Ridge(1.0).fit(found.standardization(FEATURES) * root, found.targets, found.weights)
    for solution in (closed, estimate):
        np.testing.assert_allclose(solution.weight, (ridge.coef_ * root).T, rtol=0, atol=1e-8 * closed.weight.max())
        np.testing.assert_allclose(solution.intercept, ridge.intercept_, atol=1e-9)
    assert closed.n_iter == 0 < estimate.n_iter == len(estimate.residual_norms) - 1
    with pytest.raises(ValueError, match=r"16 rows and \d+ features.*solver='pcg'"):
        pose(prior=prior, budget=1000, solver="closed").solve("auto")


@pytest.mark.parametrize("prior", ["equal", {"last": 1.0}])  # in rows, and in columns
@pytest.mark.parametrize("recipe", [{}, {"budget": 8 * N**2}, {"solver": "pcg"}], ids=repr)
def test_a_path_has_the_solutions_at_its_penalties(prior, recipe):
    """Also where there is no room for a second matrix, and without any."""
    problem, alphas = pose(prior=prior, **recipe), (0.01, 1.0, 30.0)
    for alpha, (solution, held_out) in zip(alphas, problem.path(alphas), strict=True):
        expected, left_out = problem.solve(alpha)
        assert (solution.method, solution.alpha) == (expected.method, pytest.approx(alpha))
        np.testing.assert_allclose(solution.weight, expected.weight, atol=1e-10)
        np.testing.assert_allclose(held_out, left_out, atol=1e-10)


def test_a_fitted_solution_keeps_scale_and_prior():
    solution, _ = pose(prior="evidence").solve(0.3)
    again = pose(ROWS.taking(np.arange(10)), solution)
    assert again.standardization is solution.standardization
    assert again.variances is solution.variances
