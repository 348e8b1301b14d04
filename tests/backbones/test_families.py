"""Networks that stand for the families of torchvision and timm, with random weights.

benchmarks/families.py tries all of timm's.
"""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.tracing import split_network

CONVOLUTIONAL = [
    "resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1", "convnext_tiny",
]  # fmt: skip

# name: size of the images, and stages
TIMM = {
    "vit_small_patch14_dinov2": (28, 13),  # no classifier; made for 518 pixels
    "vit_small_patch16_dinov3": (32, 13),  # rotary embeddings
    "vit_base_patch16_siglip_224": (32, 13),  # pooled by attention
    "eva02_tiny_patch14_224": (28, 13),
    "deit_tiny_distilled_patch16_224": (32, 13),  # two heads on two tokens
    "levit_128s": (64, 11),  # two heads on one vector, BatchNorm on tokens
    "resnet50_clip": (64, 6),
    "swin_tiny_patch4_window7_224": (64, 4),  # a constant of five axes
    "hiera_tiny_224": (64, 13),  # optional arguments
    "swinv2_tiny_window16_256": (64, 4),
    "efficientformerv2_s0": (64, 5),
    "convnextv2_atto": (64, 4),
    "mobilenetv3_small_050": (64, 6),
    "edgenext_xx_small": (64, 4),
    "samvit_base_patch16": (32, 15),  # tokens in a map
    "dm_nfnet_f0": (64, 9),  # standardized weights
}
SLOW = ("samvit_base_patch16", "dm_nfnet_f0")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TIMM])
def test_families_of_timm(name):
    """Features are timm's own, the network is traced, and something is read of its stages."""
    pytest.importorskip("timm", minversion="1.0.20")
    size, n_stages = TIMM[name]
    module = load_backbone(f"timm:{name}", None, image_size=size, random_state=0).module
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(x), pre_logits=True)
        network = as_vectors(module, x)
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    split = split_network(network, x, "head", read_stages=True)
    assert split.traced
    assert len(split.stages) == n_stages
    read = {part.name.removesuffix(" tangents") for part in split.parts if part.name.endswith(" tangents")}
    assert len(read) >= n_stages - 1  # but for the first layer, whose input are the pixels


def fit(backbone, size, **parameters):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    clf = LQFClassifier(backbone, weights=None, image_size=size, execution={"device": "cpu"}, **parameters)
    clf.fit(X, [0, 1, 0, 1])
    assert np.isfinite(clf.coef_).all()
    assert np.any(clf.coef_ != 0)
    assert np.isfinite(clf.decision_function(X)).all()
    return clf


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [*CONVOLUTIONAL, "swin_t", "vit_b_16"])
def test_groups(backbone):
    """Every family has groups of features beside the last ones; layers without backward passes, and with."""
    clf = fit(backbone, 64, tangents="both", tangent_layers=1, n_directions=2)
    names = list(clf.prior_)
    assert names[-1] == "last"
    for kind in ("tangents", "deviation", "directions"):
        assert any(name.endswith(f" {kind}") for name in names), names
    assert clf.tangent_layers_
    assert sum(clf.prior_.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", CONVOLUTIONAL)
def test_all_layers_of_the_papers_model(backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration
        clf = fit(backbone, 64, model="paper", tangent_layers="all", max_iter=1, tol=0)
    assert clf.n_iter_ == 1
    assert clf.coef_.size > 2 * (clf._model.network.split.n_features + 1)  # more than the head
