"""Networks of torchvision really run: randomly initialized, fitted to a few images."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torchvision.models import VisionTransformer

from sklearn_lqf import LQFClassifier

pytestmark = pytest.mark.slow

CONVOLUTIONAL = [
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn", "convnext_tiny",
]  # fmt: skip


def vision_transformer() -> nn.Module:
    """The layers of vit_b_16, smaller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
        nn.init.normal_(net.heads.head.weight)
        return net.eval()


def fit(backbone, size, **parameters):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    weights = None if isinstance(backbone, str) else "auto"
    clf = LQFClassifier(backbone, weights=weights, execution={"device": "cpu"}, **parameters)
    clf.fit(X, [0, 1, 0, 1])
    assert np.isfinite(clf.coef_).all()
    assert np.any(clf.coef_ != 0)
    assert np.isfinite(clf.decision_function(X)).all()
    return clf


@pytest.mark.parametrize("backbone", [*CONVOLUTIONAL, "swin_t", vision_transformer])
def test_groups(backbone):
    """Every family has groups of features beside the last ones; layers without backward passes, and with."""
    clf = fit(backbone, 64, tangents="both", tangent_layers=1, n_directions=2)
    names = list(clf.prior_)
    assert names[-1] == "last"
    for kind in ("tangents", "deviation", "directions"):
        assert any(name.endswith(f" {kind}") for name in names), names
    assert clf.tangent_layers_
    assert sum(clf.prior_.values()) == pytest.approx(1)


# The Linear layers of VGG have 120 million weights: a minute for one iteration.
@pytest.mark.parametrize("backbone", [name for name in CONVOLUTIONAL if name != "vgg11_bn"])
def test_all_layers_of_the_papers_model(backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration
        clf = fit(backbone, 64, model="paper", tangent_layers="all", max_iter=1, tol=0)
    assert clf.n_iter_ == 1
    assert clf.coef_.size > 2 * (clf._model.network.split.n_features + 1)  # more than the head


def test_two_heads_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="head_dist"):
        fit("timm:deit_tiny_distilled_patch16_224", 224)
