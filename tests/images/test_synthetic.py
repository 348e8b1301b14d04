"""Reference images: their range, shape and spectrum, and that they are the same everywhere."""

import itertools

import numpy as np
import pytest
import torch

from sklearn_lqf.images.synthetic import reference_images


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 32), (40, 7), (1, 1), (1, 16)])
def test_shape_range_and_order(channels, size, global_generators_unchanged):
    images = reference_images(3, channels, *size)
    assert images.shape == (3, channels, *size) and images.dtype == torch.float64
    assert bool(torch.isfinite(images).all()) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images[:2], reference_images(2, channels, *size))  # not moved by those that follow


def test_images_and_channels_differ_as_in_photographs():
    images = reference_images(32, 3, 64, 64)
    assert len(torch.unique(images.flatten(1), dim=0)) == 32
    assert float(images.std((2, 3)).min()) > 0.01  # no channel of an image is flat
    gray = images.mean(1)
    assert float(gray.mean((1, 2)).std()) > 0.05  # dark ones and bright ones
    for a, b in itertools.combinations(reference_images(32, 3, 32, 32).transpose(0, 1).flatten(1).numpy(), 2):
        assert 0.1 < np.corrcoef(a, b)[0, 1] < 0.99  # colors
    power = (abs(np.fft.fft2(gray - gray.mean((1, 2), keepdims=True))) ** 2).mean(0)
    radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    bands = np.geomspace(1 / 32, 0.5, 8)
    means = [power[(radius >= a) & (radius < b)].mean() for a, b in itertools.pairwise(bands)]
    slope = np.polyfit(np.log(np.sqrt(bands[:-1] * bands[1:])), np.log(means), 1)[0]
    assert -3.5 < slope < -1.5  # photographs: about -2 (Field 1987)
