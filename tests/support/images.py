"""Images in every form in which they are given."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from sklearn_lqf.images.reading import ImageInputs


def as_pil(images) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def as_files(images, folder: Path) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, as_pil(images), strict=True):
        image.save(path)
    return paths


def encoded(image: np.ndarray, format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def as_objects(items) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def whole(X, **options) -> torch.Tensor:
    """All images as one batch."""
    inputs = ImageInputs(X, **options)
    return inputs.batch(0, len(inputs))


class Pairs(torch.utils.data.Dataset):
    """A map-style data set of pairs (image, label)."""

    def __init__(self, items, change=lambda image: image):
        self.items, self.change = items, change

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.change(self.items[index]), index % 2


class Column:
    """A lazy sequence, as a column of the library datasets."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def every_form(images, folder: Path):
    """All the forms that are to give the same tensors, as (name, X, options)."""
    paths = as_files(images, folder)
    names = [str(path) for path in paths]
    content = [encoded(image) for image in images]
    rows = images.reshape(len(images), -1)
    shape = images.shape[1:]
    yield "array", images, {}
    yield "fortran order", np.asfortranarray(images), {}
    yield "negative strides", images[:, :, ::-1].copy()[:, :, ::-1], {}
    yield "tensor", torch.from_numpy(images), {}
    yield "raveled", rows, {"image_shape": shape}
    yield "raveled, fortran order", np.asfortranarray(rows), {"image_shape": shape}
    yield "DataFrame", pd.DataFrame(rows), {"image_shape": shape}
    yield "nullable DataFrame", pd.DataFrame(rows).astype("UInt8"), {"image_shape": shape}
    yield "PIL list", as_pil(images), {}
    yield "PIL tuple", tuple(as_pil(images)), {}
    yield "PIL object array", as_objects(as_pil(images)), {}
    yield "array list", list(images), {}
    yield "tensor list", list(torch.from_numpy(images)), {}
    yield "array object array", as_objects(list(images)), {}
    yield "path list", paths, {}
    yield "string list", names, {}
    yield "string array", np.array(names), {}
    yield "string column", np.array(names)[:, None], {}
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        yield "variable-width strings", np.array(names, dtype=np.dtypes.StringDType()), {}
    yield "path object array", as_objects(paths), {}
    yield "path Series", pd.Series(paths), {}
    yield "string Series, odd index", pd.Series(names, index=range(5, 5 + len(names))), {}
    yield "string DataFrame", pd.DataFrame({"path": names}), {}
    yield "PIL Series", pd.Series(as_pil(images)), {}
    yield "bytes", content, {}
    yield "bytearrays and views", [bytearray(content[0]), *map(memoryview, content[1:])], {}
    yield "bytes Series", pd.Series(content), {}
    yield "memory files", [io.BytesIO(c) for c in content], {}
    yield "rows of a data set", [{"image": image, "label": 0} for image in as_pil(images)], {}
    yield "encoded rows", [{"bytes": c, "path": None} for c in content], {}
    yield "encoded images in rows", [{"image": {"bytes": None, "path": name}} for name in names], {}
    yield "lazy column", Column(as_pil(images)), {}
    yield "lazy rows", Column([{"image": image} for image in as_pil(images)]), {}
    yield "data set of pairs", Pairs(as_pil(images)), {}
    yield "data set of arrays", Pairs(images), {}
    yield "mixed list", [paths[0], as_pil(images)[1], names[2], content[3], *images[4:]], {}
    if images.ndim == 4:
        first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        yield "channels first", first, {"channel_axis": 0}
        yield "channels first view", images.transpose(0, 3, 1, 2), {"channel_axis": 0}
        yield "channels first list", list(first), {"channel_axis": 0}
        yield "data set of tensors", Pairs(list(torch.from_numpy(first))), {"channel_axis": 0}
        raveled = {"channel_axis": 0, "image_shape": first.shape[1:]}
        yield "channels first raveled", first.reshape(len(first), -1), raveled
    else:
        yield "one channel", images[..., None], {}
