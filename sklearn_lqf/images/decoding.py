"""One element of a sequence as pixels: paths, encoded bytes, open files, PIL images, arrays, and dicts that hold one.

Hides Pillow: which errors a broken file raises, how images are turned upright, and how colors are converted.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

from .pixels import as_channels_last, check_channels, check_dtype, check_values

__all__ = [
    "Remark", "UnreadableError", "as_array", "decode", "describe", "element_name", "is_image", "is_missing",
    "is_number", "is_path", "load", "unwrap",
]  # fmt: skip

_PIL_MODES = {1: "L", 3: "RGB"}  # that PIL converts to, by number of channels
_PATH_MAX = 4096  # characters; a longer string is content
_NO_PATH = re.compile(r"^data:|[\0\n\r]")
_NAME_MAX = 200  # characters of a path in a message
_ORIENTATION = 0x0112  # the tag of EXIF
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # types of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """The content of an element is broken; others may be sound."""


class Remark(Enum):
    """What is said of an image that is read all the same; `{}` names it."""

    METADATA = (
        "The orientation of {} cannot be read, because the EXIF metadata are broken: the pixels are taken as they are "
        "stored. If this image lies on its side, turn it and save it anew."
    )
    CHANGED = (
        "{}: a PIL image that was changed after it was opened, but has the orientation tag of its file still. Its "
        "pixels are taken as they are. If they are not upright, give the path, or apply PIL.ImageOps.exif_transpose "
        "right after Image.open; if they are, delete the tag: del image.getexif()[0x0112]."
    )


# ------------------------------------------------------------------------------------------- what an element is


def is_path(element: Any) -> bool:
    """Whether an element is the path of a file; strings that can be none are their content."""
    if isinstance(element, str):
        return len(element) <= _PATH_MAX and _NO_PATH.search(element) is None
    return isinstance(element, os.PathLike)


def is_number(element: Any) -> bool:
    """Whether an element is one number."""
    return isinstance(element, Number) or (isinstance(element, np.generic) and element.dtype.kind in "biufc")


def is_image(element: Any) -> bool:
    """Whether an element is of a kind that holds one image; its content is not looked at."""
    element = unwrap(element)
    return (
        is_path(element)
        or isinstance(element, (Image.Image, bytes, bytearray, memoryview))
        or _is_file(element)
        or (hasattr(element, "__array__") and getattr(element, "ndim", None) in (2, 3))
    )


def unwrap(element: Any) -> Any:
    """The image in a dict as the library datasets gives them, else the element itself."""
    for _ in range(2):  # {"image": {"bytes": ..., "path": ...}}
        if not isinstance(element, Mapping):
            break
        keys = [key for key in ("image", "bytes", "path") if element.get(key) is not None]
        if not keys:
            break
        element = element[keys[0]]
    return element


def _is_file(element: Any) -> bool:
    """Whether an element can be read: an open file, a member of a zip archive."""
    return callable(getattr(element, "read", None)) or callable(getattr(element, "read_bytes", None))


def describe(element: Any) -> str:
    """The type of an object, with its shape if it has one, or with the type of what a list begins with."""
    if isinstance(element, str):
        return "str" if is_path(element) else f"str of {len(element)} characters, which is no path"
    if is_missing(element):
        return f"{type(element).__name__}, a missing value"
    shape = getattr(element, "shape", None)
    kind = f"{type(element).__module__}.{type(element).__qualname__}".removeprefix("builtins.")
    if isinstance(element, (list, tuple)):
        return f"{kind} of {describe(element[0])}" if element else f"empty {kind}"
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"


def is_missing(element: Any) -> bool:
    """Whether an element is None, NaN or NA."""
    if isinstance(element, (float, np.floating)):
        return bool(np.isnan(element))
    return element is None or type(element).__name__ in ("NAType", "NaTType")  # of pandas


def element_name(index: int, element: Any) -> str:
    """An element in messages: its index, and its path if it has one."""
    path: Any = element.get("path") if isinstance(element, Mapping) else None
    path = unwrap(element) if path is None else path
    if not is_path(path):
        path = getattr(path, "name", None) if _is_file(path) else None
    if not is_path(path):
        return f"X[{index}]"
    text = str(os.fspath(path)) if isinstance(path, os.PathLike) else str(path)
    return f"X[{index}] ({text if len(text) <= _NAME_MAX else '...' + text[-_NAME_MAX:]!r})"


# ----------------------------------------------------------------------------------------------------- decoding


def load(element: Any, name: str) -> Any:
    """What `decode` takes, from objects that only one thread may read: files and images that are open."""
    element = unwrap(element)
    if is_path(element) or (hasattr(element, "__array__") and not isinstance(element, Image.Image)):
        return element
    try:
        if isinstance(element, Image.Image):
            element.load()
            with suppress(Exception):  # broken metadata; Pillow keeps those that are sound
                element.getexif()
        elif isinstance(element, (bytearray, memoryview)):
            return bytes(element)
        elif callable(getattr(element, "read", None)):
            if getattr(element, "seekable", bool)():
                element.seek(0)
            element = element.read()
        elif callable(getattr(element, "read_bytes", None)):
            element = element.read_bytes()
    except Exception as error:
        kind = "a PIL image" if isinstance(element, Image.Image) else f"a file ({describe(element)})"
        raise UnreadableError(f"{name} is {kind} that cannot be read: {_reason(error)}.") from error
    if isinstance(element, str):
        raise ValueError(f"{name} is a file that was opened as text: open it as open(path, 'rb').")
    return element


def decode(held: Any, name: str, channel_axis: int, in_channels: int) -> tuple[np.ndarray, Remark | None]:
    """One element, as `load` returned it, as an array (h, w, C) of uint8, or of floats in 0..1.

    Raises
    ------
    UnreadableError
        The file, the bytes or the image are broken.
    FileNotFoundError
        There is no such file.
    ValueError
        The image is sound, but has channels, a dtype or values that are not supported.
    """
    if is_path(held) or isinstance(held, (bytes, Image.Image)):
        if in_channels not in _PIL_MODES:
            raise ValueError(
                f"{name}: files and PIL images have 1 or 3 channels, not the {in_channels} that are needed: pass arrays"
            )
        return _decode_encoded(held, name, _PIL_MODES[in_channels])
    pixels = as_array(held, name)
    if 0 in pixels.shape:
        raise ValueError(f"{name} is an empty image: its shape is {pixels.shape}.")
    check_channels(pixels.shape, channel_axis, in_channels, name)
    check_dtype(pixels.dtype, name)
    check_values(pixels, name)
    return as_channels_last(pixels, channel_axis), None


def _decode_encoded(held: Any, name: str, mode: str) -> tuple[np.ndarray, Remark | None]:
    """A file, which is closed again, encoded bytes, or a PIL image."""
    try:
        if isinstance(held, Image.Image):
            return _upright(held, mode, opened=False)
        with Image.open(io.BytesIO(held) if isinstance(held, bytes) else held) as image:
            return _upright(image, mode, opened=True)
    except FileNotFoundError as error:
        url = " It is the address of a page: download the image." if "://" in str(held) else ""
        raise FileNotFoundError(f"{name} does not exist.{url}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on broken files
        kind = "is a PIL image that cannot be read" if isinstance(held, Image.Image) else "cannot be read as an image"
        raise UnreadableError(f"{name} {kind}: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What an error says, without what the element holds."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is none that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).rstrip(".")


def _upright(image: Image.Image, mode: str, opened: bool) -> tuple[np.ndarray, Remark | None]:
    """Turn an image upright, if it is as it was stored, and convert it: (h, w, C) uint8."""
    if image.mode == "F" or image.mode.startswith("I"):
        # PIL would clip the values to 0..255, which turns 16-bit images white.
        raise ValueError(f"mode {image.mode!r} has more than 8 bits a channel: pass an array of floats in 0..1")
    image.load()  # before metadata, which may stand behind the pixels, and whose errors are others
    remark, turn = None, None
    try:
        turn = _TURNS.get(_stored_orientation(image) if opened else image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever a broken table raises: what is optional makes no image unreadable
        remark = Remark.METADATA if isinstance(image, ImageFile.ImageFile) else None
    if image.format == "TIFF":
        turn = None  # Pillow turns these as it loads them; some versions leave the tag
    if turn is not None and not isinstance(image, ImageFile.ImageFile):
        remark, turn = Remark.CHANGED, None  # Pillow's methods return images of another class
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors, without PIL's warning about such palettes
    return np.atleast_3d(np.asarray(image.convert(mode))), remark


def _stored_orientation(image: Image.Image) -> int:
    """The orientation in the metadata of a file, 1 where there is none.

    Pillow reads all tags at once: one that is broken hides the others, and some of them are warned of.
    """
    exif = image.info.get("exif")
    while isinstance(exif, bytes) and exif.startswith(b"Exif\x00\x00"):
        exif = exif[6:]
    if not isinstance(exif, bytes) or not exif:
        return int(image.getexif().get(_ORIENTATION, 1))
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (start,) = struct.unpack_from(order + "L", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", exif, at)
        if tag == _ORIENTATION:
            return int(struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)[0])
    beside = any(key in image.info for key in ("xmp", "XML:com.adobe.xmp"))  # which Pillow reads where EXIF has none
    return int(image.getexif().get(_ORIENTATION, 1)) if beside else 1


def as_array(X: Any, name: str) -> np.ndarray:
    """X as an array; without a copy if it is an array, a memory map or a CPU tensor."""
    if isinstance(X, torch.Tensor):
        try:
            return np.asarray(X.detach().numpy())
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} is a tensor of dtype {X.dtype} on device {X.device}: pass a CPU tensor of dtype "
                "uint8, float16, float32 or float64."
            ) from error
    return np.asarray(X)
