"""ImageReader: every form of X gives the same pixels, scikit-learn's own checks, and bad input."""

import numpy as np
import pandas as pd
import pytest
import sklearn
from PIL import Image
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from support.data import make_images
from support.images import as_files, every_form

from sklearn_lqf import ImageReader
from sklearn_lqf.estimators import image_reader as module
from sklearn_lqf.images.reading import ImageInputs

X, _ = make_images(n=6)
ROWS = X.reshape(6, -1)


@pytest.fixture
def column(tmp_path) -> pd.DataFrame:
    """A column of paths."""
    return pd.DataFrame({"path": [str(path) for path in as_files(X, tmp_path)]}, index=range(3, 9))


# ---------------------------------------------------------------------------------------------------------- pixels


def test_all_forms_are_kept_bit_by_bit(tmp_path):
    forms = {name: (form, options) for name, form, options in every_form(X, tmp_path)}
    paths = forms["string list"][0]
    forms |= {"floats": (X / 255, {}), "objects": (np.array(paths, dtype=object)[:, None], {})}
    for name, (form, options) in forms.items():
        reader = ImageReader(**options)
        images = reader.fit_transform(form)
        assert images.dtype == np.uint8, name
        assert np.array_equal(images, X), name
        assert reader.output_shape_ == (12, 12, 3), name
        assert np.array_equal(reader.set_params(raveled=True, image_size=12).transform(form), ROWS), name
    for size in (None, 5):
        expected = ImageReader(size).fit_transform(paths)
        assert np.array_equal(ImageReader(size, n_jobs=2).transform(paths), expected)


def test_resizes_as_the_estimator_does_and_rounds():
    mixed = [Image.fromarray(X[0]), Image.fromarray(X[1][:5])]
    for interpolation in ("nearest", "bilinear", "bicubic"):
        images = ImageReader((8, 10), interpolation=interpolation).fit_transform(mixed)
        exact = ImageInputs(mixed, image_size=(8, 10), interpolation=interpolation).batch(0, 2)
        assert images.shape == (2, 8, 10, 3)
        assert np.abs(images / 255 - exact.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6


def test_channels(column):
    gray = ImageReader(channels=1).fit_transform(column)
    assert np.array_equal(gray[0, ..., 0], Image.fromarray(X[0]).convert("L"))
    assert np.array_equal(ImageReader().fit_transform(X[..., 0]), np.repeat(X[..., :1], 3, -1))
    five = np.concatenate([X, X[..., :2]], -1)
    assert np.array_equal(ImageReader(channels=5).fit_transform(five), five)


def test_files_are_decoded_once_and_no_fit_is_needed(column, monkeypatch):
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), original(path))[1])
    reader = ImageReader(8)
    before = dict(vars(reader))
    images = reader.transform(column)
    assert vars(reader) == before
    assert opened == list(column["path"])
    assert np.array_equal(reader.fit_transform(column), images)
    opened.clear()
    ImageReader().fit(column)  # without a size the first file tells it
    assert opened == list(column["path"][:1])


# ----------------------------------------------------------------------------------------- scikit-learn contract


@pytest.mark.parametrize("raveled", [True, False])
def test_every_check_of_scikit_learn_passes(raveled, monkeypatch):
    """The suite for real, but for one thing: its tables have any number of columns and values beyond 0..1.

    Such tables are no images of one `image_shape`, so that a stand-in for `ImageInputs` takes each row as an image
    of one line of pixels, squashed into 0..1. All else is the reader's own.
    """

    def lines(rows, *, image_shape, **options):
        rows = np.asarray(rows, dtype=float)
        return ImageInputs((rows / (1 + rows))[:, np.newaxis], **options)

    monkeypatch.setattr(module, "ImageInputs", lines)
    results = check_estimator(ImageReader(image_shape=(1, 1), raveled=raveled), on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}
    assert sum(r["status"] == "passed" for r in results) >= 40
    tags = ImageReader(image_shape=(1, 1)).__sklearn_tags__()
    assert not (tags.requires_fit or tags.no_validation or tags._skip_test)
    assert not ImageReader().__sklearn_tags__().input_tags.two_d_array  # a table of numbers is refused


def test_containers_and_feature_names(column):
    rows = ImageReader(2, raveled=True).set_output(transform="pandas").fit_transform(column)
    assert list(rows.index) == list(column.index)
    assert rows.columns[-1] == "pixel_1_1_2"
    assert set(rows.dtypes) == {np.dtype(np.uint8)}
    for reader in (ImageReader(), make_pipeline(ImageReader())):  # images remain arrays, without names
        assert np.array_equal(reader.set_output(transform="pandas").fit_transform(column), X)
    with sklearn.config_context(transform_output="pandas"):
        assert np.array_equal(ImageReader().fit_transform(column), X)
    assert not hasattr(ImageReader(2).fit(X), "get_feature_names_out")
    reader = ImageReader(2, raveled=True, channels=1)
    with pytest.raises(NotFittedError):
        reader.get_feature_names_out()
    names = reader.fit(X[..., 0]).get_feature_names_out(["path"])
    assert list(names) == ["pixel_0_0_0", "pixel_0_1_0", "pixel_1_0_0", "pixel_1_1_0"]


def test_columns_of_raveled_rows_are_those_of_fit():
    frame = pd.DataFrame(ROWS).rename(columns=str)
    reader = ImageReader(image_shape=(12, 12, 3)).fit(frame)
    assert reader.n_features_in_ == 432
    assert list(reader.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        reader.transform(frame.rename(columns={"0": "other"}))
    assert not {"n_features_in_", "feature_names_in_"} & set(vars(reader.fit(X)))
    with pytest.raises(ValueError, match="432"):  # a fit that is refused leaves nothing
        reader.fit(ROWS[:, 1:])
    assert not hasattr(reader, "output_shape_")


# ------------------------------------------------------------------------------------------------------ bad input

# Of each kind that the tests of reading know one; and those that are the reader's own.
BAD_X = {
    "numbers": (ROWS, {}, r"X does not hold images: got numpy.ndarray of shape \(6, 432\).*image_shape"),
    "two columns": (pd.DataFrame({"path": ["x.png"], "age": [3]}), {}, r"frame of 2 columns.*ColumnTransformer"),
    "negative rows": (ROWS / -255, {"image_shape": (12, 12, 3)}, "Negative values"),
    "color for gray": (X, {"channels": 1}, r"3 channels.*1 channel\(s\) are needed.*grayscale"),
    "size": (X, {"image_size": 0}, "image_size must be"),
    "raveled": (X, {"raveled": "yes"}, "raveled must be True or False"),
    "channels": (X, {"channels": 0}, "channels must be an int >= 1, got 0"),
    "shape": (X, {"image_shape": (12,)}, "image_shape must be"),
    "axis": (X, {"channel_axis": 1}, "channel_axis"),
    "interpolation": (X, {"interpolation": "lanczos"}, "interpolation must be"),
    "jobs": (X, {"n_jobs": 0}, "n_jobs must be None or an int other than 0"),
}


@pytest.mark.parametrize("case", BAD_X)
def test_bad_images_and_parameters(case):
    bad, parameters, message = BAD_X[case]
    for method in ("fit_transform", "transform"):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            getattr(ImageReader(**parameters), method)(bad)


def test_images_of_another_size_than_in_fit():
    with pytest.raises(ValueError, match=r"shape \(6, 12, 3\).*expecting.*\(12, 12, 3\).*image_size"):
        ImageReader().fit(X).transform(X[:, :6])
    ImageReader(12).fit(X).transform(X[:, :6])
