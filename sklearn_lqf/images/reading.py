"""Images in, fixed-order batches of float tensors out.

Hides the many forms in which images are given (stacked arrays, raveled rows, paths, PIL images, lists of
arrays), where their channels are, how their values are scaled, and how they are decoded and resized. Whatever
the form, equal pixels give equal bits, and only the rows of the batch at hand are decoded or converted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from sklearn.utils import assert_all_finite
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

# The mode that PIL converts to, by number of channels.
_PIL_MODES = {1: "L", 3: "RGB"}

# Values looked at together by the check of float arrays: 16 MiB in float32, whatever the size of X.
_CHECK_CHUNK = 2**22


def is_image_input(X: Any, image_shape: Sequence[int] | None = None) -> bool:
    """Tell whether `X` is to be read as images.

    Looks at the number of dimensions and at the first element only; `ImageInputs` finds out whether the
    images are usable.

    Parameters
    ----------
    X : object
        What the user gave as X.
    image_shape : sequence of int, default=None
        The user's `image_shape`; when given, two-dimensional data are raveled images.

    Returns
    -------
    bool
        True for an array of 3 or 4 dimensions, for two-dimensional data when `image_shape` is given, and for
        a list, tuple, Series, one-dimensional array or single column whose first element is a path, a PIL
        image or an array of 2 or 3 dimensions. False for all else (numeric tables, sparse matrices, numbers),
        which is left to scikit-learn's own validation.
    """
    if _image_elements(X) is not None:
        return True
    ndim = _ndim(X)
    return ndim in (3, 4) or (ndim == 2 and image_shape is not None)


class ImageInputs:
    """The rows of X as images, converted batch by batch.

    Parameters
    ----------
    X : array-like, DataFrame or sequence
        One of

        - array of shape (n, H, W), grayscale, or (n, H, W, C), or (n, C, H, W) with ``channel_axis=0``;
        - array or DataFrame of shape (n, H * W * C) with `image_shape`;
        - list, tuple, Series, object array or single column of paths (str or os.PathLike), PIL images or
          arrays of one image each, mixed at will.

        Arrays (CPU tensors too) are uint8 in 0..255, or float16, float32 or float64 in 0..1. X is kept by
        reference; arrays, memory maps and pandas tables are never copied as a whole.
    image_shape : tuple of int, default=None
        Shape of one image: (H, W) or (H, W, C), or (C, H, W) with ``channel_axis=0``. Required for raveled
        rows. Other forms are checked against it: arrays in full, sequences by the height and width of their
        first element.
    image_size : int or tuple of (int, int), default=None
        Height and width of the tensors. Images are resized, keeping their aspect ratio, until they just cover
        this size, and the center is cut out; an int s stands for (s, s). None leaves the images as they are,
        which must then all have the same height and width.
    channel_axis : {-1, 0}, default=-1
        Axis of the channels within one array image: -1 for (H, W, C), 0 for (C, H, W). Never guessed.
    in_channels : int, default=3
        Channels of the tensors, at least 1. Grayscale arrays are repeated; PIL images and files are converted
        to RGB when it is 3 and to grayscale when it is 1, and cannot be used when it is anything else.
    interpolation : {"nearest", "bilinear", "bicubic"}, default="bilinear"
        How images are resized; with antialiasing, except for "nearest".

    Attributes
    ----------
    image_shape : tuple of (int, int, int)
        (H, W, C) of one image as given, before resizing and whatever the `channel_axis`. C is 1 for grayscale
        arrays and `in_channels` for paths and PIL images.
    size : tuple of (int, int)
        (H, W) of the tensors.
    n_features : int
        H * W * C of `image_shape`.

    Raises
    ------
    ValueError
        If an option is not one of the above, or X is empty or an array of wrong shape, channels, dtype or
        values. Elements of a sequence are checked when they are decoded, so for these it is `batch`,
        `image_shape`, `size` and `n_features` that raise, with the index (and the path) in the message.
    FileNotFoundError
        If a file does not exist; raised when it is to be decoded.
    """

    def __init__(
        self,
        X: Any,
        *,
        image_shape: Sequence[int] | None = None,
        image_size: int | Sequence[int] | None = None,
        channel_axis: int = -1,
        in_channels: int = 3,
        interpolation: str = "bilinear",
    ) -> None:
        if not isinstance(channel_axis, int | np.integer) or channel_axis not in (-1, 0):
            raise ValueError(
                f"channel_axis={channel_axis!r} is not supported: it is the axis of the channels within one "
                "image, -1 for (H, W, C) or 0 for (C, H, W)."
            )
        if not _is_positive_int(in_channels):
            raise ValueError(f"in_channels must be a positive int, got {in_channels!r}.")
        if interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'nearest', 'bilinear' or 'bicubic', got {interpolation!r}.")
        self._target = _checked_size(image_size)
        self._in_channels = int(in_channels)
        self._interpolation = InterpolationMode(interpolation)
        shape = _checked_shape(image_shape)
        elements = _image_elements(X)
        self._source: _Stack | _Elements
        if elements is None:
            self._source = _Stack(X, shape, channel_axis, self._in_channels)
        else:
            one_size = self._target is None
            self._source = _Elements(elements, shape, channel_axis, self._in_channels, one_size=one_size)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image as given; decodes the first element of a sequence, once."""
        return self._source.image_shape

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the tensors; without `image_size` that of `image_shape`."""
        return self.image_shape[:2] if self._target is None else self._target

    @property
    def n_features(self) -> int:
        """Number of values in one image as given, H * W * C of `image_shape`."""
        return math.prod(self.image_shape)

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """Convert the images ``start`` to ``stop - 1``; the bounds are those of a Python slice.

        Parameters
        ----------
        start, stop : int
            First image, and the one after the last.

        Returns
        -------
        torch.Tensor of shape (b, in_channels, H, W)
            Values in [0, 1] as float32; contiguous, on the CPU, sharing no memory with X.

        Raises
        ------
        ValueError
            If an element is not a usable image, or differs in size from the first and `image_size` is None.
        FileNotFoundError
            If a file does not exist.
        """
        rows = range(len(self))[start:stop]
        out = np.empty((len(rows), self._in_channels, *self.size), dtype=np.float32)
        for row, pixels in zip(out, self._source.read(rows), strict=True):
            row[...] = self._resized(_unit_floats(pixels).transpose(2, 0, 1))
        return torch.from_numpy(out)

    def _resized(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Resize (C, h, w) to cover `size` and cut out the center: (C or in_channels, H, W)."""
        h, w = values.shape[1:]
        if (h, w) == self.size:
            return values
        # Each image goes through the kernel alone, contiguous and with all its channels. Which kernel torch
        # picks, and with it the last bit, would else depend on the form in which the image was given.
        values = np.array(np.broadcast_to(values, (self._in_channels, h, w)), order="C")
        image = functional.resize(
            torch.from_numpy(values),
            list(_covering_size((h, w), self.size)),
            interpolation=self._interpolation,
            antialias=True,
        )
        image = functional.center_crop(image, list(self.size))
        # Bicubic overshoots at edges, the others by a rounding error at most.
        clamped: npt.NDArray[np.float32] = image.clamp(0.0, 1.0).numpy()
        return clamped


