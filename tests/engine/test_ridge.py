"""The quadratic on explicit features: its forms against scikit-learn's Ridge, refits and dense Gaussian formulas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.linear_model import Ridge
from support.linear import ACCURACY, BUDGET, Data, augmented, close, dense_m, make, refit
from torch import Tensor

from sklearn_lqf.engine.estimate import EstimatedForm
from sklearn_lqf.engine.preconditioner import Block
from sklearn_lqf.engine.ridge import (
    ColumnForm,
    Factorization,
    RowForm,
    closed_form_fits,
    factorize,
    leave_one_out,
    noise_variance,
    removals,
)

SHAPES = pytest.mark.parametrize("shape", [(12, 5), (9, 30), (2, 1), (2, 4), (7, 0)], ids=str)
METHODS = pytest.mark.parametrize("method", ["rows", "columns", "estimate"])
TWO = [Block(slice(0, 4)), Block(slice(4, 10), (2, 3))]  # with which the estimate is one


def without(data: Data, i: int, new: np.ndarray) -> np.ndarray:
    """Outputs for new rows when one of the images that row i stands for is left out."""
    s = data.s.copy()
    s[i] = s[i] - s[i] / data.m[i] if data.m[i] > 1 else 0.0
    return refit(data.x, data.y, s, new)


def left_out(form: Factorization, y: Tensor, m: Tensor) -> Tensor:
    """Outputs (n, C) for each row without it."""
    return leave_one_out(form, form.solve(y), m)


def changed(form: Factorization, y: Tensor, m: Tensor, new: Tensor) -> Tensor:
    """Changes (k, n, C) of the outputs for new rows when a row is left out."""
    return -form.hat(new)[:, :, None] * removals(form, form.solve(y), m)


def answers(form: Factorization, y: Tensor, m: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Everything that a form says, by name."""
    found = form.solve(y)
    return {
        "coef": found.coef,
        "intercept": found.intercept,
        "dual": found.dual,
        "diagonal": form.diagonal,
        "hat": form.hat(new).T,
        "variance": form.variance(new),
        "leave one out": left_out(form, y, m),
        "changes": changed(form, y, m, new).transpose(0, 1),
        "noise": torch.tensor(noise_variance(found, m, 2), dtype=torch.float64),
    }


# --------------------------------------------------------------------------------------------------------- solution


