"""Leave-one-out, influence and standard deviations against ridge regressions fitted again, and dense posteriors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from support.data import make_images, tiny_net

from sklearn_lqf import LQFClassifier, LQFRegressor
from sklearn_lqf.answers.left_out import influence
from sklearn_lqf.answers.uncertainty import output_variance

N = 15
X, LABELS = make_images(N)
NEW, NEW_LABELS = make_images(4, seed=1)
VALUES = np.c_[X[:, :6, :6, 0].mean((1, 2)), 0.01 * X[:, 6:, :6, 1].mean((1, 2))]
VALUES += np.random.default_rng(0).normal(size=VALUES.shape) * VALUES.std(0) / 2
NEW_VALUES = VALUES[:4] + 1
SEVERAL = np.c_[LABELS == "ant", LABELS != "bee", VALUES[:, 0] > VALUES[:, 0].mean()].astype(int)
WEIGHTS = np.where(np.arange(N) == 4, 0.0, np.where(np.arange(N) == 7, 2.0, np.where(np.arange(N) == 9, 0.5, 1.0)))
NET = tiny_net(width=4)
OPTIONS: dict[str, Any] = {"backbone": NET, "execution": {"dtype": "float64", "batch_size": 4}, "store_data": True}

# An estimator, y, targets in its units, y of the new images, and the form of the solution.
CASES: dict[str, tuple[Any, np.ndarray, np.ndarray, Any, str]] = {
    "views and directions": (
        LQFClassifier(views=("identity", "flip"), tangents="both", n_directions=2, sketch_size=4, **OPTIONS),
        LABELS, LABELS[:, None] == ["ant", "bee", "cow"], NEW_LABELS, "rows",
    ),
    "last features": (
        LQFClassifier(prior="last", alpha=0.1, **OPTIONS), LABELS, LABELS[:, None] == ["ant", "bee", "cow"],
        NEW_LABELS, "columns",
    ),
    "two classes": (
        LQFClassifier(**OPTIONS), LABELS == "ant", (LABELS == "ant")[:, None] == [False, True], NEW_LABELS == "ant",
        "rows",
    ),
    "several labels": (LQFClassifier(**OPTIONS), SEVERAL, SEVERAL, SEVERAL[:4], "rows"),
    "target": (LQFRegressor(**OPTIONS), VALUES[:, 0], VALUES[:, :1], NEW_VALUES[:, 0], "rows"),
    "targets": (LQFRegressor(tangents=None, **OPTIONS), VALUES, VALUES, NEW_VALUES, "columns"),
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """The ridge regression on explicit features, each times the root of its prior variance."""

    train: np.ndarray  # (n, D)
    new: np.ndarray  # (m, D)
    targets: np.ndarray  # (n, C)
    weights: np.ndarray  # (n,)

    @classmethod
    def of(cls, model: Any, targets: np.ndarray, given: np.ndarray) -> "Dense":
        groups = model._model.reader.groups
        variances = np.repeat([model.prior_[g.name] / model.alpha_ for g in groups], [g.size for g in groups])
        count = np.where(given > 0, np.maximum(given, 1), 0).sum()
        train, new = (model.features(x) * np.sqrt(variances) for x in (X, NEW))
        return cls(train, new, targets.astype(float), given * (count / given.sum()))

    def outputs(self, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """f of rows (k, D) for other weights of the training rows: (k, C)."""
        keep = weights > 0
        ridge = Ridge(1.0, solver="cholesky").fit(self.train[keep], self.targets[keep], weights[keep])
        return ridge.predict(rows).reshape(len(rows), -1)

    def without(self, i: int, given: np.ndarray) -> np.ndarray:
        """Weights without one of the images for which row i stands."""
        weights = self.weights.copy()
        weights[i] -= weights[i] / max(given[i], 1.0)
        return weights

    def posterior(self, given: np.ndarray, unit: np.ndarray, free: int) -> tuple[np.ndarray, float]:
        """Variance (m,) of an output of the new rows in its unit, and that of the noise."""
        keep = self.weights > 0
        phi, new = (np.c_[x, np.ones(len(x))] for x in (self.train[keep], self.new))
        y, s, prior = self.targets[keep] / unit, self.weights[keep], np.append(np.ones(self.train.shape[1]), 0)
        h = (phi.T * s) @ phi + np.diag(prior)
        coef = np.linalg.solve(h, (phi.T * s) @ y)
        objective = s @ ((phi @ coef - y) ** 2).sum(1) + prior @ (coef**2).sum(1)
        noise = objective / ((np.maximum(given[keep], 1).sum() - 1) * free)
        return noise * np.einsum("kp,pq,kq->k", new, np.linalg.inv(h), new), noise


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A fitted estimator, its dense twin, and what it was fitted to."""
    model, y, targets, new_y, form = CASES[request.param]
    model.fit(X, y, WEIGHTS)
    assert model.solver_ == form
    return model, Dense.of(model, targets, WEIGHTS), y, new_y


