"""The quadratic on explicit features: its forms against scikit-learn's Ridge, refits and dense Gaussian formulas."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal
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
        "leave one out": leave_one_out(form, found, m),  # outputs (n, C) for each row without it
        # Changes (n, k, C) of the outputs for new rows when a row is left out.
        "changes": -form.hat(new).T[:, :, None] * removals(form, found, m)[:, None],
        "noise": torch.tensor(noise_variance(found, m, 2), dtype=torch.float64),
    }


# ---------------------------------------------------------------------------------------------------------- oracles


@METHODS
@SHAPES
def test_solution_and_m_are_those_of_dense_formulas(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, new = data.tensors()
    form, m = make(method, x, s), dense_m(data.x, data.s)
    found, (coef, intercept) = form.solve(y), augmented(data.x, data.y, data.s)
    assert (form.method, found.coef.shape) == (method, coef.shape)
    close(found.coef, coef)
    close(found.intercept, intercept)
    centered = data.y - 100.0  # M 1 = 0, which the oracle's rounding would not know of
    close(form.diagonal, np.diag(m))
    close(found.dual, m @ centered)
    close(found.energy, np.trace(centered.T @ m @ centered))
    assert float(found.dual.sum(0).abs().max()) < 1e-10
    # The variance is that of the Gaussian posterior for an intercept of infinite prior variance: its precision is 0.
    phi, at = (np.hstack([a, np.ones((len(a), 1))]) for a in (data.x, data.new))
    precision = phi.T @ (data.s[:, None] * phi) + np.diag([1.0] * shape[1] + [0.0])
    close(form.variance(new), np.einsum("ki,ij,kj->k", at, np.linalg.inv(precision), at))


@METHODS
@SHAPES
def test_answers_equal_refits_of_ridge(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, m, new = data.tensors()
    now = refit(data.x, data.y, data.s, data.new)
    rows, changes = [], []
    for i, count in enumerate(data.m):  # one of the images that a row stands for is left out
        weights = data.s.copy()
        weights[i] = weights[i] - weights[i] / count if count > 1 else 0.0
        rows.append(refit(data.x, data.y, weights, data.x[i : i + 1])[0])
        changes.append(refit(data.x, data.y, weights, data.new) - now)
    form = make(method, x, s)
    close(form.hat(new) @ y, now)
    found = answers(form, y, m, new)
    close(found["leave one out"], np.array(rows))
    np.testing.assert_allclose(found["changes"], np.stack(changes), rtol=0, atol=ACCURACY * np.abs(data.y).max())


@pytest.mark.parametrize(("method", "scale"), [("rows", 1e-3), ("columns", 1.0), ("estimate", 1e3)])
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
    form, counts = make(method, x, s), torch.from_numpy(m)
    assert noise_variance(form.solve(y), counts, 3) == pytest.approx(expected, rel=1e-6)
    assert noise_variance(form.solve(y), counts, 1) == pytest.approx(3 * expected, rel=1e-6)  # of free outputs
    constant = noise_variance(RowForm(x, s).solve(torch.full((8, 2), 0.1)), counts, 1)
    assert constant == 0.0


# -------------------------------------------------------------------------------------------------- invariances


PER_ROW = ("dual", "diagonal", "hat", "leave one out", "changes")


@METHODS
def test_order_does_not_matter_and_arguments_are_left_alone(method: str) -> None:
    x, s, y, m, new = given = Data(9, 10).tensors()
    copies = [a.clone() for a in given]
    order = torch.from_numpy(np.random.default_rng(1).permutation(9))
    before = answers(make(method, x, s, m, TWO), y, m, new)
    after = answers(make(method, x[order], s[order], m[order], TWO), y[order], m[order], new)
    for name, value in before.items():
        close(after[name], (value[order] if name in PER_ROW else value).numpy())
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@METHODS
@pytest.mark.parametrize("case", ["pieces of rows", "float32 on a disk", "far from zero"])
def test_other_rows_of_the_same_numbers(method: str, case: str, tmp_path) -> None:
    data = Data(11, 6)
    x, s, y, m, new = data.tensors()
    if case == "pieces of rows":
        room = 4 * 6 * 8  # four rows at once: pieces of 4, 4 and 3
        if method == "estimate":
            form: Factorization = EstimatedForm(x, s, [Block(slice(0, 6))], tol=1e-13, max_iter=200, piece=room)
        else:
            form = {"rows": RowForm, "columns": ColumnForm}[method](x, s, piece=room)
        found, expected = answers(form, y, m, new), answers(make(method, x, s), y, m, new)
    elif case == "float32 on a disk":  # which counts in float64
        np.save(tmp_path / "features.npy", data.x.astype(np.float32))
        read = np.load(tmp_path / "features.npy", mmap_mode="r")  # read-only
        found = answers(make(method, read, s), y.float(), m, new.float())
        expected = answers(make(method, x.float().double(), s), y.float().double(), m, new.float().double())
    else:  # without centering the kernel's entries are 1e8: eight digits would be lost
        found = answers(make(method, x + 1e4, s), y, m, new + 1e4)
        expected = answers(make(method, x, s), y, m, new)
        found["intercept"] = found["intercept"] + 1e4 * found["coef"].sum(0)
    for name, value in expected.items():
        close(found[name], value.numpy(), accuracy=1e-8 if case == "far from zero" else 1e-9)


# ----------------------------------------------------------------------------------------------- choice of form


def test_the_smaller_form_is_taken_within_the_budget() -> None:
    for n, d, method in ((5, 9, "rows"), (9, 5, "columns"), (5, 5, "rows")):
        x, s, *_ = Data(n, d).tensors()
        assert factorize(x, s, BUDGET).method == method
        assert isinstance(factorize(x, s, budget=BUDGET, form="rows"), RowForm)
        assert isinstance(factorize(x, s, budget=BUDGET, form="columns"), ColumnForm)
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


def memory(name: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("form", ["rows", "columns"])
def test_a_closed_form_takes_one_square_matrix(form: str) -> None:
    for size in (100, 2200):  # the first loads what is loaded once; more than 32 MiB are never taken from a heap
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((size, 20)))
        x = x if form == "rows" else x.T
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
        found = factorize(x, torch.ones(len(x)), BUDGET, form=form)
        assert len(found.solve(x[:, :2]).dual) == len(found.diagonal)
        peak = memory("VmHWM") - before
    assert peak < 1.5 * 8 * size**2


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_what_is_not_positive_definite_is_refused(form: str) -> None:
    x, s, *_ = Data(6, 6).tensors()
    with pytest.raises(ValueError, match=r"not positive definite to rounding.*increase alpha"):
        factorize(torch.where(x == x[2, 2], torch.nan, x), s, BUDGET, form=form)
