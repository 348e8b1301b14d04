"""Kronecker sketches of layers: exact gradients, and inner products whose mean is the exact kernel."""

import pytest
import torch
from support.networks import built
from support.splits import rand
from torch import nn

from sklearn_lqf.engine.sketch import LayerSketch, draw_sketch, sketch_size

ROWS = 3
# Layer, and shape of its input; the input of windows has several rows for each image, one image after the other.
LAYERS = {
    "vectors": (lambda: nn.Linear(5, 4), (ROWS, 5)),
    "channels last": (lambda: nn.Linear(5, 4), (ROWS, 2, 3, 5)),
    "windows": (lambda: nn.Linear(5, 4, bias=False), (4 * ROWS, 6, 5)),
    "1x1": (lambda: nn.Conv2d(5, 4, 1), (ROWS, 5, 3, 4)),
    "dilated": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (ROWS, 2, 6, 7)),
    "same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same"), (ROWS, 2, 5, 6)),
    "reflected": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect"), (ROWS, 2, 5, 6)),
    "windows of images": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2 * ROWS, 2, 5, 4)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (ROWS, 6, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2), dilation=(2, 1), groups=4), (ROWS, 4, 7, 6)),
    "two for each channel": (lambda: nn.Conv2d(3, 6, 3, padding="same", groups=3), (ROWS, 3, 4, 5)),
    "windows in groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2 * ROWS, 4, 4, 5)),
}


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
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_sketches_are_projections_of_the_gradients(name, size):
    """Their sum over directions; without a size the gradients themselves, which stand side by side."""
    make, shape = LAYERS[name]
    layer, x = built(make).double(), rand(*shape)
    sketch = draw(layer, 2, size)
    cotangents = [rand(*layer(x).shape, seed=k + 1) for k in range(2)]
    sides = zip(cotangents, sketch.left, sketch.right, strict=True)
    expected = [(left.T @ image_gradients(layer, x, c) @ right).flatten(1) for c, left, right in sides]
    joined = torch.cat(expected, 1) if size is None else sum(expected)
    assert sketch.size == joined.shape[1]
    assert sketch_size(layer) == (layer.weight.shape[0], layer.weight[0].numel())
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + (x.ndim == 4)]:
        found = features(sketch, x.contiguous(memory_format=memory_format), cotangents)
        torch.testing.assert_close(found, joined, rtol=1e-10, atol=1e-10)


# Sides of the weight, columns, and how large a standard error of the mean may be of the largest entry: both sides are
# random, one of them, none; a rotation in one dimension is a sign. More columns have smaller errors.
@pytest.mark.parametrize(
    ("sides", "size", "bound"), [((10, 12), 3, 0.035), ((10, 12), 11, 0.012), ((10, 12), 64, 0.006), ((1, 2), 64, 0.04)]
)
def test_mean_of_the_kernels_is_exact(sides, size, bound):
    o, m = sides
    layer, x = built(lambda: nn.Linear(m, o)).double(), rand(ROWS, 4, m)
    # Gradients that nearly agree: products of those of two directions, which are no part of the kernel, must cancel.
    common = rand(ROWS, 4, o, seed=9)
    cotangents = [common + 0.3 * rand(ROWS, 4, o, seed=k) for k in range(3)]
    gradients = [image_gradients(layer, x, c).flatten(1) for c in cotangents]
    exact = sum(g @ g.T for g in gradients)
    sketched = [features(draw(layer, 3, size, seed), x, cotangents) for seed in range(700)]
    found = torch.stack([f @ f.T for f in sketched])
    error = found.std(0) / len(found) ** 0.5
    # Six entries at fixed seeds: chance passes 4 standard errors for one in 2600 choices of them.
    assert bool((abs(found.mean(0) - exact) < 4 * error).all())
    assert float(error.max()) < bound * float(exact.max())


def test_draws_are_seeded_differ_between_directions_and_are_moved(global_generators_unchanged):
    layer = built(lambda: nn.Linear(12, 10))
    a, b, other = draw(layer, 2, 4), draw(layer, 2, 4), draw(layer, 2, 4, seed=1)
    assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
    assert not torch.equal(a.left, other.left)
    assert not torch.equal(a.left[0], a.left[1]) and not torch.equal(a.right[0], a.right[1])
    assert a.left.shape == (2, 10, 4) and a.right.shape == (2, 12, 4)
    moved = draw(layer, 2, None).to(torch.device("cpu"), torch.float32)
    assert moved.left.dtype == moved.right.dtype == torch.float32
    assert moved.layer is layer and not moved.summed