def decision(model: Any, outputs: np.ndarray) -> np.ndarray:
    """Outputs (k, C) as users see them."""
    if isinstance(model, LQFRegressor):
        return outputs.squeeze(1) if outputs.shape[1] == 1 else outputs
    if outputs.shape[1] == 2:
        return outputs[:, 1] - outputs[:, 0]
    return outputs - 0.5 if outputs.dtype != object and model is CASES["several labels"][0] else outputs


def test_outputs_are_those_of_ridge_regression(case):
    """Also by ``coef_`` and ``intercept_``, in the units of y."""
    model, dense, _, _ = case
    close = {"rtol": 0, "atol": 1e-9 * np.ptp(dense.targets)}
    outputs = dense.outputs(dense.weights, dense.new)
    found = model.predict(NEW) if isinstance(model, LQFRegressor) else model.decision_function(NEW)
    np.testing.assert_allclose(found, decision(model, outputs), **close)
    np.testing.assert_allclose(model.features(NEW) @ model.coef_.T + model.intercept_, outputs, **close)
    mean = np.average(dense.targets, axis=0, weights=WEIGHTS)
    if isinstance(model, LQFRegressor):
        np.testing.assert_allclose(model.intercept_, mean)  # features have mean zero
        scale = np.sqrt(np.average((dense.targets - mean) ** 2, axis=0, weights=WEIGHTS))
        np.testing.assert_allclose(model.target_scale_, scale)
        return
    probabilities, labels = model.predict_proba(NEW), model.predict(NEW)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(NEW)), probabilities)
    if model is CASES["several labels"][0]:
        np.testing.assert_array_equal(labels, outputs > 0.5)
        np.testing.assert_array_equal(probabilities > 0.5, labels == 1)
    else:
        np.testing.assert_allclose(probabilities.sum(1), 1)
        np.testing.assert_array_equal(labels, model.classes_[outputs.argmax(1)])


def test_leave_one_out_equals_refits(case):
    model, dense, y, _ = case
    found = model.leave_one_out(X, y, WEIGHTS)
    expected = [dense.outputs(dense.without(i, WEIGHTS), dense.train[i : i + 1])[0] for i in range(N)]
    np.testing.assert_allclose(found, decision(model, np.array(expected)), rtol=0, atol=1e-9 * np.ptp(dense.targets))
    order = np.random.default_rng(0).permutation(N)
    other = model.leave_one_out(X[order], y[order], WEIGHTS[order])
    np.testing.assert_allclose(other, found[order], rtol=0, atol=1e-9 * np.ptp(dense.targets))
    np.testing.assert_allclose(model.leave_one_out(), found[WEIGHTS > 0], rtol=1e-12)  # what is stored


def test_influence_equals_refits(case):
    model, dense, y, new_y = case
    base = dense.outputs(dense.weights, dense.new)
    changed = np.stack([dense.outputs(dense.without(i, WEIGHTS), dense.new) for i in range(N)], 1)  # (m, n, C)
    expected = changed - base[:, None]
    if base.shape[1] == 1:
        expected = expected[:, :, 0]
    elif np.ndim(new_y) == 1:  # of the predicted class
        expected = np.take_along_axis(expected, base.argmax(1)[:, None, None], 2)[:, :, 0]
    found = model.influence(X, y, NEW, sample_weight=WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert not found[:, WEIGHTS == 0].any()

    classes = getattr(model, "classes_", None)
    wanted = np.asarray(new_y)[:, None] == classes if classes is not None and np.ndim(new_y) == 1 else new_y
    wanted = np.reshape(wanted, (len(NEW), -1)).astype(float)
    losses = ((changed - wanted[:, None]) ** 2).sum(2) - ((base - wanted) ** 2).sum(1)[:, None]
    found = model.influence(X, y, NEW, new_y, WEIGHTS)
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-8 * np.abs(losses).max())
    stored = model.influence(None, None, NEW, new_y)
    np.testing.assert_allclose(stored, found[:, WEIGHTS > 0], rtol=0, atol=1e-12 * np.abs(found).max())


def test_standard_deviations_equal_the_dense_posterior(case):
    model, dense, _, _ = case
    several = model is CASES["several labels"][0]
    c = dense.targets.shape[1]
    if isinstance(model, LQFRegressor):
        variance, noise = dense.posterior(WEIGHTS, model.target_scale_, c)
        expected = np.sqrt(variance + noise)[:, None] * model.target_scale_  # of a new target
        outputs, std = model.predict(NEW, return_std=True)
        np.testing.assert_array_equal(outputs, model.predict(NEW))
    else:
        variance, noise = dense.posterior(WEIGHTS, np.ones(c), c if several else c - 1)
        if not several:  # the covariance of indicators that add up to one: v (I - 1 1' / C)
            contrast = np.array([-1.0, 1.0]) if c == 2 else np.eye(c)[0]
            variance = variance * (contrast @ (np.eye(c) - 1 / c) @ contrast)
        expected = np.repeat(np.sqrt(variance)[:, None], 1 if c == 2 else c, 1)
        outputs, std = model.decision_function(NEW, return_std=True)
        np.testing.assert_array_equal(outputs, model.decision_function(NEW))
    assert std.shape == outputs.shape
    assert model.noise_variance_ == pytest.approx(noise, rel=1e-8)
    np.testing.assert_allclose(std.reshape(len(NEW), -1), expected, rtol=1e-7)


