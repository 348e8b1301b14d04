"""Pixels of one image as an array: where its channels are, which dtypes, values and sizes are taken.

Hides what is checked of arrays, and how they become floats in 0..1 with the channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils import assert_all_finite

__all__ = [
    "as_channels_last", "channels_last", "check_channels", "check_dtype", "check_values", "checked_shape",
    "checked_size", "is_positive_int", "unit_floats",
]  # fmt: skip


def channels_last(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int, int]:
    """(H, W, C) for the shape of one image as given; C is 1 when it has no channels."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if channel_axis == 0:
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2]


def as_channels_last(image: np.ndarray, channel_axis: int) -> np.ndarray:
    """A view (H, W, C) of one image as given."""
    if image.ndim == 2:
        return image[:, :, np.newaxis]
    return np.moveaxis(image, 0, -1) if channel_axis == 0 else image


def unit_floats(pixels: np.ndarray) -> npt.NDArray[np.float32]:
    """Checked pixels of any dtype and byte order as float32 in 0..1; always a copy."""
    values: npt.NDArray[np.float32] = np.array(pixels, dtype=np.float32)
    if pixels.dtype == np.uint8:
        values /= np.float32(255)
    return values


def check_channels(shape: tuple[int, ...], channel_axis: int, in_channels: int, name: str) -> None:
    """Raise unless one image as given has no channels, 1 or `in_channels`."""
    channels = channels_last(shape, channel_axis)[2]
    if channels in (1, in_channels):
        return
    other, place = (shape[0], "first") if channel_axis == -1 else (shape[-1], "last")
    if other in (1, 3) and channels not in (1, 3):
        remedy = f"If the channels are the {place} axis of an image, pass channel_axis={-1 - channel_axis}."
        if channel_axis == -1:
            remedy += " They are in tensors of torch."
    elif channels in (2, 4):
        remedy = f"Drop the alpha channel, or convert the images to grayscale or to {in_channels} channel(s)."
    else:
        remedy = f"Convert the images to grayscale or to {in_channels} channel(s)."
    raise ValueError(
        f"{name} has {channels} channels (shape of one image {shape}, channel_axis={channel_axis}), but "
        f"{in_channels} channel(s) are needed. {remedy}"
    )


def check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Raise unless the dtype is uint8 or a float of at most 8 bytes, of any byte order."""
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise ValueError(
            f"{name} has dtype {dtype}, supported are uint8 (0..255) and float16, float32, float64 (0..1): "
            "cast to uint8 (0..255) or scale floats to 0..1."
        )


def check_values(values: np.ndarray, name: str) -> None:
    """Raise unless floats are finite and in 0..1."""
    if values.dtype == np.uint8:
        return
    try:
        assert_all_finite(values, input_name="X")
    except ValueError as error:
        raise ValueError(f"{error} Found in {name}.") from None
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"Float images must lie in 0..1, got values from {low:g} to {high:g} in {name}: divide them by "
            "their largest possible value, or cast them to uint8 if they are 0..255. If they are normalized by "
            "mean and deviation, leave that out: the backbone's own is applied."
        )


def checked_shape(image_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """`image_shape` as given, (H, W) or with channels; raises for anything else."""
    if image_shape is None:
        return None
    shape = _positive_ints(image_shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"image_shape must be 2 or 3 positive ints, (H, W) or with channels, got {image_shape!r}.")
    return shape


def checked_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """`image_size` as (H, W); raises for anything else."""
    if image_size is None:
        return None
    size = _positive_ints((image_size, image_size) if isinstance(image_size, Integral) else image_size)
    if len(size) != 2:
        raise ValueError(f"image_size must be a positive int, a pair (H, W) of them, or None, got {image_size!r}.")
    return size[0], size[1]


def _positive_ints(values: Any) -> tuple[int, ...]:
    """The positive ints of a sequence; none if it is no sequence of only these."""
    if not isinstance(values, (Sequence, np.ndarray)) or not all(map(is_positive_int, values)):
        return ()
    return tuple(int(value) for value in values)


def is_positive_int(value: Any) -> bool:
    """Whether a value is an int above 0, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0
