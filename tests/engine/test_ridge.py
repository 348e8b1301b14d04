"""The quadratic on explicit features: its forms against scikit-learn's Ridge, refits and dense Gaussian formulas."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.linear_model import Ridge
from torch import Tensor

from sklearn_lqf.engine import ridge
from sklearn_lqf.engine.ridge import (
    Block,
    ColumnForm,
    EstimatedForm,
    Factorization,
    KroneckerPreconditioner,
    RowForm,
    Solution,
    Status,
    changes,
    closed_form_fits,
    factorize,
    leave_one_out,
    noise_variance,
    pcg,
)

# Of closed forms against dense oracles, relative: condition numbers below 1e4 times the rounding unit, with a margin.
ACCURACY = 1e-9
TOL = 1e-13  # of conjugate gradients that are compared with closed forms
BUDGET = 1 << 30
SHAPES = pytest.mark.parametrize("shape", [(12, 5), (9, 30), (2, 1), (2, 4), (7, 0)], ids=str)
METHODS = pytest.mark.parametrize("method", ["rows", "columns", "estimate"])


class Data:
    """Rows with uneven weights and multiplicities, features with a mean, targets with a large one, and new rows."""

    def __init__(self, n: int = 12, d: int = 5, outputs: int = 3, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((n, d)) * rng.uniform(0.5, 2.0, d) + 3.0
        self.y = self.x @ rng.standard_normal((d, outputs)) + rng.standard_normal((n, outputs)) + 100.0
        self.s = rng.uniform(0.2, 3.0, n)
        self.m = np.where(rng.random(n) < 0.5, 1.0, rng.uniform(1.0, 4.0, n))
        self.new = rng.standard_normal((4, d)) + 3.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features, weights, targets, multiplicities and new rows."""
        x, s, y, m, new = (torch.from_numpy(a) for a in (self.x, self.s, self.y, self.m, self.new))
        return x, s, y, m, new


def make(method: str, x: Tensor, s: Tensor, multiplicity: Tensor | None = None) -> Factorization:
    """A form by its name; the estimate has one exact block, with which it is exact too."""
    if method == "estimate":
        blocks = [Block(slice(0, x.shape[1]))]
        return EstimatedForm(x, s, blocks, tol=TOL, max_iter=200, multiplicity=multiplicity)
    return factorize(x, s, BUDGET, form=method)


def close(found: Tensor | np.ndarray | float, expected: np.ndarray | float, accuracy: float = ACCURACY) -> None:
    """Equal relative to the largest number."""
    scale = np.abs(expected).max() if np.size(expected) else 1.0
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=accuracy * max(float(scale), 1e-300))


# Dense oracles, in numpy and scikit-learn.


