"""What users give as X: images, a table of numbers, or something else, which is told what to give instead.

Hides the containers of data (lists, frames, columns, tensors, data sets of torch and of Hugging Face) and how they
are told apart. Only types are looked at, and nothing is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .decoding import describe, is_image, is_number, is_path, unwrap

__all__ = [
    "first_image", "image_elements", "is_dataset", "is_image_input", "labels_of_dataset", "plain_frame", "rows_named",
    "what_to_give",
]  # fmt: skip

_EXPECTED = "Expected images as an array or as a sequence of paths, PIL images or arrays, got"
_ROWS_NAMED = 10  # in messages


def is_image_input(X: Any, image_shape: Sequence[int] | None = None) -> bool:
    """Tell whether `X` is to be read as images.

    Looks at the number of dimensions and at the types of elements only; `ImageInputs` finds out whether the images
    are usable.

    Parameters
    ----------
    X : object
        What the user gave as X.
    image_shape : sequence of int, default=None
        The user's `image_shape`; when given, two-dimensional data are raveled images.

    Returns
    -------
    bool
        True for an array of 3 or 4 dimensions, for two-dimensional data when `image_shape` is given, for a map-style
        data set, and for a list, tuple, Series, one-dimensional array or single column that holds anything else than
        numbers and rows of numbers. False for these (tables, sparse matrices, numbers), which are left to
        scikit-learn's own validation.

    Raises
    ------
    ValueError
        If X is neither: one image, a DataLoader, a dict, an iterator, an empty list, a frame of which one column
        holds images. The message says what to give instead.
    """
    _refuse_other_kinds(X)
    if image_elements(X) is not None:
        return True
    ndim = _ndim(X)
    return ndim in (3, 4) or (ndim == 2 and image_shape is not None)


def image_elements(X: Any) -> Any:
    """The sequence in a list, 1-D array, single column or data set, if it is read one by one, else None."""
    if is_dataset(X):
        return X
    elements = _elements(X)
    # Not of numbers and of rows alone: None among paths is missing data, but no table.
    if elements is None or all(is_number(e) or _is_row(e) for e in elements):
        return None
    return elements


def first_image(elements: Any) -> Any:
    """The first image of a sequence or a data set, as it is given; None where it cannot be taken."""
    try:
        first = elements[0]
    except Exception:  # of the user's data set; whoever reads it says so
        return None
    image = unwrap(first[0] if is_dataset(elements) and isinstance(first, (list, tuple)) and first else first)
    return image.item() if isinstance(image, np.generic) else image  # numpy's strings have a shape, too


def is_dataset(X: Any) -> bool:
    """Whether X is a map-style data set: something with a length that is indexed, and is no array and no list."""
    return (
        hasattr(X, "__getitem__")
        and hasattr(X, "__len__")
        and not isinstance(X, (list, tuple, str, bytes, bytearray, memoryview, Mapping, IterableDataset, range))
        and not any(hasattr(X, name) for name in ("__array__", "toarray", "iloc"))
    )


def labels_of_dataset(X: Any) -> str:
    """What to give as y where X is a data set; nothing for anything else."""
    if not is_dataset(X):
        return ""
    known = "y=X.targets" if hasattr(X, "targets") else "y=[label for _, label in X]"
    if hasattr(X, "column_names"):  # of Hugging Face
        known = "y=X['label'], or the column that holds them"
    return f". Labels are given apart from images, also those of a data set: {known}"


def plain_frame(X: Any) -> Any:
    """A pandas frame of nullable numbers, or of Arrow's, as one of numpy's numbers; anything else as it is."""
    if not (hasattr(X, "iloc") and getattr(X, "ndim", 0) == 2):
        return X
    dtypes = list(X.dtypes)
    if all(isinstance(dtype, np.dtype) for dtype in dtypes):
        return X
    plain = [getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes]
    if not all(isinstance(dtype, np.dtype) and dtype.kind in "biuf" for dtype in plain):
        return X
    missing = np.flatnonzero(X.isna().any(axis=1).to_numpy(dtype=bool))
    if len(missing):
        raise ValueError(f"Input X contains NaN: values are missing in {rows_named(missing)}. Leave these rows out.")
    return X.astype(np.result_type(*plain))


def rows_named(rows: Any) -> str:
    """Rows in messages: the first ten, and how many there are."""
    text = ", ".join(str(int(row)) for row in rows[:_ROWS_NAMED])
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {text}{more}"


def _elements(X: Any) -> Any:
    """What a list, a 1-D array or a single column of objects or strings holds; None for all else."""
    if isinstance(X, (list, tuple)):
        return X
    if not hasattr(X, "__array__") or isinstance(X, torch.Tensor):
        return None
    shape = getattr(X, "shape", None)
    if shape is not None and len(shape) != 1 and tuple(shape[1:]) != (1,):
        return None
    array = np.asarray(X)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    # Objects, and numpy's strings of fixed and of variable width.
    return array if array.ndim == 1 and array.dtype.kind in "OUT" else None


def _is_row(element: Any) -> bool:
    """Whether an element is a row of numbers, a list of such rows, or an array that holds them."""
    while isinstance(element, (list, tuple)):
        if not element:
            return True
        if is_image(element[0]):
            return False
        element = element[0]
        if is_number(element):
            return True
    dtype = getattr(element, "dtype", None)
    return getattr(element, "ndim", None) == 1 and (
        isinstance(dtype, torch.dtype) or getattr(dtype, "kind", "O") in "biufc"
    )


def _ndim(X: Any) -> int:
    """Count the dimensions of arrays, tables and nested lists; 0 for all else."""
    if isinstance(X, (list, tuple)):
        return 1 + (_ndim(X[0]) if len(X) else 0)
    if not hasattr(X, "__array__"):  # sparse matrices, strings, PIL images
        return 0
    ndim = getattr(X, "ndim", None)
    return int(np.asarray(X).ndim if ndim is None else ndim)


# ------------------------------------------------------------------------------------ what is not taken, and why


def _refuse_other_kinds(X: Any) -> None:
    """Raise for what is neither images nor a table, in words that say what to give."""
    if isinstance(X, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        folder = " load_image_folder reads a folder." if is_path(X) else ""
        raise ValueError(f"{_EXPECTED} {describe(X)}. Put a single image into a list.{folder}")
    if getattr(X, "ndim", 0) > 4:
        raise ValueError(
            f"{_EXPECTED} an array with {X.ndim} dimension(s), shape {tuple(X.shape)} and dtype {X.dtype}. Images of "
            "one array have shape (n, H, W) or (n, H, W, C), or (n, C, H, W) with channel_axis=0."
        )
    if isinstance(X, DataLoader):
        raise ValueError(
            f"{_EXPECTED} a DataLoader. Give its data set, X=loader.dataset, and labels in its order; LQF makes its "
            "own batches, without shuffling."
        )
    if isinstance(X, (Mapping, Set)):
        raise ValueError(
            f"{_EXPECTED} {describe(X)}. Give the images as a list; of a dict, the values or the entry of images."
        )
    by_number = any(hasattr(X, name) for name in ("__getitem__", "__array__", "toarray"))
    if isinstance(X, IterableDataset) or (hasattr(X, "__iter__") and not by_number):
        raise ValueError(f"{_EXPECTED} {describe(X)}, whose images cannot be read by their number: pass list(X).")
    if is_dataset(X) or isinstance(X, Dataset):
        _refuse_dataset(X)
    elif hasattr(X, "columns") and (hasattr(X, "iloc") or hasattr(X, "row")):  # of pandas or polars
        _refuse_columns(X)
    elements = _elements(X)
    if elements is not None and not len(elements):
        raise ValueError(
            f"X is an empty {type(X).__name__}: Found array with 0 sample(s) while a minimum of 1 is required."
        )


def _refuse_dataset(X: Any) -> None:
    """Raise unless a data set has a length above 0."""
    try:
        length = len(X)
    except (TypeError, NotImplementedError, AttributeError) as error:  # as torch's own do
        raise ValueError(
            f"X is a data set ({describe(X)}) without a length, so that its images cannot be read by their number: "
            "give it __len__, or pass a list of the images."
        ) from error
    if not length:
        raise ValueError(
            f"X is an empty data set ({describe(X)}): Found array with 0 sample(s) while a minimum of 1 is required."
        )


def _refuse_columns(X: Any) -> None:
    """Raise for a frame of several columns if one of them holds paths or images."""
    if X.shape[0] == 0 or X.shape[1] < 2:
        return
    first = X.iloc[0] if hasattr(X, "iloc") else X[0]
    values = list(first) if hasattr(first, "iloc") else first.row(0)
    names = [str(name) for name, value in zip(X.columns, values, strict=True) if is_image(value)]
    if names:
        raise ValueError(
            f"X is a frame of {X.shape[1]} columns, of which {', '.join(map(repr, names[:3]))} "
            f"{'holds' if len(names) == 1 else 'hold'} text or images. Images are one column: pass X[{names[0]!r}] "
            "(in a ColumnTransformer, select it). Vectors are columns of numbers alone."
        )


def what_to_give(element: Any) -> str:
    """The remedy for an element that is no image."""
    if isinstance(element, (list, tuple)) and element and is_image(element[0]):
        return " Pairs are given apart: X=[image for image, _ in X], y=[label for _, label in X]."
    if getattr(element, "ndim", 0) > 3:
        return " Arrays of several images are joined: X=numpy.concatenate(X)."
    if isinstance(element, str):
        return " Text in base64 is decoded to bytes by base64.b64decode."
    if isinstance(unwrap(element), Mapping):
        return " Name the entry that holds the image, as in [row['img'] for row in X]."
    if is_number(element) or _is_row(element):
        return " Numbers are images only as raveled rows of one table, with image_shape."
    return " Leave such rows out, of y too."
