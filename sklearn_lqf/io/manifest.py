"""Python values as JSON and named tensors, and back. Decoding never runs code from a file.

Hides how strings, tuples, dicts with any keys, arrays of labels and random states are written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_PLAIN = (bool, int, str, type(None))
_SUPPORTED = (
    "None, bool, int, float, str, path, list, tuple, dict, RandomState, tensors, and arrays of numbers, strings or of "
    "objects of these kinds"
)


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Write a value as JSON; arrays and tensors are put apart.

    Parameters
    ----------
    value : object
        None, bool, int, float, str, path, list, tuple, mapping, RandomState, torch.device, Tensor, scalar of numpy, or
        ndarray of numbers, strings or objects of these kinds.
    name : str
        Name of the value, with which the names of its tensors begin; also that in error messages.
    tensors : dict of str to Tensor
        Takes the arrays and tensors; it is changed.

    Returns
    -------
    object
        Of what JSON can hold. Paths and devices become str.

    Raises
    ------
    TypeError
        The value, or one inside it, is of another kind; the message names it.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return {"scalar": encode(np.asarray(value), name, tensors)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, list | tuple):
        items = [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = [[encode(k, f"{name}.key{i}", tensors), encode(v, f"{name}.{i}", tensors)]
                 for i, (k, v) in enumerate(value.items())]  # fmt: skip
        return {"dict": pairs}
    if isinstance(value, np.random.RandomState):
        return {"random_state": encode(value.get_state(legacy=True), name, tensors)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return _encode_array(value, name, tensors)
    raise TypeError(f"{name} is of type {type(value).__name__}; supported are {_SUPPORTED}.")


def _encode_array(value: np.ndarray, name: str, tensors: dict[str, Tensor]) -> Any:
    kind, shape = value.dtype.kind, list(value.shape)
    if kind in "US":
        texts = [t if kind == "U" else t.decode("latin-1") for t in value.ravel().tolist()]
        return {"text": texts, "dtype": value.dtype.str, "shape": shape}
    if kind == "O":
        items = [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value.ravel())]
        return {"objects": items, "shape": shape}
    try:
        tensors[name] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(f"{name} is an array of dtype {value.dtype}; supported are {_SUPPORTED}.") from None
    return {"array": name}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Read a value that `encode` has written.

    Parameters
    ----------
    value : object
        JSON, as `encode` returned it.
    tensors : mapping of str to Tensor
        The arrays and tensors of the value, by their names.

    Returns
    -------
    object
        The value that `encode` was given; paths and devices as str, scalars of numpy as such.

    Raises
    ------
    ValueError, KeyError, TypeError
        The JSON is not what `encode` writes.
    """
    if isinstance(value, (*_PLAIN, float)):
        return value
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    kinds = {
        "scalar": lambda v: decode(v, tensors)[()],
        "float": float,
        "tuple": lambda v: tuple(decode(item, tensors) for item in v),
        "dict": lambda v: {decode(key, tensors): decode(item, tensors) for key, item in v},
        "random_state": lambda v: _random_state(decode(v, tensors)),
        "tensor": lambda v: tensors[v],
        "array": lambda v: tensors[v].numpy(),
        "text": lambda v: _texts(v, value["dtype"], value["shape"]),
        "objects": lambda v: _objects([decode(item, tensors) for item in v], value["shape"]),
    }
    for kind, read in kinds.items():
        if kind in value:
            return read(value[kind])
    raise ValueError(f"unknown kind of value: {list(value)}")


def _texts(texts: list[str], dtype: str, shape: list[int]) -> np.ndarray:
    kind = np.dtype(dtype).kind
    if kind not in "US":
        raise ValueError(f"{dtype!r} is no dtype of text")
    return np.array([t if kind == "U" else t.encode("latin-1") for t in texts], dtype=dtype).reshape(shape)


def _objects(items: list[Any], shape: list[int]) -> np.ndarray:
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found.reshape(shape)


def _random_state(state: Any) -> np.random.RandomState:
    found = np.random.RandomState()  # scikit-learn takes this kind
    found.set_state(state)
    return found
