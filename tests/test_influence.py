"""Leave-one-out and influence against models fitted again, by the dense Jacobian."""

import numpy as np
import pytest
import torch
from images import make_images, tiny_net
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from test_objective import close

from sklearn_lqf import LQFClassifier, influence
from sklearn_lqf.influence import Dual, TrainingSet

N, V, C, P, M, ALPHA = 7, 2, 3, 40, 4, 0.7
F64 = torch.float64


def rand(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


J = rand(V, N, C, P, seed=0)
NEW = rand(M, C, P, seed=1)
TARGETS = rand(N, C, seed=2)


def model(weights, offsets):
    """f_lin of the training rows (V, n, C) and of the new ones (m, C), fitted from scratch; weights may be zero."""
    mean = weights @ TARGETS / weights.sum()
    offset = mean.expand(V, N, C) if offsets is None else offsets
    rows = (weights / V).expand(V, N)
    h = torch.einsum("vn,vncp,vncq->pq", rows, J, J) + ALPHA * torch.eye(P, dtype=F64)
    d = torch.linalg.solve(h, torch.einsum("vn,vncp,vnc->p", rows, J, TARGETS - offset))
    return offset + J @ d, (mean if offsets is None else 0) + NEW @ d


@pytest.fixture(params=["centered", "offsets"])
def offsets(request):
    return None if request.param == "centered" else rand(V, N, C, seed=3)


@pytest.fixture(params=["equal", "weighted", "multiple"])
def data(request, offsets):
    weights, multiplicity = torch.ones(N, dtype=F64), torch.ones(N, dtype=F64)
    if request.param == "weighted":
        weights = torch.linspace(0.5, 2, N, dtype=F64)
    elif request.param == "multiple":
        weights = multiplicity = torch.arange(1, N + 1, dtype=F64)
    return TrainingSet(TARGETS, weights, multiplicity, offsets)


def dual(data: TrainingSet) -> Dual:
    rows = J.flatten(0, 1)
    return Dual(torch.einsum("icp,jdp->icjd", rows, rows), data, ALPHA)


def weights_without(data: TrainingSet, i: int):
    weights = data.weights.clone()
    weights[i] -= weights[i] / data.multiplicity[i]
    return weights


def test_leave_one_out_equals_refits(data, offsets):
    expected = torch.stack([model(weights_without(data, i), offsets)[0][:, i] for i in range(N)], 1)
    close(dual(data).leave_one_out(), expected)


def test_changes_equal_refits(data, offsets):
    base = model(data.weights, offsets)[1]
    expected = torch.stack([model(weights_without(data, i), offsets)[1] - base for i in range(N)], 1)
    found = dual(data).changes(torch.einsum("mcp,idp->mcid", NEW, J.flatten(0, 1)))
    close(found, expected, 1e-9)


# ------------------------------------------------------------------------------------------------ the estimator

X, Y = make_images(15)
NEW_X, NEW_Y = make_images(4, seed=1)
WEIGHTS = np.where(np.arange(15) == 4, 0.0, np.where(np.arange(15) == 7, 2.0, 1.0))


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(
        tiny_net(), **{"dtype": "float64", "tol": 1e-12, "max_iter": 1000, "batch_size": 4, **parameters}
    )


def jacobian(clf: LQFClassifier, images: np.ndarray) -> np.ndarray:
    """Rows (n, C, P) of the Jacobian in the units of the solver."""
    network = clf._model.network
    x = torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2)
    point = network.at(clf._model.activations(x))
    n, c = point.outputs.shape
    eye = torch.eye(n * c, dtype=torch.float64).view(n, c, n, c)
    j = np.array([[point.vjp(u).numpy() for u in row] for row in eye])
    j[..., : network.slices["head.weight"].start] *= clf.tail_scale_
    return j