def refit(x: np.ndarray, y: np.ndarray, s: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Outputs (k, C) of scikit-learn's Ridge for new rows (k, D)."""
    if not x.shape[1]:
        return np.tile(np.average(y, axis=0, weights=s), (len(new), 1))
    kept = s > 0
    model = Ridge(alpha=1.0, solver="svd").fit(x[kept], y[kept], sample_weight=s[kept])
    return np.asarray(model.predict(new)).reshape(len(new), -1)


def without(data: Data, i: int, new: np.ndarray) -> np.ndarray:
    """Outputs for new rows when one of the images that row i stands for is left out."""
    s = data.s.copy()
    s[i] = s[i] - s[i] / data.m[i] if data.m[i] > 1 else 0.0
    return refit(data.x, data.y, s, new)


def dense_m(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """M by its definition."""
    a = np.linalg.inv(x @ x.T + np.diag(1 / s))
    one = a.sum(1)
    return a - np.outer(one, one) / one.sum()


def augmented(x: np.ndarray, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B and b by least squares on the rows, a column of ones, and rows for the penalty of B alone."""
    root = np.sqrt(s)[:, None]
    rows = np.vstack([root * np.hstack([x, np.ones((len(x), 1))]), np.eye(x.shape[1], x.shape[1] + 1)])
    found = np.linalg.lstsq(rows, np.vstack([root * y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return found[:-1], found[-1]


# --------------------------------------------------------------------------------------------------------- solution


@METHODS
@SHAPES
def test_solution_is_that_of_dense_least_squares(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, _ = data.tensors()
    coef, intercept = make(method, x, s).solve(y)
    expected = augmented(data.x, data.y, data.s)
    assert coef.shape == expected[0].shape
    close(coef, expected[0])
    close(intercept, expected[1])


@METHODS
def test_solution_is_that_of_scikit_learn(method: str) -> None:
    data = Data(20, 8)
    x, s, y, _, new = data.tensors()
    form = make(method, x, s)
    coef, intercept = form.solve(y)
    model = Ridge(alpha=1.0, solver="svd").fit(data.x, data.y, sample_weight=data.s)
    close(coef.T, model.coef_)
    close(intercept, model.intercept_)
    close(new @ coef + intercept, model.predict(data.new))
    close(form.hat(new) @ y, model.predict(data.new))


@METHODS
@SHAPES
def test_m_by_its_definition(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, _ = data.tensors()
    form, m = make(method, x, s), dense_m(data.x, data.s)
    close(form.diagonal, np.diag(m))
    close(form.dual(y), m @ (data.y - 100.0))  # M 1 = 0, which the oracle's rounding would not know of
    assert float(form.dual(y).sum(0).abs().max()) < 1e-10
    assert form.method == method
    assert form.features is x
    close(form.weights, data.s)


@METHODS
def test_features_far_from_zero_lose_no_accuracy(method: str) -> None:
    # Without centering the kernel's entries are 1e8: eight digits would be lost.
    data = Data(12, 5)
    x, s, y, m, _ = data.tensors()
    near, far = make(method, x, s), make(method, x + 1e4, s)
    close(far.solve(y)[0], near.solve(y)[0].numpy(), accuracy=1e-8)
    close(leave_one_out(far, y, m), leave_one_out(near, y, m).numpy(), accuracy=1e-8)


@METHODS
def test_float32_features_count_in_float64(method: str) -> None:
    data = Data(9, 4)
    x, s, y, _, new = data.tensors()
    rounded = x.float()
    found, expected = make(method, rounded, s.float()), make(method, rounded.double(), s.float().double())
    close(found.solve(y)[0], expected.solve(y)[0].numpy(), accuracy=1e-12)
    close(found.hat(new.float()), expected.hat(new.float().double()).numpy(), accuracy=1e-12)
    assert found.dual(y.float()).dtype is torch.float64


@METHODS
def test_pieces_of_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(11, 6)
    x, s, y, m, new = data.tensors()
    whole = make(method, x, s)
    monkeypatch.setattr(ridge, "_ELEMENTS", 4 * 6)  # four rows at once: pieces of 4, 4 and 3
    pieces = make(method, x, s)
    close(pieces.solve(y)[0], whole.solve(y)[0].numpy())
    close(pieces.diagonal, whole.diagonal.numpy())
    close(pieces.hat(new), whole.hat(new).numpy())
    close(pieces.variance(new), whole.variance(new).numpy())
    close(leave_one_out(pieces, y, m), leave_one_out(whole, y, m).numpy())


@METHODS
def test_features_on_disk(method: str, tmp_path) -> None:
    data = Data(9, 6)
    x, s, y, _, new = data.tensors()
    np.save(tmp_path / "features.npy", data.x.astype(np.float32))
    read = np.load(tmp_path / "features.npy", mmap_mode="r")  # read-only
    form, expected = make(method, read, s), make(method, x.float(), s)
    close(form.solve(y)[0], expected.solve(y)[0].numpy())
    close(form.hat(data.new), expected.hat(new).numpy())


# ---------------------------------------------------------------------------------------------------- leaving out


@METHODS
@SHAPES
def test_leave_one_out_equals_refits(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, m, _ = data.tensors()
    expected = np.concatenate([without(data, i, data.x[i : i + 1]) for i in range(len(x))])
    close(leave_one_out(make(method, x, s), y, m), expected)


@METHODS
@SHAPES
def test_changes_equal_refits(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, m, new = data.tensors()
    now = refit(data.x, data.y, data.s, data.new)
    expected = np.stack([without(data, i, data.new) - now for i in range(len(x))], 1)
    found = changes(make(method, x, s), y, m, new)
    assert found.shape == (4, len(x), 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ACCURACY * np.abs(data.y).max())


@METHODS
def test_changes_of_the_rows_themselves_give_leave_one_out(method: str) -> None:
    data = Data(10, 4)
    x, s, y, m, _ = data.tensors()
    form = make(method, x, s)
    coef, intercept = form.solve(y)
    own = changes(form, y, m, x).diagonal(dim1=0, dim2=1).T
    close(x @ coef + intercept + own, leave_one_out(form, y, m).numpy())


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
    coef, intercept = form.solve(y)
    np.testing.assert_allclose((new @ coef + intercept)[:, 0] - 100.0, mean, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(form.variance(new), deviation**2, rtol=1e-3)


@METHODS
@SHAPES
def test_noise_maximizes_the_likelihood_of_contrasts(method: str, shape: tuple[int, int]) -> None:
    data = Data(*shape)
    x, s, y, _, _ = data.tensors()
    n = len(x)
    # Contrasts of the rows, orthonormal to 1, do not see the intercept: their likelihood is the restricted one.
    q = np.linalg.qr(np.hstack([np.ones((n, 1)), np.eye(n)[:, 1:]]))[0][:, 1:]
    covariance, z = q.T @ (data.x @ data.x.T + np.diag(1 / data.s)) @ q, q.T @ data.y
    expected = np.trace(z.T @ np.linalg.solve(covariance, z)) / ((n - 1) * 3)
    close(noise_variance(make(method, x, s), y, torch.ones(n), 3), expected)


def test_noise_counts_images_and_free_outputs() -> None:
    data = Data(8, 3)
    x, s, y, m, _ = data.tensors()
    form = RowForm(x, s)
    one = noise_variance(form, y, m, 1)
    close(noise_variance(form, y, m, 2), one / 2)
    close(noise_variance(form, y, torch.ones(8), 1), one * (data.m.sum() - 1) / 7)
    assert noise_variance(form, torch.full((8, 2), 0.1), m, 1) == 0.0  # a constant has no noise


# -------------------------------------------------------------------------------------------------- invariances


def answers(form: Factorization, y: Tensor, m: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Everything that a form says, by name."""
    coef, intercept = form.solve(y)
    return {
        "coef": coef,
        "intercept": intercept,
        "dual": form.dual(y),
        "diagonal": form.diagonal,
        "hat": form.hat(new).T,
        "variance": form.variance(new),
        "leave one out": leave_one_out(form, y, m),
        "changes": changes(form, y, m, new).transpose(0, 1),
        "noise": torch.tensor(noise_variance(form, y, m, 2), dtype=torch.float64),
    }


PER_ROW = ("dual", "diagonal", "hat", "leave one out", "changes")
TWO = [Block(slice(0, 4)), Block(slice(4, 10), (2, 3))]


def several(method: str, x: Tensor, s: Tensor, m: Tensor) -> Factorization:
    """A form by its name; the estimate with several blocks, so that it is one."""
    if method == "estimate":
        return EstimatedForm(x, s, TWO, tol=TOL, max_iter=300, multiplicity=m)
    return make(method, x, s)


@METHODS
def test_a_weight_of_two_is_a_row_given_twice(method: str) -> None:
    data = Data(8, 10)
    x, s, y, _, new = data.tensors()
    m = torch.tensor([1.0, 2, 1, 3, 1, 1, 2, 1], dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(8), m.long())
    joined = answers(several(method, x, s, m), y, m, new)
    one = torch.ones(len(index), dtype=torch.float64)
    given = answers(several(method, x[index], (s / m)[index], one), y[index], one, new)
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
    before = answers(several(method, x, s, m), y, m, new)
    after = answers(several(method, x[order], s[order], m[order]), y[order], m[order], new)
    for name, value in before.items():
        close(after[name], (value[order] if name in PER_ROW else value).numpy())


@METHODS
def test_each_output_is_on_its_own(method: str) -> None:
    data = Data(9, 10)
    x, s, y, m, _ = data.tensors()
    form = several(method, x, s, m)
    together, alone = form.solve(y)[0], form.solve(y[:, 1:2])[0]
    close(alone[:, 0], together[:, 1].numpy())
    close(leave_one_out(form, y[:, 1:2], m)[:, 0], leave_one_out(form, y, m)[:, 1].numpy())


# ----------------------------------------------------------------------------------------------- choice of form


def test_the_smaller_form_is_taken() -> None:
    for n, d, method in ((5, 9, "rows"), (9, 5, "columns"), (5, 5, "rows")):
        x, s, *_ = Data(n, d).tensors()
        assert factorize(x, s, BUDGET).method == method
        assert isinstance(factorize(x, s, budget=BUDGET, form="rows"), RowForm)
        assert isinstance(factorize(x, s, budget=BUDGET, form="columns"), ColumnForm)


def test_budget() -> None:
    x, s, *_ = Data(10, 4).tensors()
    bytes_of_columns = 3 * 8 * 4**2
    assert closed_form_fits(10, 4, bytes_of_columns)
    assert closed_form_fits(4, 10, bytes_of_columns)
    assert not closed_form_fits(10, 4, bytes_of_columns - 1)
    assert factorize(x, s, bytes_of_columns).method == "columns"
    with pytest.raises(ValueError, match=r"10 rows and 4 features takes 3 square matrices of 4 rows.*solver='pcg'"):
        factorize(x, s, bytes_of_columns - 1)
    with pytest.raises(ValueError, match="3 square matrices of 10 rows"):
        factorize(x, s, bytes_of_columns, form="rows")
    with pytest.raises(ValueError, match=r"form must be 'auto', 'rows' or 'columns'; got 'dense'"):
        factorize(x, s, BUDGET, form="dense")


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
        answers(several(method, x, s, m), y, m, new)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


# ------------------------------------------------------------------------------------------------ preconditioner


def curvature(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Phi' S Phi + I of features less their weighted mean."""
    x = x - np.average(x, axis=0, weights=s)
    return x.T @ (s[:, None] * x) + np.eye(x.shape[1])


def inverse_of(p: KroneckerPreconditioner, d: int) -> np.ndarray:
    """Its matrix (D, D)."""
    return p(torch.eye(d, dtype=torch.float64)).numpy()


def kronecker_rows(seed: int = 0) -> np.ndarray:
    """Features of matrices a_i b_j' for all pairs, of both signs: their curvature is a Kronecker product."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((6, 4))
    rows = np.einsum("ip,jq->ijpq", a, b).reshape(30, 12)
    return np.vstack([rows, -rows])


def test_exact_blocks_are_exact() -> None:
    data = Data(12, 5)
    x, s, *_ = data.tensors()
    h = curvature(data.x, data.s)
    close(inverse_of(KroneckerPreconditioner(x, s, [Block(slice(0, 5))]), 5), np.linalg.inv(h))
    found = inverse_of(KroneckerPreconditioner(x, s, [Block(slice(0, 2)), Block(slice(2, 5))]), 5)
    close(found[:2, :2], np.linalg.inv(h[:2, :2]))
    close(found[2:, 2:], np.linalg.inv(h[2:, 2:]))
    assert not found[:2, 2:].any()


@pytest.mark.parametrize("weights", ["even", "of the pairs"])
def test_kronecker_data_are_exact(weights: str) -> None:
    rows, rng = kronecker_rows(), np.random.default_rng(1)
    # Weights u_i v_j leave the curvature a Kronecker product.
    pairs = np.outer(rng.uniform(0.5, 2, 5), rng.uniform(0.5, 2, 6)).ravel()
    s = np.ones(60) if weights == "even" else np.tile(pairs, 2)
    found = KroneckerPreconditioner(torch.from_numpy(rows), torch.from_numpy(s), [Block(slice(0, 12), (3, 4))])
    close(inverse_of(found, 12), np.linalg.inv(curvature(rows, s)))
    assert found.trace == pytest.approx(np.trace(np.linalg.inv(curvature(rows, s))))


def test_one_kronecker_direction_is_exact() -> None:
    rng = np.random.default_rng(0)
    direction = np.outer(rng.standard_normal(3), rng.standard_normal(4)).ravel()
    rows, s = rng.standard_normal((7, 1)) * direction, rng.uniform(0.5, 2, 7)
    found = KroneckerPreconditioner(torch.from_numpy(rows), torch.from_numpy(s), [Block(slice(0, 12), (3, 4))])
    close(inverse_of(found, 12), np.linalg.inv(curvature(rows, s)))


def test_a_kronecker_block_by_its_definition() -> None:
    data = Data(9, 12)
    x, s, *_ = data.tensors()
    f = (data.x - np.average(data.x, axis=0, weights=data.s)).reshape(9, 3, 4)
    left = sum(w * m @ m.T for w, m in zip(data.s, f, strict=True))
    right = sum(w * m.T @ m for w, m in zip(data.s, f, strict=True))
    found = inverse_of(KroneckerPreconditioner(x, s, [Block(slice(0, 12), (3, 4))]), 12)
    close(found, np.linalg.inv(np.kron(left, right) / np.trace(left) + np.eye(12)))
    close(found, found.T)


def test_rows_that_are_all_equal_have_no_curvature() -> None:
    x, s = torch.ones(4, 6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for sides in (None, (2, 3)):
        close(inverse_of(KroneckerPreconditioner(x, s, [Block(slice(0, 6), sides)]), 6), np.eye(6))


def test_wide_blocks_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "_BLOCK_MAX", 3)
    data = Data(9, 26)
    x, s, *_ = data.tensors()
    wide = [Block(slice(0, 7)), Block(slice(7, 17), (5, 2)), Block(slice(17, 26), (1, 9))]
    narrow = [
        *(Block(slice(*ends)) for ends in ((0, 3), (3, 6), (6, 7))),
        Block(slice(7, 13), (3, 2)),
        Block(slice(13, 17), (2, 2)),
        *(Block(slice(*ends)) for ends in ((17, 20), (20, 23), (23, 26))),
    ]
    found = inverse_of(KroneckerPreconditioner(x, s, wide), 26)
    close(found, inverse_of(KroneckerPreconditioner(x, s, narrow), 26))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block(slice(0, 3))], "must cover all 6 columns; they end at column 3"),
        ([Block(slice(0, 3)), Block(slice(4, 6))], "follows column 3"),
        ([Block(slice(0, 4)), Block(slice(3, 6))], "follows column 4"),
        ([Block(slice(0, 6), (2, 2))], "sides of 4 features for 6 columns"),
        ([], "must cover all 6 columns"),
    ],
)
def test_blocks_that_do_not_fit(blocks: list[Block], message: str) -> None:
    x, s, *_ = Data(5, 6).tensors()
    with pytest.raises(ValueError, match=message):
        KroneckerPreconditioner(x, s, blocks)


# -------------------------------------------------------------------------------------------- conjugate gradients


def grouped(n: int = 80, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Block]]:
    """Groups of very different prior variances, each with a decaying spectrum, one of Kronecker sketches."""
    rng = np.random.default_rng(seed)
    parts = [scale * rng.standard_normal((n, 12)) * np.arange(1, 13) ** -1.5 for scale in (30.0, 3.0, 0.3)] + [
        10.0 * np.einsum("np,nq->npq", rng.standard_normal((n, 4)), rng.standard_normal((n, 5))).reshape(n, 20)
    ]
    x = np.hstack(parts)
    y = x @ rng.standard_normal((56, 3)) / 10 + rng.standard_normal((n, 3))
    blocks = [Block(slice(a, a + 12)) for a in (0, 12, 24)] + [Block(slice(36, 56), (4, 5))]
    return torch.from_numpy(x), torch.from_numpy(rng.uniform(0.5, 2, n)), torch.from_numpy(y), blocks


def test_pcg_finds_the_optimum_in_fewer_iterations_with_the_preconditioner() -> None:
    x, s, y, blocks = grouped()
    coef, intercept = augmented(x.numpy(), y.numpy(), s.numpy())
    plain = pcg(x, s, y, None, tol=1e-12, max_iter=1000)
    helped = pcg(x, s, y, KroneckerPreconditioner(x, s, blocks), tol=1e-12, max_iter=1000)
    for found in (plain, helped):
        assert found.converged
        assert found.status is Status.CONVERGED
        assert len(found.residual_norms) == found.n_iter + 1
        assert found.residual_norms[0] == 1.0
        assert found.residual_norms[-1] <= 1e-12
        # The least eigenvalue of H is 1, its largest 1e5: errors are at most 1e5 times the relative residual.
        close(found.coef, coef, accuracy=1e-7)
        close(found.intercept, intercept, accuracy=1e-7)
    assert 2 * helped.n_iter < plain.n_iter


def test_pcg_with_the_exact_inverse_takes_one_iteration() -> None:
    x, s, y, _ = grouped()
    found = pcg(x, s, y, KroneckerPreconditioner(x, s, [Block(slice(0, 56))]), tol=1e-10, max_iter=5)
    assert (found.status, found.n_iter) == (Status.CONVERGED, 1)


def true_residuals(found: Solution, x: Tensor, s: Tensor, y: Tensor) -> np.ndarray:
    """|gradient| over |gradient at zero| of each output (C,), from the objective."""
    x, s, y = x.numpy(), s.numpy(), y.numpy()
    x, y = x - np.average(x, axis=0, weights=s), y - np.average(y, axis=0, weights=s)
    coef, rhs = found.coef.numpy(), x.T @ (s[:, None] * y)
    gradient = rhs - x.T @ (s[:, None] * (x @ coef)) - coef
    return np.linalg.norm(gradient, axis=0) / np.maximum(np.linalg.norm(rhs, axis=0), 1e-300)


@pytest.mark.parametrize("tol", [1e-1, 1e-4, 1e-8])
def test_converged_means_every_output_by_its_true_gradient(tol: float) -> None:
    x, s, y, blocks = grouped()
    y = y * torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64)  # each output has a scale of its own
    found = pcg(x, s, y, KroneckerPreconditioner(x, s, blocks), tol=tol, max_iter=1000)
    residuals = true_residuals(found, x, s, y)
    assert (residuals <= tol * (1 + 1e-6)).all()
    assert residuals.max() == pytest.approx(found.residual_norms[-1], rel=1e-4)


def test_outputs_that_are_done_rest() -> None:
    x, s, y, _ = grouped()
    easy = x[:, :1] * 0 + 5.0  # a constant: done from the start
    first = pcg(x, s, torch.cat([y[:, :1], easy], 1), None, tol=1e-12, max_iter=1000)
    assert first.converged
    assert not first.coef[:, 1].any()
    assert float(first.intercept[1]) == pytest.approx(5.0, abs=1e-12)
    alone = pcg(x, s, y[:, :1], None, tol=1e-12, max_iter=1000)
    close(first.coef[:, 0], alone.coef[:, 0].numpy(), accuracy=1e-7)
    # An output that starts at its optimum is not moved while another goes on.
    start = torch.cat([alone.coef, torch.zeros_like(alone.coef)], 1)
    again = pcg(x, s, y[:, :2], None, tol=1e-7, max_iter=1000, start=start)
    assert again.converged
    assert torch.equal(again.coef[:, 0], alone.coef[:, 0])


def test_a_start_saves_iterations() -> None:
    x, s, y, blocks = grouped()
    precondition = KroneckerPreconditioner(x, s, blocks)
    cold = pcg(x, s, y, precondition, tol=1e-8, max_iter=1000)
    start = cold.coef * 1.001
    copy = start.clone()
    warm = pcg(x, s, y, precondition, tol=1e-8, max_iter=1000, start=start)
    assert warm.converged
    assert 0 < warm.n_iter < cold.n_iter
    assert torch.equal(start, copy)
    done = pcg(x, s, y, precondition, tol=1e-7, max_iter=1000, start=cold.coef)
    assert (done.n_iter, done.status) == (0, Status.CONVERGED)


def test_statuses() -> None:
    x, s, y, blocks = grouped()
    short = pcg(x, s, y, None, tol=1e-10, max_iter=3)
    assert (short.status, short.n_iter, short.converged) == (Status.MAX_ITER, 3, False)
    assert true_residuals(short, x, s, y).max() == pytest.approx(short.residual_norms[-1], rel=1e-6)
    assert pcg(x, s, y, None, tol=1e-10, max_iter=0).status is Status.MAX_ITER
    bad = pcg(torch.where(x == x[3, 3], torch.inf, x), s, y, None, tol=1e-10, max_iter=50)
    assert bad.status is Status.NOT_FINITE
    assert bad.n_iter <= 1
    hopeless = pcg(x, s, y, KroneckerPreconditioner(x, s, blocks), tol=1e-30, max_iter=10_000)
    assert hopeless.status is Status.STAGNATED
    assert hopeless.n_iter < 1000
    assert all(isinstance(status.value, str) and status.value.endswith(".") for status in Status)
    with pytest.raises(FrozenInstanceError):
        short.n_iter = 1  # type: ignore[misc]


def test_pcg_without_features_or_outputs() -> None:
    _, s, y, _, _ = Data(6, 1).tensors()
    none = torch.zeros(6, 0, dtype=torch.float64)
    found = pcg(none, s, y, KroneckerPreconditioner(none, s, []), tol=1e-8, max_iter=5)
    assert found.converged
    close(found.intercept, np.average(y.numpy(), axis=0, weights=s.numpy()))
    assert pcg(torch.ones(6, 2), s, y[:, :0], None, tol=1e-8, max_iter=5).coef.shape == (2, 0)


# ------------------------------------------------------------------------------------------------------ estimates


def correlated(overlap: float, n: int = 300, groups: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of 30 features that see ``overlap`` of the same 40 variables: rows, weights, targets and new rows."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n + 200, 40)) * np.arange(1, 41) ** -0.5
    own = [rng.standard_normal((n + 200, 30)) * np.arange(1, 31) ** -0.5 for _ in range(groups)]
    parts = [overlap * z @ rng.standard_normal((40, 30)) / 40**0.5 + (1 - overlap) * e for e in own]
    x = np.hstack([2 * p / np.sqrt((p**2).sum(1).mean()) for p in parts])
    y = z[:n, :3] @ rng.standard_normal((3, 2)) + 0.3 * rng.standard_normal((n, 2))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return x[:n], torch.from_numpy(rng.uniform(0.5, 1.5, n)), y, x[n:]


@pytest.mark.parametrize("overlap", [0.2, 0.7, 1.0])
def test_estimates_are_near_the_exact_answers(overlap: float) -> None:
    x, s, y, new = correlated(overlap)
    one = torch.ones(len(x), dtype=torch.float64)
    blocks = [Block(slice(a, a + 30)) for a in range(0, 150, 30)] + [Block(slice(150, 180), (5, 6))]
    found, exact = EstimatedForm(x, s, blocks, tol=1e-8, max_iter=500), ColumnForm(x, s)
    # Measured over three seeds: M_ii are wrong by at most 1.3 % in the mean and 8 % a row, the leave-one-out error by
    # 5 %, the variance by 8 %. The sums over blocks alone are wrong by 11 to 48 % in the mean of M_ii, some of which
    # are negative, and by factors of 0.5 to 3.8 in the variance. Bounds are about twice what was measured.
    ratio = (found.diagonal / exact.diagonal).numpy()
    assert 0.97 < ratio.mean() < 1.03
    assert ratio.std() < 0.16
    errors = [float((s[:, None] * (leave_one_out(f, y, one) - y) ** 2).sum()) for f in (found, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    variances = [float(f.variance(new).mean()) for f in (found, exact)]
    assert variances[0] == pytest.approx(variances[1], rel=0.16)


def test_the_estimate_solves_with_conjugate_gradients() -> None:
    x, s, y, new = correlated(0.7)
    blocks = [Block(slice(a, a + 30)) for a in range(0, 180, 30)]
    found, exact = EstimatedForm(x, s, blocks, tol=1e-11, max_iter=500), ColumnForm(x, s)
    assert found.course is None
    close(found.solve(y)[0], exact.solve(y)[0].numpy(), accuracy=1e-8)
    assert found.course is not None
    assert found.course.converged
    close(found.hat(new), exact.hat(new).numpy(), accuracy=1e-8)
    close(found.dual(y), exact.dual(y).numpy(), accuracy=1e-8)


def test_the_estimate_solves_once_for_the_same_targets() -> None:
    x, s, y, _ = correlated(0.7)
    form = EstimatedForm(x, s, [Block(slice(0, 180))], tol=1e-8, max_iter=500)
    form.solve(y)
    first = form.course
    form.dual(y.clone())
    assert form.course is first
    y[0] += 1.0  # in place: these are others
    form.solve(y)
    assert form.course is not first
    close(form.solve(y)[0], ColumnForm(x, s).solve(y)[0].numpy(), accuracy=1e-6)


def test_estimated_diagonals_lie_between_nothing_and_the_weights() -> None:
    # A prior so wide that rows are interpolated: sums over blocks would make M_ii negative.
    x, s, y, _ = correlated(0.7)
    form = EstimatedForm(30 * x, s, [Block(slice(a, a + 30)) for a in range(0, 180, 30)], tol=1e-6, max_iter=2000)
    assert bool((form.diagonal > 0).all())
    assert bool((form.diagonal < s).all())
    assert bool(leave_one_out(form, y, torch.ones(300)).isfinite().all())
