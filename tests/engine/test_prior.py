"""Learned prior: criteria against refits and the Gaussian likelihood of contrasts, gradients, invariances, searches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from support.linear import ACCURACY

from sklearn_lqf.engine.prior import CRITERIA, Rows, criterion, learn_prior, scale_prior

KINDS = pytest.mark.parametrize("kind", CRITERIA)


def centered(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Features of weighted mean 0 and weighted mean squared norm 1."""
    features = features - np.average(features, axis=0, weights=weights)
    return features / np.sqrt(np.average((features**2).sum(1), weights=weights))


def problem(n: int = 13, outputs: int = 3, seed: int = 0) -> tuple[list[np.ndarray], Rows]:
    """Three groups of 2, 5 and 20 features (fewer and more than rows), with uneven weights and multiplicities."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3.0, n)
    multiplicity = np.where(rng.random(n) < 0.5, 1.0, rng.uniform(1.0, 4.0, n))
    groups = [centered(rng.standard_normal((n, d)), weights) for d in (2, 5, 20)]
    targets = groups[0] @ rng.standard_normal((2, outputs)) + 0.5 * rng.standard_normal((n, outputs)) + 7.0
    return groups, seen(kernels(groups), targets, weights, multiplicity, outputs)


def kernels(groups: list[np.ndarray]) -> np.ndarray:
    return np.stack([g @ g.T for g in groups])


def seen(kernels, targets, weights, multiplicity, free: int) -> Rows:
    return Rows(*(torch.from_numpy(v) for v in (kernels, targets, weights, multiplicity)), free)


def fit_without(rows: Rows, phi: np.ndarray, i: int) -> Ridge:
    """Ridge regression without one of the images that a row stands for, or without the rows of its set."""
    weights = rows.weights.numpy().copy()
    if rows.together is None:
        weights[i] *= 1 - 1 / rows.multiplicity[i]
    else:
        weights[rows.together == rows.together[i]] = 0
    return Ridge(alpha=1.0, solver="svd").fit(phi, rows.targets.numpy(), sample_weight=weights)


THETA = np.array([3.0, 0.4, 1.5])
TOGETHER = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 2, 4, 0, 4, 1])  # the sets of 13 rows


@pytest.mark.parametrize("together", [None, TOGETHER])
def test_leave_one_out_equals_refits(together):
    groups, rows = problem()
    rows = replace(rows, together=together)
    phi = np.hstack([np.sqrt(t) * g for t, g in zip(THETA, groups, strict=True)])
    found = np.stack([fit_without(rows, phi, i).predict(phi[i : i + 1])[0] for i in range(len(phi))])
    squares = rows.weights @ (rows.targets - torch.from_numpy(found)).square().sum(1)
    expected = float(0.5 * rows.multiplicity.sum() * rows.free * squares.log())
    assert criterion(rows, THETA, "leave-one-out")[0] == pytest.approx(expected, rel=ACCURACY)


@pytest.mark.parametrize("theta", [THETA, 20 * THETA])
def test_evidence_is_the_likelihood_of_contrasts(theta):
    _, rows = problem()
    n, outputs = rows.targets.shape
    rows = replace(rows, multiplicity=torch.ones(n).double())
    weights = rows.weights.numpy()
    contrasts = null_space(np.ones((1, n))).T  # (n - 1, n), orthonormal: what the intercept does not change
    covariance = contrasts @ (np.tensordot(theta, rows.kernels.numpy(), 1) + np.diag(1 / weights)) @ contrasts.T
    y = contrasts @ rows.targets.numpy()
    noise = np.trace(y.T @ np.linalg.solve(covariance, y)) / y.size  # where the likelihood is largest
    likelihood = multivariate_normal(np.zeros(n - 1), noise * covariance).logpdf(y.T).sum()
    # What the criterion leaves out of the likelihood; det(F A F') = det A (1' A^-1 1) / n.
    constant = outputs / 2 * ((n - 1) * (np.log(2 * np.pi) + 1) - np.log(n) - np.log(weights).sum())
    assert criterion(rows, theta, "evidence")[0] + constant == pytest.approx(-likelihood, rel=ACCURACY)


@KINDS
@pytest.mark.parametrize(("outputs", "together"), [(1, None), (3, None), (3, TOGETHER)])
def test_gradient_equals_finite_differences(kind, outputs, together):
    rows = replace(problem(outputs=outputs)[1], together=together)
    _, gradient = criterion(rows, THETA, kind)
    step = 1e-5  # central differences: error of order step^2, rounding about 1e-16 / step
    for g in range(3):
        up, down = THETA.copy(), THETA.copy()
        up[g] += step
        down[g] -= step
        slope = (criterion(rows, up, kind)[0] - criterion(rows, down, kind)[0]) / (2 * step)
        assert gradient[g] == pytest.approx(slope, rel=1e-6, abs=1e-7)


@KINDS
def test_scale_equals_the_best_of_a_fine_grid(kind):
    _, rows = problem(n=30)
    shares = np.array([5.0, 2.0, 1.0])
    grid = np.linspace(-9, 12, 1051)
    values = [criterion(rows, np.exp(u) * shares / 8, kind)[0] + 0.01 * u**2 for u in grid]
    best = grid[int(np.argmin(values))]
    assert np.log(scale_prior(rows, shares, kind=kind)) == pytest.approx(best, abs=0.03)  # the step is 0.02
    # So does the search for the prior of one group, whose scale alone a narrow hyper-prior leaves to be learned.
    one = replace(rows, kernels=rows.kernels[:1])
    learned = learn_prior(one, np.ones(1), kind=kind, deviation=1e-2)
    assert np.log(learned[0]) == pytest.approx(np.log(scale_prior(one, np.ones(1), kind=kind)), abs=0.02)


@KINDS
def test_learned_prior_is_a_minimum(kind):
    _, rows = problem(n=40)  # more rows than features: the noise is seen, and the scale stays off its bounds
    expected, deviation = np.array([1.0, 4.0, 2.0]), np.array([0.5, 1.0, 2.0])
    theta = learn_prior(rows, expected, kind=kind, deviation=deviation)
    shares = expected / expected.sum()

    def objective(log_theta: np.ndarray) -> float:
        """At theta, with the split of log theta into z and u that the hyper-prior likes best."""
        offset = log_theta - np.log(shares)
        u = (offset / deviation**2).sum() / ((1 / deviation**2).sum() + 0.02)
        hyper_prior = ((offset - u) ** 2 / (2 * deviation**2)).sum() + 0.01 * u**2
        return criterion(rows, np.exp(log_theta), kind)[0] + hyper_prior

    best = objective(np.log(theta))
    rng = np.random.default_rng(5)
    for size in (0.05, 0.3, 2.0):
        for step in size * rng.standard_normal((10, 3)):
            assert objective(np.log(theta) + step) > best - 1e-3  # the search stops at slopes of 1e-2


@KINDS
def test_constant_group_breaks_nothing(kind):
    _, rows = problem(n=40)
    zero = torch.zeros_like(rows.kernels[:1])
    with_zero = replace(rows, kernels=torch.cat([rows.kernels, zero]))
    theta = learn_prior(with_zero, np.ones(4), kind=kind)
    assert np.isfinite(theta).all() and (theta > 0).all()
    # The others are as without it but for the weak hyper-prior on the scale, of which they have less a priori.
    np.testing.assert_allclose(np.log(theta[:3]), np.log(learn_prior(rows, np.ones(3), kind=kind)), atol=0.05)
    alone = replace(rows, kernels=zero)
    assert 0 < learn_prior(alone, np.ones(1), kind=kind)[0] < np.inf
    assert 0 < scale_prior(alone, np.ones(1), kind=kind) < np.inf


@KINDS
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_equal_targets_leave_the_expected_shares_and_few_rows_suffice(kind, n):
    rng = np.random.default_rng(n)
    groups = [centered(rng.standard_normal((n, 4)), np.ones(n)) if n > 1 else np.zeros((1, 4)) for _ in range(3)]
    for value in (0.0, 0.1, -1e6):
        targets = np.full((n, 2), value) + np.array([0.0, 0.3])
        rows = seen(kernels(groups), targets, np.full(n, 1.7), np.ones(n), 2)
        assert criterion(rows, THETA, kind)[0] == 0
        theta = learn_prior(rows, THETA, kind=kind)
        np.testing.assert_allclose(theta / theta.sum(), THETA / THETA.sum(), rtol=1e-12)
        assert np.isfinite(theta).all() and (theta > 0).all()
        assert scale_prior(rows, THETA, kind=kind) == 1
    for multiplicity in (1.0, 2.0):
        targets = np.eye(2)[np.arange(n) % 2]
        rows = seen(kernels(groups), targets, np.full(n, multiplicity), np.full(n, multiplicity), 1)
        theta = learn_prior(rows, np.ones(3), kind=kind)
        assert np.isfinite(theta).all() and (theta > 0).all()
        assert 0 < scale_prior(rows, np.ones(3), kind=kind) < np.inf


@KINDS
def test_targets_without_noise_stay_within_the_bounds(kind):
    groups, rows = problem(n=40)
    targets = groups[0] @ np.array([[1.0], [2.0]])
    rows = replace(rows, targets=torch.from_numpy(targets), free=1)
    theta = learn_prior(rows, np.ones(3), kind=kind, deviation=3.0)
    assert np.isfinite(theta).all() and (theta > 0).all()
    assert theta.argmax() == 0
    assert scale_prior(rows, np.ones(3), kind=kind) <= np.exp(12) * (1 + 1e-12)


@KINDS
def test_kernels_rounded_to_float32_work_at_any_scale(kind):
    rng = np.random.default_rng(7)
    base = rng.standard_normal((80, 3)).astype(np.float32)
    kernel = np.float64(base @ base.T)
    noise = rng.standard_normal(kernel.shape) * 1e-6
    kernel += noise + noise.T
    assert np.linalg.eigvalsh(1e9 * kernel + np.eye(80)).min() < 0  # no Cholesky factor as it stands
    for weights in (np.ones(80), np.geomspace(1e-6, 1e3, 80)):
        rows = seen(kernel[None], rng.standard_normal((80, 1)), weights, np.ones(80), 1)
        value, gradient = criterion(rows, np.array([1e9]), kind)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bad_input_is_refused():
    _, rows = problem()
    with pytest.raises(ValueError, match="kind must be one of"):
        learn_prior(rows, THETA, kind="evidenz")
    for bad in (0.0, -1.0, np.nan, np.inf):
        for name, numbers in {"expected": np.array([1.0, bad, 1.0]), "deviation": bad}.items():
            with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
                learn_prior(rows, **{"expected": np.ones(3), name: numbers})
    with pytest.raises(ValueError, match="one number for each of the 3 kernels"):
        scale_prior(rows, np.ones(2))
    for kernel in (-rows.kernels, torch.full_like(rows.kernels, np.nan)):
        with pytest.raises(np.linalg.LinAlgError, match="finite and positive semi-definite"):
            criterion(replace(rows, kernels=kernel), 100 * THETA)