class _Stack:
    """Images of one shape, the rows of one array or table."""

    def __init__(self, X: Any, shape: tuple[int, ...] | None, channel_axis: int, in_channels: int) -> None:
        # A DataFrame is cut into rows before it becomes an array: the conversion of all of it may copy.
        self._table = X if hasattr(X, "iloc") and X.ndim == 2 else _as_array(X, "X")
        self._channel_axis = channel_axis
        self._shape = self._checked_image_shape(shape)  # of one image, as given
        _check_channels(self._shape, channel_axis, in_channels, "X")
        _check_dtype(self._block(0, 1).dtype, "X")
        step = max(1, _CHECK_CHUNK // math.prod(self._shape))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            _check_values(self._block(start, stop), f"X[{start}:{stop}]")

    def __len__(self) -> int:
        return int(self._table.shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return _channels_last(self._shape, self._channel_axis)

    def read(self, rows: range) -> Iterator[np.ndarray]:
        """Yield each image as an array (h, w, C) with checked values."""
        for row in self._block(rows.start, rows.stop):
            yield _as_channels_last(row.reshape(self._shape), self._channel_axis)

    def _block(self, start: int, stop: int) -> np.ndarray:
        """Return the rows `start` to `stop - 1` as an array, shaped as given."""
        if isinstance(self._table, np.ndarray):
            return self._table[start:stop]
        block: np.ndarray = self._table.iloc[start:stop].to_numpy()
        return block

    def _checked_image_shape(self, given: tuple[int, ...] | None) -> tuple[int, ...]:
        """Check the shape of X against `image_shape` and return that of one image as given."""
        shape = tuple(int(length) for length in self._table.shape)
        if shape and shape[0] == 0:
            raise ValueError(f"Found array with 0 sample(s) (shape={shape}) while a minimum of 1 is required.")
        if len(shape) not in (2, 3, 4):
            raise ValueError(
                "Expected images of shape (n, H, W), (n, H, W, C) or (n, n_features), or a sequence of "
                f"paths, PIL images or arrays; got an array with {len(shape)} dimension(s), shape {shape} "
                f"and dtype {self._table.dtype}. Put a single image into a list."
            )
        if 0 in shape:
            raise ValueError(f"Found array with 0 feature(s) (shape={shape}) while a minimum of 1 is required.")
        if len(shape) > 2:
            axis = self._channel_axis
            if given is not None and _channels_last(given, axis) != _channels_last(shape[1:], axis):
                raise ValueError(f"X has images of shape {shape[1:]}, but image_shape={given}.")
            return shape[1:]
        if given is None:
            raise ValueError(
                f"X of shape {shape} holds raveled images: pass image_shape=(H, W) or (H, W, C) to tell what "
                "they look like."
            )
        if math.prod(given) != shape[1]:
            raise ValueError(f"X has {shape[1]} features, but image_shape={given} makes {math.prod(given)}.")
        return given


class _Elements:
    """A sequence of paths, PIL images and arrays, each decoded by its own type when it is read."""

    def __init__(
        self,
        elements: Sequence[Any],
        shape: tuple[int, ...] | None,
        channel_axis: int,
        in_channels: int,
        *,
        one_size: bool,
    ) -> None:
        self._elements = elements
        self._given = shape
        self._channel_axis = channel_axis
        self._in_channels = in_channels
        self._one_size = one_size  # whether all images must have the height and width of the first

    def __len__(self) -> int:
        return len(self._elements)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        h, w, channels = self._decode(0).shape
        given = self._given
        # Not the channels: those of files and PIL images are converted anyway.
        if given is not None and _channels_last(given, self._channel_axis)[:2] != (h, w):
            raise ValueError(f"{self._name(0)} is {h}x{w} (height x width), but image_shape={given}.")
        return h, w, channels

    def read(self, rows: range) -> Iterator[np.ndarray]:
        """Yield each image as an array (h, w, C) with checked values."""
        for index in rows:
            pixels = self._decode(index)
            if self._one_size:
                self._check_size(pixels.shape, index)
            yield pixels

    def _check_size(self, shape: tuple[int, ...], index: int) -> None:
        """Raise unless an image has the height and width of the first."""
        (h, w), (height, width) = shape[:2], self.image_shape[:2]
        if (h, w) != (height, width):
            raise ValueError(
                f"{self._name(index)} is {h}x{w} (height x width) but {self._name(0)} is {height}x{width}: "
                "images of mixed sizes need a common one. Set it, for example image_size=224 (LQFClassifier takes "
                'image_size="backbone", too: the size that the backbone was trained with).'
            )

    def _name(self, index: int) -> str:
        """Name an element in messages, by its index and path."""
        element = self._elements[index]
        return f"X[{index}] ({os.fspath(element)!r})" if _is_path(element) else f"X[{index}]"

    def _decode(self, index: int) -> np.ndarray:
        """Return one element as an array (h, w, C): uint8, or floats in 0..1."""
        element, name = self._elements[index], self._name(index)
        if _is_path(element):
            return self._decode_file(element, name)
        if isinstance(element, Image.Image):
            try:
                return self._decode_pil(element)
            except Exception as error:  # as in _decode_file: an image opened lazily is read only here
                raise ValueError(f"{name} is a PIL image that cannot be read: {error}") from error
        if not _is_image(element):
            raise ValueError(
                f"{name} is not an image: expected a path, a PIL image or an array of shape (H, W) or "
                f"(H, W, C), got {describe(element)}."
            )
        pixels = _as_array(element, name)
        if 0 in pixels.shape:
            raise ValueError(f"{name} is an empty image: its shape is {pixels.shape}.")
        _check_channels(pixels.shape, self._channel_axis, self._in_channels, name)
        _check_dtype(pixels.dtype, name)
        _check_values(pixels, name)
        return _as_channels_last(pixels, self._channel_axis)

    def _decode_file(self, path: Any, name: str) -> np.ndarray:
        """Decode one file, and close it: (h, w, C) uint8."""
        try:
            with Image.open(path) as image:
                return self._decode_pil(image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name} does not exist.") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on broken files
            raise ValueError(f"{name} cannot be read as an image: {error}") from error

    def _decode_pil(self, image: Image.Image) -> np.ndarray:
        """Turn an image upright and convert it to `in_channels` channels: (h, w, C) uint8."""
        if self._in_channels not in _PIL_MODES:
            raise ValueError(
                f"files and PIL images have 1 or 3 channels, not the {self._in_channels} that are needed: pass arrays"
            )
        if image.mode == "F" or image.mode.startswith("I"):
            # PIL would clip the values to 0..255, which turns 16-bit images white.
            raise ValueError(f"mode {image.mode!r} has more than 8 bits a channel: pass an array of floats in 0..1")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colors, without PIL's warning about such palettes
        return np.atleast_3d(np.asarray(image.convert(_PIL_MODES[self._in_channels])))


def _image_elements(X: Any) -> Sequence[Any] | None:
    """Return what a list, 1-D array or single column holds if its first element is one image, else None."""
    elements: Any = None
    if isinstance(X, (list, tuple)):
        elements = X
    elif hasattr(X, "__array__") and not isinstance(X, torch.Tensor):
        shape = getattr(X, "shape", None)
        if shape is None or len(shape) == 1 or tuple(shape[1:]) == (1,):
            array = np.asarray(X)
            if array.ndim == 2:
                array = array[:, 0]
            # Objects, and numpy's strings of fixed and of variable width.
            elements = array if array.ndim == 1 and array.dtype.kind in "OUT" else None
    return elements if elements is not None and len(elements) and _is_image(elements[0]) else None


def _is_image(element: Any) -> bool:
    """Tell whether an element is a path, a PIL image or an array of 2 or 3 dimensions."""
    if _is_path(element) or isinstance(element, Image.Image):
        return True
    return hasattr(element, "__array__") and getattr(element, "ndim", None) in (2, 3)


def _is_path(element: Any) -> bool:
    return isinstance(element, (str, os.PathLike))


def _ndim(X: Any) -> int:
    """Count the dimensions of arrays, tables and nested lists; 0 for all else."""
    if isinstance(X, (list, tuple)):
        return 1 + (_ndim(X[0]) if len(X) else 0)
    if not hasattr(X, "__array__"):  # sparse matrices, strings, PIL images
        return 0
    ndim = getattr(X, "ndim", None)
    return int(np.asarray(X).ndim if ndim is None else ndim)


def _as_array(X: Any, name: str) -> np.ndarray:
    """Return X as an array; without a copy if it is an array, a memory map or a CPU tensor."""
    if isinstance(X, torch.Tensor):
        try:
            return np.asarray(X.detach().numpy())
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} is a tensor of dtype {X.dtype} on device {X.device}: pass a CPU tensor of dtype "
                "uint8, float16, float32 or float64."
            ) from error
    if isinstance(X, (list, tuple)) or hasattr(X, "__array__"):
        return np.asarray(X)
    raise ValueError(
        "Expected images as an array or as a sequence of paths, PIL images or arrays, got "
        f"{describe(X)}. Put a single image into a list."
    )


