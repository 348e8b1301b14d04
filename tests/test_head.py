"""The ridge head against scikit-learn's Ridge and against refits."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from sklearn_lqf import head
from sklearn_lqf.head import RidgeHead, fit_ridge_head, orthogonal_head, random_head

F64 = torch.float64
ALPHAS = torch.logspace(-4, 2, 9, dtype=F64)
SIZES = {"more rows than features": (15, 5), "fewer rows than features": (12, 40), "many rows": (26, 4)}
# Leaving out loses digits where an image's own leverage is close to one.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}


class Data:
    """Features (V, n, D), targets (n, 3) that depend on them, and weights."""

    def __init__(self, n: int, d: int, views: int = 1, seed: int = 0):
        rng = np.random.default_rng(seed)
        base = rng.normal(size=(n, d)) * np.linspace(1, 0.1, d) + rng.normal(size=d)
        self.features = torch.from_numpy(np.stack([base + 0.1 * rng.normal(size=(n, d)) for _ in range(views)]))
        self.targets = torch.from_numpy(base @ rng.normal(size=(d, 3)) + 0.5 * rng.normal(size=(n, 3)))
        self.weights = torch.from_numpy(rng.uniform(0.5, 3.0, size=n))
        self.ones = torch.ones(n, dtype=F64)

    def fit(self, multiplicity: Tensor | None = None, alphas: Tensor = ALPHAS) -> RidgeHead:
        multiplicity = self.ones if multiplicity is None else multiplicity
        return fit_ridge_head(self.features, self.targets, self.weights, multiplicity, alphas)

    def reference(self, alpha: float, weights: Tensor | None = None) -> Ridge:
        """scikit-learn's ridge on all views, each with its share of the weight."""
        views, _, d = self.features.shape
        weights = self.weights if weights is None else weights
        model = Ridge(alpha, solver="svd")
        return model.fit(self.features.reshape(-1, d), self.targets.repeat(views, 1), (weights / views).repeat(views))

    def unit(self) -> float:
        """Weighted sum of the squared norms of the centered features, for each image."""
        views, _, d = self.features.shape
        x, s = self.features.reshape(-1, d), (self.weights / views).repeat(views)
        x = x - (s @ x) / s.sum()
        return float((s * x.square().sum(1)).sum() / len(self.weights))

    def held_out(self, alpha: float, removed: Tensor) -> Tensor:
        """Outputs (V, n, C) by refits without a part of the weight of each image."""
        found = torch.empty(self.features.shape[0], *self.targets.shape, dtype=F64)
        for i in range(len(self.weights)):
            weights = self.weights.clone()
            weights[i] *= 1 - removed[i]
            found[:, i] = torch.from_numpy(self.reference(alpha, weights).predict(self.features[:, i].numpy()))
        return found


@pytest.fixture(params=SIZES)
def size(request) -> tuple[int, int]:
    return SIZES[request.param]


@pytest.fixture(params=[1, 3])
def views(request) -> int:
    return request.param


def close(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), **TOLERANCE)


def assert_heads_close(found: RidgeHead, expected: RidgeHead, rows: slice = slice(None)) -> None:
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-9)
    close(found.weight, expected.weight)
    close(found.bias, expected.bias)
    close(found.held_out[:, rows], expected.held_out)


# --------------------------------------------------------------------------------------------------- fits


def test_equals_ridge_of_scikit_learn(size, views):
    data = Data(*size, views)
    found = data.fit()
    expected = data.reference(found.alpha)
    close(found.weight, expected.coef_)
    close(found.bias, expected.intercept_)


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_the_scale_of_weights_is_that_of_the_penalty(size, factor):
    data = Data(*size)
    expected = data.fit()
    data.weights = factor * data.weights
    found = data.fit()
    close(found.weight, expected.weight)
    close(found.held_out, expected.held_out)
    assert found.alpha == pytest.approx(factor * expected.alpha)


def test_penalty_is_in_units_of_the_mean_squared_norm(size, views):
    data = Data(*size, views)
    found = data.fit(alphas=torch.tensor([0.37], dtype=F64))
    assert found.alpha == pytest.approx(0.37 * data.unit(), rel=1e-12)


def test_shapes_and_dtypes(views):
    data = Data(12, 5, views)
    found = fit_ridge_head(
        data.features.float(), data.targets.float(), data.weights.float(), data.ones.float(), ALPHAS.float()
    )
    assert found.weight.shape == (3, 5)
    assert found.bias.shape == (3,)
    assert found.held_out.shape == (views, 12, 3)
    assert {t.dtype for t in (found.weight, found.bias, found.held_out)} == {F64}
    assert isinstance(found.alpha, float)
    with pytest.raises(FrozenInstanceError):
        found.alpha = 1.0


# --------------------------------------------------------------------------------------------- leaving out


def test_held_out_equals_refits_without_the_image(size, views):
    data = Data(*size, views)
    found = data.fit()
    close(found.held_out, data.held_out(found.alpha, data.ones))


@pytest.mark.parametrize("index", [0, 4, 8])
def test_held_out_equals_refits_for_any_penalty(index):
    data = Data(12, 40)
    found = data.fit(alphas=ALPHAS[index : index + 1])
    close(found.held_out, data.held_out(found.alpha, data.ones))


