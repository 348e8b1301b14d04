"""Images as one array: the step of a pipeline that reads them, so that they are decoded once.

Hides how images of any form become pixels of 8 bits of one size, and how they are told from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted, validate_data

from ..images.decoding import describe
from ..images.reading import ImageInputs
from ..images.sources import is_image_input, plain_frame

__all__ = ["ImageReader"]

_AHEAD = 4  # images of a batch for each thread


class ImageReader(TransformerMixin, BaseEstimator):
    """Read paths, PIL images or arrays into one array of images of 8 bits and of one size.

    Put before an estimator in a pipeline, it decodes each file once for a fit; what is behind it, such as a grid
    search, works on pixels. `raveled` images are rows for tools that take two-dimensional data only.

    Parameters
    ----------
    image_size : int or tuple of (int, int), default=None
        Height and width of the result. Images are resized, keeping their aspect ratio, until they just cover this
        size, and the center is cut out; an int s stands for (s, s). None: images are taken as they are, and must be
        of one size.
    raveled : bool, default=False
        Whether each image becomes one row of numbers.
    channels : int, default=3
        Channels of the result. Grayscale arrays are repeated; files and PIL images are converted to RGB when it is 3,
        to grayscale when it is 1, and cannot be read when it is anything else.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of the images of which the rows of a two-dimensional X are raveled. None: such rows
        are not images.
    channel_axis : {-1, 0}, default=-1
        Axis of the channels within one image of X. That of the result is always the last.
    interpolation : {"nearest", "bilinear", "bicubic"}, default="bilinear"
        How images are resized; with antialiasing, except for ``"nearest"``.
    n_jobs : int or None, default=None
        Threads that decode and resize images. None is 1 unless in a ``joblib.parallel_config``, -1 is one for each
        processor. The result does not depend on it.

    Attributes
    ----------
    output_shape_ : tuple of (int, int, int)
        (H, W, C) of each image of the result.
    n_features_in_ : int
        Columns of X; defined only when its rows are raveled images.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of a DataFrame of raveled images; defined only when they are all strings.

    See Also
    --------
    LQFClassifier : Reads the same forms of X by itself, batch by batch.
    sklearn.feature_extraction.image.PatchExtractor : Cuts patches from an array of images.

    Notes
    -----
    The result depends on the images of the call alone: `transform` needs no `fit`. All of it is held in memory,
    H * W * C bytes for each image. Pixels of X in 8 bits that are not resized are kept bit by bit; all others are
    rounded to 8 bits.

    ``Pipeline(memory=...)`` keeps the result of `fit` only, and finds it by the paths, not by what the files hold.
    In a grid search the images that a candidate is scored on are read for each candidate, unless the search comes
    behind the reader: ``make_pipeline(ImageReader(224), GridSearchCV(...))`` reads each image once.

    Examples
    --------
    >>> from PIL import Image
    >>> from sklearn_lqf import ImageReader
    >>> images = [Image.new("RGB", (40, 30)), Image.new("L", (64, 64))]
    >>> ImageReader(image_size=32).fit_transform(images).shape
    (2, 32, 32, 3)
    >>> ImageReader(image_size=32, raveled=True).fit_transform(images).shape
    (2, 3072)
    """

    def __init__(
        self,
        image_size: Any = None,
        *,
        raveled: bool = False,
        channels: int = 3,
        image_shape: Sequence[int] | None = None,
        channel_axis: int = -1,
        interpolation: str = "bilinear",
        n_jobs: int | None = None,
    ):
        self.image_size = image_size
        self.raveled = raveled
        self.channels = channels
        self.image_shape = image_shape
        self.channel_axis = channel_axis
        self.interpolation = interpolation
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> ImageReader:
        """Check parameters and the form of X; nothing is learned but the shape of the result.

        Parameters
        ----------
        X : array-like or sequence of images
            One of

            - list, tuple, Series, one-dimensional array or single column (n, 1) of paths, PIL images, arrays, bytes of
              encoded images, binary files, or dicts with an entry "image" or "bytes";
            - data set with a length, such as those of torchvision and of Hugging Face;
            - array of shape (n, H, W) or (n, H, W, C), or (n, C, H, W) with ``channel_axis=0``;
            - array or DataFrame of shape (n, n_features) of raveled images, with `image_shape`.

            Arrays are uint8 in 0..255, or floats in 0..1.
        y : object, default=None
            Ignored.

        Returns
        -------
        self : ImageReader
            The transformer.

        Raises
        ------
        ValueError
            If a parameter is not one of the above, or X holds no images. Elements of a sequence are read by
            `transform`; here only the first is, and only without `image_size`.
        """
        for name in ("output_shape_", "n_features_in_", "feature_names_in_"):  # of an earlier fit
            self.__dict__.pop(name, None)
        self.output_shape_ = self._output_shape(self._inputs(X, reset=True))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Read images.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        images : ndarray of shape (n, H, W, C), or (n, H * W * C) if `raveled`
            Pixels, uint8.

        Raises
        ------
        ValueError
            If an element is not a usable image, with its index (and path), or has not the size of those of `fit` and
            `image_size` is None.
        FileNotFoundError
            If a file does not exist.
        """
        inputs = self._inputs(X, reset=False)
        shape = self._output_shape(inputs)
        expected = getattr(self, "output_shape_", shape)
        if shape != expected:
            raise ValueError(
                f"X makes images of shape {shape}, but ImageReader is expecting images of shape {expected} as in fit: "
                "set image_size to accept other sizes."
            )
        images = np.empty((len(inputs), *shape), np.uint8)
        step = 1 if inputs.n_jobs == 1 else _AHEAD * inputs.n_jobs  # few at once: images as they are may be large
        for start in range(0, len(images), step):
            pixels = (inputs.batch(start, start + step) * 255).round()
            images[start : start + step] = pixels.permute(0, 2, 3, 1).numpy()
        return images.reshape(len(images), -1) if self.raveled else images

    @available_if(lambda self: self.raveled)
    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Name the columns of the result; only there if `raveled`.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Only compared with the names seen in `fit`.

        Returns
        -------
        feature_names_out : ndarray of str objects
            ``pixel_{row}_{column}_{channel}``.
        """
        check_is_fitted(self, "output_shape_")
        _check_feature_names_in(self, input_features, generate_names=False)
        return np.array([f"pixel_{i}_{j}_{k}" for i, j, k in np.ndindex(self.output_shape_)], dtype=object)

    def set_output(self, *, transform: str | None = None) -> ImageReader:
        """Set the container of the result; images that are not `raveled` remain an array.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"}, default=None
            Container of the rows of `transform`; None leaves it as it is.

        Returns
        -------
        self : ImageReader
            The transformer.
        """
        if self.raveled:
            super().set_output(transform=transform)
        return self

    def _inputs(self, X: Any, reset: bool) -> ImageInputs:
        """X as images; rows that are raveled pass scikit-learn's checks of two-dimensional data."""
        if not isinstance(self.raveled, bool | np.bool_):
            raise ValueError(f"raveled must be True or False, got {self.raveled!r}.")
        if not isinstance(self.channels, Integral) or isinstance(self.channels, bool) or self.channels < 1:
            raise ValueError(f"channels must be an int >= 1, got {self.channels!r}.")
        if not is_image_input(X):
            if self.image_shape is None:
                raise ValueError(
                    f"X does not hold images: got {describe(X)}. Supported are paths, PIL images or arrays in a list, "
                    "Series or single column (select it by ColumnTransformer), arrays (n, H, W) or (n, H, W, C), and "
                    "raveled images (n, n_features) with image_shape."
                )
            X = validate_data(self, plain_frame(X), dtype="numeric", ensure_non_negative=True, reset=reset)
        return ImageInputs(
            X,
            image_shape=self.image_shape,
            image_size=self.image_size,
            channel_axis=self.channel_axis,
            in_channels=self.channels,
            interpolation=self.interpolation,
            n_jobs=self.n_jobs,
        )

    def _output_shape(self, inputs: ImageInputs) -> tuple[int, int, int]:
        return *inputs.size, int(self.channels)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []
        tags.input_tags.two_d_array = self.image_shape is not None
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.input_tags.positive_only = True
        return tags
