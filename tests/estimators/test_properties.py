"""Properties that hold for whatever data hypothesis draws: forms of X, labels, weights, order, batches, targets.

Fits are of a network of some hundred parameters in float64. Draws are the same in each run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from support.data import merged, tiny_net
from support.images import every_form
from torch import nn

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", derandomize=True, deadline=None, database=None, suppress_health_check=QUIET)
settings.load_profile("ci")

FITS = settings(max_examples=8)


# Two convolutions.
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    NET = nn.Sequential(
        nn.Conv2d(3, 3, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()  # fmt: skip


def classifier(**parameters: Any) -> LQFClassifier:
    return LQFClassifier(NET, **merged({"alpha": 0.1, "execution": {"dtype": "float64"}}, parameters))


def regressor(**parameters: Any) -> LQFRegressor:
    return LQFRegressor(NET, **merged({"alpha": 0.1, "execution": {"dtype": "float64"}}, parameters))


# The codes of labels: at least two of each of three classes, in any order.
CODES = st.lists(st.integers(0, 2), max_size=3).flatmap(lambda more: st.permutations([0, 0, 1, 1, 2, 2, *more]))


@st.composite
def problems(draw: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Color images (n, 6, 6, 3), no two equal, and codes of their classes, of which the images show something."""
    codes = np.array(draw(CODES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pixels = rng.integers(0, 160, (len(codes), 6, 6, 3))
    pixels[np.arange(len(codes)), ..., codes] += draw(st.integers(0, 95))
    return pixels.astype(np.uint8), codes


def assert_same_model(one: LQFClassifier, other: LQFClassifier, X: np.ndarray) -> None:
    assert other.alpha_ == pytest.approx(one.alpha_, rel=1e-5)
    assert other.temperature_ == pytest.approx(one.temperature_, rel=1e-5)
    assert_close(other.decision_function(X), one.decision_function(X))


def assert_close(one: Any, other: Any, rtol: float = 1e-6) -> None:
    """Equal up to rounding, which the search for a prior amplifies, in units of the largest value."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * max(np.abs(other).max(), 1e-12))


def test_every_form_gives_the_same_model(tmp_path):
    X, y = np.random.default_rng(0).integers(0, 256, (6, 7, 8, 3)).astype(np.uint8), np.arange(6) % 2
    expected = classifier().fit(X, y)
    for name, form, options in every_form(X, tmp_path):
        clf = classifier(**options).fit(form, y)
        assert clf.image_shape_[:2] == (7, 8), name
        assert np.array_equal(clf.predict_proba(form), expected.predict_proba(X)), name
    floats = X.astype(np.float32) / np.float32(255)
    assert_close(classifier().fit(floats, y).decision_function(X), expected.decision_function(X), 1e-3)


@FITS
@given(data=st.data(), problem=problems())
def test_predictions_are_of_each_image_alone(data, problem):
    """Whatever stands beside it, in whatever order and batches."""
    X, codes = problem
    options = {"image_size": 5, "tangents": "both", "n_directions": 2}
    clf = classifier(execution={"batch_size": data.draw(st.integers(1, 7))}, **options).fit(X, codes)
    assert_same_model(clf, classifier(**options).fit(X, codes), X)
    every = clf.decision_function(X)
    chosen = data.draw(st.lists(st.integers(0, len(X) - 1), min_size=1, max_size=9))
    np.testing.assert_allclose(clf.decision_function(X[chosen]), every[chosen], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(clf.decision_function([X[i] for i in chosen]), every[chosen], rtol=1e-9, atol=1e-12)


def three(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, min_size=3, max_size=3, unique=True)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
LABELS = {
    "text": three(TEXT),
    "objects": three(TEXT),
    "ints": three(st.integers(-(2**40), 2**40)),
    "small ints": three(st.integers(-128, 127)),
    "whole floats": three(st.integers(-1000, 1000).map(float)),
    "bools": st.just([False, True, True]),
}


@FITS
@given(data=st.data(), problem=problems())
def test_labels_are_names(data, problem):
    """The model is that of the codes, and predicts in the labels that were given, in their type."""
    X, codes = problem
    kind = data.draw(st.sampled_from(sorted(LABELS)))
    labels = sorted(data.draw(LABELS[kind]))
    dtype = {"objects": object, "small ints": np.int8, "whole floats": np.float32}.get(kind)
    y = np.array(labels, dtype=dtype)[codes]
    known = np.array(sorted(set(labels)), dtype=y.dtype)
    codes = np.searchsorted(known, y)
    expected = classifier().fit(X, codes)
    y.flags.writeable = False
    index = data.draw(st.permutations(range(len(y))))
    given_y: Any = data.draw(st.sampled_from([y, y.tolist(), pd.Series(y, index=index)]))
    clf = classifier().fit(X, given_y)
    assert np.array_equal(clf.coef_, expected.coef_)
    assert np.array_equal(clf.classes_, known)
    predicted = clf.predict(X)
    assert predicted.dtype == clf.classes_.dtype
    assert np.array_equal(predicted, known[expected.predict(X)])
    probabilities = clf.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert np.array_equal(known[probabilities.argmax(1)], predicted)
    assert clf.score(X, given_y) == expected.score(X, codes)


def weights_of(draw: Callable, codes: np.ndarray, values: st.SearchStrategy) -> np.ndarray:
    """A weight for each row, not zero for all rows of a class."""
    weights = np.array(draw(st.lists(values, min_size=len(codes), max_size=len(codes))), dtype=float)
    assume(all(weights[codes == c].any() for c in range(3)))
    return weights


POSITIVE = st.floats(0.01, 10)


@settings(max_examples=16)
@given(
    data=st.data(), problem=problems(), alpha=st.sampled_from(["auto", 0.1]),
    kind=st.sampled_from(["scaled", "zero", "repeated", "of classes", "permuted"]),
)  # fmt: skip
def test_weights(data, problem, alpha, kind):
    """Below 1 their scale does not matter; above they are numbers of repetitions; zero is a row left out."""
    X, codes = problem
    rows, options, own = np.arange(len(codes)), {"alpha": alpha}, {}
    if kind == "scaled":
        weights = weights_of(data.draw, codes, st.floats(0.1, 1))
        others = data.draw(st.floats(1e-6, 1)) * weights
    elif kind == "repeated":
        weights = weights_of(data.draw, codes, st.integers(0, 3))
        rows = np.array(data.draw(st.permutations(np.repeat(rows, weights.astype(int)).tolist())))
        others = np.ones(len(rows))
    elif kind == "of classes":  # which are no repetitions, whatever their size
        own = {"class_weight": dict(enumerate(data.draw(st.lists(POSITIVE, min_size=3, max_size=3))))}
        weights = weights_of(data.draw, codes, st.floats(0.01, 1))
        others = weights * np.array([own["class_weight"][c] for c in codes])
        others /= others.max()
    else:
        weights = weights_of(data.draw, codes, st.one_of(st.just(0.0), POSITIVE))
        rows = np.flatnonzero(weights) if kind == "zero" else np.array(data.draw(st.permutations(rows)))
        others = weights[rows]
        options["views"] = data.draw(st.sampled_from(["identity", ("identity", "flip"), ("flip", "identity")]))
    one = classifier(**options, **own).fit(X, codes, weights)
    other = classifier(**options).fit(X[rows], codes[rows], others)
    if kind in ("zero", "permuted"):
        assert one._model.fingerprint == other._model.fingerprint
    assert_same_model(other, one, X)


SIZES, SIGN = st.floats(1e-6, 1e6), st.sampled_from([1, -1])


@FITS
@given(
    data=st.data(), problem=problems(), n_targets=st.sampled_from([None, 1, 2]), alpha=st.sampled_from(["auto", 0.1])
)
def test_targets_in_other_units(data, problem, n_targets, alpha):
    """Predictions follow a y + b, for each target by its own; so does that of a constant."""
    X, codes = problem
    shape = (len(codes),) if n_targets is None else (len(codes), n_targets)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    y = rng.normal(size=shape) + codes.reshape(-1, *[1] * (len(shape) - 1))
    count = n_targets or 1
    factors = st.tuples(SIGN, SIZES).map(np.prod)
    a = np.array(data.draw(st.lists(factors, min_size=count, max_size=count)))
    b = a * data.draw(st.floats(-100, 100))
    if n_targets is None:
        a, b = a[0], b[0]
    one = regressor(alpha=alpha).fit(X, y)
    other = regressor(alpha=alpha).fit(X, a * y + b)
    assert other.alpha_ == pytest.approx(one.alpha_, rel=1e-6)
    assert one.predict(X).shape == shape
    np.testing.assert_allclose(regressor(alpha=alpha).fit(X, np.full(shape, b)).predict(X), np.full(shape, b))
    assert_close((other.predict(X) - b) / a, one.predict(X))
    assert_close(other.target_scale_, np.atleast_1d(np.abs(a)) * one.target_scale_)
    column = regressor(alpha=alpha).fit(X, pd.DataFrame(a * y + b) if n_targets else (a * y + b).tolist())
    assert_close(column.predict(X), other.predict(X), 1e-9)


@FITS
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_vectors_in_other_units(data, seed):
    """The built-in network standardizes them, whatever their scale, origin, layout and container."""
    X = np.random.default_rng(seed).normal(size=(9, 3))
    y = np.arange(9) % 3
    scales = np.array(data.draw(st.lists(SIZES, min_size=3, max_size=3)))
    moved = scales * (X + data.draw(st.floats(-100, 100)))
    one = LQFClassifier(alpha=0.1).fit(X, y)
    form = data.draw(st.sampled_from(["array", "F", "list", "frame"]))
    Z: Any = {"array": moved, "F": np.asfortranarray(moved), "list": moved.tolist(), "frame": pd.DataFrame(moved)}[form]
    other = LQFClassifier(alpha=0.1).fit(Z, y)
    assert_close(other.decision_function(Z), one.decision_function(X))


# ------------------------------------------------------------------------------------- the same sum of squared errors

# From 501 images on, the prior is learned from some of them.
SOME, MANY = 20, 520


def vectors(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of three classes that overlap."""
    rng = np.random.default_rng(n)
    y = np.arange(n) % 3
    return rng.normal(size=(n, 5)) + 0.9 * np.eye(5)[y], y


def targets(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy number for each vector."""
    X, _ = vectors(n)
    return X, X[:, 0] + np.random.default_rng(1).normal(size=n)


def labels(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Several for each vector."""
    X, y = vectors(n)
    return X, np.c_[y == 0, y != 1, X[:, 4] > 0].astype(int)


def noise(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, a little brighter in the channel of their class."""
    rng = np.random.default_rng(n)
    y = np.arange(n) % 3
    pixels = rng.integers(0, 120, (n, 8, 8, 3))
    pixels[np.arange(n), ..., y] += 15
    return pixels.astype(np.uint8), y


# How X and y are drawn; an estimator, the numbers of rows, and how near its answers are.
CASES: dict[str, tuple[Callable, Any, list[int], float]] = {
    "balanced": (vectors, LQFClassifier(class_weight="balanced"), [SOME], 1e-6),
    "evidence": (vectors, LQFClassifier(prior="evidence"), [MANY], 1e-6),  # of few copies it has no bound
    "targets": (targets, LQFRegressor(), [SOME, MANY], 1e-6),
    "labels": (labels, LQFClassifier(), [SOME], 1e-6),
    "folds": (vectors, LQFClassifierCV(alphas=[0.03, 0.3, 3.0]), [SOME], 1e-6),
    "images": (noise, LQFClassifier(tiny_net(), tangents="both"), [SOME, MANY], 1e-4),
}


@pytest.mark.parametrize(("case", "n"), [(case, n) for case in CASES for n in CASES[case][2]])
def test_order_and_repetition_of_many_rows(case, n):
    draw, estimator, _, rtol = CASES[case]
    X, y = draw(n)
    weights = np.where(np.arange(n) % 4 == 1, 2, np.where(np.arange(n) % 5 == 2, 3, 1))
    order = np.random.default_rng(0).permutation(n)
    twice = np.random.default_rng(1).permutation(np.repeat(np.arange(n), weights))
    new = draw(50)[0]
    one = clone(estimator).fit(X, y, weights)
    permuted = clone(estimator).fit(X[order], y[order], weights[order])
    repeated = clone(estimator).fit(X[twice], y[twice])
    for other in (permuted, repeated):
        assert other.alpha_ == pytest.approx(one.alpha_, rel=max(rtol, 1e-5))  # outputs hardly change with it
        assert other.noise_variance_ == pytest.approx(one.noise_variance_, rel=rtol)
        assert other.prior_ == pytest.approx(one.prior_, rel=1e-3, abs=1e-6)
        if isinstance(one, LQFClassifier):
            assert other.temperature_ == pytest.approx(one.temperature_, rel=max(rtol, 1e-5))
            assert_close(other.decision_function(new), one.decision_function(new), rtol)
        else:
            assert_close(other.predict(new), one.predict(new), rtol)
