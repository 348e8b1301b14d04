"""Forgetting and adding of training images against fits from scratch, and what remains of the forgotten."""

import copy
import functools
import gc
import pickle
import types

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from support.data import make_images, merged, tiny_net

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor
from sklearn_lqf.engine.fitted import FeatureReader
from sklearn_lqf.engine.problem import Problem, TrainingRows

N, GONE = 15, [1, 5, 12]
KEPT = np.delete(np.arange(N), GONE)
X, Y = make_images(N)
RNG = np.random.default_rng(0)
VALUES = X[:, :6, :6].mean((1, 2)) / 255 + 0.1 * RNG.standard_normal((N, 3))  # numeric targets
LABELS = (np.median(VALUES, 0) < VALUES).astype(int)  # several for each image
VECTORS = RNG.standard_normal((N, 4)) * [1, 10, 0.1, 1] + 3
WEIGHTS = RNG.uniform(0.5, 2.0, N)
EXACT = {"backbone": tiny_net(width=4), "execution": {"dtype": "float64", "batch_size": 5}, "store_data": True}


def classifier(kind=LQFClassifier, **parameters):
    return kind(**merged(EXACT, parameters))


def regressor(**parameters) -> LQFRegressor:
    return classifier(LQFRegressor, **parameters)


def assert_equal_fits(found, expected, X: np.ndarray) -> None:
    """The same model of the same data, but for rounding, which a search for the prior makes larger."""
    assert found._model.fingerprint == expected._model.fingerprint
    assert list(found.prior_) == list(expected.prior_)
    np.testing.assert_allclose(list(found.prior_.values()), list(expected.prior_.values()), rtol=0, atol=1e-6)
    for name in ("alpha_", "coef_", "intercept_", "target_scale_", "noise_variance_", "temperature_"):
        if getattr(expected, name, None) is not None:
            one, other = getattr(found, name), getattr(expected, name)
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(other).max(), err_msg=name)
    if hasattr(expected, "cv_results_"):
        one, other = (f.cv_results_["mean_test_score"] for f in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-6)
    method = "decision_function" if hasattr(expected, "classes_") else "predict"
    one, other = getattr(found, method)(X), getattr(expected, method)(X)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-8 * np.abs(other).max())
    assert found.converged_


# An estimator, its X and y, and whether its rows have weights.
CASES = {
    "images": (classifier(), X, Y, False),
    "directions": (
        classifier(views=("identity", "flip"), tangents="both", n_directions=2, sketch_size=3), X, Y, False
    ),
    "balanced": (classifier(class_weight="balanced", prior="evidence"), X, Y, True),
    "weights of classes": (classifier(class_weight={"ant": 2.0, "bee": 1.0, "cow": 0.5}), X, Y, False),
    "last features": (classifier(prior="last", alpha=0.3), X, Y, True),
    "iterations": (classifier(solver="pcg", prior="equal", tol=1e-12, max_iter=1000), X, Y, False),
    "searched": (classifier(LQFClassifierCV, alphas=[0.01, 0.1, 1.0], cv=2, scoring="neg_log_loss"), X, Y, True),
    "searched without folds": (classifier(LQFClassifierCV, alphas=[0.01, 0.1, 1.0]), X, Y, False),
    "labels": (classifier(), X, LABELS, False),
    "regressor": (regressor(), X, VALUES[:, 0], True),
    "two targets": (regressor(alpha=0.1), X, VALUES[:, :2], False),
    "vectors": (classifier(backbone="auto"), VECTORS, Y, True),
    "regressor of vectors": (regressor(backbone="auto"), VECTORS, VALUES[:, :2] * [1, 100], False),
}  # fmt: skip


@functools.cache
def _fitted(case: str, kept: bool):
    estimator, X, y, weighted = CASES[case]
    rows = KEPT if kept else slice(None)
    return copy.copy(estimator).fit(X[rows], y[rows], WEIGHTS[rows] if weighted else None)


def fitted(case: str, kept: bool = False):
    """A case fitted from scratch, on all rows or on those kept; a copy, since changes replace what is fitted."""
    return copy.copy(_fitted(case, kept))


