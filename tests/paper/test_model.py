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
from support.networks import Other
from support.oracle import jacobian, least_squares
from torch import Tensor, nn

from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.prepared import PreparedNetwork
from sklearn_lqf.paper.model import TARGET_SCALE, PaperFit, PaperModel, fit_paper

N, C, F64, CPU = 12, 3, torch.float64, torch.device("cpu")
X, Y = make_images(N)
IMAGES, NEW = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 for images in (X, make_images(4, seed=1)[0]))
TARGETS = (Y[:, None] == np.unique(Y)).astype(float)
WEIGHTS = np.linspace(0.5, 2.0, N)
UNIT = np.full(C, 1 / TARGET_SCALE)
for array in (TARGETS, WEIGHTS, UNIT):
    array.setflags(write=False)  # as arrays of joblib may be
NOISY = TARGETS + 3 * np.random.default_rng(0).standard_normal((N, C))  # for which leave-one-out wants a penalty


def prepared(tangent_layers=1, dtype: torch.dtype = F64) -> PreparedNetwork:
    backbone = load_backbone(tiny_net(), "auto")
    return PreparedNetwork(
        backbone, (3, 12, 12), tangent_layers, negative_slope=0.0, read_stages=False,
        preprocessing=backbone.preprocessing, dtype=dtype, device=CPU,
    )  # fmt: skip


def batches(network: PreparedNetwork, images: Tensor = IMAGES, size: int = 5) -> list[tuple[Tensor, ...]]:
    return [network.activations(part) for part in images.split(size)]


OPTIONS = {"alpha": 0.3, "solver": "pcg", "tol": 1e-11, "max_iter": 2000, "seed": 0}  # far beyond the accuracy of users


def fit(network: PreparedNetwork, rows=slice(None), targets=TARGETS, weights=WEIGHTS, **options) -> PaperFit:
    """A fit of some rows."""
    inputs = batches(network, IMAGES[rows])
    return fit_paper(network, inputs, targets[rows], weights[rows], UNIT, **{**OPTIONS, **options})


def dense(network: PreparedNetwork, head: np.ndarray, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    """The Jacobian by torch.func, and f_w0. A folded BatchNorm is in the units of the convolution's parameters."""
    split, x = network.split, network.preprocessing.normalize(images.to(F64))
    module = Other(lambda m, x: m.tail(*m.trunk(x)), trunk=split.trunk, tail=split.tail)
    weight, bias = torch.from_numpy(head), torch.zeros(len(head), dtype=F64)
    j = jacobian(module, [f"tail.{name}" for name in split.tangent], weight, bias, x)
    return j, module(x).detach() @ weight.T


def close(found, expected, tolerance: float = 1e-9) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def unit_of_alpha(j: Tensor, weights: np.ndarray = WEIGHTS) -> float:
    return float(weights @ j.square().sum((1, 2)).numpy() / (C * weights.sum()))


@pytest.mark.parametrize(("tangent_layers", "solver"), [("head", "pcg"), (1, "sgd"), ("all", "pcg")])
def test_is_the_dense_optimum(tangent_layers, solver):
    network = prepared(tangent_layers)
    found = fit(network, solver=solver)
    assert found.result.converged
    j, offset = dense(network, found.model.head)
    assert found.relative_alpha == pytest.approx(0.3, rel=1e-12)
    assert found.alpha == pytest.approx(0.3 * unit_of_alpha(j), rel=1e-9)
    targets = TARGET_SCALE * torch.tensor(TARGETS) - offset
    expected = least_squares(j, targets, torch.tensor(WEIGHTS), found.alpha)
    close(found.model.coef, expected, 1e-7)
    outputs = found.model.evaluator(None)(NEW)
    assert outputs.dtype == torch.float64
    j, offset = dense(network, found.model.head, NEW)
    close(outputs, (offset + j @ expected) / TARGET_SCALE, 1e-7)


def test_order_of_rows_does_not_matter_and_a_weight_of_two_is_a_row_given_twice():
    network, order = prepared(), np.random.default_rng(0).permutation(N)
    double = np.ones(N)
    double[[2, 5]] = 2
    pairs = [
        ({"rows": order}, {}),
        ({"rows": np.append(np.arange(N), [2, 5]), "weights": np.ones(N)}, {"weights": double}),
    ]
    for found, expected in pairs:
        found, expected = (fit(network, **kind, targets=NOISY, alpha="auto") for kind in (found, expected))
        assert found.alpha == pytest.approx(expected.alpha, rel=1e-6)  # to which its search is the same
        close(found.model.coef, expected.model.coef, 1e-5)
        np.testing.assert_array_equal(found.model.head, expected.model.head)  # which sees no data


def test_the_head_is_drawn_by_a_seed():
    network = prepared("head")
    head, again, other = (PaperModel.at(network, seed, np.ones(4000), torch.zeros(0)).head for seed in (0, 0, 1))
    np.testing.assert_array_equal(fit(network, tol=1.0).model.head, head[:C])
    np.testing.assert_array_equal(again, head)
    assert not np.isclose(head, other).any(1).all()
    # 64000 draws: standard errors are 0.4% of the deviation and 0.6% of the variance.
    assert abs(head.mean()) < 4 * 16**-0.5 / 64000**0.5
    assert (head**2).sum(1).mean() == pytest.approx(1.0, rel=0.03)


def test_units_of_outputs():
    network, unit = prepared(), np.array([2.0, 1.0, 0.5])
    found = fit_paper(network, batches(network), TARGETS * unit, WEIGHTS, unit, **OPTIONS)
    plain = fit_paper(network, batches(network), TARGETS, WEIGHTS, np.ones(C), **OPTIONS)
    close(found.model.coef, plain.model.coef)
    close(found.model.evaluator(None)(IMAGES), torch.from_numpy(unit) * plain.model.evaluator(None)(IMAGES))


def leave_one_out_error(x: np.ndarray, y: np.ndarray, s: np.ndarray, m: np.ndarray, alpha: float) -> float:
    """Of ridge regressions without one of the m images that a row stands for, by refits."""
    total = 0.0
    for i in range(len(x)):
        rest = s.copy()
        rest[i] *= 1 - 1 / m[i]
        predicted = Ridge(alpha, solver="svd").fit(x, y, rest).predict(x[i : i + 1])
        total += s[i] * float(((predicted - y[i]) ** 2).sum())
    return total


class Pixels:
    """A network whose last features are its input, with rows, targets that depend on them, and weights."""

    def __init__(self):
        rng = np.random.default_rng(0)
        backbone = load_backbone(nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), "auto")
        self.network = PreparedNetwork(backbone, (3, 1, 2), "head", 0.0, False, None, F64, CPU)
        self.x, self.weights = 3 * rng.standard_normal((40, 6)) + 5, rng.uniform(0.5, 3, 40)
        self.targets = (self.x[:, :C] + 6 * rng.standard_normal((40, C))) / TARGET_SCALE

    def fit(self, rows=slice(None), **options) -> PaperFit:
        inputs = [(x,) for x in torch.from_numpy(self.x[rows]).split(15)]
        options = {**OPTIONS, "alpha": "auto", "tol": 1e-3, **options}
        return fit_paper(self.network, inputs, self.targets[rows], self.weights[rows], UNIT, **options)


