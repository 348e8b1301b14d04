"""Networks of torchvision really run: randomly initialized, fitted for one iteration."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from sklearn_lqf import LQFClassifier

pytestmark = pytest.mark.slow

CONVOLUTIONAL = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn", "convnext_tiny",
]  # fmt: skip
TRANSFORMERS = ["vit_b_16", "swin_t"]


def fit_one_iteration(backbone, tangent_layers, size):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    clf = LQFClassifier(
        backbone, weights=None, tangent_layers=tangent_layers, max_iter=1, tol=0, random_state=0, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration
        clf.fit(X, [0, 1, 0, 1])
    assert clf.n_iter_ == 1
    assert np.isfinite(clf.coef_).all()
    assert np.any(clf.coef_ != 0)
    assert np.isfinite(clf.decision_function(X)).all()
    return clf


@pytest.mark.parametrize("backbone", CONVOLUTIONAL + TRANSFORMERS)
def test_last_stage(backbone):
    clf = fit_one_iteration(backbone, 1, 224 if backbone in TRANSFORMERS else 64)
    head = 2 * (clf._model.split.n_features + 1)
    assert clf.n_parameters_ > head


@pytest.mark.parametrize("backbone", CONVOLUTIONAL)
def test_all_layers(backbone):
    everything = fit_one_iteration(backbone, "all", 64)
    assert everything.n_parameters_ > 2 * (everything._model.split.n_features + 1)


def test_two_heads_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="head_dist"):
        fit_one_iteration("timm:deit_tiny_distilled_patch16_224", 1, 224)
