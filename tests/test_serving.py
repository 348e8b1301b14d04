"""The model as one module, and as exported programs."""

import numpy as np
import pytest
import torch
from features import needs_export_of_forward_mode
from images import TinyNet, make_images, tiny_net
from sklearn.exceptions import NotFittedError
from torch import nn

from sklearn_lqf import LQFClassifier, LQFRegressor

X, Y = make_images()
IMAGES = torch.from_numpy(X).permute(0, 3, 1, 2) / 255


def classifier(**parameters):
    return LQFClassifier(**{"backbone": tiny_net(), "tol": 1e-2, **parameters})


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"tangent_layers": "all", "negative_slope": 0.1},
        {"tangent_layers": "head", "readout": "last"},
        {"head": "ridge", "dtype": "float64"},
        {"center": False, "preprocessing": {"mean": 0.4, "std": 0.2}, "target_scale": 3.0},
    ],
)
def test_outputs_are_those_of_decision_function(parameters):
    clf = classifier(**parameters).fit(X, Y)
    module = clf.to_module()
    found = module(IMAGES.to(clf._model.dtype))
    assert not found.requires_grad
    np.testing.assert_allclose(found.numpy(), clf.decision_function(X), atol=1e-5)


def test_untraced_network_and_vectors():
    class Branching(TinyNet):
        def forward(self, x):
            return super().forward(x if x.mean() < 100 else -x)

    with pytest.warns(UserWarning, match="cannot be traced"):
        clf = classifier(backbone=Branching()).fit(X, Y)
    np.testing.assert_allclose(clf.to_module()(IMAGES).numpy(), clf.decision_function(X), atol=1e-5)
    vectors = np.random.default_rng(0).normal(size=(30, 3))
    reg = LQFRegressor().fit(vectors, 1000 * vectors[:, :2] ** 2)
    np.testing.assert_allclose(reg.to_module()(torch.from_numpy(vectors)).numpy(), reg.predict(vectors), rtol=1e-9)


def test_module_is_independent_and_moves():
    clf = classifier().fit(X, Y)
    before, module = clf.decision_function(X), clf.to_module()
    moved = module.double()
    np.testing.assert_allclose(moved(IMAGES.double()).numpy(), before, atol=1e-4)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.zero_()
    assert np.array_equal(clf.decision_function(X), before)
    with pytest.raises(NotFittedError):
        LQFClassifier().to_module()


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # torch 2.6, of its own graph
@pytest.mark.parametrize("tangent_layers", [1, "all"])
def test_exported_for_any_number_of_images(tangent_layers, tmp_path):
    clf = classifier(tangent_layers=tangent_layers).fit(X, Y)
    batch = torch.export.Dim("batch", min=1, max=1024)  # torch 2.6 asks for the largest
    program = torch.export.export(clf.to_module(), (IMAGES[:2],), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (1, 2, len(X)):
        np.testing.assert_allclose(loaded(IMAGES[:n]).detach().numpy(), clf.decision_function(X[:n]), atol=1e-5)


def test_layer_norm_is_exported_for_one_number_of_images():
    needs_export_of_forward_mode()

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.norm(self.conv(x).flatten(2).transpose(1, 2)).mean(1))

    clf = classifier(backbone=Normed(), tangent_layers="all").fit(X, Y)
    program = torch.export.export(clf.to_module(), (IMAGES,), strict=False)
    np.testing.assert_allclose(program.module()(IMAGES).detach().numpy(), clf.decision_function(X), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that nothing else here imports
def test_onnx(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    clf = classifier(tangent_layers="all").fit(X, Y)
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        clf.to_module(),
        (IMAGES[:2],),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    np.testing.assert_allclose(found, clf.decision_function(X), atol=1e-5)
