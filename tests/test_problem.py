"""From activations to the quadratic: its parts, its solutions along a path of penalties, and subsets of the rows."""

import numpy as np
import pytest
import torch
from images import make_images, tiny_net
from test_objective import close

from sklearn_lqf import problem
from sklearn_lqf.backbones import load_backbone
from sklearn_lqf.cache import TrunkCache
from sklearn_lqf.model import LinearModel
from sklearn_lqf.objective import Quadratic
from sklearn_lqf.problem import Problem, Recipe, TrainingRows, probe_outputs, weighted_mean

N, C, F64, CPU = 12, 3, torch.float64, torch.device("cpu")
X, Y = make_images(N)
IMAGES = torch.from_numpy(X).permute(0, 3, 1, 2) / 255
BOTH = torch.cat([IMAGES, IMAGES.flip(3)])
TARGETS = torch.from_numpy((Y[:, None] == np.unique(Y)).astype(float))
WEIGHTS = torch.linspace(0.5, 2.0, N, dtype=F64)


def made(images: torch.Tensor, chosen=slice(None), **parameters) -> tuple[LinearModel, TrainingRows, Recipe]:
    """What a problem is made of, for some of the images and for each of their views."""
    backbone = load_backbone(tiny_net(), "auto")
    model = LinearModel(backbone, (3, 12, 12), 1, 0.0, True, backbone.preprocessing, F64, CPU)
    views = len(images) // N
    own = images.view(views, N, *images.shape[1:])[:, chosen].flatten(0, 1)
    cache = TrunkCache(lambda a, b: model.activations(own[a:b]), len(own), 5, "memory", lambda count: None)
    rows = TrainingRows(cache, TARGETS[chosen], WEIGHTS[chosen], WEIGHTS[chosen], views)
    recipe = {"head": "orthogonal", "centered": True, "tail_weight": 0.03, "damping": 0.1, "seed": 0, **parameters}
    return model, rows, Recipe(**recipe)


def jacobian(found: Problem) -> torch.Tensor:
    """Rows (V n, C, P) in the units of the solver."""
    parts = []
    for z in found.rows.cache:
        point = found.network.at(z)
        eye = torch.eye(len(z[0]) * C, dtype=F64).view(len(z[0]), C, -1, C)
        parts.append(torch.stack([torch.stack([point.vjp(u) for u in row]) for row in eye]))
    return torch.cat(parts)


def optimum(found: Problem, j: torch.Tensor, alpha: float) -> torch.Tensor:
    """The solution by the dual of the dense quadratic."""
    views = found.rows.views
    s = (found.rows.weights / views).repeat(views).repeat_interleave(C)
    flat, t = j.flatten(0, 1), (found.rows.targets - found.offset).reshape(-1)
    return flat.T @ torch.linalg.solve(flat @ flat.T + torch.diag(alpha / s), t)


