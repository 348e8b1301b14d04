"""LQFClassifierCV against GridSearchCV, explicit leave-one-out, and scikit-learn's ridge regression with its own."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from support.data import make_images, merged, tiny_net
from torch import nn

from sklearn_lqf import LQFClassifier, LQFClassifierCV
from sklearn_lqf.engine.fitted import FeatureReader

N, ALPHAS = 18, [0.03, 3.0, 0.3]
X, CORNERS = make_images(N)
Y = np.where(np.arange(N) % 5 == 4, np.roll(CORNERS, 1), CORNERS)  # some of them wrong, so that scores differ
ONEHOT = (Y[:, None] == np.unique(Y)).astype(float)
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2.0, N)
LABELS = (np.arange(N)[:, None] % [2, 3, 4] == 0).astype(int)
VECTORS = X[:, ::6, ::6, 0].reshape(N, -1) / 255
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    NETWORK = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()
OPTIONS = {"execution": {"dtype": "float64", "batch_size": 5}}
BOTH_VIEWS = ("identity", "flip")


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(**merged({"backbone": tiny_net()}, OPTIONS, parameters))


def search(**parameters) -> LQFClassifierCV:
    return LQFClassifierCV(**merged({"backbone": tiny_net(), "alphas": ALPHAS}, OPTIONS, parameters))


def hits(estimator, rows, y) -> float:
    """A scorer that sees every digit of the decision values of those that are right."""
    right = np.reshape(estimator.predict(rows) == y, (len(y), -1)).all(1)
    return float(np.square(estimator.decision_function(rows)[right]).sum())


def certainty(estimator, rows, y) -> float:
    """A scorer that sees every digit of the probabilities."""
    return float(np.log(estimator.predict_proba(rows)).sum())


# Parameters, y, whether there are weights, and the scorers.
CASES = {
    "plain": ({}, Y, False, [None, "roc_auc_ovr", "neg_log_loss", hits]),
    "balanced": ({"class_weight": "balanced", "views": BOTH_VIEWS}, Y, True, [hits]),
    "two classes": ({"prior": "evidence"}, np.where(Y == "cow", "ant", Y), False, ["roc_auc"]),
    "labels": ({"prior": {"last": 2.0, "block2.1 tangents": 1.0}}, LABELS, False, [None, hits, certainty]),
    "directions": ({"tangents": "both"}, Y, True, [certainty]),
    "vectors": ({"backbone": NETWORK}, Y, False, [hits]),
}


@pytest.mark.filterwarnings("ignore:The scoring <function:UserWarning")  # of scikit-learn 1.9, for weights
@pytest.mark.parametrize("case", CASES)
def test_folds_score_as_a_grid_search(case):
    parameters, y, weighted, scorings = CASES[case]
    data = VECTORS if case == "vectors" else X
    weights = WEIGHTS if weighted else None
    cv = KFold(2, shuffle=True, random_state=0) if case == "labels" else 2
    names = ["score"] if len(scorings) == 1 else [str(i) for i in range(len(scorings))]
    several = {name: s or "accuracy" for name, s in zip(names, scorings, strict=True)}
    grid = GridSearchCV(
        classifier(**parameters), {"alpha": ALPHAS}, cv=cv, refit=False,
        scoring=scorings[0] if len(scorings) == 1 else several,
    ).fit(data, y, **({"sample_weight": WEIGHTS} if weighted else {}))  # fmt: skip
    for name, scoring in zip(names, scorings, strict=True):
        found = search(cv=cv, scoring=scoring, **parameters).fit(data, y, weights)
        for key in ("split0_test", "split1_test", "mean_test", "std_test", "rank_test"):
            expected = grid.cv_results_[f"{key}_{name}"]
            np.testing.assert_allclose(found.cv_results_[f"{key}_score"], expected, rtol=1e-9, atol=1e-9)
        assert found.best_index_ == np.argmin(grid.cv_results_[f"rank_test_{name}"])
    last = classifier(alpha=found.best_alpha_, **parameters).fit(data, y, weights)
    np.testing.assert_allclose(found.decision_function(data), last.decision_function(data), atol=1e-12)
    assert found.alpha_ == pytest.approx(found.best_alpha_, rel=1e-12)
    assert found.temperature_ == pytest.approx(last.temperature_, rel=1e-9)


def test_folds_may_be_given_and_features_are_evaluated_once(monkeypatch):
    folds, rows, evaluate = list(StratifiedKFold(3).split(X, Y)), [], FeatureReader._evaluate
    masks = [tuple(np.isin(np.arange(N), part) for part in fold) for fold in folds]
    expected = search(cv=3).fit(X, Y).cv_results_
    monkeypatch.setattr(FeatureReader, "_evaluate", lambda r, x: rows.append(len(x[0])) or evaluate(r, x))
    for cv in (folds, masks, (fold for fold in folds), StratifiedKFold(3)):
        rows.clear()
        model = search(cv=cv).fit(X, Y)
        assert sum(rows) == N
        assert model.n_splits_ == 3
        for key, value in expected.items():
            np.testing.assert_array_equal(model.cv_results_[key], value)


def test_weights_are_multiplicities_also_in_scores():
    counts = 1 + np.arange(N) % 3 % 2
    repeated, place = np.repeat(np.arange(N), counts), np.arange(N) % 2

    def score(rows: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        folds = [(np.flatnonzero(place[rows] != k), np.flatnonzero(place[rows] == k)) for k in (0, 1)]
        fitted = search(scoring="neg_log_loss", cv=folds).fit(X[rows], Y[rows], weights)
        return fitted.cv_results_["mean_test_score"]

    found = score(np.arange(N), counts)
    np.testing.assert_allclose(found, score(repeated), rtol=1e-6)
    assert not np.allclose(found, score(np.arange(N)))


@pytest.mark.parametrize("kind", ["splitter", "indices", "masks"])
def test_rows_without_a_weight_are_in_no_fold(kind):
    """Splitters count the rows that have one, folds that are given count all."""
    weights, place = np.where(np.arange(N) % 6 == 1, 0.0, WEIGHTS), np.arange(N) % 2
    kept = weights > 0

    def folds(place: np.ndarray):
        parts = [(place != k, place == k) for k in (0, 1)]
        return {"splitter": 2, "masks": parts, "indices": [tuple(map(np.flatnonzero, part)) for part in parts]}[kind]

    found = search(cv=folds(place), scoring=hits).fit(X, Y, weights)
    expected = search(cv=folds(place[kept]), scoring=hits).fit(X[kept], Y[kept], weights[kept])
    for key, value in expected.cv_results_.items():
        np.testing.assert_allclose(found.cv_results_[key], value, rtol=1e-9)
    with pytest.raises(ValueError, match="Fold 0 of cv has"):
        search(cv=[(np.flatnonzero(kept), np.flatnonzero(~kept))]).fit(X, Y, weights)


def test_given_folds_do_not_outlive_their_rows():
    model = search(cv=list(StratifiedKFold(2).split(X, Y)), store_data=True).fit(X, Y).set_params(cv=2)
    for change in (lambda: model.forget([0]), lambda: model.partial_fit(X[:1], Y[:1])):
        with pytest.raises(ValueError, match="cv was given as folds of the rows of fit"):
            change()
    assert model.fit(X, Y).forget([0]).n_splits_ == 2


@pytest.mark.parametrize(
    ("parameters", "weighted"), [({"views": BOTH_VIEWS}, False), ({"class_weight": "balanced"}, True)]
)
def test_without_folds_images_are_left_out_one_by_one(parameters, weighted):
    """By refits of scikit-learn's Ridge with scale and prior held fixed; a row of weight above 1 keeps the rest."""
    weights = WEIGHTS if weighted else None
    found = search(**parameters).fit(X, Y, weights)
    probable = search(scoring=certainty, **parameters).fit(X, Y, weights)
    right = search(scoring="accuracy", **parameters).fit(X, Y, weights)
    assert found.n_splits_ == N
    assert set(found.cv_results_) == {"alpha", "mean_test_score", "rank_test_score"}
    given = np.ones(N) if weights is None else weights
    part = given / given.dot(ONEHOT)[ONEHOT.argmax(1)] if "class_weight" in parameters else given
    # The total weight is the number of images that rows stand for.
    s, rest = part * (np.maximum(given, 1).sum() / part.sum()), 1 - 1 / np.maximum(given, 1)
    shares = {group.name: found.prior_[group.name] for group in found._model.reader.groups}
    columns = np.sqrt(np.repeat(list(shares.values()), [group.size for group in found._model.reader.groups]))
    features = found.features(X) * columns
    for k, alpha in enumerate(ALPHAS):
        outputs = np.empty((N, 3))
        for i in range(N):
            without = np.where(np.arange(N) == i, s * rest, s)
            outputs[i] = Ridge(alpha).fit(features, ONEHOT, without).predict(features[i : i + 1])[0]
        error = np.average(((outputs - ONEHOT) ** 2).mean(1), weights=part)
        assert found.cv_results_["mean_test_score"][k] == pytest.approx(-error, rel=1e-8)
        single = classifier(alpha=alpha, **parameters).fit(X, Y, weights)
        np.testing.assert_allclose(single.leave_one_out(X, Y, weights), outputs, atol=1e-9)
        expected = np.log(softmax(outputs / single.temperature_, 1)).sum()
        assert probable.cv_results_["mean_test_score"][k] == pytest.approx(expected, rel=1e-6)
        expected = np.average(outputs.argmax(1) == ONEHOT.argmax(1), weights=weights)
        assert right.cv_results_["mean_test_score"][k] == pytest.approx(expected)


def test_among_equal_scores_the_first_wins_and_nan_is_last():
    assert "alpha" not in search().get_params() and not hasattr(search(), "alpha")
    model = search(cv=2, scoring=lambda *_: 0.5).fit(X, Y)
    assert (model.best_index_, model.best_alpha_) == (0, ALPHAS[0])
    assert model.cv_results_["rank_test_score"].tolist() == [1, 1, 1]
    scores = iter([1.0, np.nan, 2.0])
    model = search(scoring=lambda *_: next(scores)).fit(X, Y)
    assert model.best_index_ == 2
    assert model.cv_results_["rank_test_score"].tolist() == [2, 3, 1]