def test_multiplicity_removes_a_part_of_the_weight(size, views):
    data = Data(*size, views)
    multiplicity = torch.linspace(1.0, 3.7, size[0], dtype=F64)
    found = data.fit(multiplicity)
    close(found.held_out, data.held_out(found.alpha, 1 / multiplicity))


def test_chosen_penalty_has_the_smallest_error_of_refits(size, views):
    data = Data(*size, views)
    # Units of weight, as in the sum of squares.
    errors = []
    for alpha in ALPHAS * data.unit():
        error = (data.held_out(float(alpha), data.ones) - data.targets).square().sum(2)
        errors.append(float((data.weights * error.mean(0)).sum()))
    best = int(np.argmin(errors))
    assert 0 < best < len(ALPHAS) - 1, "the data must have an optimum inside the grid"
    assert data.fit().alpha == pytest.approx(float(ALPHAS[best]) * data.unit(), rel=1e-9)


def test_weight_of_two_equals_a_row_given_twice(size, views):
    data, twice = Data(*size, views), Data(*size, views)
    doubled = torch.arange(size[0]) % 3 == 0
    rows = torch.cat([torch.arange(size[0]), torch.where(doubled)[0]])
    twice.features, twice.targets = data.features[:, rows], data.targets[rows]
    twice.weights, twice.ones = data.weights[rows], torch.ones(len(rows), dtype=F64)
    data.weights = torch.where(doubled, 2 * data.weights, data.weights)
    found = data.fit(torch.where(doubled, 2.0, 1.0))
    assert_heads_close(twice.fit(), found, slice(0, size[0]))
    close(twice.fit().held_out[:, size[0] :], found.held_out[:, doubled])


def test_order_of_rows_and_views_does_not_matter(size, views):
    data = Data(*size, views)
    expected = data.fit()
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(0))
    data.features, data.targets, data.weights = data.features[:, order], data.targets[order], data.weights[order]
    data.features = data.features.flip(0)
    found = data.fit()
    close(found.weight, expected.weight)
    close(found.held_out.flip(0), expected.held_out[:, order])


# --------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("ratio", [0, 10**9])
def test_gram_matrix_and_svd_agree(ratio, views, monkeypatch):
    data = Data(30, 4, views)
    expected = data.fit()
    monkeypatch.setattr(head, "_GRAM_RATIO", ratio)
    assert_heads_close(data.fit(), expected)


@pytest.mark.parametrize("ratio", [0, 10**9])
def test_features_that_depend_on_each_other(ratio, monkeypatch):
    monkeypatch.setattr(head, "_GRAM_RATIO", ratio)
    data = Data(40, 4)
    data.features = torch.cat([data.features, data.features[..., :2], torch.zeros(1, 40, 1, dtype=F64)], 2)
    found = data.fit()
    expected = data.reference(found.alpha)
    close(found.weight, expected.coef_)
    close(found.bias, expected.intercept_)
    close(found.held_out, data.held_out(found.alpha, data.ones))


@pytest.mark.parametrize("ratio", [0, 10**9])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_constant_features_leave_the_mean_target(value, ratio, monkeypatch):
    monkeypatch.setattr(head, "_GRAM_RATIO", ratio)
    data = Data(11, 3)
    data.features = torch.full_like(data.features, value)
    found = data.fit()
    mean = (data.weights @ data.targets) / data.weights.sum()
    assert not found.weight.any()
    close(found.bias, mean)
    others = (data.weights @ data.targets - data.weights.unsqueeze(1) * data.targets) / (
        data.weights.sum() - data.weights
    ).unsqueeze(1)
    close(found.held_out[0], others)


def test_constant_feature_beside_others_is_ignored():
    data = Data(30, 5)
    expected = data.fit()
    data.features = torch.cat([data.features, torch.full((1, 30, 1), 1e3, dtype=F64)], 2)
    found = data.fit()
    close(found.weight[:, :5], expected.weight)
    close(found.weight[:, 5], torch.zeros(3, dtype=F64))
    close(found.bias, expected.bias)


def test_two_images():
    data = Data(2, 40)
    found = data.fit()
    # Without one of them the other's target is all that is known.
    close(found.held_out[0], data.targets.flip(0))


def test_one_image_cannot_be_left_out():
    with pytest.raises(ValueError, match="at least two images"):
        Data(1, 3).fit()


def test_there_must_be_a_penalty():
    with pytest.raises(ValueError, match="penalt"):
        Data(10, 3).fit(alphas=torch.empty(0))


def test_targets_that_are_not_finite_are_refused():
    data = Data(10, 3)
    data.targets[3, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        data.fit()


# -------------------------------------------------------------------------------------------- random head


def test_random_head_has_rows_of_unit_norm_on_average():
    weight = random_head(200, 300, torch.Generator().manual_seed(0))
    assert weight.shape == (200, 300)
    assert weight.dtype == F64
    # 60000 draws: standard errors are 0.4% of the deviation and 0.6% of the variance.
    assert abs(float(weight.mean())) < 4 * 300**-0.5 / 60000**0.5
    assert float(weight.square().sum(1).mean()) == pytest.approx(1.0, rel=0.03)


def test_random_head_is_determined_by_its_generator():
    first, second, other = (random_head(4, 6, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("n_classes", [1, 4, 7, 10])
def test_orthogonal_head_has_orthonormal_rows_as_far_as_there_is_room(n_classes):
    head = orthogonal_head(n_classes, 4, torch.Generator().manual_seed(0))
    assert head.shape == (n_classes, 4)
    for rows in head.split(4):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
