"""ImageReader: every form of X gives the same pixels, scikit-learn's own checks, and every bad input."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from support.data import make_images

from sklearn_lqf import ImageReader
from sklearn_lqf.estimators import image_reader as module
from sklearn_lqf.images.reading import ImageInputs

X, _ = make_images(n=6)


def as_files(folder: Path, images=X) -> list[str]:
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return [str(path) for path in paths]


# ---------------------------------------------------------------------------------------------------------- pixels


def test_all_forms_are_kept_bit_by_bit(tmp_path):
    paths = as_files(tmp_path)
    frame = pd.DataFrame({"path": paths})
    forms = {
        "array": (X, {}),
        "floats": (X / 255, {}),
        "raveled": (X.reshape(6, -1), {"image_shape": (12, 12, 3)}),
        "nullable": (pd.DataFrame(X.reshape(6, -1)).astype("UInt8"), {"image_shape": (12, 12, 3)}),
        "channels first": (X.transpose(0, 3, 1, 2), {"channel_axis": 0}),
        "PIL": ([Image.fromarray(x) for x in X], {}),
        "paths": ([Path(p) for p in paths], {}),
        "series": (frame["path"], {}),
        "column": (frame, {}),
        "objects": (frame.to_numpy(dtype=object), {}),  # what a ColumnTransformer hands on
        "mixed": ([*paths[:3], *X[3:]], {}),
    }
    for name, (form, parameters) in forms.items():
        for size in (None, 12):
            reader = ImageReader(size, **parameters)
            images = reader.fit_transform(form)
            assert images.dtype == np.uint8, name
            assert np.array_equal(images, X), name
            assert reader.output_shape_ == (12, 12, 3), name
            rows = reader.set_params(raveled=True).fit_transform(form)
            assert np.array_equal(rows, X.reshape(6, -1)), name


def test_resizes_as_the_estimator_does_and_rounds():
    mixed = [Image.fromarray(X[0]), Image.fromarray(X[1][:5])]
    for interpolation in ("nearest", "bilinear", "bicubic"):
        images = ImageReader((8, 10), interpolation=interpolation).fit_transform(mixed)
        exact = ImageInputs(mixed, image_size=(8, 10), interpolation=interpolation).batch(0, 2)
        assert images.shape == (2, 8, 10, 3)
        assert np.abs(images / 255 - exact.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6


def test_channels(tmp_path):
    gray = ImageReader(channels=1).fit_transform(as_files(tmp_path))
    assert gray.shape == (6, 12, 12, 1)
    assert np.array_equal(gray[0, ..., 0], Image.fromarray(X[0]).convert("L"))
    repeated = ImageReader().fit_transform(X[..., 0])
    assert np.array_equal(repeated, np.repeat(X[..., :1], 3, -1))
    five = np.concatenate([X, X[..., :2]], -1)
    assert np.array_equal(ImageReader(channels=5).fit_transform(five), five)


def test_threads_read_the_same_pixels(tmp_path):
    paths = as_files(tmp_path, np.repeat(X, 4, axis=0))
    for size in (None, 5):
        expected = ImageReader(size).fit_transform(paths)
        assert np.array_equal(ImageReader(size, n_jobs=2).fit_transform(paths), expected)


def test_needs_no_fit():
    reader = ImageReader(4)
    before = dict(vars(reader))
    assert np.array_equal(reader.transform(X), ImageReader(4).fit_transform(X))
    assert vars(reader) == before


def test_files_are_decoded_once(tmp_path, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), original(path))[1])
    paths = as_files(tmp_path)
    ImageReader(8).fit_transform(paths)
    assert opened == paths
    opened.clear()
    ImageReader().fit(paths)  # without a size the first file tells it
    assert opened == paths[:1]


# ----------------------------------------------------------------------------------------- scikit-learn contract


def test_every_check_of_scikit_learn_passes(monkeypatch):
    """The suite for real, but for one thing: its tables have any number of columns and values beyond 0..1.

    Such tables are no images of one `image_shape`, so that a stand-in for `ImageInputs` takes each row as an image
    of one line of pixels, squashed into 0..1. All else is the reader's own.
    """

    def lines(rows, *, image_shape, **options):
        rows = np.asarray(rows, dtype=float)
        return ImageInputs((rows / (1 + rows))[:, np.newaxis], **options)

    monkeypatch.setattr(module, "ImageInputs", lines)
    for raveled in (True, False):
        results = check_estimator(ImageReader(image_shape=(1, 1), raveled=raveled), on_skip=None, on_fail=None)
        failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
        assert not failed
        assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}
        assert sum(r["status"] == "passed" for r in results) >= 40


def test_tags_are_honest():
    assert not ImageReader().__sklearn_tags__().input_tags.two_d_array  # a table of numbers is refused
    with pytest.raises(ValueError, match="image_shape"):
        ImageReader().fit(X.reshape(6, -1))
    tags = ImageReader(image_shape=(12, 12, 3)).__sklearn_tags__()
    assert tags.input_tags.two_d_array
    assert not tags.requires_fit
    assert not tags.no_validation
    assert not tags._skip_test


def test_feature_names_are_there_for_rows_only():
    reader = ImageReader(2, raveled=True, channels=1)
    with pytest.raises(NotFittedError):
        reader.get_feature_names_out()
    names = reader.fit(X[..., 0]).get_feature_names_out(["path"])
    assert list(names) == ["pixel_0_0_0", "pixel_0_1_0", "pixel_1_0_0", "pixel_1_1_0"]
    assert not hasattr(ImageReader(2).fit(X), "get_feature_names_out")


def test_containers(tmp_path):
    column = pd.DataFrame({"path": as_files(tmp_path)}, index=range(3, 9))
    rows = ImageReader(2, raveled=True).set_output(transform="pandas").fit_transform(column)
    assert list(rows.index) == list(column.index)
    assert rows.columns[-1] == "pixel_1_1_2"
    assert set(rows.dtypes) == {np.dtype(np.uint8)}
    for images in (
        ImageReader().set_output(transform="pandas").fit_transform(column),
        make_pipeline(ImageReader()).set_output(transform="pandas").fit_transform(column),
    ):
        assert np.array_equal(images, X)
    with sklearn.config_context(transform_output="pandas"):
        assert np.array_equal(ImageReader().fit_transform(column), X)


def test_columns_of_raveled_rows_are_those_of_fit():
    frame = pd.DataFrame(X.reshape(6, -1)).rename(columns=str)
    reader = ImageReader(image_shape=(12, 12, 3)).fit(frame)
    assert reader.n_features_in_ == 432
    assert list(reader.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        reader.transform(frame.rename(columns={"0": "other"}))
    assert not hasattr(reader.fit(X), "n_features_in_")
    assert not hasattr(reader, "feature_names_in_")


def test_clones_and_pickles():
    reader = ImageReader((4, 6), raveled=True, channels=1, interpolation="nearest").fit(X[..., 0])
    assert clone(reader).get_params() == reader.get_params()
    twin = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(twin.transform(X[..., 0]), reader.transform(X[..., 0]))
    assert twin.output_shape_ == (4, 6, 1)


# ------------------------------------------------------------------------------------------------------ bad input

ROWS = X.reshape(6, -1)
BAD_X = {
    "numbers": (ROWS, {}, r"X does not hold images: got numpy.ndarray of shape \(6, 432\).*image_shape"),
    "list of numbers": ([1, 2], {}, "got list of int"),
    "nothing": ([], {}, "empty list"),
    "none": (None, {}, "got NoneType"),
    "one path": ("x.png", {}, "got str.*list"),
    "one image": (Image.new("L", (4, 4)), {}, "got PIL.Image.Image.*list"),
    "two columns": (
        pd.DataFrame({"path": ["x.png"], "age": [3]}),
        {},
        r"frame of 2 columns.*'path'.*ColumnTransformer",
    ),
    "no rows": (X[:0], {}, "0 sample"),
    "no rows, raveled": (ROWS[:0], {"image_shape": (12, 12, 3)}, "0 sample"),
    "other columns": (ROWS, {"image_shape": (12, 12)}, "432 features.*144"),
    "text": (np.full((2, 4), "a"), {"image_shape": (2, 2)}, "numeric"),
    "negative rows": (ROWS / -255, {"image_shape": (12, 12, 3)}, "Negative values"),
    "NaN in rows": (np.full((2, 4), np.nan), {"image_shape": (2, 2)}, "NaN"),
    "five axes": (X[None], {}, r"got an array with 5 dimension\(s\)"),
    "floats 0..255": (X * 1.0, {}, r"0\.\.1"),
    "int64": (X.astype(int), {}, "uint8"),
    "NaN": (np.full((2, 4, 4), np.nan), {}, "NaN"),
    "four channels": (X[..., [0, 1, 2, 0]], {}, r"4 channels.*3 channel\(s\) are needed.*alpha"),
    "color for gray": (X, {"channels": 1}, r"3 channels.*1 channel\(s\) are needed.*grayscale"),
    "channels first": (X.transpose(0, 3, 1, 2), {}, "channel_axis=0"),
    "mixed sizes": ([*X, X[0, :7]], {}, r"X\[6\] is 7x12.*image_size"),
    "a number among images": ([*X, 5], {}, r"X\[6\] is not an image.*got int"),
    "missing value": (np.array([*map(str, range(2)), None], object)[::-1], {}, r"X\[0\] is not an image.*got NoneType"),
    "files of 5 channels": ([Image.new("RGB", (4, 4))], {"channels": 5}, r"X\[0\].*not the 5 that are needed"),
}


@pytest.mark.parametrize("case", BAD_X)
def test_bad_images(case):
    bad, parameters, message = BAD_X[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ImageReader(**parameters).fit_transform(bad)


def test_bad_files_are_named_by_index_and_path(tmp_path):
    paths = as_files(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    for size in (None, 8):
        for column in ([*paths, tmp_path / "bad.png"], pd.DataFrame({"path": [*paths, str(tmp_path / "bad.png")]})):
            with pytest.raises(ValueError, match=r"X\[6\].*bad\.png.*cannot be read"):
                ImageReader(size).fit_transform(column)
        with pytest.raises(FileNotFoundError, match=r"X\[6\].*gone\.png.*does not exist"):
            ImageReader(size).fit_transform([*paths, str(tmp_path / "gone.png")])


BAD_PARAMETERS = {
    "size": ({"image_size": 0}, "image_size must be"),
    "size of the backbone": ({"image_size": "backbone"}, "image_size must be"),
    "raveled": ({"raveled": "yes"}, "raveled must be True or False"),
    "channels": ({"channels": 0}, "channels must be an int >= 1, got 0"),
    "channels bool": ({"channels": True}, "channels must be"),
    "channels text": ({"channels": "RGB"}, "channels must be"),
    "shape": ({"image_shape": (12,)}, "image_shape must be"),
    "other shape": ({"image_shape": (5, 5, 3)}, "image_shape"),
    "axis": ({"channel_axis": 1}, "channel_axis"),
    "interpolation": ({"interpolation": "lanczos"}, "interpolation must be"),
    "jobs": ({"n_jobs": 0}, "n_jobs must be None or an int other than 0"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
@pytest.mark.parametrize("method", ["fit", "transform"])
def test_bad_parameters(case, method):
    parameters, message = BAD_PARAMETERS[case]
    with pytest.raises(ValueError, match=message):
        getattr(ImageReader(**parameters), method)(X)


def test_images_of_another_size_than_in_fit():
    reader = ImageReader().fit(X)
    with pytest.raises(ValueError, match=r"shape \(6, 12, 3\).*expecting.*\(12, 12, 3\).*image_size"):
        reader.transform(X[:, :6])
    ImageReader(12).fit(X).transform(X[:, :6])
