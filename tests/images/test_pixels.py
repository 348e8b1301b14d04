"""Channels, dtypes, values and shapes of arrays: errors that say what was found and what to do."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.images import whole

from sklearn_lqf.images.reading import ImageInputs

N, H, W = 7, 9, 12


def refused(forms, message, **options):
    """Each of the forms is refused in these words."""
    for X in forms:
        with pytest.raises(ValueError, match=message):
            whole(X, **options)


@pytest.mark.parametrize(("channels", "in_channels"), [(4, 3), (2, 3), (3, 1), (5, 3)])
def test_wrong_channels(rng, channels, in_channels):
    X = rng.integers(0, 256, (N, H, W, channels), dtype=np.uint8)
    message = rf"{channels} channels .*{in_channels} channel\(s\) are needed.*(Convert|convert) the images to grayscale"
    refused([X], f"X has {message}", in_channels=in_channels)
    refused([list(X)], rf"X\[0\] has {message}", in_channels=in_channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_axis_is_suggested_but_not_guessed(rng, color, channels):
    X = rng.integers(0, 256, (N, channels, H, W), dtype=np.uint8)
    forms = [X, list(X), torch.from_numpy(X), list(torch.from_numpy(X))]
    refused(forms, "12 channels .*pass channel_axis=0.*tensors of torch")
    assert whole(X, channel_axis=0).shape == (N, 3, H, W)
    refused([color, list(color)], "9 channels .*pass channel_axis=-1", channel_axis=0)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "bool", "complex64", "longdouble", "object", "str"])
def test_other_dtypes(gray, dtype):
    X = gray.astype(dtype)
    message = r"has dtype .*cast to uint8 \(0\.\.255\) or scale floats to 0\.\.1"
    refused([X, X.reshape(N, -1)], f"X {message}", image_shape=(H, W))
    refused([list(X)], rf"X\[0\] {message}")
    if dtype in ("int64", "int8"):
        frame = pd.DataFrame(X.reshape(N, -1))
        refused([frame, frame.astype(dtype.capitalize())], f"X {message}", image_shape=(H, W))


def test_tensors_that_numpy_cannot_hold(gray):
    for X in (torch.from_numpy(gray).to(torch.bfloat16), torch.zeros(N, H, W, device="meta")):
        refused([X, list(X)], r"X(\[0\])? is a tensor of dtype .*pass a CPU tensor")


RANGE = r"must lie in 0\.\.1, got values from .*"


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "Input X contains NaN.*"), (-np.inf, "infinity.*"), (-0.01, RANGE), (1.01, RANGE), (255.0, RANGE)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_no_pixels(value, message, dtype):
    X = np.zeros((N, H, W), dtype=dtype)
    X[5, 3, 2] = value
    remedy = "divide them.*cast them to uint8.*normalized" if "must" in message else ""
    rows = X.reshape(N, -1)
    refused([X, torch.from_numpy(X), rows, pd.DataFrame(rows)], rf"{message}X.*{remedy}", image_shape=(H, W))
    inputs = ImageInputs(list(X))
    inputs.batch(0, 5)
    with pytest.raises(ValueError, match=rf"{message}X\[5\].*{remedy}"):
        inputs.batch(5, 6)


@pytest.mark.parametrize("row", [0, 63, 64, 129])
def test_every_row_of_a_large_array_is_checked(row):
    X = np.zeros((130, 256, 256), dtype=np.float16)  # 64 of them are looked at together
    X[row, -1, -1] = 2
    refused([X], rf"in X\[{row // 64 * 64}:{min(row // 64 * 64 + 64, 130)}\]")


def test_shapes_that_contradict_image_shape(color, gray):
    refused([color], r"images of shape \(9, 12, 3\), but image_shape=\(12, 9, 3\)", image_shape=(W, H, 3))
    rows = gray.reshape(N, -1)
    refused([rows, pd.DataFrame(rows)], r"108 features, but image_shape=\(9, 11\) makes 99", image_shape=(9, 11))
    refused([rows], "pass image_shape=")
    refused([np.empty((3, 0, 8))], r"Found array with 0 feature\(s\)")
    refused([[np.zeros((8, 8)), np.zeros((0, 8))]], r"X\[1\] is an empty image")
    for shape in ((), (4,), (2, 3, 4, 5, 3)):
        refused([np.zeros(shape)], rf"got an array with {len(shape)} dimension\(s\)")