def refitted(clf: LQFClassifier, weights: np.ndarray, views: list[np.ndarray], new: np.ndarray) -> np.ndarray:
    """Outputs for new images of the quadratic with other weights of the rows, fitted on the dense Jacobian."""
    targets = (Y[:, None] == clf.classes_).astype(float)
    mean = weights @ targets / weights.sum()
    rows = np.concatenate([jacobian(clf, v) for v in views])
    s = np.tile(weights / len(views), len(views))
    h = np.einsum("n,ncp,ncq->pq", s, rows, rows) + clf.alpha_ * np.eye(rows.shape[2])
    b = np.einsum("n,ncp,nc->p", s, rows, np.tile(targets - mean, (len(views), 1)))
    return mean + jacobian(clf, new) @ np.linalg.solve(h, b)


@pytest.fixture(scope="module", params=["identity", ("identity", "flip")])
def fitted(request):
    clf = classifier(views=request.param).fit(X, Y, WEIGHTS)
    return clf, [X] if request.param == "identity" else [X, X[:, :, ::-1].copy()]


def without(i: int) -> np.ndarray:
    weights = WEIGHTS.copy()
    weights[i] = max(weights[i] - 1, 0)
    return weights


def test_the_estimators_leave_one_out_equals_refits(fitted):
    clf, views = fitted
    found = clf.leave_one_out(X, Y, WEIGHTS)
    for i in (0, 4, 7, 14):  # one of them without a weight, one with a weight of 2
        np.testing.assert_allclose(found[i], refitted(clf, without(i), views, X[i : i + 1])[0], atol=1e-8)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(clf.leave_one_out(X[order], Y[order], WEIGHTS[order]), found[order], atol=1e-9)


def test_the_estimators_influence_equals_refits(fitted):
    clf, views = fitted
    base = clf.decision_function(NEW_X)
    onehot = (NEW_Y[:, None] == clf.classes_).astype(float)
    outputs = clf.influence(X, Y, NEW_X, sample_weight=WEIGHTS)
    losses = clf.influence(X, Y, NEW_X, NEW_Y, WEIGHTS)
    assert outputs.shape == losses.shape == (4, 15)
    for i in (0, 4, 7, 14):
        f = refitted(clf, without(i), views, NEW_X)
        rows = np.arange(4), base.argmax(1)
        np.testing.assert_allclose(outputs[:, i], (f - base)[rows], atol=1e-8)
        expected = ((f - onehot) ** 2).sum(1) - ((base - onehot) ** 2).sum(1)
        np.testing.assert_allclose(losses[:, i], expected, atol=1e-8)


@pytest.mark.parametrize("parameters", [{"tangent_layers": "head"}, {"tangent_layers": "head", "target_scale": 5.0}])
def test_without_a_tail_both_methods_equal_refits_of_ridge(parameters):
    clf = classifier(**parameters).fit(X, Y)
    F, targets = clf.features(X), (Y[:, None] == clf.classes_).astype(float)
    F1 = np.c_[F, np.ones(len(F))]  # the bias has the penalty of the weights
    expected = []
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        mean = targets[rest].mean(0)
        ridge = Ridge(clf.alpha_, fit_intercept=False).fit(F1[rest], targets[rest] - mean)
        expected.append(mean + ridge.predict(F1[i : i + 1])[0])
    for method in ("exact", "head"):
        np.testing.assert_allclose(clf.leave_one_out(X, Y, method=method), expected, atol=1e-8)


def test_head_method_is_an_estimate(fitted):
    clf, _ = fitted
    exact, head = (clf.leave_one_out(X, Y, WEIGHTS, method=m) for m in ("exact", "head"))
    assert 0 < np.abs(exact - head).max() < 0.2 * np.abs(exact).max()


def test_not_centered_and_two_classes():
    two = Y != "cow"
    clf = classifier(center=False, cache="none").fit(X[two], Y[two])
    found = clf.leave_one_out(X[two], Y[two])
    assert found.shape == (two.sum(),)
    base = clf.decision_function(X[two])
    assert np.corrcoef(found, base)[0, 1] > 0.5 and not np.allclose(found, base, atol=1e-3)
    assert np.abs(clf.influence(X[two], Y[two], NEW_X)).max() > 0


