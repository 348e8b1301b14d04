"""What several fits share: a network by name, and what it computes of an image."""

import warnings

import numpy as np
import pytest
import torch
import torchvision
from numpy.testing import assert_array_equal
from support.data import make_images, merged, tiny_net

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones import backbone, checkpoints
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.engine.fitted import FeatureReader
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


def test_weights_are_read_again_when_their_file_changes(tmp_path, monkeypatch):
    read, path = [], tmp_path / "weights.pth"
    monkeypatch.setattr(backbone, "load_file", lambda *a: (read.append(1), checkpoints.load_file(*a))[1])
    net = torchvision.models.squeezenet1_1(weights=None)
    torch.save(net.state_dict(), path)
    first, second = (load_backbone("squeezenet1_1", path).module for _ in range(2))
    assert len(read) == 1 and first is not second
    with torch.no_grad():
        first.features[0].weight.zero_()  # what is returned is the caller's
        net.features[0].weight.fill_(0.5)
    assert second.features[0].weight.any()
    load_backbone("squeezenet1_1", path, image_size=96)
    assert load_backbone("squeezenet1_1", None, random_state=0).module.features[0].weight.any()
    torch.save(net.state_dict(), path)
    assert (load_backbone("squeezenet1_1", path).module.features[0].weight == 0.5).all()
    assert len(read) == 3


OTHERS = (
    {"n_directions": 1}, {"sketch_size": 3}, {"random_state": 1}, {"views": ("identity", "flip")},
    {"tangent_layers": ["block2"]}, {"negative_slope": 0.1}, {"preprocessing": {"mean": 0.4}},
    {"execution": {"dtype": "float64"}},
)  # fmt: skip


@pytest.mark.parametrize("tangent_layers", ["head", "all"])
def test_features_along_directions_are_computed_once(tangent_layers, monkeypatch, tmp_path):
    """Also where all layers have tangents, so that there is no trunk."""
    images, labels = make_images(n=8)
    rows, compute = [], FeatureReader._evaluate
    monkeypatch.setattr(FeatureReader, "_evaluate", lambda r, z: rows.append(len(z[0])) or compute(r, z))

    def fit(**options):
        options = merged({"backbone": tiny_net(), "tangents": "network", "tangent_layers": tangent_layers}, options)
        return LQFClassifier(**merged({"execution": {"memory": tmp_path}}, options)).fit(images, labels)

    first = fit()
    assert_array_equal(fit().decision_function(images), first.decision_function(images))
    fit(prior="evidence", alpha=0.1)
    assert sum(rows) == 8
    for k, options in enumerate(OTHERS):
        fit(**options)
        assert sum(rows) == 8 * (k + 2 + (k >= 3)), options  # two views are two images


def test_the_last_values_are_kept_and_their_warnings_repeated():
    recent, made = Recent(1), []

    def make() -> int:
        made.append(1)
        warnings.warn("odd", UserWarning, stacklevel=1)
        return len(made)

    for key, wanted in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        with pytest.warns(UserWarning, match="odd"):
            assert recent.get(key, make) == wanted
