"""Small images for the tests of how images are read."""

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def color(rng):
    """Color images, (7, 9, 12, 3) uint8."""
    return rng.integers(0, 256, (7, 9, 12, 3), dtype=np.uint8)


@pytest.fixture
def gray(rng):
    """Grayscale images, (7, 9, 12) uint8."""
    return rng.integers(0, 256, (7, 9, 12), dtype=np.uint8)
