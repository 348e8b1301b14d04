"""The paper's model: the dense optimum of its objective, its penalties, its outputs and its pickles."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import joblib
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from support.data import make_images, tiny_net
from support.oracle import jacobian, least_squares
from torch import Tensor, nn

from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.images.cache import TrunkCache
from sklearn_lqf.network.prepared import PreparedNetwork
from sklearn_lqf.network.tracing import remove_head
from sklearn_lqf.paper import model as paper
from sklearn_lqf.paper.model import TARGET_SCALE, PaperFit, PaperModel, fit_paper

N, C, F64, CPU = 12, 3, torch.float64, torch.device("cpu")
X, Y = make_images(N)
IMAGES = torch.from_numpy(X).permute(0, 3, 1, 2) / 255
TARGETS = (Y[:, None] == np.unique(Y)).astype(float)
WEIGHTS = np.linspace(0.5, 2.0, N)
UNIT = np.full(C, 1 / TARGET_SCALE)
for array in (TARGETS, WEIGHTS, UNIT):
    array.setflags(write=False)  # as arrays of joblib may be
NOISY = TARGETS + 1.5 * np.random.default_rng(0).standard_normal((N, C))  # for which leave-one-out wants a penalty


def prepared(tangent_layers=1, dtype: torch.dtype = F64) -> PreparedNetwork:
    backbone = load_backbone(tiny_net(), "auto")
    return PreparedNetwork(
        backbone, (3, 12, 12), tangent_layers, negative_slope=0.0, read_stages=False,
        preprocessing=backbone.preprocessing, dtype=dtype, device=CPU,
    )  # fmt: skip


def batches(network: PreparedNetwork, images: Tensor = IMAGES, size: int = 5) -> list[tuple[Tensor, ...]]:
    return [network.activations(part) for part in images.split(size)]


OPTIONS = {"alpha": 0.3, "solver": "pcg", "tol": 1e-11, "max_iter": 2000, "seed": 0}  # far beyond the accuracy of users


def fit(
    network: PreparedNetwork, rows=slice(None), size: int = 5, targets=TARGETS, weights=WEIGHTS, **options
) -> PaperFit:
    """A fit of some rows."""
    inputs = batches(network, IMAGES[rows], size)
    return fit_paper(network, inputs, targets[rows], weights[rows], UNIT, **{**OPTIONS, **options})


class Reference:
    """Outputs of the backbone itself at a head, and the Jacobian by torch.func."""

    def __init__(self, network: PreparedNetwork, head: np.ndarray):
        self.network = network
        self.weight, self.bias = torch.from_numpy(head), torch.zeros(len(head), dtype=F64)
        # Of the prepared graph: where a BatchNorm is folded, the convolution's parameters are in other units.
        self.module = nn.Sequential(network.split.trunk, _Spread(network.split.tail))
        self.names = [f"1.tail.{name}" for name in network.split.tangent]

    def jacobian(self, images: Tensor = IMAGES) -> Tensor:
        return jacobian(self.module, self.names, self.weight, self.bias, self._normalized(images))

    def offset(self, images: Tensor = IMAGES) -> Tensor:
        """f_w0."""
        source = tiny_net().double()
        remove_head(source, self._normalized(images))
        with torch.no_grad():
            return source(self._normalized(images)) @ self.weight.T

    def _normalized(self, images: Tensor) -> Tensor:
        return self.network.preprocessing.normalize(images.to(F64))


class _Spread(nn.Module):
    """A tail as a function of the tuple that the trunk returns."""

    def __init__(self, tail: nn.Module):
        super().__init__()
        self.tail = tail

    def forward(self, inputs):
        return self.tail(*inputs)


def close(found, expected, tolerance: float = 1e-9) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def unit_of_alpha(j: Tensor, weights: np.ndarray = WEIGHTS) -> float:
    return float(weights @ j.square().sum((1, 2)).numpy() / (C * weights.sum()))


@pytest.fixture
def without_floor(monkeypatch):
    """An automatic penalty is that of the ridge regression, however small."""
    monkeypatch.setattr(paper, "_ALPHA_MIN", 0.0)


# ------------------------------------------------------------------------------------------- the solution


@pytest.mark.parametrize("solver", ["pcg", "sgd"])
@pytest.mark.parametrize("tangent_layers", ["head", 1, "all"])
def test_is_the_dense_optimum(tangent_layers, solver):
    network = prepared(tangent_layers)
    found = fit(network, solver=solver)
    assert found.result.converged
    reference = Reference(network, found.model.head)
    j, offset = reference.jacobian(), reference.offset()
    assert found.relative_alpha == pytest.approx(0.3, rel=1e-12)
    assert found.alpha == pytest.approx(0.3 * unit_of_alpha(j), rel=1e-9)
    targets = TARGET_SCALE * torch.tensor(TARGETS) - offset
    expected = least_squares(j, targets, torch.tensor(WEIGHTS), found.alpha)
    close(found.model.coef, expected, 1e-7)
    outputs = (offset + j @ expected) / TARGET_SCALE
    close(found.model.evaluator(None)(IMAGES), outputs, 1e-7)


def test_batches_do_not_matter():
    network = prepared()
    expected = fit(network).model.coef
    for solver in ("pcg", "sgd"):
        for size in (1, 12):
            close(fit(network, size=size, solver=solver).model.coef, expected, 1e-7)
    cache = TrunkCache(lambda a, b: network.activations(IMAGES[a:b]), N, 5, "memory", lambda count: None)
    close(fit_paper(network, cache, TARGETS, WEIGHTS, UNIT, **OPTIONS).model.coef, expected)


@pytest.mark.parametrize("alpha", ["auto", 0.1])
def test_order_of_rows_does_not_matter_and_a_weight_of_two_is_a_row_given_twice(alpha, without_floor):
    network, order = prepared(), np.random.default_rng(0).permutation(N)
    ones, double = np.ones(N), np.ones(N)
    double[[2, 5]] = 2
    pairs = [
        ({"rows": order}, {}),
        ({"rows": np.append(np.arange(N), [2, 5]), "weights": ones}, {"weights": double}),
    ]
    for found, expected in pairs:
        found, expected = (fit(network, **kind, targets=NOISY, alpha=alpha) for kind in (found, expected))
        assert found.alpha == pytest.approx(expected.alpha, rel=1e-6)  # to which its search is the same
        close(found.model.coef, expected.model.coef, 1e-5)


def test_the_head_is_random_and_label_free():
    network = prepared()
    first, other, seeded = fit(network), fit(network, np.arange(N - 1, -1, -1).copy()), fit(network, seed=1)
    assert first.model.head.shape == (C, 16)
    np.testing.assert_array_equal(first.model.head, other.model.head)
    assert not np.allclose(first.model.head, seeded.model.head)
    # 60000 draws: standard errors are 0.4% of the deviation and 0.6% of the variance.
    drawn = paper._random_head(200, 300, torch.Generator().manual_seed(0))
    assert abs(drawn.mean()) < 4 * 300**-0.5 / 60000**0.5
    assert (drawn**2).sum(1).mean() == pytest.approx(1.0, rel=0.03)


def test_units_of_outputs():
    network, unit = prepared(), np.array([2.0, 1.0, 0.5])
    found = fit_paper(network, batches(network), TARGETS * unit, WEIGHTS, unit, **OPTIONS)
    plain = fit_paper(network, batches(network), TARGETS, WEIGHTS, np.ones(C), **OPTIONS)
    close(found.model.coef, plain.model.coef)
    close(found.model.evaluator(None)(IMAGES), unit * plain.model.evaluator(None)(IMAGES))


# ------------------------------------------------------------------------------------------- the penalty


def leave_one_out_error(x: np.ndarray, y: np.ndarray, s: np.ndarray, m: np.ndarray, alpha: float) -> float:
    """Of ridge regressions without one of the m images that a row stands for, by refits."""
    total = 0.0
    for i in range(len(x)):
        rest = s.copy()
        rest[i] *= 1 - 1 / m[i]
        predicted = Ridge(alpha, solver="svd").fit(x, y, rest).predict(x[i : i + 1])
        total += s[i] * float(((predicted - y[i]) ** 2).sum())
    return total


def test_penalty_with_the_smallest_leave_one_out_error():
    rng = np.random.default_rng(0)
    x, s = 3 * rng.standard_normal((40, 6)) + 5, rng.uniform(0.5, 3, 40)
    y, m = x[:, :3] + 6 * rng.standard_normal((40, 3)), np.maximum(s, 1)
    found = paper._ridge_alpha(x, y, s, m)
    errors = [leave_one_out_error(x, y, s, m, factor * found) for factor in (0.2, 0.5, 1.0, 2.0, 5.0)]
    # The hyper-prior of the scale moves the minimum a little.
    assert errors[2] <= min(errors) and errors[2] < 0.999 * min(errors[0], errors[4])


def last_features(network: PreparedNetwork) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([network.split.tail(*z).numpy() for z in batches(network)])


@pytest.mark.parametrize("limit", [None, 7])  # of the rows that are seen
def test_automatic_penalty_is_that_of_the_last_features(limit, monkeypatch, without_floor):
    if limit:
        monkeypatch.setattr(paper, "_RIDGE_ROWS", limit)
    network, some = prepared(), paper._ridge_rows(N)
    assert len(set(some)) == (limit or N) and (np.diff(some) > 0).all()
    found = fit(network, targets=NOISY, alpha="auto", tol=1e-3)
    weights = WEIGHTS[some]
    expected = paper._ridge_alpha(last_features(network)[some], NOISY[some], weights, np.maximum(weights, 1))
    unit = unit_of_alpha(Reference(network, found.model.head).jacobian())
    assert found.alpha == pytest.approx(expected, rel=1e-6)
    assert found.relative_alpha == pytest.approx(expected / unit, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_the_scale_of_weights_is_that_of_an_automatic_penalty(factor, without_floor):
    network, ones = prepared(), np.ones(N)
    options = {"alpha": "auto", "multiplicity": ones, "targets": NOISY}
    expected = fit(network, **options)
    found = fit(network, weights=factor * WEIGHTS, **options)
    assert found.alpha == pytest.approx(factor * expected.alpha, rel=1e-6)
    close(found.model.coef, expected.model.coef, 1e-5)


def test_automatic_penalty_has_a_floor(monkeypatch):
    network = prepared()
    monkeypatch.setattr(paper, "_ridge_alpha", lambda *arguments: 1e-12)
    found = fit(network, alpha="auto", tol=1e-3)
    assert found.relative_alpha == pytest.approx(1e-3 * WEIGHTS.sum() / np.maximum(WEIGHTS, 1).sum())


def test_constant_features_choose_nothing():
    assert paper._ridge_alpha(np.full((5, 2), 3.0), np.eye(5), np.ones(5), np.ones(5)) == 0.0


# ------------------------------------------------------------------------------------------- what is fitted


def test_outputs_are_the_offset_and_the_tangent():
    network = prepared("all")
    new = torch.from_numpy(make_images(4, seed=1)[0]).permute(0, 3, 1, 2) / 255
    model = fit(network, tol=1e-3).model
    reference = Reference(network, model.head)
    expected = reference.offset(new) + reference.jacobian(new) @ torch.from_numpy(model.coef)
    found = model.evaluator(None)(new)
    assert found.dtype == np.float64 and found.shape == (4, C)
    close(found, UNIT * expected.numpy())


def test_a_model_is_a_value(tmp_path):
    model = fit(prepared(), tol=1e-3).model
    with pytest.raises(FrozenInstanceError):
        model.unit = UNIT
    assert model.linearized is model.linearized
    expected = model.evaluator(None)(IMAGES)
    before = pickle.dumps(model)
    joblib.dump(model, tmp_path / "model")
    mapped = joblib.load(tmp_path / "model", mmap_mode="r")  # arrays that cannot be written to
    for copy in (pickle.loads(before), mapped, PaperModel(model.network, model.head, model.coef, model.unit)):
        assert "linearized" not in vars(copy)
        np.testing.assert_array_equal(copy.evaluator(None)(IMAGES), expected)
        np.testing.assert_array_equal(copy.coef, model.coef)
    assert pickle.dumps(model) == before  # what was evaluated does not count
    recall = model.evaluator(joblib.Memory(tmp_path, verbose=0))
    for _ in range(2):
        close(recall(IMAGES), expected, 1e-12)


def test_float32():
    single = fit(prepared(dtype=torch.float32), tol=1e-5)
    double = fit(prepared())
    assert single.model.coef.dtype == np.float32
    assert single.model.evaluator(None)(IMAGES).dtype == np.float64
    # Of the solver and of float32, times the condition number of the problem.
    close(single.model.evaluator(None)(IMAGES), double.model.evaluator(None)(IMAGES), 1e-3)


# ------------------------------------------------------------------------------------------- the course


@pytest.mark.parametrize("solver", ["pcg", "sgd"])
def test_iterations_are_reported_and_may_be_stopped(solver, global_generators_unchanged):
    seen = []
    found = fit(
        prepared(), solver=solver, report=lambda number, residual, d: seen.append((number, residual)) or number == 2
    )
    assert seen == list(enumerate(found.result.residual_norms))[1:]
    assert not found.result.converged and found.result.n_iter == 2


def test_what_is_not_finite_gives_no_model():
    network, targets = prepared(), np.where(TARGETS > 0, np.inf, 0.0)
    broken = [tuple(torch.full_like(z, torch.inf) for z in batch) for batch in batches(network)]
    with pytest.raises(ValueError, match="features of the training images are not all finite"):
        fit_paper(network, broken, TARGETS, WEIGHTS, UNIT, **OPTIONS)
    with pytest.raises(ValueError, match="no solution"):
        fit(network, targets=targets)


def test_one_probe_for_each_row_changes_the_path_alone(monkeypatch):
    network = prepared()
    expected = fit(network)
    monkeypatch.setattr(paper, "_EXACT_MAX", 0)
    found = fit(network, alpha=1.0)
    found = fit(network, alpha=expected.alpha / found.alpha)  # the unit is an estimate then
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-12)
    close(found.model.coef, expected.model.coef, 1e-7)