CASES = {
    "one view": (IMAGES, {}),
    "two views": (BOTH, {}),
    "own outputs": (BOTH, {"head": "random", "centered": False}),
    "ridge head": (BOTH, {"head": "ridge", "centered": False}),
    "one prior": (IMAGES, {"tail_weight": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quadratic_is_the_dense_one(case):
    images, parameters = CASES[case]
    model, rows, recipe = made(images, **parameters)
    found = Problem(model, rows, recipe)
    j, s = jacobian(found), WEIGHTS / rows.views
    close(found.mean, WEIGHTS @ TARGETS / WEIGHTS.sum())
    if recipe.centered:
        close(found.offset, found.mean.expand(rows.views, N, C))
    elif recipe.head == "ridge":
        assert found.offset is found.held_out
    else:
        own = [found.network.at(z).outputs for z in rows.cache]
        close(found.offset, torch.cat(own).view(-1, N, C))
    energy = (s.repeat(rows.views) * j.square().sum((1, 2))).sum()
    assert found.unit == pytest.approx(float(energy / (C * WEIGHTS.sum())), rel=1e-10)
    tail = j[..., : found.network.slices["head.weight"].start].square().sum((1, 2))
    if recipe.tail_weight is not None:
        part = float((s.repeat(rows.views) * tail).sum() / energy)
        assert part == pytest.approx(recipe.tail_weight / (1 + recipe.tail_weight), rel=1e-10)
    quadratic, _ = found.at(0.7)
    d = optimum(found, j, 0.7)
    close(quadratic.matvec(d), quadratic.rhs(), 1e-9)


def test_penalties():
    model, rows, recipe = made(IMAGES)
    found = Problem(model, rows, recipe)
    assert found.alpha(2.0) == 2 * found.unit
    least = 1e-3 * found.unit * float(rows.weights.sum() / rows.multiplicity.sum())  # follows the scale of weights
    assert found.alpha("auto") == pytest.approx(max(found.ridge_alpha, least))
    found.ridge_alpha = 1e-9
    assert found.alpha("auto") == pytest.approx(least)


@pytest.mark.parametrize("case", CASES)
def test_path_is_the_dense_optimum_of_each_penalty(case):
    images, parameters = CASES[case]
    model, rows, recipe = made(images, **parameters)
    found = Problem(model, rows, recipe)
    j, alphas = jacobian(found), [found.unit * a for a in (3.0, 0.3, 0.1)]
    for alpha, result in zip(alphas, found.path(alphas, 1e-11, 500), strict=True):
        assert result.converged
        close(result.x, optimum(found, j, alpha), 1e-8)
        if recipe.head != "ridge":  # which is fitted to what it would say without an image, not to its outputs
            close(found.outputs(result.x, rows.cache), found.offset.flatten(0, 1) + j @ result.x)


@pytest.mark.parametrize("case", CASES)
def test_a_path_takes_fewer_products(case, monkeypatch):
    images, parameters = CASES[case]
    products, matvec = [], Quadratic.matvec
    monkeypatch.setattr(Quadratic, "matvec", lambda h, v: products.append(h.alpha) or matvec(h, v))
    found = Problem(*made(images, **parameters))
    alphas = [found.unit * a for a in (3.0, 1.0, 0.3, 0.1, 0.03)]
    assert all(result.converged for result in found.path(alphas, 1e-2, 100))
    together = len(products)
    for alpha in alphas:
        next(Problem(*made(images, **parameters)).path([alpha], 1e-2, 100))
    assert together < 0.7 * (len(products) - together)


def test_directions_that_are_dropped_only_cost_products(monkeypatch):
    monkeypatch.setattr(problem, "_PATH_BYTES", 1)
    found = Problem(*made(IMAGES))
    alphas = [found.unit, 0.1 * found.unit]
    for alpha, result in zip(alphas, found.path(alphas, 1e-11, 500), strict=True):
        close(result.x, optimum(found, jacobian(found), alpha), 1e-8)


def test_targets_that_are_the_offset():
    model, rows, recipe = made(IMAGES)
    constant = TrainingRows(rows.cache, torch.ones(N, C, dtype=F64), WEIGHTS, WEIGHTS)
    for result in Problem(model, constant, recipe).path([1.0, 0.1], 1e-2, 10):
        assert result.converged and not result.x.any()


@pytest.mark.parametrize("images", [IMAGES, BOTH], ids=["one view", "two views"])
def test_some_of_the_rows(images):
    chosen = [7, 0, 1, 10, 4]
    model, rows, recipe = made(images)
    found = Problem(model.again(), rows.taking(chosen), recipe)
    expected = Problem(*made(images, chosen))
    assert found.unit == pytest.approx(expected.unit, rel=1e-12)
    assert found.ridge_alpha == pytest.approx(expected.ridge_alpha, rel=1e-9)
    close(found.held_out, expected.held_out, 1e-9)
    ours, theirs = (next(p.path([0.1 * p.unit], 1e-12, 500)).x for p in (found, expected))
    close(ours, theirs, 1e-9)
    assert model.network is None  # the others' model stays as it was


def test_rows_with_other_weights_and_in_other_batches():
    _, rows, _ = made(BOTH)
    twice = rows.weighted(2 * WEIGHTS)
    assert torch.equal(twice.weights, 2 * WEIGHTS) and twice.given is rows.given
    assert rows.rebatched(7).cache.sizes == [7, 7, 7, 3]
    assert torch.equal(TrainingRows(rows.cache, TARGETS, WEIGHTS, WEIGHTS).multiplicity, WEIGHTS.clamp_min(1))


def test_outputs_of_new_images():
    model, rows, recipe = made(IMAGES, head="ridge", centered=False)
    found = Problem(model, rows, recipe)
    x = next(found.path([found.unit], 1e-6, 100)).x
    new = [model.activations(torch.from_numpy(make_images(4, seed=1)[0]).permute(0, 3, 1, 2) / 255)]
    point = found.network.at(new[0])
    close(found.outputs(x, new), point.outputs + point.jvp(x))


def test_probes():
    assert torch.equal(probe_outputs(10, 3), torch.eye(3, dtype=F64))
    many = probe_outputs(100, 3)
    assert many.shape == (1, 100, 3)
    assert set(many.unique().tolist()) == {-1.0, 1.0}
    state = torch.get_rng_state()
    assert torch.equal(probe_outputs(100, 3), many)
    assert torch.equal(torch.get_rng_state(), state)


def test_weighted_mean():
    t = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    assert weighted_mean(t, torch.tensor([3.0, 1.0])).tolist() == [2.0, 3.0]
