"""LQFClassifier inside the tools of scikit-learn: each does with images what it does with tables."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from support.data import make_images, tiny_net
from support.images import as_files

from sklearn_lqf import ImageReader, LQFClassifier

X, Y = make_images(n=36)
SHAPE = (12, 12, 3)


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(), **parameters)


@pytest.fixture(scope="module")
def fitted() -> LQFClassifier:
    return classifier().fit(X, Y)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """Paths of the training images beside a column of numbers."""
    paths = [str(path) for path in as_files(X, tmp_path_factory.mktemp("images"))]
    return pd.DataFrame({"path": paths, "length": np.arange(len(X))})


def test_column_of_paths_equals_arrays(fitted, table):
    expected = fitted.decision_function(X)
    column = make_column_transformer(("passthrough", ["path"]))
    rows = make_column_transformer((ImageReader(raveled=True), ["path"]))
    for steps in (
        (column, classifier()),
        (column, ImageReader(), classifier()),
        (rows, classifier(image_shape=SHAPE)),
    ):
        pipeline = make_pipeline(*steps)
        assert np.array_equal(pipeline.fit(table, Y).decision_function(table), expected)
        pipeline = clone(pipeline).set_output(transform="pandas")
        assert np.array_equal(pipeline.fit(table, Y).decision_function(table), expected)


def test_pipelines_and_searches_decode_once(table, tmp_path, monkeypatch):
    opened, original = [], Image.open  # paths in the order in which they are decoded
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), original(path))[1])
    paths, grid = list(table["path"]), {"alpha": [1e-2, 1.0]}
    pipeline = make_pipeline(ImageReader(12), classifier(), memory=str(tmp_path))
    pipeline.fit(paths, Y).decision_function(paths)
    assert opened == 2 * paths  # for the fit, and for the prediction
    opened.clear()
    pipeline.set_params(lqfclassifier__alpha=1.0).fit(paths, Y)
    assert opened == []
    pipeline = make_pipeline(ImageReader(12), GridSearchCV(classifier(), grid, cv=2)).fit(table[["path"]], Y)
    assert opened == paths
    expected = GridSearchCV(classifier(), grid, cv=2).fit(X, Y).cv_results_["mean_test_score"]
    np.testing.assert_array_equal(pipeline[-1].cv_results_["mean_test_score"], expected)
