"""The tolerance up to which the network is computed in bfloat16."""

import pickle

import numpy as np
import pytest
from support.data import make_images, tiny_net

from sklearn_lqf import LQFClassifier

X, Y = make_images()


def fitted(tolerance: float, **parameters) -> LQFClassifier:
    execution = {"dtype": "float32", "tolerance": tolerance}
    return LQFClassifier(tiny_net(), tangents="both", execution=execution, **parameters).fit(X, Y)


@pytest.mark.parametrize(("tolerance", "precision"), [(0, "full"), (1e-9, "full"), (0.3, "bfloat16")])
def test_features_are_within_the_tolerance(tolerance, precision):
    clf, exact = fitted(tolerance), LQFClassifier(tiny_net(), tangents="both").fit(X, Y)
    assert (clf.precision_, exact.precision_) == (precision, "full")
    features, wanted = clf.features(X), exact.features(X)
    assert np.array_equal(features, wanted) == (precision == "full")
    for start, stop in exact.groups_.values():  # images other than those of the check
        error = np.linalg.norm(features[:, start:stop] - wanted[:, start:stop])
        assert error <= 2 * tolerance * np.linalg.norm(wanted[:, start:stop])


def test_the_precision_is_that_of_the_fit(tmp_path):
    clf = fitted(0.3)
    path = tmp_path / "model.safetensors"
    pytest.importorskip("safetensors")
    clf.save(path)
    for twin in (pickle.loads(pickle.dumps(clf)), LQFClassifier.load(path, backbone=tiny_net())):
        twin.set_params(execution__tolerance=0)
        assert twin.precision_ == "bfloat16"
        assert np.array_equal(twin.decision_function(X), clf.decision_function(X))


def test_float64_is_never_reduced():
    clf = LQFClassifier(tiny_net(), execution={"dtype": "float64", "tolerance": 1.0}).fit(X, Y)
    assert clf.precision_ == "full"


@pytest.mark.parametrize(("tolerance", "accuracy"), [(0.0, 1e-4), (10.0, 0.2)])
def test_updates_of_vectors_read_as_the_fit_did(tolerance, accuracy):
    vectors = X.reshape(len(X), -1)[:, :8].astype(float)
    execution = {"dtype": "float32", "tolerance": tolerance}

    def model(rows: slice) -> LQFClassifier:
        clf = LQFClassifier(tangents="network", random_state=3, store_data=True, execution=execution)
        return clf.fit(vectors[rows], Y[rows])

    updated, expected = model(slice(None)).forget(0), model(slice(1, None))
    assert updated._model.reader.precision == expected.precision_ == ("bfloat16" if tolerance else "full")
    found, wanted = updated.decision_function(vectors), expected.decision_function(vectors)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=accuracy * np.abs(wanted).max())
