"""LQFClassifier on images: the scikit-learn contract where its own checks do not reach."""

import copy
import dataclasses
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from support.callbacks import Silent
from support.data import TinyNet, make_images, merged, tiny_net
from torch import nn

from sklearn_lqf import LQFClassifier
from sklearn_lqf.engine.fitted import FeatureReader
from sklearn_lqf.network.prepared import PreparedNetwork

X, Y = make_images()
RAVELED = X.reshape(len(X), -1)


def classifier(**parameters) -> LQFClassifier:
    """A small classifier; float64 makes equalities sharp."""
    return LQFClassifier(**merged({"backbone": tiny_net(), "execution": {"dtype": "float64"}}, parameters))


@pytest.fixture(scope="module")
def fitted() -> LQFClassifier:
    return classifier().fit(X, Y)


def assert_equal_models(one: LQFClassifier, other: LQFClassifier, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(one.decision_function(X), other.decision_function(X), rtol=rtol, atol=rtol)


def test_rows_memmaps_gray_images_and_feature_names(fitted, tmp_path):
    """What holds for whole data sets of any form is in `test_properties`."""
    np.save(tmp_path / "X.npy", X)
    expected = fitted.decision_function(X[:1])
    for form in (RAVELED[:1], np.load(tmp_path / "X.npy", mmap_mode="r")[:1]):
        assert np.array_equal(fitted.decision_function(form), expected)
    frame = pd.DataFrame(RAVELED, columns=[f"p{i}" for i in range(RAVELED.shape[1])])
    clf = classifier(image_shape=(12, 12, 3)).fit(frame, Y)
    assert clf.feature_names_in_[0] == "p0"
    with pytest.raises(ValueError, match="feature names"):
        clf.predict(frame.rename(columns={"p0": "q0"}))
    assert not hasattr(clf.fit(X, Y), "feature_names_in_")  # names of an earlier fit are gone
    clf = classifier(image_size=16).fit(X[..., 0], Y)
    assert (clf.image_shape_, clf.n_features_in_) == ((12, 12, 1), 144)
    clf.predict(np.zeros((2, 20, 30), np.uint8))  # any size


def test_fits_are_idempotent_and_clones_share_the_module(fitted):
    net = tiny_net()
    clf = classifier(backbone=net)
    twin = clone(clf)
    assert twin.backbone is clf.backbone is net
    assert twin.get_params() == clf.get_params()
    for _ in range(2):
        assert np.array_equal(clf.fit(X, Y).decision_function(X), fitted.decision_function(X))
    assert_equal_models(classifier(random_state=1).fit(X, Y), fitted, 1e-12)  # nothing is random
    one, same, other = (classifier(tangents="network", random_state=seed).fit(X, Y) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.coef_, same.coef_)
    assert not np.allclose(one.coef_, other.coef_)


def test_items_of_execution_are_parameters():
    clf = LQFClassifier(execution={"dtype": "float64"}).set_params(execution__batch_size=3, alpha=1.0)
    assert clf.execution == {"dtype": "float64", "batch_size": 3}
    assert clf.get_params()["execution__batch_size"] == 3
    assert clf.get_params()["execution__device"] == "auto"
    assert clone(clf).execution == clf.execution
    order = np.argsort(Y, kind="stable")  # folds without shuffling leave a class out
    search = GridSearchCV(classifier(), {"execution__batch_size": [5, 24]}, cv=KFold(3)).fit(X[order], Y[order])
    assert np.ptp(search.cv_results_["mean_test_score"]) == 0


# Others have tests that compare what they do with dense references and refits.
OPTIONS = [
    {"negative_slope": 0.1}, {"tangents": "network", "tangent_layers": ["block2"], "sketch_size": None},
    {"execution": {"dtype": "float32", "n_jobs": 2}}, {"model": "paper", "tangent_layers": "all"},
    {"model": "paper", "tangent_layers": "head"},
]  # fmt: skip


@pytest.mark.parametrize("parameters", OPTIONS, ids=str)
def test_options(parameters):
    clf = classifier(**parameters).fit(X, Y)
    assert clf.converged_
    assert clf.score(X, Y) == 1.0
    test, labels = make_images(seed=1)
    assert clf.score(test, labels) > 0.8


def test_attributes(fitted):
    assert list(fitted.classes_) == ["ant", "bee", "cow"]
    assert fitted.n_features_in_ == 432
    assert fitted.features(X).shape == (len(X), 16 + 8 + 8 + 8 + 8)
    assert (fitted.coef_.shape, fitted.intercept_.shape) == ((3, 48), (3,))
    assert list(fitted.prior_)[-1] == "last"
    assert sum(fitted.prior_.values()) == pytest.approx(1)
    assert (fitted.solver_, fitted.n_iter_, len(fitted.residual_norms_), fitted.converged_) == ("rows", 1, 0, True)
    assert fitted.alpha_ > 0 and fitted.noise_variance_ > 0
    assert (fitted.device_, fitted.tangent_layers_) == ("cpu", [])
    assert classifier(tangents=None).fit(X, Y).features(X).shape == (len(X), 16)
    iterative = classifier(solver="pcg", tangents="network", tol=1e-6).fit(X, Y)
    assert iterative.tangent_layers_ == ["block2.0"]
    paper = classifier(model="paper").fit(X, Y)
    assert paper.coef_.ndim == 1
    for clf in (iterative, paper):
        assert clf.residual_norms_.shape == (clf.n_iter_ + 1,)
        assert clf.residual_norms_[-1] <= clf.tol


def test_memory_of_the_device(fitted, monkeypatch):
    tried, evaluate, limit = [], FeatureReader._evaluate, 7

    def guarded(self, activations):
        tried.append(len(activations[0]))
        if len(activations[0]) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return evaluate(self, activations)

    monkeypatch.setattr(FeatureReader, "_evaluate", guarded)
    assert_equal_models(classifier(execution={"batch_size": 24}).fit(X, Y), fitted)
    assert max(tried) == 24
    limit = 0
    with pytest.raises(MemoryError, match="tangent_layers"):
        classifier().fit(X, Y)
    network = fitted._model.network
    kept = network._bytes_of_a_row.kept
    for room, most in ((0, 1), (5 * kept, 5), (100 * kept, 24)):
        assert network.rows_at_once(24, budget=room) == most


def test_the_trunk_takes_images_that_stay_in_the_caches(fitted, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    network = fitted._model.network
    largest = network._bytes_of_a_row.largest
    assert largest == 8 * 8 * 6 * 6  # bytes of the channels of the stem
    assert network.rows_of_trunk(layer_budget=5 * largest) == 5
    monkeypatch.setattr(PreparedNetwork, "rows_of_trunk", lambda _: 5)
    np.testing.assert_allclose(fitted.decision_function(X), classifier().fit(X, Y).decision_function(X), atol=1e-10)
    # Each time the parameters are read: of a network with many of them few images gain nothing.
    wide = nn.Sequential(nn.Flatten(), nn.Linear(432, 500), nn.Tanh(), nn.Linear(500, 5))
    monkeypatch.undo()
    assert LQFClassifier(wide).fit(X, Y)._model.network.rows_of_trunk(layer_budget=0) > 100


def test_memory_shares_the_trunk_between_fits_and_predictions(monkeypatch, tmp_path):
    rows, options = [], {"tangents": "network"}
    activations, references = PreparedNetwork.activations, PreparedNetwork.reference_inputs
    # Synthetic images do not count.
    monkeypatch.setattr(PreparedNetwork, "activations", lambda n, x: rows.append(len(x)) or activations(n, x))
    monkeypatch.setattr(PreparedNetwork, "reference_inputs", lambda n, k: rows.append(-k) or references(n, k))
    cross_val_score(classifier(execution={"memory": tmp_path}, **options), X, Y, cv=KFold(3))
    assert sum(rows) == len(X)
    rows.clear()
    clf = classifier(execution={"memory": joblib.Memory(str(tmp_path), verbose=0)}, **options).fit(X, Y)
    clf.predict(X)
    assert sum(rows) == 0
    assert_equal_models(clf, classifier(**options).fit(X, Y))
    rows.clear()
    classifier(execution={"memory": tmp_path}, tangents="network", tangent_layers="all").fit(X, Y)  # has no trunk
    classifier(execution={"memory": tmp_path}, preprocessing={"mean": (0.4, 0.4, 0.4)}, **options).fit(X, Y)
    assert sum(rows) == 2 * len(X)


def test_callbacks():
    callback = pytest.importorskip("sklearn.callback")

    class Counter(Silent):
        def __init__(self):
            self.ends = []

        def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
            self.ends.append((context.task_name, fitted_estimator.decision_function(X)))
            return len(self.ends) == 2

    counter = Counter()
    assert isinstance(counter, callback.FitCallback)
    clf = classifier(model="paper", tol=1e-6).set_callbacks(counter)
    with pytest.warns(ConvergenceWarning):
        clf.fit(X, Y)
    assert [name for name, _ in counter.ends] == ["iteration", "iteration", "fit"]
    assert clf.n_iter_ == 2
    np.testing.assert_allclose(counter.ends[-1][1], clf.decision_function(X))
    closed = Counter()
    assert classifier().set_callbacks(closed).fit(X, Y).converged_
    assert [name for name, _ in closed.ends] == ["fit"]


def test_verbose_shows_a_bar(capsys):
    pytest.importorskip("tqdm")
    clf = classifier(verbose=1, execution={"batch_size": 5}).fit(X, Y)
    shown = capsys.readouterr().err
    assert shown.index("preparing") < shown.index("reading") < shown.index("prior") < shown.index("solving")
    clf.predict(X)
    assert "reading" in capsys.readouterr().err
    classifier(verbose=1, model="paper").fit(X, Y)
    assert "solving" in capsys.readouterr().err
    classifier().fit(X, Y)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_copies_answer_bit_equal_and_are_updated(tmp_path):
    clf, path = classifier(store_data=True, tangents="both").fit(X, Y), tmp_path / "model.joblib"
    joblib.dump(clf, path)
    read_only = joblib.load(path, mmap_mode="r")
    for twin in (pickle.loads(pickle.dumps(clf)), copy.deepcopy(clf), joblib.load(path), read_only):
        for method in ("predict_proba", "features"):
            assert np.array_equal(getattr(twin, method)(X), getattr(clf, method)(X))
        np.testing.assert_array_equal(twin.leave_one_out(), clf.leave_one_out())
    np.testing.assert_array_equal(read_only.influence(None, None, X[:2]), clf.influence(None, None, X[:2]))
    assert_equal_models(read_only.forget(0).partial_fit(X[:1], Y[:1]), clf)


def test_a_model_of_an_absent_device_is_loaded_on_the_cpu(fitted):
    state = fitted._model.network.__getstate__()
    state["device"] = "cuda:7"
    network = object.__new__(PreparedNetwork)
    with pytest.warns(UserWarning, match="not present"):
        network.__setstate__(state)
    assert network.device.type == "cpu"


def test_a_missed_tolerance_is_said():
    with pytest.warns(ConvergenceWarning, match="max_iter") as found:
        clf = classifier(solver="pcg", tol=1e-9, max_iter=1, store_data=True).fit(X, Y)
        assert not clf.converged_
        clf.forget(0)
        clf.partial_fit(X[:1], Y[:1])
    assert [w.filename for w in found] == [__file__] * 3


def test_the_penalty_in_the_units_of_the_parameter(fitted):
    assert classifier(alpha=np.float32(0.25)).fit(X, Y).alpha_ == pytest.approx(0.25)
    assert_equal_models(classifier(alpha=fitted.alpha_).fit(X, Y), fitted)


@pytest.mark.parametrize("multilabel", [False, True])
def test_few_images_that_are_all_right_leave_a_doubt(multilabel):
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 20, 235, 255)])
    labels = np.eye(2, dtype=int)[[0, 0, 1, 1]] if multilabel else np.array([0, 0, 1, 1])
    few = classifier().fit(images, labels)
    many = classifier().fit(np.repeat(images, 25, 0), np.repeat(labels, 25, 0))
    for clf, n in ((few, 4), (many, 100)):
        wrong = 1 - clf.predict_proba(images)[np.arange(4), [0, 0, 1, 1]]
        assert 0.1 < wrong.mean() * (n + 2) < 10
    weighted = classifier().fit(images, labels, sample_weight=np.full(4, 25))
    assert weighted.temperature_ == pytest.approx(many.temperature_, rel=1e-4)


def test_networks_that_mix_the_images_of_a_batch_or_need_two_rows():
    net = tiny_net()
    net.block2[1] = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match="other images of a batch"):
        classifier(backbone=net).fit(X, Y)

    class Squeezed(TinyNet):
        def forward(self, x):
            x = self.block2(self.stem(x))
            return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).squeeze())

    assert classifier(backbone=Squeezed().eval(), tangents=None).fit(X, Y).converged_


def test_views_are_averaged(fitted):
    one, images = fitted._model.reader, torch.rand(3, 3, *X.shape[1:3], dtype=torch.float64)
    both = dataclasses.replace(one, views=("identity", "flip")).reading(None)(images)
    torch.testing.assert_close(both, (one.reading(None)(images) + one.reading(None)(images.flip(-1))) / 2)
