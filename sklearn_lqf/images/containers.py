"""The rows of X as images: those of one array or table, and those of a sequence, one by one.

Hides where the pixels of a row lie, and which of them may be read by several threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .decoding import Remark, UnreadableError, as_array, decode, describe, element_name, is_image, load
from .pixels import as_channels_last, channels_last, check_channels, check_dtype, check_values
from .sources import is_dataset, plain_frame, what_to_give

__all__ = ["Elements", "Stack"]

_CHECK_CHUNK = 2**22  # values looked at together by the check of float arrays: 16 MiB in float32
_NAMED = 10  # elements that one error names
_READ_TWICE = 8  # elements of a data set that are compared: one flipped at random in half of the cases passes 1 in 256


class Stack:
    """Images of one shape, the rows of one array or table."""

    parallel = False  # nothing is decoded

    def __init__(self, X: Any, shape: tuple[int, ...] | None, channel_axis: int, in_channels: int):
        # A DataFrame is cut into rows before it becomes an array: the conversion of all of it may copy.
        X = plain_frame(X)
        self._table = X if hasattr(X, "iloc") and X.ndim == 2 else self._checked_array(X)
        self._channel_axis = channel_axis
        self._shape = self._checked_image_shape(shape)  # of one image, as given
        check_channels(self._shape, channel_axis, in_channels, "X")
        check_dtype(self._block(0, 1).dtype, "X")
        step = max(1, _CHECK_CHUNK // math.prod(self._shape))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            check_values(self._block(start, stop), f"X[{start}:{stop}]")

    def __len__(self) -> int:
        return int(self._table.shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return channels_last(self._shape, self._channel_axis)

    def load(self, rows: range) -> Iterator[tuple[int, Any]]:
        """The number and the values of each row."""
        yield from zip(rows, self._block(rows.start, rows.stop), strict=True)

    def decode(self, index: int, row: np.ndarray) -> tuple[np.ndarray, Remark | None]:
        """One image as an array (h, w, C) with checked values."""
        return as_channels_last(row.reshape(self._shape), self._channel_axis), None

    def name(self, index: int) -> str:
        """A row in messages."""
        return f"X[{index}]"

    def _block(self, start: int, stop: int) -> np.ndarray:
        """The rows `start` to `stop - 1` as an array, shaped as given."""
        if isinstance(self._table, np.ndarray):
            return self._table[start:stop]
        block: np.ndarray = self._table.iloc[start:stop].to_numpy()
        return block

    @staticmethod
    def _checked_array(X: Any) -> np.ndarray:
        if isinstance(X, (list, tuple)) or hasattr(X, "__array__"):
            return as_array(X, "X")
        raise ValueError(
            "Expected images as an array or as a sequence of paths, PIL images or arrays, got "
            f"{describe(X)}. Put a single image into a list."
        )

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
            if given is not None and channels_last(given, axis) != channels_last(shape[1:], axis):
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


class Elements:
    """A sequence of paths, PIL images, arrays and the like, or a data set; each is decoded by its own type."""

    def __init__(
        self,
        elements: Sequence[Any],
        shape: tuple[int, ...] | None,
        channel_axis: int,
        in_channels: int,
        *,
        one_size: bool,
    ):
        self._elements = elements
        self._given = shape
        self._channels = (channel_axis, in_channels)
        self._one_size = one_size  # whether all images must have the height and width of the first
        self._is_dataset = is_dataset(elements)
        self._compared = not self._is_dataset
        # The items of a data set are made by its own code, which may not be meant for several threads.
        self.parallel = not self._is_dataset
        self._sound = np.zeros(len(elements), dtype=bool)  # those that were decoded
        if not self._is_dataset:
            bad = [i for i, element in enumerate(elements) if not is_image(element)]
            if bad:
                raise ValueError(_listed([self._no_image(i, elements[i]) for i in bad[:_NAMED]], str(len(bad))))

    def __len__(self) -> int:
        return len(self._elements)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the first image; decodes it."""
        ((index, held),) = self.load(range(1))
        h, w, channels = decode(held, self.name(index), *self._channels)[0].shape
        given = self._given
        # Not the channels: those of files and PIL images are converted anyway.
        if given is not None and channels_last(given, self._channels[0])[:2] != (h, w):
            raise ValueError(f"{self.name(0)} is {h}x{w} (height x width), but image_shape={given}.")
        return h, w, channels

    def load(self, rows: range) -> Iterator[tuple[int, Any]]:
        """The number of each row, and what `decode` takes; only one thread may be in it."""
        if not self._compared:
            self._compared = True
            self._compare()
        for index in rows:
            yield index, load(self._element(index), self.name(index))

    def decode(self, index: int, held: Any) -> tuple[np.ndarray, Remark | None]:
        """One image as an array (h, w, C) with checked values; any thread may be in it."""
        pixels, remark = decode(held, self.name(index), *self._channels)
        if self._one_size:
            self._check_size(pixels.shape, index)
        self._sound[index] = True
        return pixels, remark

    def all_broken(self, first: Exception) -> Exception:
        """The error of one broken element, with those of others that have not been read yet, up to ten."""
        errors = {str(first): first}
        for index in np.flatnonzero(~self._sound).tolist():
            if len(errors) == _NAMED:
                break
            try:
                for i, held in self.load(range(index, index + 1)):
                    decode(held, self.name(i), *self._channels)
            except (UnreadableError, FileNotFoundError) as error:
                errors[str(error)] = error
            except ValueError:
                continue  # sound, but not what is needed
        if len(errors) == 1:
            return first
        kind = FileNotFoundError if all(isinstance(e, FileNotFoundError) for e in errors.values()) else ValueError
        return kind(_listed(list(errors), f"At least {_NAMED}" if len(errors) == _NAMED else str(len(errors))))

    def _element(self, index: int) -> Any:
        """One element; of a pair in a data set, the image."""
        if not self._is_dataset:
            return self._elements[index]
        try:
            element = self._elements[index]
        except Exception as error:  # the user's code, which reads files
            raise UnreadableError(
                f"X[{index}] cannot be taken from the data set ({describe(self._elements)}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(element, (list, tuple)) and element:
            element = element[0]
        if not is_image(element):
            raise ValueError(self._no_image(index, element))
        return element

    def _compare(self) -> None:
        """Raise if elements of a data set are others when they are read again."""
        for index in range(min(_READ_TWICE, len(self))):
            name = self.name(index)
            one, other = (decode(load(self._element(index), name), name, *self._channels)[0] for _ in range(2))
            if not np.array_equal(one, other):
                raise ValueError(
                    f"X[{index}] is another image each time it is read: the data set ({describe(self._elements)}) "
                    "changes its images at random. Take random transforms off; views=('identity', 'flip') averages "
                    "over mirrored images."
                )

    def _check_size(self, shape: tuple[int, ...], index: int) -> None:
        """Raise unless an image has the height and width of the first."""
        (h, w), (height, width) = shape[:2], self.image_shape[:2]
        if (h, w) != (height, width):
            raise ValueError(
                f"{self.name(index)} is {h}x{w} (height x width) but {self.name(0)} is {height}x{width}: "
                "images of mixed sizes need a common one. Set it, for example image_size=224 (LQFClassifier takes "
                'image_size="backbone", too: the size that the backbone was trained with).'
            )

    def name(self, index: int) -> str:
        """An element in messages."""
        return f"X[{index}]" if self._is_dataset else element_name(index, self._elements[index])

    def _no_image(self, index: int, element: Any) -> str:
        return (
            f"X[{index}] is not an image: expected a path, a PIL image or an array of shape (H, W) or (H, W, C), "
            f"got {describe(element)}.{what_to_give(element)}"
        )


def _listed(messages: list[str], count: str) -> str:
    """The messages of some elements as one."""
    return messages[0] if len(messages) == 1 else "\n".join([f"{count} elements of X cannot be used:", *messages])
