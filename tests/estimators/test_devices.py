"""Fits on a GPU, a real one where there is one, and a pretended one that refuses what is on the wrong device."""

import pickle

import numpy as np
import pytest
import torch
from support.data import make_images, merged, tiny_net
from support.devices import PretendedGPU

from sklearn_lqf import ImageFeatures, LQFClassifier

X, Y = make_images(n=31)
KINDS = {
    "default": {},
    "directions": {"tangents": "both", "tangent_layers": "all"},
    "conjugate gradients": {"solver": "pcg", "tol": 1e-9},
    "more rows than features": {"prior": "last"},
    "views": {"views": ("identity", "flip")},
}
PAPER = {  # its dual numbers do not survive a pretended GPU
    "paper": {"model": "paper", "store_data": False},
    "paper, sgd": {"model": "paper", "store_data": False, "solver": "sgd", "max_iter": 2, "tol": 1.0},
}


def answers(device: str, **parameters) -> dict[str, np.ndarray]:
    """What a fit on a device says, by name."""
    given = {"backbone": tiny_net(), "execution": {"dtype": "float64", "device": device}, "store_data": True}
    clf = LQFClassifier(**merged(given, parameters)).fit(X, Y)
    assert clf.device_.startswith(device)
    found = {"coef": clf.coef_, "probabilities": clf.predict_proba(X)}
    if clf.model == "paper":  # answers nothing else
        return found
    twin = pickle.loads(pickle.dumps(clf))
    return found | {
        "features": clf.features(X[:3]),
        "leave one out": clf.leave_one_out(),
        "influence": clf.influence(None, None, X[:5]),
        "deviation": clf.decision_function(X[:5], return_std=True)[1],
        "updated": twin.forget([3, 5]).partial_fit(X[:2], Y[:2]).predict_proba(X),
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_a_gpu_stays_there(kind):
    with PretendedGPU():
        found = answers("cuda", **KINDS[kind])
    assert_equal(found, answers("cpu", **KINDS[kind]), 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS | PAPER)
def test_cuda_agrees_with_the_cpu(kind):
    parameters = (KINDS | PAPER)[kind]
    assert_equal(answers("cuda", **parameters), answers("cpu", **parameters), 1e-6)


def test_image_features_on_a_gpu():
    def features(device: str) -> np.ndarray:
        execution = {"dtype": "float64", "device": device}
        return ImageFeatures(tiny_net(), tangents="local", execution=execution).fit_transform(X, Y)

    with PretendedGPU():
        found = features("cuda")
    np.testing.assert_allclose(found, features("cpu"), rtol=0, atol=1e-9)


def test_the_pretended_gpu_refuses_what_a_gpu_does():
    with PretendedGPU():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda" and (2 * there).to("cpu").device.type == here.device.type == "cpu"
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