@pytest.mark.parametrize("case", CASES)
def test_adding_and_forgetting_equal_fits(case):
    estimator, data, y, weighted = CASES[case]
    model = copy.copy(estimator)
    known = np.unique(y) if y.ndim == 1 else np.arange(y.shape[1])
    classes = {"classes": known} if hasattr(model, "class_weight") else {}
    for rows in (slice(0, 6), slice(6, 7), slice(7, None)):  # one of them alone
        model.partial_fit(data[rows], y[rows], **classes, sample_weight=WEIGHTS[rows] if weighted else None)
        classes = {}
    assert_equal_fits(model, fitted(case), data)
    assert len(model._model.rows) == N
    assert model.forget(1) is model
    model = pickle.loads(pickle.dumps(model)).forget(np.array([4, 11]))  # by the places of those that remain
    assert_equal_fits(model, fitted(case, kept=True), data)


def test_which_rows_are_counted_and_a_drawn_seed_is_kept():
    twice, weights = np.append(np.arange(N), 3), np.where(np.arange(N) == 0, 0.0, 1.0)
    assert_equal_fits(classifier().fit(X[twice], Y[twice]).forget(3), classifier().fit(X, Y), X)  # one of equal images
    assert_equal_fits(classifier().fit(X, Y, weights).forget(0), classifier().fit(X[2:], Y[2:]), X)
    model = classifier(random_state=None, tangents="both", n_directions=2, sketch_size=3).fit(X, Y)
    directions, expected = model._model.reader.directions.copy(), copy.copy(model)
    assert_equal_fits(model.forget([]), expected, X)  # nothing may be forgotten
    assert np.array_equal(model._model.reader.directions, directions)


def secrets(stored: TrainingRows, gone: list[int]) -> dict[str, set[bytes]]:
    """What is known of some rows alone: each number, and each digest."""

    def of(array: np.ndarray) -> set[bytes]:
        alone = np.setdiff1d(array[gone], np.append(np.delete(array, gone, 0).ravel(), [0.0, 1.0]))
        return {x.tobytes() for x in alone[:8]}

    found = {"features": of(stored.features), "targets": of(stored.targets), "weights": of(stored.given)}
    found["digests"] = {bytes(stored.digests[i]) for i in gone}
    if stored.vectors is not None:
        found["vectors"] = of(stored.vectors)
    return {k: v for k, v in found.items() if v}


def memory_of(root: object) -> bytes:
    """All arrays and tensors that can be reached from an object, views with all of what they are views of."""
    seen, todo, found = {}, [root], []
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType):
            continue
        seen[id(item)] = item  # kept alive, so that no other gets its id
        if isinstance(item, np.ndarray):
            found.append(item.tobytes())
            todo.append(item.base)
        elif isinstance(item, torch.Tensor):
            whole = torch.empty(0, dtype=torch.uint8).set_(item.detach().untyped_storage())
            found.append(whole.numpy().tobytes())
        elif isinstance(item, bytes | bytearray | memoryview):
            found.append(bytes(item))
        elif isinstance(item, types.FunctionType):  # its globals are not its own
            todo += [c.cell_contents for c in item.__closure__ or ()]
        else:  # whether tracked or not: a dict of arrays alone is not
            todo += gc.get_referents(item)
    return b"".join(found)


def leaks(known: dict[str, set[bytes]], model) -> dict[str, set[str]]:
    """Of which kinds something is found: in the memory, and in a pickle."""
    places = {"memory": memory_of(vars(model)), "pickle": pickle.dumps(model)}
    return {p: {k for k, parts in known.items() if any(x in whole for x in parts)} for p, whole in places.items()}


SECRETIVE = {
    "directions": {"features", "digests"},
    "searched": {"features", "weights", "digests"},
    "regressor": {"features", "targets", "weights", "digests"},
    "regressor of vectors": {"features", "vectors", "targets", "digests"},
}


@pytest.mark.parametrize("case", SECRETIVE)
def test_nothing_of_the_forgotten_remains(case):
    model, kinds = fitted(case), SECRETIVE[case]
    known = secrets(model._model.rows, GONE)
    assert set(known) == kinds
    assert leaks(known, model) == {"memory": kinds, "pickle": kinds}
    model.forget(GONE)
    assert leaks(known, model) == {"memory": set(), "pickle": set()}
    model.predict(CASES[case][1][KEPT])
    model.leave_one_out()
    assert leaks(known, model) == {"memory": set(), "pickle": set()}


BAD_INDICES = [
    ([3, 15], r"from 0 to 14, got \[15\]"), (-1, r"got \[-1\]"), ([4, 3, 4], r"twice: \[4\]"), ([1.0, 2.0], "float64"),
    (np.arange(N) == 3, "bool"), (None, "ints"), ([[1, 2]], r"shape \(1, 2\)"), (np.arange(1, N), "1 training"),
    (np.flatnonzero(Y == "bee"), "bee"),
]  # fmt: skip


