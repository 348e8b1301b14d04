"""Data as people have them: data sets, frames, missing labels, threads, folders; the model is that of arrays."""

import io

import numpy as np
import pandas as pd
import pytest
from support.data import make_images, tiny_net
from support.images import Pairs, as_files, as_objects, as_pil, encoded

from sklearn_lqf import LQFClassifier, LQFRegressor, load_image_folder

X, Y = make_images(12, size=8)
ROWS = X.reshape(12, -1)


def fitted(images, y=Y, **parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(width=4), prior="last", image_size=None, **parameters).fit(images, y)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return fitted(X).decision_function(X)


FORMS = {
    "data set": (lambda folder: Pairs(as_pil(X)), {}),
    "rows with images": (lambda folder: [{"image": image} for image in as_pil(X)], {}),
    "memory files": (lambda folder: [io.BytesIO(encoded(image)) for image in X], {}),
    "bytes": (lambda folder: [encoded(image) for image in X], {}),
    "paths, in threads": (lambda folder: as_files(X, folder), {"execution": {"n_jobs": 2, "batch_size": 3}}),
    "nullable frame": (
        lambda folder: pd.DataFrame(ROWS).astype("UInt8").rename(columns=str),
        {"image_shape": (8, 8, 3)},
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_model_is_that_of_arrays(case, tmp_path, expected):
    make, parameters = FORMS[case]
    images = make(tmp_path)
    model = fitted(images, **parameters)
    np.testing.assert_allclose(model.decision_function(images), expected, rtol=1e-5, atol=1e-6)
    assert hasattr(model, "feature_names_in_") == ("frame" in case)


def test_a_folder_from_files_to_predictions(tmp_path):
    for name in np.unique(Y):
        (tmp_path / name).mkdir()
        as_files(X[name == Y], tmp_path / name)
    data = load_image_folder(tmp_path)
    model = fitted(data.paths, data.target)
    assert data.target_names == sorted(set(Y))
    assert (model.predict(data.paths) == data.target).mean() > 0.5


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT])
def test_missing_labels_are_named_by_row(missing):
    labels = as_objects(Y.tolist())
    labels[[2, 7]] = missing
    for y in (labels, pd.Series(labels), labels.tolist()):
        with pytest.raises(
            ValueError, match=r"^Input y contains NaN or None: no value in rows 2, 7\. Leave these rows"
        ):
            fitted(X, y)


def test_missing_values_are_named_by_row():
    model = LQFRegressor(tiny_net(width=4), prior="last", image_size=None)
    values = np.arange(24.0).reshape(12, 2)
    values[5, 1] = np.nan
    numbers = pd.Series(range(12), dtype="Int64")
    numbers[5] = pd.NA
    for y in (values, numbers, [*range(5), None, *range(6)]):
        with pytest.raises(ValueError, match="contains NaN or None: no value in row 5"):
            model.fit(X, y)


@pytest.mark.parametrize("dtype", ["string", "category", "Int64", "boolean"])
def test_labels_in_columns_of_pandas(dtype):
    codes = np.unique(Y, return_inverse=True)[1]
    y = {"Int64": codes, "boolean": codes > 0}.get(dtype, Y)
    model = fitted(X, pd.Series(y).astype(dtype))
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    np.testing.assert_array_equal(model.predict(X), fitted(X, y).predict(X))


def test_files_of_models_are_given_by_path():
    model = fitted(X)
    for call in (model.save, LQFClassifier.load):
        with pytest.raises(TypeError, match="path must be a str or a path, got BytesIO: pass a path"):
            call(io.BytesIO())


def test_labels_of_a_data_set_are_given_apart():
    with pytest.raises(
        ValueError, match=r"requires y to be passed, but the target y is None\. .*y=\[label for _, label"
    ):
        fitted(Pairs(as_pil(X)), None)
