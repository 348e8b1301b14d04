"""Bounds hold, and the network at w0 + d is the network."""

import copy

import numpy as np
import pytest
import torch
from images import make_images, tiny_net
from sklearn.exceptions import NotFittedError

from sklearn_lqf import LQFClassifier, LQFRegressor

X, Y = make_images(15)
NEW, _ = make_images(6, seed=1)


def classifier(**parameters) -> LQFClassifier:
    return LQFClassifier(tiny_net(), **{"dtype": "float64", "tol": 1e-10, "max_iter": 1000, **parameters})


def test_bound_of_outputs_holds_and_is_not_loose_beyond_reason():
    rough, best = classifier(tol=0.3).fit(X, Y), classifier().fit(X, Y)
    bound = rough.output_bound(NEW)
    distance = np.abs(rough.decision_function(NEW) - best.decision_function(NEW))
    assert bound.shape == (6, 3)
    assert (distance <= bound).all()
    assert (best.output_bound(NEW) < 1e-6 * bound).all()
    regressor = LQFRegressor(tiny_net(), dtype="float64").fit(X, 100.0 * (Y == "ant"))
    assert regressor.output_bound(NEW).shape == (6, 1)


@pytest.mark.parametrize("parameters", [{}, {"center": False, "readout": "last"}, {"target_scale": 5.0}])
def test_network_outputs_are_linear_to_first_order(parameters):
    clf = classifier(tangent_layers="all", **parameters).fit(X, Y)
    base = copy.deepcopy(clf)
    gaps = []
    for scale in (1.0, 0.1):
        clf.coef_ = scale * base.coef_
        gaps.append(np.abs(clf.network_outputs(NEW) - clf.decision_function(NEW)).max())
    assert 0 < gaps[1] < gaps[0] / 30  # of second order
    clf.coef_ = 0 * base.coef_
    np.testing.assert_allclose(clf.network_outputs(NEW), clf.decision_function(NEW), atol=1e-12)


def test_network_outputs_are_those_of_the_network_with_changed_weights():
    clf = classifier(tangent_layers=["block2"], readout="last", center=False).fit(X, Y)
    network = clf._model.network
    d, w, b = network.views(torch.from_numpy(clf.coef_))
    net = tiny_net().double()
    conv, norm = net.block2[0], net.block2[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    # BatchNorm is folded: the change is that of the product.
    change, shift = (d[name] for name in network.names)
    with torch.no_grad():
        conv.weight += change / scale.view(-1, 1, 1, 1)
        norm.bias += shift
        x = clf._model.preprocessing.normalize(torch.from_numpy(NEW / np.float32(255)).permute(0, 3, 1, 2).double())
        h = net.stem(x)
        h = net.block2(h + net.block1(h)).mean((2, 3))
        standardized = clf._model.standardization(h)
        expected = standardized @ (network.weight + w).T + network.bias + b
    np.testing.assert_allclose(clf.network_outputs(NEW), expected.numpy(), atol=1e-10)


def test_unfitted():
    for method in ("output_bound", "network_outputs"):
        with pytest.raises(NotFittedError):
            getattr(classifier(), method)(X)
