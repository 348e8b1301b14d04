"""From features to the solution: scale, prior and weights against scikit-learn's Ridge.

The features are random numbers, in four groups of which one is a pair of sketches; no network is needed.
"""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from sklearn_lqf.engine import problem
from sklearn_lqf.engine.features import Group
from sklearn_lqf.engine.problem import Problem, Recipe, TrainingRows

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


def pose(rows: TrainingRows = ROWS, **recipe) -> Problem:
    return Problem(rows, GROUPS, rows.given, np.ones(rows.targets.shape[1]), replace(RECIPE, **recipe))


def scaled(found: Problem, theta: np.ndarray) -> np.ndarray:
    return found.standardization(found._rows.features) * np.sqrt(np.repeat(theta, SIZES))


def refits(found: Problem, theta: np.ndarray) -> np.ndarray:
    """Outputs (n, C) for each row by Ridge without one of the images that it stands for."""
    phi, s, t = scaled(found, theta), found.weights, found.targets
    rest = 1 - 1 / found._rows.multiplicity
    out = np.empty_like(t)
    for i in range(len(t)):
        without = np.where(np.arange(len(t)) == i, s * rest, s)
        out[i] = Ridge(1.0).fit(phi, t, without).predict(phi[i : i + 1])
    return out


def error(found: Problem, theta: np.ndarray) -> float:
    """The criterion in nats, by refits."""
    squares = found.weights @ np.square(refits(found, theta) - found.targets).sum(1)
    return 0.5 * found._rows.multiplicity.sum() * found._recipe.free * np.log(squares)


# -------------------------------------------------------------------------------------------------------- scale


def test_groups_are_standardized_with_the_weights():
    found = pose()
    psi, s = found.standardization(FEATURES), found.weights
    assert s.sum() == pytest.approx(np.maximum(GIVEN, 1).sum())  # the number of images
    np.testing.assert_allclose(s / GIVEN, s[0] / GIVEN[0])
    np.testing.assert_allclose(s @ psi, 0, atol=1e-9)
    wrong = np.where(np.arange(FEATURES.size).reshape(FEATURES.shape) == 7, np.inf, FEATURES)
    with pytest.raises(ValueError, match="not all finite"):
        pose(replace(ROWS, features=wrong))


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
    values = [error(found, theta * f) + 0.01 * np.log(theta.sum() * f) ** 2 for f in (0.8, 1.0, 1.25)]
    assert values[1] <= min(values) + 1e-9
    np.testing.assert_allclose(pose(prior=prior).solve("auto")[0].weight[np.repeat(shares, SIZES) == 0], 0)


def test_the_learned_prior_is_a_minimum():
    """Of the held-out error by refits and the hyper-prior: the last features count as much as all other statistics."""
    found = pose()
    expected = np.array([2.0, 1.0, 1.0, 1.0]) / 5

    def objective(log_theta: np.ndarray) -> float:
        # log theta = log e + z + u: of all z and u the best for a theta.
        z = log_theta - np.log(expected)
        u = z.sum() / (len(z) + 0.02)
        return error(found, np.exp(log_theta)) + np.square(z - u).sum() / 2 + 0.01 * u**2

    best = np.log(found.variances)
    for step in np.vstack([np.eye(4), np.ones(4)]):
        for sign in (-0.3, 0.3):
            assert objective(best + sign * step) > objective(best) - 1e-3
    assert found.variances.min() > 0
    assert not np.allclose(found.variances, pose(prior="evidence").variances, rtol=1e-2)


# ----------------------------------------------------------------------------------------- the rows of the prior


@pytest.fixture
def many(monkeypatch) -> TrainingRows:
    """Rows of three classes of very different size; a prior is learned from 30 of them."""
    monkeypatch.setattr(problem, "_PRIOR_ROWS", 30)
    rng, codes = np.random.default_rng(1), np.repeat(np.arange(C), [150, 40, 10])
    features = rng.normal(size=(200, sum(SIZES))) + 0.5 * codes[:, None] * rng.normal(size=sum(SIZES))
    return TrainingRows(features, np.eye(C)[codes], np.ones(200), rng.integers(0, 256, (200, 16), dtype=np.uint8))