def _channels_last(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int, int]:
    """Return (H, W, C) for the shape of one image as given; C is 1 when it has no channels."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if channel_axis == 0:
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2]


def _as_channels_last(image: np.ndarray, channel_axis: int) -> np.ndarray:
    """Return a view (H, W, C) of one image as given."""
    if image.ndim == 2:
        return image[:, :, np.newaxis]
    return np.moveaxis(image, 0, -1) if channel_axis == 0 else image


def _unit_floats(pixels: np.ndarray) -> npt.NDArray[np.float32]:
    """Return checked pixels of any dtype and byte order as float32 in 0..1; always a copy."""
    values: npt.NDArray[np.float32] = np.array(pixels, dtype=np.float32)
    if pixels.dtype == np.uint8:
        values /= np.float32(255)
    return values


def _covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size that covers `target` with the aspect ratio of `size`."""
    (h, w), (height, width) = size, target
    # The scale is max(height / h, width / w). In whole numbers, for the longer side to be rounded down as in
    # torchvision's Resize and yet never to fall short of the target.
    if height * w >= width * h:
        return height, height * w // h
    return width * h // w, width


def _check_channels(shape: tuple[int, ...], channel_axis: int, in_channels: int, name: str) -> None:
    """Raise unless one image as given has no channels, 1 or `in_channels`."""
    channels = _channels_last(shape, channel_axis)[2]
    if channels in (1, in_channels):
        return
    other, place = (shape[0], "first") if channel_axis == -1 else (shape[-1], "last")
    if other in (1, 3) and channels not in (1, 3):
        remedy = f"If the channels are the {place} axis of an image, pass channel_axis={-1 - channel_axis}."
    elif channels in (2, 4):
        remedy = f"Drop the alpha channel, or convert the images to grayscale or to {in_channels} channel(s)."
    else:
        remedy = f"Convert the images to grayscale or to {in_channels} channel(s)."
    raise ValueError(
        f"{name} has {channels} channels (shape of one image {shape}, channel_axis={channel_axis}), but "
        f"{in_channels} channel(s) are needed. {remedy}"
    )


