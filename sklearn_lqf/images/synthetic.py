"""Images that no data set holds, by which a network is asked in which directions its features vary.

Hides how they are drawn: overlapping leaves of one color and a size that follows a power law, under a texture whose
spectrum falls with the frequency, as in photographs. They depend on their size and number alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["reference_images"]

_LEAVES = (3, 60)  # in an image
_EXPONENTS = (0.8, 1.6)  # of the amplitude spectrum 1 / f^a; about 1 in photographs
_CONTRASTS = (0.05, 0.25)  # standard deviation of the texture
# Rows: luminance and the two opponent colors, in whose order the contrast of photographs falls.
_COLORS = np.array([[0.6, 0.6, 0.5], [0.7, 0.0, -0.7], [0.3, -0.8, 0.5]]) * np.array([[1.0], [0.3], [0.2]])


def reference_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Dead leaves with a texture.

    Parameters
    ----------
    count : int
    channels : int
        One is the first of three colors; channels of any other number are alike, and share the edges of the leaves.
    height, width : int

    Returns
    -------
    Tensor of shape (count, channels, height, width)
        float64 in [0, 1].

    References
    ----------
    Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001 (leaves and their sizes); Field, "Relations
    between the statistics of natural images and the response properties of cortical cells", JOSA A 1987 (spectrum).
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1.0
    return torch.from_numpy(np.stack([_image(rng, channels, frequency) for _ in range(count)]))


def _image(rng: np.random.Generator, channels: int, frequency: np.ndarray) -> np.ndarray:
    """One image, (channels, height, width)."""
    height, width = frequency.shape
    y, x = np.ogrid[:height, :width]
    colors = max(channels, 3)
    image = np.broadcast_to(rng.uniform(0.2, 0.8, (colors, 1, 1)), (colors, height, width)).copy()
    for _ in range(rng.integers(*_LEAVES)):
        radius = min(0.05 * rng.pareto(1.5) + 0.02, 0.5) * max(height, width)
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        flat = rng.uniform(0.3, 1.0)  # height of a box over its width
        if rng.random() < 0.6:
            inside = (x - column) ** 2 + (y - row) ** 2 < radius**2
        else:
            inside = (abs(x - column) < radius) & (abs(y - row) < radius * flat)
        image[:, inside] = rng.uniform(0, 1, (colors, 1))
    image += rng.uniform(*_CONTRASTS) * _texture(rng, colors, frequency)
    return np.clip(image[:channels], 0, 1)


def _texture(rng: np.random.Generator, colors: int, frequency: np.ndarray) -> np.ndarray:
    """Noise of variance 1 whose spectrum falls, (colors, height, width)."""
    white = rng.standard_normal((colors, *frequency.shape))
    found = np.fft.ifft2(np.fft.fft2(white) / frequency ** rng.uniform(*_EXPONENTS)).real
    if colors == 3:
        found = np.einsum("kc,khw->chw", _COLORS, found)
    return (found - found.mean()) / max(float(found.std()), np.finfo(np.float64).tiny)
