"""Kronecker sketches of layers: exact gradients, and inner products whose mean is the exact kernel."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_lqf.engine.sketch import LayerSketch, draw_sketch, sketch_size

F64 = torch.float64
ROWS = 3
# Layer, and shape of its input; the input of windows has several rows for each image, one image after the other.
LAYERS = {
    "vectors": (lambda: nn.Linear(5, 4), (ROWS, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (ROWS, 6, 5)),
    "channels last": (lambda: nn.Linear(5, 4), (ROWS, 2, 3, 5)),
    "windows": (lambda: nn.Linear(5, 4, bias=False), (4 * ROWS, 6, 5)),
    "1x1": (lambda: nn.Conv2d(5, 4, 1), (ROWS, 5, 3, 4)),
    "3x3": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (ROWS, 2, 7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (ROWS, 2, 6, 7)),
    "same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same"), (ROWS, 2, 5, 6)),
    "valid": (lambda: nn.Conv2d(2, 4, (2, 3), padding="valid"), (ROWS, 2, 5, 6)),
    "reflected": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect"), (ROWS, 2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (ROWS, 2, 5, 6)),
    "windows of images": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2 * ROWS, 2, 5, 4)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (ROWS, 6, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2), dilation=(2, 1), groups=4), (ROWS, 4, 7, 6)),
    "two for each channel": (lambda: nn.Conv2d(3, 6, 3, padding="same", groups=3), (ROWS, 3, 4, 5)),
    "windows in groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2 * ROWS, 4, 4, 5)),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def built(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().double()


def image_gradients(layer: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Gradients of <cotangent, layer(x)> by the weight, of each image alone, as matrices (rows, o, m)."""
    found = []
    for xi, ci in zip(x.chunk(ROWS), cotangent.chunk(ROWS), strict=True):
        found.append(torch.autograd.grad((layer(xi) * ci).sum(), layer.weight)[0].flatten(1))
    return torch.stack(found)


def features(sketch: LayerSketch, x: torch.Tensor, cotangents: list[torch.Tensor]) -> torch.Tensor:
    inputs = sketch.inputs(x, ROWS)
    return sketch.joined([sketch.features(inputs, c, k) for k, c in enumerate(cotangents)])


def draw(layer: nn.Module, n_directions: int, size: int | None, seed: int = 0) -> LayerSketch:
    return draw_sketch(layer, n_directions, size, torch.Generator().manual_seed(seed))


# torch copies the input of an even kernel with padding="same", and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_exact_gradients_stand_side_by_side(name, memory_format):
    make, shape = LAYERS[name]
    layer, x = built(make), rand(*shape)
    if memory_format is torch.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    cotangents = [rand(*layer(x).shape, seed=k + 1) for k in range(2)]
    expected = torch.cat([image_gradients(layer, x, c).flatten(1) for c in cotangents], 1)
    sketch = draw(layer, 2, None)
    assert sketch.size == expected.shape[1] == 2 * layer.weight.numel()
    assert sketch_size(layer) == (layer.weight.shape[0], layer.weight[0].numel())
    torch.testing.assert_close(features(sketch, x, cotangents), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_sketches_are_projections_of_the_gradients(name):
    make, shape = LAYERS[name]
    layer, x = built(make), rand(*shape)
    sketch = draw(layer, 2, 3)
    cotangents = [rand(*layer(x).shape, seed=k + 1) for k in range(2)]
    gradients = np.stack([image_gradients(layer, x, c).numpy() for c in cotangents])
    expected = np.einsum("kop,krom,kmq->rpq", sketch.left.numpy(), gradients, sketch.right.numpy()).reshape(ROWS, -1)
    found = features(sketch, x, cotangents).numpy()
    assert found.shape == (ROWS, sketch.size)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tokens", "3x3", "depthwise"])
@pytest.mark.parametrize("size", [100, 512])
def test_rotations_keep_the_kernel_of_one_direction(name, size):
    make, shape = LAYERS[name]
    layer, x = built(make), rand(*shape)
    cotangent = rand(*layer(x).shape, seed=1)
    gradients = image_gradients(layer, x, cotangent).flatten(1)
    sketch = draw(layer, 1, size)
    assert sketch.size == layer.weight.numel()  # no more columns than the weight has elements
    found = features(sketch, x, [cotangent])
    torch.testing.assert_close(found @ found.T, gradients @ gradients.T, rtol=1e-11, atol=1e-10)


def sampled_kernels(sides: tuple[int, int], size: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Kernels (seeds, ROWS, ROWS) of sketches of a layer of these sides for three directions, and the exact one."""
    o, m = sides
    layer, x = built(lambda: nn.Linear(m, o)), rand(ROWS, 4, m)
    # Gradients that nearly agree: products of those of two directions, which are no part of the kernel, must cancel.
    common = rand(ROWS, 4, o, seed=9)
    cotangents = [common + 0.3 * rand(ROWS, 4, o, seed=k) for k in range(3)]
    gradients = [image_gradients(layer, x, c).flatten(1).numpy() for c in cotangents]
    exact = sum(g @ g.T for g in gradients)
    found = []
    for seed in range(seeds):
        f = features(draw(layer, 3, size, seed), x, cotangents).numpy()
        found.append(f @ f.T)
    return np.stack(found), exact


# Both sides random, one of them, none; a rotation in one dimension is a sign.
@pytest.mark.parametrize("sides, size", [((10, 12), 3), ((10, 12), 11), ((10, 12), 64), ((1, 2), 64)])
def test_mean_of_the_kernels_is_exact(sides, size):
    found, exact = sampled_kernels(sides, size, 1500)
    error = found.std(0) / len(found) ** 0.5
    # Six entries at fixed seeds: chance passes 4 standard errors for one in 2600 choices of them. A standard error is
    # at most 3 % of the largest entry.
    assert (abs(found.mean(0) - exact) < 4 * error).all()
    assert error.max() < 0.03 * exact.max()


def test_error_falls_with_the_size():
    # One normal side of q columns has variance of order 1 / q, two have 2 / q + 1 / q^2: from 2 to 8 columns the
    # deviation falls by a factor of about 2.2 for the same direction, and by 4 for different ones.
    def deviation(size: int) -> float:
        found, exact = sampled_kernels((10, 12), size, 400)
        return float(np.square(found - exact).mean() ** 0.5)

    assert deviation(8) < 0.6 * deviation(2)


def test_draws_are_seeded_and_differ_between_directions():
    layer = built(lambda: nn.Linear(12, 10))
    a, b, other = draw(layer, 2, 4), draw(layer, 2, 4), draw(layer, 2, 4, seed=1)
    assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
    assert not torch.equal(a.left, other.left)
    assert not torch.equal(a.left[0], a.left[1]) and not torch.equal(a.right[0], a.right[1])
    assert a.left.shape == (2, 10, 4) and a.right.shape == (2, 12, 4)


def test_to_changes_the_matrices_alone():
    sketch = draw(built(lambda: nn.Linear(12, 10)), 2, None)
    moved = sketch.to(torch.device("cpu"), torch.float32)
    assert moved.left.dtype == moved.right.dtype == torch.float32
    assert moved.layer is sketch.layer and moved.summed is sketch.summed is False and moved.size == sketch.size


def test_global_generator_is_left_alone(global_generators_unchanged):
    draw(built(lambda: nn.Conv2d(3, 4, 3)), 2, 2)
    draw(built(lambda: nn.Conv2d(3, 4, 3)), 2, 64)