def test_rows_of_the_prior_are_some_of_each_class_chosen_by_content(many):
    one = pose(many)
    chosen = one._prior_rows()
    assert np.bincount(many.targets[chosen].argmax(1)).tolist() == [10, 10, 10]
    assert len(np.unique(chosen)) == 30
    plain = pose(many, stratified=False, free=C)._prior_rows()
    assert len(plain) == 30 and np.bincount(many.targets[plain].argmax(1))[0] > 15
    order = np.random.default_rng(2).permutation(200)
    other = pose(many.taking(order))
    assert set(chosen) == set(order[other._prior_rows()])
    np.testing.assert_allclose(other.variances, one.variances, rtol=1e-6)
    grown = pose(many.joined(replace(many.taking(order[:1]), digests=np.full((1, 16), 255, np.uint8))))
    assert len(set(grown._prior_rows()) - set(chosen)) <= 1  # one image more hardly changes the choice
    # Copies stand together.
    weighted = replace(many, given=np.where(np.isin(np.arange(200), chosen[::3]), 2.0, 1.0))
    twice = pose(many.taking(np.r_[np.arange(200), chosen[::3]]))
    assert len(twice._prior_rows()) == 40
    np.testing.assert_allclose(twice.variances, pose(weighted).variances, rtol=1e-6)


def test_with_many_classes_more_rows_are_taken(many, monkeypatch):
    monkeypatch.setattr(problem, "_PRIOR_ROWS_MAX", 90)
    codes = np.arange(200) % 25
    assert len(pose(replace(many, targets=np.eye(25)[codes]), free=24)._prior_rows()) == 90
    monkeypatch.setattr(problem, "_PRIOR_ROWS_MAX", 2000)
    sample = pose(replace(many, targets=np.eye(25)[codes]), free=24)._prior_rows()
    assert np.bincount(codes[sample]).tolist() == [4] * 25


# ----------------------------------------------------------------------------------------------------- solutions


@pytest.mark.parametrize("form", ["rows", "columns", "pcg", "zero variance"])
def test_solutions_are_those_of_ridge(form):
    rows = ROWS.taking(np.tile(np.arange(N), 2)) if form == "columns" else ROWS  # more rows than columns
    if form == "columns":
        rows = replace(rows, features=rows.features + RNG.normal(size=rows.features.shape))
    prior = "equal" if form == "zero variance" else RECIPE.prior
    found = pose(rows, solver="pcg" if form == "pcg" else "auto", prior=prior)
    (solution, held_out), theta = found.solve("auto"), found.variances
    assert solution.method == {"pcg": "estimate", "zero variance": "columns"}.get(form, form)
    ridge = Ridge(1.0).fit(scaled(found, theta), found.targets, found.weights)
    expected = (ridge.coef_ * np.sqrt(np.repeat(theta, SIZES))).T
    np.testing.assert_allclose(solution.weight, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(solution.intercept, ridge.intercept_, atol=1e-9)
    if form == "pcg":
        assert 0 < solution.n_iter == len(solution.residual_norms) - 1
        assert solution.residual_norms[-1] <= 1e-12 < solution.residual_norms[0]
        some = {"last": 1.0, "b directions": 3.0}
        assert "max_iter" in pose(solver="pcg", max_iter=1, prior=some).solve("auto")[0].advice
    else:
        np.testing.assert_allclose(held_out, refits(found, theta), atol=1e-8)
        assert solution.n_iter == 0
    assert solution.advice is None


def test_what_does_not_fit_is_estimated():
    assert pose(budget=1000).solve("auto")[0].method == "estimate"
    assert pose(budget=8 * N**2).solve("auto")[0].method == "rows"
    with pytest.raises(ValueError, match=r"16 rows and 22 features.*solver='pcg'"):
        pose(budget=1000, solver="closed").solve("auto")


def test_a_fitted_solution_keeps_scale_and_prior():
    solution, _ = pose(prior="evidence").solve(0.3)
    again = Problem(ROWS.taking(np.arange(10)), GROUPS, GIVEN[:10], np.ones(C), RECIPE, fitted=solution)
    assert again.standardization is solution.standardization
    assert again.variances is solution.variances
