"""What is read as images, what is left to scikit-learn, and what is told to be given otherwise."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from support.images import Column, Pairs, as_files, as_objects, encoded, whole

from sklearn_lqf.images.reading import ImageInputs
from sklearn_lqf.images.sources import first_image, is_image_input, labels_of_dataset, plain_frame

PICTURE = Image.new("RGB", (4, 4))
SECRET = "secret content"


class NotAnArray:
    """What scikit-learn's common checks pass as X: convertible to an array, and no more."""

    def __init__(self, data):
        self.data = np.asarray(data)

    def __array__(self, dtype=None, copy=None):
        return self.data


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([PICTURE])


class NoLength(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return PICTURE


# Images only with image_shape.
TABLES = [
    np.zeros((4, 8)), np.zeros((4, 1)), np.zeros((4, 8), dtype=object), np.zeros((4, 1), dtype=object),
    np.array([["a", "b"], ["c", "d"]], dtype=object), pd.DataFrame(np.zeros((4, 8))), pd.DataFrame({"a": [1.0, 2.0]}),
    NotAnArray(np.zeros((4, 8))), torch.zeros(4, 8), [[1.0, 2.0], [3.0, 4.0]], [np.zeros(8), torch.zeros(8)],
]  # fmt: skip
LEFT_TO_SCIKIT_LEARN = [
    sparse.eye(4).tocsr(), sparse.csr_array(np.eye(4)), np.zeros(4), np.array(3.0), np.zeros(4, dtype=object),
    pd.Series([1.0, 2.0]), torch.zeros(4), [1.0, float("nan")], 3.0, None,
]  # fmt: skip
IMAGES = [
    np.zeros((4, 8, 8)), np.zeros((4, 8, 8, 3)), np.zeros((0, 8, 8, 3)), np.zeros((4, 8, 8), dtype=object),
    torch.zeros(4, 8, 8), NotAnArray(np.zeros((4, 8, 8))), [np.zeros((8, 8))], [torch.zeros(3, 8, 8)], ["missing.png"],
    (Path("missing.png"),), (PICTURE,), [b"content"], [io.BytesIO()], [{"image": PICTURE}], np.array(["missing.png"]),
    np.array([["missing.png"]], dtype=object), pd.Series(["missing.png"]), pd.DataFrame({"path": ["missing.png"]}),
    pd.Series([PICTURE]), Pairs([PICTURE]), Column([PICTURE]), [None, "a.png"],  # missing values are no numbers
    [None, None], [[1.0], None], [{"a": 1}],
]  # fmt: skip


KINDS = [*((X, False, True) for X in TABLES), *((X, False, False) for X in LEFT_TO_SCIKIT_LEARN)]


@pytest.mark.parametrize(("X", "plain", "raveled"), [*KINDS, *((X, True, True) for X in IMAGES)])
def test_what_is_read_as_images(X, plain, raveled):
    assert is_image_input(X) is plain
    assert is_image_input(X, (2, 4)) is raveled
    if not raveled:
        with pytest.raises(ValueError, match=r"Expected images as an array or as a sequence|dimension"):
            ImageInputs(X, image_shape=(2, 2))


def test_first_image(color):
    for X in ([PICTURE, 1], Pairs([PICTURE]), Column([{"image": PICTURE}])):
        assert first_image(X) is PICTURE
    assert type(first_image(np.array(["a.png"]))) is str  # not numpy's, which has a shape as arrays of pixels do
    assert first_image(Pairs([PICTURE], lambda image: 1 / 0)) is None
    assert torch.equal(whole(NotAnArray(color)), whole(color))


# ------------------------------------------------------------------------------------------ what is not taken

ONE = r"Expected images as an array or as a sequence .*got {}\. Put a single image into a list"
EMPTY = r"Found array with 0 sample\(s\)"
OTHER = {
    "one path": ("a.png", ONE.format("str") + ".*load_image_folder"),
    "one pathlib path": (Path("a.png"), ONE.format(".*Path")),
    "one image": (PICTURE, ONE.format(r"PIL\.Image\.Image")),
    "one file's content": (SECRET.encode(), ONE.format("bytes")),
    "a DataLoader": (torch.utils.data.DataLoader(Pairs([PICTURE])), r"got a DataLoader.*X=loader\.dataset"),
    "a dict": ({SECRET: PICTURE}, "got dict.*of a dict, the values"),
    "a set": ({SECRET}, "got set.*as a list"),
    "a generator": ((x for x in [PICTURE]), r"got generator.*pass list\(X\)"),
    "a view": ({1: PICTURE}.values(), r"got dict_values.*pass list\(X\)"),
    "a stream": (Stream(), r"got .*Stream.*pass list\(X\)"),
    "no length": (NoLength(), r"data set \(.*NoLength\) without a length.*give it __len__"),
    "an empty data set": (Pairs([]), "empty data set.*" + EMPTY),
    "an empty list": ([], "empty list.*" + EMPTY),
    "an empty tuple": ((), "empty tuple.*" + EMPTY),
    "an empty Series": (pd.Series([], dtype=object), "empty Series.*" + EMPTY),
    "an empty column": (pd.DataFrame({"path": pd.Series([], dtype=object)}), EMPTY),
    "no objects": (np.empty(0, dtype=object), EMPTY),
    "several columns": (
        pd.DataFrame({"age": [1], "path": [SECRET], "class": ["cat"]}),
        r"frame of 3 columns, of which 'path', 'class' hold text or images.*pass X\['path'\]",
    ),
    "five axes": (np.zeros((2, 3, 4, 5, 3)), r"an array with 5 dimension\(s\), shape \(2, 3, 4, 5, 3\)"),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_neither_images_nor_a_table(case):
    X, message = OTHER[case]
    for function in (is_image_input, ImageInputs):
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            function(X)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("X", [np.empty((0, 8, 8, 3), dtype=np.uint8), np.empty((0, 64)), torch.empty(0, 8, 8)])
def test_empty_arrays(X):
    with pytest.raises(ValueError, match=EMPTY):
        ImageInputs(X, image_shape=(8, 8))


# An element that is no image, what it is called, and what is said of it.
ELEMENTS = {
    "None": (None, "NoneType, a missing value.*Leave such rows out"),
    "nan": (float("nan"), "float, a missing value"),
    "NA": (pd.NA, "NAType, a missing value"),
    "a number": (3.0, "float.*image_shape"),
    "a vector": (np.zeros(4), r"numpy\.ndarray of shape \(4,\).*image_shape"),
    "several images": (np.zeros((2, 4, 4, 3)), r"shape \(2, 4, 4, 3\).*numpy\.concatenate"),
    "a list": ([SECRET], "list of str"),
    "a pair": ((PICTURE, 1), r"tuple of PIL\.Image\.Image.*X=\[image for image, _ in X\]"),
    "a dict": ({"img": PICTURE, SECRET: 1}, r"dict.*row\['img'\] for row in X"),
    "an empty dict": ({}, "dict"),
    "base64": ("data:image/png;base64," + SECRET, "str of 36 characters, which is no path.*b64decode"),
    "a text": (SECRET * 1000, "str of 14000 characters, which is no path"),
    "lines": (SECRET + "\n", "str of 15 characters, which is no path"),
}


@pytest.mark.parametrize("case", ELEMENTS)
@pytest.mark.parametrize("place", [0, 2])
def test_an_element_that_is_no_image(case, place):
    element, message = ELEMENTS[case]
    elements = [PICTURE] * 2
    elements.insert(place, element)
    for X in (elements, tuple(elements), as_objects(elements), pd.Series(elements, dtype=object)):
        assert is_image_input(X)
        with pytest.raises(ValueError, match=rf"(?s)X\[{place}\] is not an image: .*got .*{message}") as caught:
            ImageInputs(X)
        assert SECRET not in str(caught.value)
    if case not in ("a list", "a pair"):  # of which a data set gives the image
        inputs = ImageInputs(Column(elements))
        with pytest.raises(ValueError, match=rf"X\[{place}\] is not an image"):
            inputs.batch(0, 3)


def test_ten_elements_that_are_no_images_are_named():
    with pytest.raises(ValueError, match=r"(?s)^12 elements of X cannot be used:\nX\[1\] .*X\[10\] ") as caught:
        ImageInputs([PICTURE, *[None] * 12])
    assert "X[11]" not in str(caught.value)


def test_labels_of_a_data_set_are_pointed_at():
    X = Pairs([PICTURE])
    assert "y=[label for _, label in X]" in labels_of_dataset(X)
    X.targets = [0]
    assert "y=X.targets" in labels_of_dataset(X)
    X.column_names = ["image", "label"]
    assert "y=X['label']" in labels_of_dataset(X)
    assert labels_of_dataset([PICTURE]) == labels_of_dataset(None) == ""


# ------------------------------------------------------------------------------------------ frames and archives


@pytest.mark.parametrize("dtype", ["UInt8", "Int64", "Float32", "boolean"])
def test_nullable_frames_become_plain(dtype):
    plain = pd.DataFrame({"a": [0, 1], "b": [1, 0]}).astype(dtype.lower().replace("boolean", "bool"))
    pd.testing.assert_frame_equal(plain_frame(plain.astype(dtype)), plain)
    others = (pd.DataFrame({"a": ["x"]}), pd.DataFrame({"a": pd.Categorical(["x"])}), plain.to_numpy(), None)
    assert all(plain_frame(other) is other for other in (plain, *others))


def test_frames_of_arrow_and_of_polars(color, tmp_path):
    polars = pytest.importorskip("polars")
    rows, names = color.reshape(len(color), -1), [str(path) for path in as_files(color, tmp_path)]
    frame = polars.DataFrame(rows, schema=[f"p{i}" for i in range(rows.shape[1])])
    assert torch.equal(whole(frame, image_shape=color.shape[1:]), whole(color))
    for X in (polars.DataFrame({"path": names}), polars.Series(names)):
        assert is_image_input(X)
        assert torch.equal(whole(X), whole(color))
    with pytest.raises(ValueError, match=r"X\[1\] is not an image.*missing"):
        ImageInputs(polars.Series(["a.png", None]))
    with pytest.raises(ValueError, match=r"pass X\['path'\]"):
        ImageInputs(polars.DataFrame({"path": names, "age": [1.0] * len(names)}))


def test_members_of_a_zip_archive_and_open_files(color, tmp_path):
    names = [f"{index}.png" for index in range(len(color))]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, image in zip(names, color, strict=True):
            archive.writestr(name, encoded(image))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for X in ([archive.open(name) for name in names], [zipfile.Path(archive, name) for name in names]):
            for n_jobs in (1, 2):
                assert torch.equal(whole(X, n_jobs=n_jobs), whole(color))
    path = as_files(color[:1], tmp_path)[0]
    with path.open("rb") as file:
        file.read(20)  # they are read from the start, each time
        assert torch.equal(whole([file, file]), whole(color[[0, 0]]))
    with path.open(encoding="latin-1") as file, pytest.raises(ValueError, match=r"opened as text.*'rb'"):
        whole([file])
    with pytest.raises(ValueError, match=r"X\[0\] \('.*0\.png'\) is a file .* cannot be read: .*closed"):
        whole([file])
