"""Data as people have them: folders, missing labels, columns of pandas; forms of images are in `test_properties`."""

import io

import numpy as np
import pandas as pd
import pytest
from support.data import make_images, tiny_net
from support.images import Pairs, as_files, as_objects, as_pil

from sklearn_lqf import LQFClassifier, LQFRegressor, load_image_folder

X, Y = make_images(12, size=8)


def fitted(images, y=Y, **parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(width=4), prior="last", image_size=None, **parameters).fit(images, y)


def test_a_folder_from_files_to_predictions(tmp_path):
    for name in np.unique(Y):
        (tmp_path / name).mkdir()
        as_files(X[name == Y], tmp_path / name)
    data = load_image_folder(tmp_path)
    assert data.target_names == sorted(set(Y))
    model, threads = (
        fitted(data.paths, data.target, execution=execution) for execution in (None, {"n_jobs": 2, "batch_size": 3})
    )
    assert (model.predict(data.paths) == data.target).mean() > 0.5
    one, other = (m.decision_function(data.paths) for m in (model, threads))
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_missing_labels_and_values_are_named_by_row():
    for missing in (None, float("nan"), pd.NA, pd.NaT):
        labels = as_objects(Y.tolist())
        labels[[2, 7]] = missing
        for y in (labels, pd.Series(labels), labels.tolist()):
            message = r"^Input y contains NaN or None: no value in rows 2, 7\. Leave these rows"
            with pytest.raises(ValueError, match=message):
                fitted(X, y)
    values = np.arange(24.0).reshape(12, 2)
    values[5, 1] = np.nan
    numbers = pd.Series(range(12), dtype="Int64")
    numbers[5] = pd.NA
    for y in (values, numbers, [*range(5), None, *range(6)]):
        with pytest.raises(ValueError, match="contains NaN or None: no value in row 5"):
            LQFRegressor(tiny_net(width=4), prior="last", image_size=None).fit(X, y)


@pytest.mark.parametrize("dtype", ["string", "category", "Int64", "boolean"])
def test_labels_in_columns_of_pandas(dtype):
    codes = np.unique(Y, return_inverse=True)[1]
    y = {"Int64": codes, "boolean": codes > 0}.get(dtype, Y)
    model = fitted(X, pd.Series(y).astype(dtype))
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    np.testing.assert_array_equal(model.predict(X), fitted(X, y).predict(X))


def test_what_is_given_otherwise_is_said():
    for call in (fitted(X).save, LQFClassifier.load):
        with pytest.raises(TypeError, match="path must be a str or a path, got BytesIO: pass a path"):
            call(io.BytesIO())
    with pytest.raises(ValueError, match=r"the target y is None\. .*y=\[label for _, label"):
        fitted(Pairs(as_pil(X)), None)