def test_automatic_penalty_has_the_smallest_leave_one_out_error_on_the_last_features():
    data = Pixels()
    found, multiplicity = data.fit(), np.maximum(data.weights, 1)
    errors = [
        leave_one_out_error(data.x, data.targets, data.weights, multiplicity, factor * found.alpha)
        for factor in (0.2, 0.5, 1.0, 2.0, 5.0)
    ]
    # The hyper-prior of the scale moves the minimum a little.
    assert errors[2] <= min(errors) and errors[2] < 0.999 * min(errors[0], errors[4])
    unit = np.average((data.x**2).sum(1) + 1, weights=data.weights)
    assert found.relative_alpha == pytest.approx(found.alpha / unit, rel=1e-9)


def test_automatic_penalty_may_be_chosen_from_some_rows():
    data, some = Pixels(), np.sort(np.random.default_rng(0).choice(40, 20, replace=False))
    assert data.fit(ridge_rows=20).alpha == pytest.approx(data.fit(some).alpha, rel=1e-9)


def test_the_scale_of_weights_is_that_of_an_automatic_penalty():
    factor, network = 1e-6, prepared()
    options = {"alpha": "auto", "multiplicity": np.ones(N), "targets": NOISY}
    expected = fit(network, **options)
    found = fit(network, weights=factor * WEIGHTS, **options)
    assert found.alpha == pytest.approx(factor * expected.alpha, rel=1e-6)
    close(found.model.coef, expected.model.coef, 1e-5)


@pytest.mark.parametrize("rows", [np.zeros(4, dtype=int), np.arange(N)])  # of features that are constant, and others
def test_automatic_penalty_has_a_floor(rows):
    found = fit(prepared(), rows, targets=np.ones((N, C)), weights=np.full(N, 0.5), alpha="auto", tol=1e-3)
    assert found.relative_alpha == pytest.approx(0.5e-3)  # follows the scale of weights


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
    assert single.model.evaluator(None)(IMAGES).dtype == torch.float64
    # Of the solver and of float32, times the condition number of the problem.
    close(single.model.evaluator(None)(IMAGES), double.model.evaluator(None)(IMAGES), 1e-3)


def test_iterations_are_reported_and_may_be_stopped(global_generators_unchanged):
    seen = []
    found = fit(
        prepared(), solver="sgd", report=lambda number, residual, d: seen.append((number, residual)) or number == 2
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


def test_one_probe_for_each_row_changes_the_path_alone():
    """As for many outputs of many rows; the unit of the penalty is an estimate then."""
    images = torch.from_numpy(make_images(90)[0]).permute(0, 3, 1, 2) / 255
    network, targets, weights = prepared(), np.eye(C)[np.arange(90) % C], np.ones(90)
    found = fit_paper(network, batches(network, images, 45), targets, weights, UNIT, **OPTIONS)
    j, offset = dense(network, found.model.head, images)
    assert found.alpha == pytest.approx(0.3 * unit_of_alpha(j, weights), rel=0.2)
    expected = least_squares(j, TARGET_SCALE * torch.tensor(targets) - offset, torch.tensor(weights), found.alpha)
    close(found.model.coef, expected, 1e-7)
