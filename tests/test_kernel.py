"""The tangent kernel against explicit Jacobians."""

import pytest
import torch
from test_objective import NETWORKS, C, N, close, make

from sklearn_lqf import kernel
from sklearn_lqf.kernel import tangent_kernel


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request):
    return make(request.param)


def expected(problem, rows=slice(None), columns=slice(None)):
    j = problem.j  # (n, C, P)
    return torch.einsum("icp,jdp->icjd", j[rows], j[columns])


@pytest.mark.parametrize("sizes", [N, 4, [2, 9]])
def test_equals_the_jacobians(problem, sizes):
    close(tangent_kernel(problem.network, problem.batches(sizes)), expected(problem))


def test_between_two_sets(problem):
    batches = problem.batches([3, 8])
    found = tangent_kernel(problem.network, batches[:1], batches[1:])
    assert found.shape == (3, C, 8, C)
    close(found, expected(problem, slice(3), slice(3, None)))


def test_pieces_do_not_matter(problem, monkeypatch):
    monkeypatch.setattr(kernel, "_PRODUCTS", 1)
    monkeypatch.setattr(kernel, "_JACOBIANS", 2)
    close(tangent_kernel(problem.network, problem.batches()), expected(problem))


def test_which_way_does_not_depend_on_the_rows_of_a_batch(monkeypatch):
    problem = make("outside")
    monkeypatch.setattr(kernel, "_PRODUCTS", 300)  # elements, of the Jacobians of more than one image
    close(tangent_kernel(problem.network, problem.batches([8, 1, 2])), expected(problem))


def layer(seed: int, positions: int, groups: int, m: int = 5, o: int = 3):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4 + seed, groups, positions, m), (4 + seed, groups, C, positions, o))
    return (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 40])  # products of positions, or Jacobians
def test_both_ways_through_a_layer(positions, groups):
    a, g = layer(0, positions, groups)
    b, h = layer(1, positions, groups)
    j, q = (torch.einsum("bgcto,bgtm->bcgom", y, x).flatten(2) for x, y in ((a, g), (b, h)))
    close(kernel._layer_product(a, g, b, h), torch.einsum("icp,jdp->icjd", j, q))


def test_tail_scale_counts():
    problem = make("convolutional")
    tail = problem.network.slices["head.weight"].start
    problem.network.tail_scale = 0.5
    j = problem.j.clone()
    j[:, :, :tail] *= 0.5
    expected = torch.einsum("icp,jdp->icjd", j, j)
    close(tangent_kernel(problem.network, problem.batches()), expected)
    problem.network.tail_scale = 0.1
    close(tangent_kernel(problem.network, problem.batches(), tail_scale=5.0), expected)
