"""A network by name is prepared once for several fits."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sklearn_lqf import LQFClassifier
from sklearn_lqf.estimators import data
from sklearn_lqf.network import prepared
from sklearn_lqf.runtime.memory import Recent

X = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
Y = np.arange(8) % 2


@pytest.fixture
def made(monkeypatch):
    """How often networks were prepared."""
    calls, split = [], prepared.split_network
    monkeypatch.setattr(prepared, "split_network", lambda *a, **k: (calls.append(1), split(*a, **k))[1])
    monkeypatch.setattr(data, "_READERS", Recent(2))
    return calls


def test_fits_share_a_network_as_long_as_it_is_the_same(made):
    first = LQFClassifier().fit(X, Y)
    second = LQFClassifier(prior="evidence", alpha=0.1).fit(X, Y)
    assert len(made) == 1
    assert second._model.reader is first._model.reader
    assert LQFClassifier(random_state=1).fit(X, Y)._model.reader.seed != first._model.reader.seed
    other = LQFClassifier(weights=None, random_state=1).fit(X, Y)
    again = LQFClassifier(weights=None, random_state=1).fit(X, Y)
    assert len(made) == 3
    assert_array_equal(again.decision_function(X), other.decision_function(X))


def test_the_last_values_are_kept_and_their_warnings_repeated():
    recent, made = Recent(1), []

    def make() -> int:
        made.append(1)
        warnings.warn("odd", UserWarning, stacklevel=1)
        return len(made)

    for key, wanted in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        with pytest.warns(UserWarning, match="odd"):
            assert recent.get(key, make) == wanted
