"""Preprocessing: what it does to pixels, and which values it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.networks import IMAGENET, uniform

from sklearn_lqf.backbones.preprocessing import Preprocessing


def test_normalize_standardizes_each_channel_and_keeps_the_images():
    preprocessing = Preprocessing(None, (0.1, 0.2), (0.5, 0.25))
    images = uniform(3, 2, 4, 5).double()
    before = images.clone()
    expected = np.stack([(before[:, 0] - 0.1) / 0.5, (before[:, 1] - 0.2) / 0.25], axis=1)
    np.testing.assert_allclose(preprocessing.normalize(images), expected, rtol=1e-15)
    assert torch.equal(images, before)
    assert preprocessing.normalize(images.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"size": 64}, {"size": (64, 64)}),
        ({"size": [48, np.int64(64)]}, {"size": (48, 64)}),
        ({"size": None}, {"size": None}),
        ({"mean": 0, "std": np.ones(3)}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"interpolation": "nearest"}, {"interpolation": "nearest"}),
    ],
)
def test_override_replaces_what_is_given(overrides, expected):
    assert IMAGENET.override(overrides) == replace(IMAGENET, **expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"means": 0.5}, r"unknown keys \['means'\]; allowed are \['size', 'mean', 'std', 'interpolation'\]"),
        ({"mean": (0.5, 0.5)}, r"\['mean'\] must be one number or 3.* got \(0.5, 0.5\)"),
        ({"mean": "dark"}, r"\['mean'\] .* got 'dark'"),
        ({"mean": (0.0, 0.0, np.nan)}, r"\['mean'\] .* finite"),
        ({"std": (1.0, 1.0, 0.0)}, r"\['std'\] .* finite and positive; got \(1.0, 1.0, 0.0\)"),
        ({"std": -1}, r"\['std'\] .* positive"),
        ({"size": 0}, r"\['size'\] must be a positive int, a pair .* got 0"),
        ({"size": (3, 64, 64)}, r"\['size'\] .* got \(3, 64, 64\)"),
        ({"size": 64.5}, r"\['size'\] .* got 64.5"),
        ({"interpolation": "lanczos"}, r"one of \['nearest', 'bilinear', 'bicubic'\], got 'lanczos'"),
        ("bilinear", r"None or a dict with any of the keys .* got str"),
    ],
)
def test_override_refuses_unusable_values(overrides, message):
    with pytest.raises(TypeError if isinstance(overrides, str) else ValueError, match=message):
        IMAGENET.override(overrides)