@METHODS
@SHAPES
def test_solution_is_that_of_dense_least_squares(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, _ = data.tensors()
    found, (coef, intercept) = make(method, x, s).solve(y), augmented(data.x, data.y, data.s)
    assert found.coef.shape == coef.shape
    close(found.coef, coef)
    close(found.intercept, intercept)


@METHODS
def test_solution_is_that_of_scikit_learn(method: str) -> None:
    data = Data(20, 8)
    x, s, y, _, new = data.tensors()
    form = make(method, x, s)
    found, model = form.solve(y), Ridge(alpha=1.0, solver="svd").fit(data.x, data.y, sample_weight=data.s)
    close(found.coef.T, model.coef_)
    close(found.intercept, model.intercept_)
    close(form.hat(new) @ y, model.predict(data.new))


@METHODS
@SHAPES
def test_m_by_its_definition(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, _ = data.tensors()
    form, m = make(method, x, s), dense_m(data.x, data.s)
    found, centered = form.solve(y), data.y - 100.0  # M 1 = 0, which the oracle's rounding would not know of
    close(form.diagonal, np.diag(m))
    close(found.dual, m @ centered)
    close(found.energy, np.trace(centered.T @ m @ centered))
    assert float(found.dual.sum(0).abs().max()) < 1e-10
    assert form.method == method


@METHODS
def test_features_far_from_zero_lose_no_accuracy(method: str) -> None:
    # Without centering the kernel's entries are 1e8: eight digits would be lost.
    data = Data(12, 5)
    x, s, y, m, _ = data.tensors()
    near, far = make(method, x, s), make(method, x + 1e4, s)
    close(far.solve(y).coef, near.solve(y).coef.numpy(), accuracy=1e-8)
    close(left_out(far, y, m), left_out(near, y, m).numpy(), accuracy=1e-8)


@METHODS
def test_float32_features_count_in_float64(method: str) -> None:
    data = Data(9, 4)
    x, s, y, _, new = data.tensors()
    rounded = x.float()
    found, expected = make(method, rounded, s.float()), make(method, rounded.double(), s.float().double())
    close(found.solve(y).coef, expected.solve(y).coef.numpy(), accuracy=1e-12)
    close(found.hat(new.float()), expected.hat(new.float().double()).numpy(), accuracy=1e-12)
    assert found.solve(y.float()).dual.dtype is torch.float64


@METHODS
def test_pieces_of_rows(method: str) -> None:
    x, s, y, m, new = Data(11, 6).tensors()
    room = 4 * 6 * 8  # four rows at once: pieces of 4, 4 and 3
    if method == "estimate":
        pieces: Factorization = EstimatedForm(x, s, [Block(slice(0, 6))], tol=1e-13, max_iter=200, piece=room)
    else:
        pieces = {"rows": RowForm, "columns": ColumnForm}[method](x, s, piece=room)
    found, expected = answers(pieces, y, m, new), answers(make(method, x, s), y, m, new)
    for name, value in expected.items():
        close(found[name], value.numpy())


@METHODS
def test_features_on_disk(method: str, tmp_path) -> None:
    data = Data(9, 6)
    x, s, y, _, new = data.tensors()
    np.save(tmp_path / "features.npy", data.x.astype(np.float32))
    read = np.load(tmp_path / "features.npy", mmap_mode="r")  # read-only
    form, expected = make(method, read, s), make(method, x.float(), s)
    close(form.solve(y).coef, expected.solve(y).coef.numpy())
    close(form.hat(data.new), expected.hat(new).numpy())


# ---------------------------------------------------------------------------------------------------- leaving out


@METHODS
@SHAPES
def test_leave_one_out_equals_refits(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, m, _ = data.tensors()
    expected = np.concatenate([without(data, i, data.x[i : i + 1]) for i in range(len(x))])
    close(left_out(make(method, x, s), y, m), expected)


@METHODS
@SHAPES
def test_changes_equal_refits(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, m, new = data.tensors()
    now = refit(data.x, data.y, data.s, data.new)
    expected = np.stack([without(data, i, data.new) - now for i in range(len(x))], 1)
    found = changed(make(method, x, s), y, m, new)
    assert found.shape == (4, len(x), 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ACCURACY * np.abs(data.y).max())


# ------------------------------------------------------------------------------------------- variance and noise


@METHODS
@SHAPES
def test_variance_is_the_gaussian_posterior(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, _, _, new = data.tensors()
    phi, at = (np.hstack([a, np.ones((len(a), 1))]) for a in (data.x, data.new))
    # The limit of an infinite prior variance of the intercept, in weight space: its precision is 0.
    precision = phi.T @ (data.s[:, None] * phi) + np.diag([1.0] * shape[1] + [0.0])
    close(make(method, x, s).variance(new), np.einsum("ki,ij,kj->k", at, np.linalg.inv(precision), at))


@METHODS
def test_mean_and_variance_are_those_of_a_gaussian_process(method: str) -> None:
    data = Data(10, 4, outputs=1)
    x, s, y, _, new = data.tensors()
    big = 1e3  # deviation of the intercept's prior
    # DotProduct(big) is big^2 + <x, x'>, so the intercept has a variance of 1e6 in the place of infinity: relative
    # differences of 1e-6 times the prior's and the weights' sizes, of which 1e-3 is a wide bound; rounding is 1e-10.
    process = GaussianProcessRegressor(DotProduct(big, "fixed"), alpha=1 / data.s, optimizer=None)
    mean, deviation = process.fit(data.x, data.y[:, 0] - 100.0).predict(data.new, return_std=True)
    form = make(method, x, s)
    found = form.solve(y)
    np.testing.assert_allclose((new @ found.coef + found.intercept)[:, 0] - 100.0, mean, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(form.variance(new), deviation**2, rtol=1e-3)


@METHODS
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_noise_has_the_largest_likelihood_at_any_scale_of_weights(method: str, scale: float) -> None:
    data, m = Data(8, 5), np.array([1, 2, 1, 3, 1, 1, 2, 1])
    x, s, y, _, _ = data.tensors()
    s = scale * s
    # Each image by itself: y ~ N(f, sigma^2 / s). Contrasts that are orthonormal to 1 do not see the intercept.
    rows = np.repeat(np.arange(8), m)
    q = np.linalg.qr(np.hstack([np.ones((len(rows), 1)), np.eye(len(rows))[:, 1:]]))[0][:, 1:]
    phi, weights = data.x[rows], (s.numpy() / m)[rows]
    covariance, z = q.T @ (phi @ phi.T + np.diag(1 / weights)) @ q, q.T @ data.y[rows]

    def loss(log_variance: float) -> float:
        return -float(multivariate_normal(cov=np.exp(log_variance) * covariance).logpdf(z.T).sum())

    expected = np.exp(minimize_scalar(loss, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9}).x)
    found = noise_variance(make(method, x, s).solve(y), torch.from_numpy(m), 3)
    assert found == pytest.approx(expected, rel=1e-6)


def test_noise_counts_free_outputs() -> None:
    x, s, y, m, _ = Data(8, 3).tensors()
    form = RowForm(x, s)
    close(noise_variance(form.solve(y), m, 2), noise_variance(form.solve(y), m, 1) / 2)
    assert noise_variance(form.solve(torch.full((8, 2), 0.1)), m, 1) == 0.0  # a constant has no noise


# -------------------------------------------------------------------------------------------------- invariances


PER_ROW = ("dual", "diagonal", "hat", "leave one out", "changes")


@METHODS
def test_a_weight_of_two_is_a_row_given_twice(method: str) -> None:
    data = Data(8, 10)
    x, s, y, _, new = data.tensors()
    m = torch.tensor([1.0, 2, 1, 3, 1, 1, 2, 1], dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(8), m.long())
    joined = answers(make(method, x, s, m, TWO), y, m, new)
    one = torch.ones(len(index), dtype=torch.float64)
    given = answers(make(method, x[index], (s / m)[index], one, TWO), y[index], one, new)
    for name in ("coef", "intercept", "variance", "noise"):
        close(given[name], joined[name].numpy())
    close(given["leave one out"], joined["leave one out"][index].numpy())
    close(given["changes"], joined["changes"][index].numpy())
    for name in ("dual", "hat"):  # a row's weight is that of its copies together
        close(torch.zeros_like(joined[name]).index_add_(0, index, given[name]), joined[name].numpy())


@METHODS
def test_the_order_of_rows_does_not_matter(method: str) -> None:
    data = Data(9, 10)
    x, s, y, m, new = data.tensors()
    order = torch.from_numpy(np.random.default_rng(1).permutation(9))
    before = answers(make(method, x, s, m, TWO), y, m, new)
    after = answers(make(method, x[order], s[order], m[order], TWO), y[order], m[order], new)
    for name, value in before.items():
        close(after[name], (value[order] if name in PER_ROW else value).numpy())


@METHODS
def test_each_output_is_on_its_own(method: str) -> None:
    data = Data(9, 10)
    x, s, y, m, _ = data.tensors()
    form = make(method, x, s, m, TWO)
    close(form.solve(y[:, 1:2]).coef[:, 0], form.solve(y).coef[:, 1].numpy())
    close(left_out(form, y[:, 1:2], m)[:, 0], left_out(form, y, m)[:, 1].numpy())


# ----------------------------------------------------------------------------------------------- choice of form


def test_the_smaller_form_is_taken() -> None:
    for n, d, method in ((5, 9, "rows"), (9, 5, "columns"), (5, 5, "rows")):
        x, s, *_ = Data(n, d).tensors()
        assert factorize(x, s, BUDGET).method == method
        assert isinstance(factorize(x, s, budget=BUDGET, form="rows"), RowForm)
        assert isinstance(factorize(x, s, budget=BUDGET, form="columns"), ColumnForm)


def test_budget() -> None:
    x, s, *_ = Data(10, 4).tensors()
    bytes_of_columns = 8 * 4**2
    assert closed_form_fits(10, 4, bytes_of_columns)
    assert closed_form_fits(4, 10, bytes_of_columns)
    assert not closed_form_fits(10, 4, bytes_of_columns - 1)
    assert factorize(x, s, bytes_of_columns).method == "columns"
    with pytest.raises(ValueError, match=r"10 rows and 4 features takes a square matrix of 4 rows.*solver='pcg'"):
        factorize(x, s, bytes_of_columns - 1)
    with pytest.raises(ValueError, match="a square matrix of 10 rows"):
        factorize(x, s, bytes_of_columns, form="rows")
    with pytest.raises(ValueError, match=r"form must be 'auto', 'rows' or 'columns'; got 'dense'"):
        factorize(x, s, BUDGET, form="dense")


PEAK = """
import sys, torch
from sklearn_lqf.engine.ridge import factorize

def memory(name):  # of Linux
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def solve(n, d, form):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x[:, :2].clone()
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    found = factorize(x, torch.ones(n), 1 << 33, form=form)
    found.solve(y), found.diagonal
    return (memory("VmHWM") - before) / (8 * min(n, d) ** 2)

for n, d, form in ((100, 60, "rows"), (60, 100, "columns"), (2000, 20, "rows"), (20, 2000, "columns")):
    size, peak = max(n, d) if (n < d) == (form == "columns") else min(n, d), 0
    peak = solve(n, d, form) * min(n, d) ** 2 / size**2
    print(form, size, peak)
    assert size < 1000 or peak < 1.5, (form, peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_closed_form_takes_one_square_matrix() -> None:
    subprocess.run([sys.executable, "-c", PEAK], check=True, timeout=300)


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_what_is_not_positive_definite_is_refused(form: str) -> None:
    x, s, *_ = Data(6, 6).tensors()
    with pytest.raises(ValueError, match=r"not positive definite to rounding.*increase alpha"):
        factorize(torch.where(x == x[2, 2], torch.nan, x), s, BUDGET, form=form)


def test_a_form_leaves_its_arguments_alone() -> None:
    data = Data(9, 10)
    x, s, y, m, new = given = data.tensors()
    copies = [a.clone() for a in given]
    for method in ("rows", "columns", "estimate"):
        answers(make(method, x, s, m, TWO), y, m, new)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