def _check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Raise unless the dtype is uint8 or a float of at most 8 bytes, of any byte order."""
    if dtype != np.uint8 and not (dtype.kind == "f" and dtype.itemsize <= 8):
        raise ValueError(
            f"{name} has dtype {dtype}, supported are uint8 (0..255) and float16, float32, float64 (0..1): "
            "cast to uint8 (0..255) or scale floats to 0..1."
        )


def _check_values(values: np.ndarray, name: str) -> None:
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
            "their largest possible value, or cast them to uint8 if they are 0..255."
        )


def _checked_shape(image_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """Check `image_shape` and return it as given."""
    if image_shape is None:
        return None
    shape = _positive_ints(image_shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"image_shape must be 2 or 3 positive ints, (H, W) or with channels, got {image_shape!r}.")
    return shape


def _checked_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Check `image_size` and return it as (H, W)."""
    if image_size is None:
        return None
    size = _positive_ints((image_size, image_size) if isinstance(image_size, Integral) else image_size)
    if len(size) != 2:
        raise ValueError(f"image_size must be a positive int, a pair (H, W) of them, or None, got {image_size!r}.")
    return size[0], size[1]


def _positive_ints(values: Any) -> tuple[int, ...]:
    """Return the positive ints of a sequence; none if it is no sequence of only these."""
    if not isinstance(values, (Sequence, np.ndarray)) or not all(map(_is_positive_int, values)):
        return ()
    return tuple(int(value) for value in values)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def describe(element: Any) -> str:
    """Name the type of an object, with its shape if it has one, or with the type of what a list begins with."""
    shape = getattr(element, "shape", None)
    kind = f"{type(element).__module__}.{type(element).__qualname__}".removeprefix("builtins.")
    if isinstance(element, (list, tuple)):
        return f"{kind} of {describe(element[0])}" if element else f"empty {kind}"
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"