def test_bad_indices_change_nothing():
    model = classifier().fit(X, Y)
    before = pickle.dumps(model)
    for indices, message in BAD_INDICES:
        with pytest.raises(ValueError, match=message):
            model.forget(indices)
        assert pickle.dumps(model) == before


@pytest.mark.parametrize("make", [classifier, regressor])
def test_what_is_not_stored_cannot_be_changed(make):
    y = Y if make is classifier else VALUES
    with pytest.raises(NotFittedError):
        make().forget(0)
    model = make(store_data=False).fit(X, y)
    for name in ("forget", "partial_fit"):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=name) as caught:
            getattr(model, name)
        assert "set store_data=True before fit" in str(caught.value.__cause__)
    model.set_params(store_data=True)
    for change in (lambda: model.forget(0), lambda: model.partial_fit(X, y)):
        with pytest.raises(ValueError, match="fitted with store_data=False"):
            change()
    assert model.fit(X, y).forget(0) is model


def after(function):
    """The same, and then an interrupt from the keyboard."""

    def interrupted(*args, **kwargs):
        function(*args, **kwargs)
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize(
    ("case", "owner", "place"),
    [("images", Problem, "_choose_prior"), ("images", FeatureReader, "shares"), ("vectors", Problem, "solve")],
)
def test_an_interrupt_changes_nothing(case, owner, place, monkeypatch):
    model, (_, data, y, _) = fitted(case), CASES[case]
    before, outputs = pickle.dumps(model), model.predict(data)
    for change in (lambda: model.forget(GONE), lambda: model.partial_fit(data[:4], y[:4])):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, place, after(getattr(owner, place)))
            change()
        assert pickle.dumps(model) == before
        assert np.array_equal(model.predict(data), outputs)
    assert_equal_fits(model.forget(GONE), fitted(case, kept=True), data)


def test_classes_of_which_there_is_no_image_yet_or_that_are_new():
    two = Y != "cow"
    model = classifier().partial_fit(X[two], Y[two], classes=["cow", "bee", "ant"])
    assert model.classes_.tolist() == ["ant", "bee", "cow"]
    assert model.decision_function(X).shape == (N, 3)
    assert set(model.predict(X[two])) == {"ant", "bee"}
    model.partial_fit(X[~two], Y[~two], classes=["ant", "bee", "cow"])
    whole = classifier().fit(np.r_[X[two], X[~two]], np.r_[Y[two], Y[~two]])
    assert_equal_fits(model, whole, X)
    grown = classifier().fit(X[two], Y[two]).partial_fit(X[~two], Y[~two], classes=["ant", "bee", "cow"])
    assert_equal_fits(grown, whole, X)
    with pytest.raises(ValueError, match="must name those of the calls before"):
        model.partial_fit(X[:1], Y[:1], classes=["ant", "bee"])
    model.fit(X, LABELS)  # from scratch, whatever was before
    assert model.classes_.tolist() == [0, 1, 2]


SMALL = X[:, :10, :10]
BAD_ROWS = [
    ("images", X, np.where(Y == "cow", "yak", Y), {}, "yak"), ("images", X, LABELS, {}, "one class"),
    ("labels", X, LABELS[:, 0], {}, "3 labels"), ("labels", X, LABELS[:, :2], {}, "3 labels"),
    ("regressor", X, VALUES, {}, "3 targets"), ("images", SMALL, Y, {}, "size"), ("vectors", X, Y, {}, "vectors"),
    ("images", VECTORS, Y, {}, "features"), ("vectors", VECTORS[:, :3], Y, {}, "3 features"),
    ("images", X, Y[:3], {}, "inconsistent"), ("images", X, Y, {"sample_weight": np.zeros(N)}, "zero"),
    ("vectors", np.where(VECTORS > 4, np.inf, VECTORS), Y, {}, "infinity"),
    ("regressor", X, np.where(VALUES[:, 0] > 0.3, np.nan, 0.0), {}, "NaN"),
]  # fmt: skip


def test_bad_rows_change_nothing():
    for kind, data, y, options, message in BAD_ROWS:
        model = fitted(kind)
        before = pickle.dumps(model)
        with pytest.raises(ValueError, match=message):
            model.partial_fit(data, y, **options)
        assert pickle.dumps(model) == before
