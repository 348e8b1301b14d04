"""The block-diagonal preconditioner against dense inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.linear import Data, close

from sklearn_lqf.engine.centered import CenteredRows
from sklearn_lqf.engine.preconditioner import Block, KroneckerPreconditioner


def preconditioner(x, s, blocks, **options) -> KroneckerPreconditioner:
    """Of arrays or tensors."""
    return KroneckerPreconditioner(CenteredRows(torch.as_tensor(x), torch.as_tensor(s)), blocks, **options)


def curvature(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Phi' S Phi + I of features less their weighted mean."""
    x = x - np.average(x, axis=0, weights=s)
    return x.T @ (s[:, None] * x) + np.eye(x.shape[1])


def inverse_of(p: KroneckerPreconditioner, d: int) -> np.ndarray:
    """Its matrix (D, D)."""
    return p(torch.eye(d, dtype=torch.float64)).numpy()


def test_exact_blocks_are_exact() -> None:
    data = Data(12, 5)
    x, s, *_ = data.tensors()
    h = curvature(data.x, data.s)
    close(inverse_of(preconditioner(x, s, [Block(slice(0, 5))]), 5), np.linalg.inv(h))
    found = inverse_of(preconditioner(x, s, [Block(slice(0, 2)), Block(slice(2, 5))]), 5)
    close(found[:2, :2], np.linalg.inv(h[:2, :2]))
    close(found[2:, 2:], np.linalg.inv(h[2:, 2:]))
    assert not found[:2, 2:].any()


@pytest.mark.parametrize("case", ["all pairs", "weights of pairs", "one direction", "no curvature"])
def test_kronecker_data_are_exact(case: str) -> None:
    rng = np.random.default_rng(0)
    if case in ("all pairs", "weights of pairs"):
        # Matrices a_i b_j' for all pairs, of both signs; weights u_i v_j leave the curvature a Kronecker product.
        rows = np.einsum("ip,jq->ijpq", rng.standard_normal((5, 3)), rng.standard_normal((6, 4))).reshape(30, 12)
        pairs = np.outer(rng.uniform(0.5, 2, 5), rng.uniform(0.5, 2, 6)).ravel()
        rows, s = np.vstack([rows, -rows]), np.ones(60) if case == "all pairs" else np.tile(pairs, 2)
    else:
        size = np.ones((7, 1)) if case == "no curvature" else rng.standard_normal((7, 1))
        rows, s = size * np.outer(rng.standard_normal(3), rng.standard_normal(4)).ravel(), rng.uniform(0.5, 2, 7)
    found, expected = preconditioner(rows, s, [Block(slice(0, 12), (3, 4))]), np.linalg.inv(curvature(rows, s))
    close(inverse_of(found, 12), expected)
    assert found.trace == pytest.approx(np.trace(expected))


def test_a_kronecker_block_by_its_definition() -> None:
    data = Data(9, 12)
    x, s, *_ = data.tensors()
    f = (data.x - np.average(data.x, axis=0, weights=data.s)).reshape(9, 3, 4)
    left = sum(w * m @ m.T for w, m in zip(data.s, f, strict=True))
    right = sum(w * m.T @ m for w, m in zip(data.s, f, strict=True))
    found = inverse_of(preconditioner(x, s, [Block(slice(0, 12), (3, 4))]), 12)
    close(found, np.linalg.inv(np.kron(left, right) / np.trace(left) + np.eye(12)))
    close(found, found.T)


def test_wide_blocks_are_split() -> None:
    data = Data(9, 26)
    x, s, *_ = data.tensors()
    wide = [Block(slice(0, 7)), Block(slice(7, 17), (5, 2)), Block(slice(17, 26), (1, 9))]
    narrow = [
        *(Block(slice(*ends)) for ends in ((0, 3), (3, 6), (6, 7))),
        Block(slice(7, 13), (3, 2)),
        Block(slice(13, 17), (2, 2)),
        *(Block(slice(*ends)) for ends in ((17, 20), (20, 23), (23, 26))),
    ]
    found = inverse_of(preconditioner(x, s, wide, widest=3), 26)
    close(found, inverse_of(preconditioner(x, s, narrow), 26))


def test_blocks_that_do_not_fit() -> None:
    x, s, *_ = Data(5, 6).tensors()
    for blocks, message in (
        ([Block(slice(0, 3))], "must cover all 6 columns; they end at column 3"),
        ([Block(slice(0, 4)), Block(slice(3, 6))], "follows column 4"),
        ([Block(slice(0, 6), (2, 2))], "sides of 4 features for 6 columns"),
        ([], "must cover all 6 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            preconditioner(x, s, blocks)