def test_certificate():
    clf = classifier(tol=0.3).fit(X, Y)
    best = classifier().fit(X, Y)
    prior = np.where(np.arange(clf.n_parameters_) < clf._n_tail, clf.tail_scale_, 1.0)
    distance = np.linalg.norm((clf.coef_ - best.coef_) / prior)
    assert 0 < distance <= clf.distance_bound_
    assert best.distance_bound_ < 1e-6 * clf.distance_bound_


def test_other_data_are_refused(fitted):
    clf, _ = fitted
    changed, swapped = X.copy(), Y.copy()
    changed[0, 0, 0, 0] ^= 1
    swapped[[0, 1]] = swapped[[1, 0]]
    for data in ((changed, Y, WEIGHTS), (X, swapped, WEIGHTS), (X, Y, None), (X[1:], Y[1:], WEIGHTS[1:])):
        with pytest.raises(ValueError, match="fitted on"):
            clf.leave_one_out(*data)
    with pytest.raises(ValueError, match="fitted on"):
        clf.influence(changed, Y, NEW_X, sample_weight=WEIGHTS)


def test_bad_input(fitted, monkeypatch):
    clf, _ = fitted
    with pytest.raises(NotFittedError):
        classifier().leave_one_out(X, Y)
    with pytest.raises(ValueError, match="yak"):
        clf.leave_one_out(X, np.where(np.arange(15) == 0, "yak", Y), WEIGHTS)
    with pytest.raises(ValueError, match="yak"):
        clf.influence(X, Y, NEW_X, ["yak"] * 4, WEIGHTS)
    with pytest.raises(ValueError, match="inconsistent"):
        clf.influence(X, Y, NEW_X, NEW_Y[:2], WEIGHTS)
    with pytest.raises(ValueError, match="'exact' or 'head'"):
        clf.leave_one_out(X, Y, WEIGHTS, method="magic")
    with pytest.raises(ValueError, match="orthogonal"):
        classifier(head="ridge").fit(X, Y).leave_one_out(X, Y)
    monkeypatch.setattr(influence, "DUAL_MAX", 20)
    with pytest.raises(ValueError, match=r"(42|84) outputs.*up to 20.*method='head'"):
        clf.leave_one_out(X, Y, WEIGHTS)


# ------------------------------------------------------------------------------------------------ the estimate


@pytest.mark.parametrize(("method", "least"), [("cg", 0.95), ("kfac", 0.6)])
def test_estimates_are_near(fitted, method, least):
    clf, _ = fitted
    for labels in (None, NEW_Y):
        exact, found = (clf.influence(X, Y, NEW_X, labels, WEIGHTS, method=m) for m in ("exact", method))
        assert exact.shape == found.shape
        assert least < np.corrcoef(exact.ravel(), found.ravel())[0, 1] < 1
        assert (found[:, WEIGHTS == 0] == 0).all()


@pytest.mark.parametrize("method", ["cg", "kfac"])
def test_estimates_without_a_tail_are_the_effect(method):
    clf = classifier(tangent_layers="head").fit(X, Y)
    exact, found = (clf.influence(X, Y, NEW_X, method=m) for m in ("exact", method))
    # What is left is the mean target of the others, which the estimate takes for that of all.
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


def test_estimate_of_several_labels():
    labels = np.c_[Y == "ant", Y != "bee", Y == "cow"].astype(int)
    clf = classifier().fit(X, labels)
    exact, found = (clf.influence(X, labels, NEW_X, method=m) for m in ("exact", "cg"))
    assert exact.shape == found.shape == (4, 15, 3)
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match="'exact', 'cg' or 'kfac'"):
        clf.influence(X, labels, NEW_X, method="magic")