def test_answers_for_many_rows_are_made_in_pieces():
    model = LQFClassifier(**{**OPTIONS, "store_data": True}).fit(X, LABELS)._model
    features = np.random.default_rng(0).normal(size=(13, model.solution.weight.shape[0]))
    seen: list[int] = []

    def effect(changes: np.ndarray, piece: slice) -> np.ndarray:
        seen.append(len(changes))
        return changes.sum(2)

    of_fit = (model, model.rows, model.rows.given, features)
    room = 8 * 2 * N * 3  # two rows of changes of all outputs by all images
    found = influence(*of_fit, effect, budget=room), output_variance(*of_fit, budget=room)
    for one, other in zip(found, (influence(*of_fit, effect), output_variance(*of_fit)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    assert seen == [2] * 6 + [1] + [13]


def test_estimates_are_near():
    options = {**OPTIONS, "prior": "equal", "alpha": 0.1}
    exact = LQFClassifier(**options).fit(X, LABELS, WEIGHTS)
    estimate = LQFClassifier(solver="pcg", tol=1e-10, max_iter=1000, **options).fit(X, LABELS, WEIGHTS)
    assert (exact.solver_, estimate.solver_) == ("rows", "estimate")
    np.testing.assert_allclose(estimate.decision_function(NEW), exact.decision_function(NEW), atol=1e-7)
    left_out, effect, spread, again = (
        [call(model) for model in (exact, estimate)]
        for call in (
            lambda m: m.leave_one_out(X, LABELS, WEIGHTS),
            lambda m: m.influence(X, LABELS, NEW, NEW_LABELS, WEIGHTS),
            *2 * [lambda m: m.decision_function(NEW, return_std=True)[1]],
        )
    )
    # Relative to the distance between outputs with and without the image, which is what is estimated.
    distance = np.linalg.norm(left_out[0] - exact.decision_function(X))
    assert 0 < np.linalg.norm(left_out[1] - left_out[0]) < 0.3 * distance
    assert 0 < np.abs(spread[1] / spread[0] - 1).max() < 0.5
    assert 0.97 < np.corrcoef(effect[0].ravel(), effect[1].ravel())[0, 1] < 1
    assert np.array_equal(again, spread)


def test_a_weight_of_two_is_a_row_given_twice():
    """Whole fits by conjugate gradients, with a learned prior; each image once among the answers."""
    options = {**OPTIONS, "solver": "pcg", "tol": 1e-11, "max_iter": 2000}
    weights, twice = np.where(np.arange(N) % 4 == 1, 2.0, 1.0), np.r_[np.arange(N), np.arange(1, N, 4)]
    one = LQFClassifier(**options).fit(X, LABELS, weights)
    two = LQFClassifier(**options).fit(X[twice], LABELS[twice])
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(two.predict_proba(NEW), one.predict_proba(NEW), **close)
    np.testing.assert_allclose(two.leave_one_out()[:N], one.leave_one_out(), **close)
    np.testing.assert_allclose(two.influence(None, None, NEW)[:, :N], one.influence(None, None, NEW), **close)
    spread = [m.decision_function(NEW, return_std=True)[1] for m in (two, one)]
    np.testing.assert_allclose(*spread, **close)


def test_other_data_are_refused():
    model = LQFClassifier(**OPTIONS).fit(X, LABELS, WEIGHTS)
    changed, swapped = X.copy(), LABELS.copy()
    changed[0, 0, 0, 0] ^= 1
    swapped[[0, 1]] = swapped[[1, 0]]
    for data in (
        (changed, LABELS, WEIGHTS), (X, swapped, WEIGHTS), (X, LABELS, None), (X[1:], LABELS[1:], WEIGHTS[1:])
    ):  # fmt: skip
        with pytest.raises(ValueError, match="fitted on"):
            model.leave_one_out(*data)
    with pytest.raises(ValueError, match="fitted on"):
        model.influence(changed, LABELS, NEW, sample_weight=WEIGHTS)


def test_what_is_needed():
    bare = {**OPTIONS, "store_data": False}
    with pytest.raises(ValueError, match="fit it with store_data=True"):
        LQFClassifier(**bare).fit(X, LABELS).decision_function(X, return_std=True)
    paper = LQFClassifier(model="paper", **{**bare, "tol": 0.1}).fit(X, LABELS).set_params(store_data=True)
    calls = {
        "leave_one_out": lambda: paper.leave_one_out(X, LABELS),
        "influence": lambda: paper.influence(X, LABELS, NEW),
        "return_std": lambda: paper.decision_function(NEW, return_std=True),
        "features": lambda: paper.features(NEW),
        "forget": lambda: paper.forget(0),
        "partial_fit": lambda: paper.partial_fit(X, LABELS),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name} is there for model='groups' only"):
            call()
