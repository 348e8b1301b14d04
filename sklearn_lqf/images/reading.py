"""Images in, fixed-order batches of float tensors out.

Hides how values are scaled, images resized, and read ahead by several threads. Whatever the form in which they are
given, equal pixels give equal bits, and only the rows of the batch at hand, and of the next, are decoded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from joblib import effective_n_jobs
from threadpoolctl import threadpool_limits
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from .containers import Elements, Stack
from .decoding import Remark, UnreadableError
from .pixels import checked_shape, checked_size, is_positive_int, unit_floats
from .sources import image_elements, is_image_input

__all__ = ["ImageInputs", "is_image_input"]

Values = npt.NDArray[np.float32]


class ImageInputs:
    """The rows of X as images, converted batch by batch.

    Parameters
    ----------
    X : array-like, DataFrame or sequence
        One of

        - array of shape (n, H, W), grayscale, or (n, H, W, C), or (n, C, H, W) with ``channel_axis=0``;
        - array or DataFrame of shape (n, H * W * C) with `image_shape`;
        - list, tuple, Series, object array or single column of paths (str or os.PathLike), PIL images, arrays of one
          image each, bytes of encoded images, binary files, or dicts with an entry "image" or "bytes", mixed at will;
        - map-style data set, such as those of torchvision and of Hugging Face, of such images or of pairs that begin
          with one.

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
    n_jobs : int or None, default=None
        Threads that decode and resize the images of a sequence; they read the next batch while the caller works on
        this one. None is 1, which reads in the caller's thread, unless in a ``joblib.parallel_config``; -1 is one
        for each processor. The tensors do not depend on it. The items of a data set are taken in the caller's thread.

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
        If an option is not one of the above, or X is empty, an array of wrong shape, channels, dtype or values, or
        a sequence of which an element is of no kind that holds an image. The content of elements is checked when
        they are decoded, so for these it is `batch`, `image_shape`, `size` and `n_features` that raise, with the
        index (and the path) in the message; up to ten broken elements are named together.
    FileNotFoundError
        If a file does not exist; raised when it is to be decoded.

    Warns
    -----
    UserWarning
        If the orientation of an image is in doubt; once for each `ImageInputs`.
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
        n_jobs: int | None = None,
    ) -> None:
        if not isinstance(channel_axis, int | np.integer) or channel_axis not in (-1, 0):
            raise ValueError(
                f"channel_axis={channel_axis!r} is not supported: it is the axis of the channels within one "
                "image, -1 for (H, W, C) or 0 for (C, H, W)."
            )
        if not is_positive_int(in_channels):
            raise ValueError(f"in_channels must be a positive int, got {in_channels!r}.")
        if interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'nearest', 'bilinear' or 'bicubic', got {interpolation!r}.")
        self._target = checked_size(image_size)
        self._in_channels = int(in_channels)
        self._interpolation = InterpolationMode(interpolation)
        self._remarked: set[Remark] = set()
        self.n_jobs = checked_n_jobs(n_jobs)
        shape = checked_shape(image_shape)
        is_image_input(X, shape)  # refuses what is neither images nor a table
        elements = image_elements(X)
        self._source: Stack | Elements
        if elements is None:
            self._source = Stack(X, shape, channel_axis, self._in_channels)
        else:
            one_size = self._target is None
            self._source = Elements(elements, shape, channel_axis, self._in_channels, one_size=one_size)
        self._pool: ThreadPoolExecutor | None = None
        if self.n_jobs > 1 and self._source.parallel:
            self._pool = ThreadPoolExecutor(self.n_jobs, "sklearn_lqf-reading", _one_thread_of_torch)
        self._next: _Batch | None = None  # read ahead
        self._end = 0  # of the batch before

    def __len__(self) -> int:
        return len(self._source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image as given; decodes the first element of a sequence, once."""
        try:
            return self._source.image_shape
        except (UnreadableError, FileNotFoundError) as error:
            raise self._with_others(error) from error.__cause__

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
        size = self.size
        try:
            batch = self._ahead(rows) or self._begun(rows, size)
            self._read_ahead(rows, size)
            remarks = batch.finished()
        except (UnreadableError, FileNotFoundError) as error:
            raise self._with_others(error) from error.__cause__
        self._warn(rows, remarks)
        return torch.from_numpy(batch.values)

    # ------------------------------------------------------------------------------------------ reading ahead

    def _begun(self, rows: range, size: tuple[int, int]) -> _Batch:
        """Begin to read some rows; without threads, read them."""
        values = np.empty((len(rows), self._in_channels, *size), dtype=np.float32)
        batch = _Batch(rows, values)
        for place, (index, held) in enumerate(self._source.load(rows)):
            if self._pool is None:
                batch.read.append(self._convert(values[place], index, held))
            else:
                batch.read.append(self._pool.submit(self._convert, values[place], index, held))
        return batch

    def _ahead(self, rows: range) -> _Batch | None:
        """The batch that was read ahead, if it has these rows."""
        batch, self._next = self._next, None
        if batch is None or batch.rows == rows:
            return batch
        batch.cancel()
        return None

    def _read_ahead(self, rows: range, size: tuple[int, int]) -> None:
        """Begin the batch after this one, where batches follow one another."""
        follows = rows.start in (0, self._end)
        self._end = rows.stop
        after = range(rows.stop, min(rows.stop + len(rows), len(self)))
        if self._pool is None or len(rows) < 2 or not follows or not after:
            return
        try:
            self._next = self._begun(after, size)
        except (ValueError, FileNotFoundError):
            self._next = None  # raised again when it is asked for

    def _with_others(self, error: Exception) -> Exception:
        return self._source.all_broken(error) if isinstance(self._source, Elements) else error

    # --------------------------------------------------------------------------------------------- one image

    def _convert(self, out: Values, index: int, held: Any) -> Remark | None:
        """Write one image as floats (in_channels, H, W)."""
        pixels, remark = self._source.decode(index, held)
        out[...] = self._resized(unit_floats(pixels).transpose(2, 0, 1))
        return remark

    def _resized(self, values: Values) -> Values:
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
        clamped: Values = image.clamp(0.0, 1.0).numpy()
        return clamped

    def _warn(self, rows: range, remarks: list[Remark | None]) -> None:
        """Warn of what was remarked of images; once of each kind."""
        for kind in Remark:
            indices = [i for i, remark in zip(rows, remarks, strict=True) if remark is kind]
            if indices and kind not in self._remarked:
                self._remarked.add(kind)
                name = self._source.name(indices[0])
                warnings.warn(f"{kind.value.format(name)}{_others(indices[1:])}", UserWarning, stacklevel=3)


class _Batch:
    """Rows that are being read."""

    def __init__(self, rows: range, values: Values):
        self.rows, self.values = rows, values
        self.read: list[Remark | Future[Remark | None] | None] = []

    def finished(self) -> list[Remark | None]:
        """Wait for all rows; raises the error of the first that has one, as reading them in turn does."""
        try:
            return [r.result() if isinstance(r, Future) else r for r in self.read]
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Do not read what was not begun."""
        for read in self.read:
            if isinstance(read, Future):
                read.cancel()


def checked_n_jobs(n_jobs: Any) -> int:
    """`n_jobs` as a number of threads; raises unless it is None or an int other than 0."""
    if n_jobs is not None and (not isinstance(n_jobs, int | np.integer) or isinstance(n_jobs, bool) or n_jobs == 0):
        raise ValueError(f"n_jobs must be None or an int other than 0 (-1: all processors), got {n_jobs!r}.")
    return int(effective_n_jobs(n_jobs))


def _one_thread_of_torch() -> None:
    """Keep torch to one thread within a thread that reads; the settings of other threads remain."""
    torch.get_num_threads()  # torch sets the number for a thread when it is first asked
    threadpool_limits(1, user_api="openmp")


def _others(indices: list[int]) -> str:
    return f" So are {', '.join(f'X[{i}]' for i in indices[:9])}{' and more' * (len(indices) > 9)}." if indices else ""


def _covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size that covers `target` with the aspect ratio of `size`."""
    (h, w), (height, width) = size, target
    # The scale is max(height / h, width / w). In whole numbers, for the longer side to be rounded down as in
    # torchvision's Resize and yet never to fall short of the target.
    if height * w >= width * h:
        return height, height * w // h
    return width * h // w, width
