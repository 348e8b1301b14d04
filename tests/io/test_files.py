"""Estimators in files: equal after loading, refused when anything is wrong, and never run."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from joblib import Memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from support.data import TinyNet, make_images, merged, tiny_net
from torch import nn

import sklearn_lqf
from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor
from sklearn_lqf.io import files as persistence
from sklearn_lqf.io.archive import digest
from sklearn_lqf.network import prepared

X, Y = make_images()
NEW = make_images(seed=1)[0]
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(40, 3))
NET = tiny_net()
APART = {"_model", "_metadata_request", "backbone", "execution"}
SMALL = {"image_size": 32, "tangents": None}


def classifier(kind=LQFClassifier, **parameters):
    return kind(**merged({"backbone": NET, "execution": {"dtype": "float64"}}, parameters))


# Of both models, in all forms of the solution and kinds of groups.
MODELS = {
    "groups": {},
    "directions": {
        "tangents": "both", "n_directions": 2, "sketch_size": 3, "views": ("identity", "flip"), "solver": "pcg"
    },
    "given prior": {"prior": {"last": 2.0, "block2.1 deviation": np.float64(1)}, "alpha": np.float64(0.1)},
    "several labels": {
        "tangents": "both", "tangent_layers": ["block2"], "prior": np.arange(1, 7), "image_size": np.int64(12),
        "preprocessing": {"mean": 0.5, "std": (0.2, 0.3, 0.4)}, "class_weight": None, "weights": "auto",
    },
    "paper": {"model": "paper", "tol": 1e-2},
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    return classifier().fit(X, Y)


@pytest.fixture(scope="module")
def of_vectors():
    return LQFClassifier().fit(VECTORS, (VECTORS[:, 0] > 0).astype(int))


def saved(estimator, folder, **options):
    path = folder / "model.safetensors"
    estimator.save(path, **options)
    return path


def header_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sklearn_lqf"])


def rewrite(path, change) -> None:
    """Change the header, with a digest that is right: what an attacker would do."""
    header, tensors = header_of(path), load_file(path)
    change(header, tensors)
    text = json.dumps(header)
    save_file(tensors, path, {"sklearn_lqf": text, "digest": digest(tensors, text)})


def comparable(estimator) -> dict:
    """Fitted attributes, and parameters but for those that load decides."""
    return {k: v for k, v in vars(estimator).items() if k not in APART}


def assert_same(one, other) -> None:
    np.testing.assert_equal(comparable(one), comparable(other))
    assert [type(v) for v in comparable(one).values()] == [type(v) for v in comparable(other).values()]
    assert vars(one).keys() == vars(other).keys()


# ------------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("kind", MODELS)
def test_predictions_are_equal_to_the_bit(kind, tmp_path):
    targets = np.column_stack([Y == "ant", X[:, 0, 0, 0] > 128]).astype(int) if kind == "several labels" else Y
    clf = classifier(**MODELS[kind]).fit(X, targets)
    path = saved(clf, tmp_path, include_backbone=kind != "directions")
    twin = LQFClassifier.load(path, device="cpu", backbone=tiny_net())
    assert_same(twin, clf)
    pickled = pickle.loads(pickle.dumps(clf))
    for other in (twin, pickled):
        for method in ("predict", "predict_proba", "decision_function"):
            assert np.array_equal(getattr(other, method)(NEW), getattr(clf, method)(NEW))
        if kind != "paper":
            assert np.array_equal(other.features(NEW), clf.features(NEW))
            assert np.array_equal(other.leave_one_out(X, targets), clf.leave_one_out(X, targets))
    expected = clf.predict_proba(NEW)
    np.testing.assert_allclose(twin.fit(X, targets).predict_proba(NEW), expected, rtol=1e-12)


def test_weights_come_from_the_file(fitted, tmp_path):
    net = tiny_net(seed=5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    path = saved(fitted, tmp_path)
    large, header = path.stat().st_size, header_of(path)
    for backbone in (net, TinyNet):
        twin = LQFClassifier.load(path, backbone=backbone, device="cpu")
        assert np.array_equal(twin.decision_function(NEW), fitted.decision_function(NEW))
        assert type(twin.backbone) is TinyNet and twin.backbone is not net
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (header["class"], header["backbone"]) == ("LQFClassifier", "support.data.TinyNet")
    assert header["version"] == sklearn_lqf.__version__
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0]
    saved(fitted, tmp_path, include_backbone=False)
    weights = sum(v.numel() * v.element_size() for v in before.values())
    assert large - path.stat().st_size > 0.9 * weights
    with pytest.raises(ValueError, match=r"'TinyNet' is not the one.*its weights are others.*include_backbone=True"):
        LQFClassifier.load(path, backbone=net)


def test_refits_start_from_the_weights_of_the_file(tmp_path):
    """Of the estimator itself, a clone, a search, an update, a pickle and another file, and at another size."""
    fit = classifier(store_data=True).fit(X, Y)
    twin = LQFClassifier.load(saved(fit, tmp_path), backbone=tiny_net(seed=5), device="cpu")
    expected = fit.decision_function(NEW)
    for other in (clone(twin), pickle.loads(pickle.dumps(twin)), twin):
        assert np.array_equal(other.fit(X, Y).decision_function(NEW), expected)
    again = LQFClassifier.load(saved(twin, tmp_path), backbone=tiny_net(seed=7), device="cpu")
    assert np.array_equal(clone(again).fit(X, Y).decision_function(NEW), expected)
    grid = {"alpha": [0.1, 1.0]}
    searches = [GridSearchCV(clone(model), grid, cv=2).fit(X, Y) for model in (again, fit)]
    assert np.array_equal(*(search.decision_function(NEW) for search in searches))
    assert np.array_equal(*(clone(m).set_params(image_size=16).fit(X, Y).decision_function(NEW) for m in (twin, fit)))


def test_refits_have_the_preprocessing_of_a_name(tmp_path):
    """A module in the place of a name, and a name in the place of a module."""
    named = LQFClassifier("squeezenet1_1", weights=None, preprocessing={"mean": 0.3}, **SMALL).fit(X, Y)
    net = torchvision.models.squeezenet1_1(num_classes=1000, weights=None)
    twin = LQFClassifier.load(saved(named, tmp_path), backbone=net, device="cpu")
    assert np.array_equal(clone(twin).fit(X, Y).decision_function(NEW), named.decision_function(NEW))
    own = LQFClassifier(net, **SMALL).fit(X, Y)
    twin = LQFClassifier.load(saved(own, tmp_path), backbone="squeezenet1_1", device="cpu")
    assert np.array_equal(clone(twin).fit(X, Y).decision_function(NEW), own.decision_function(NEW))


def test_size_of_files_and_pickles(tmp_path):
    layers = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = nn.Sequential(*layers, nn.Linear(256, 5))
    clf = LQFClassifier(backbone).fit(*make_images(n=120, size=24))
    clf.backbone = "auto"  # what the caller passed is the caller's
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    for size in (len(pickle.dumps(clf)), saved(clf, tmp_path).stat().st_size):
        assert size <= 1.3 * (weights + 3 * clf.coef_.nbytes)


def test_backbone_by_name_is_built_without_a_download(tmp_path, monkeypatch):
    clf = LQFClassifier("squeezenet1_1", weights=None, **SMALL).fit(X, Y)
    clf.weights = "auto"  # as if it had them from torchvision
    path = saved(clf, tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", None)
    twin = LQFClassifier.load(path, device="cpu")
    assert np.array_equal(twin.decision_function(NEW), clf.decision_function(NEW))
    assert (twin.backbone, twin.weights) == ("squeezenet1_1", "auto")
    saved(clf.set_params(execution__download=False), tmp_path, include_backbone=False)
    with pytest.raises(RuntimeError, match="download=False"):
        LQFClassifier.load(path)
    saved(clf.set_params(weights=None), tmp_path, include_backbone=False)  # drawn again by random_state
    assert np.array_equal(LQFClassifier.load(path, device="cpu").decision_function(NEW), clf.decision_function(NEW))
    saved(clf.set_params(weights=torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1), tmp_path)
    assert LQFClassifier.load(path).weights == "IMAGENET1K_V1"


def test_regressor_with_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(VECTORS, columns=["a", "b", "ä"])
    targets = np.column_stack([VECTORS[:, 0] ** 2, VECTORS[:, 1]])
    reg = LQFRegressor(random_state=np.random.RandomState(3)).fit(frame, targets)
    twin = LQFRegressor.load(saved(reg, tmp_path), device="cpu")
    assert twin.feature_names_in_.tolist() == ["a", "b", "ä"]
    assert np.array_equal(twin.predict(frame), reg.predict(frame))
    assert twin.random_state.randint(99) == reg.random_state.randint(99)


class Subclass(LQFClassifierCV):
    """Somebody's own."""


def test_a_search_of_a_subclass_with_requests_of_metadata(tmp_path):
    memory = Memory(tmp_path / "trusted", verbose=0)
    clf = classifier(Subclass, alphas=np.array([0.1, 1.0]), cv=3, store_data=True, execution={"memory": memory})
    with config_context(enable_metadata_routing=True):
        clf.set_fit_request(sample_weight=True).fit(X, Y)
    path = saved(clf, tmp_path)
    assert "trusted" not in json.dumps(header_of(path))
    twin = Subclass.load(path, backbone=TinyNet, device="cpu")
    assert_same(twin, clf)
    assert twin.execution == {"dtype": "float64", "device": "cpu"}
    assert np.array_equal(twin.predict_proba(NEW), clf.predict_proba(NEW))
    requests = [m.get_metadata_routing().fit.requests for m in (twin, clf)]
    assert requests[0] == requests[1] != {"sample_weight": None}
    with pytest.raises(ValueError, match=r"holds an estimator of class Subclass: use Subclass.load"):
        LQFClassifierCV.load(path, backbone=TinyNet)


class Shifted(TinyNet):
    """With a buffer outside the state dict, and tied weights."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.register_buffer("shift", torch.full((1,), shift), persistent=False)
        self.again = self.stem[0]

    def forward(self, x):
        return super().forward(x + self.shift)


@pytest.mark.parametrize("kind", ["shifted", "vectors"])
def test_stored_data_go_on(kind, tmp_path):
    """Also of a network with weights in unusual places."""
    clf, backbone, x, y = LQFClassifier(store_data=True), None, VECTORS, np.arange(40) % 2
    if kind == "shifted":
        clf, backbone, x, y = classifier(backbone=Shifted(0.3), tangents=None, store_data=True), Shifted, X, Y
    clf.fit(x, y)
    twin = LQFClassifier.load(saved(clf, tmp_path), backbone=backbone, device="cpu")
    assert np.array_equal(twin.predict_proba(x), clf.predict_proba(x))
    for model in (clf, twin):
        model.forget([0, 3]).partial_fit(x[:1], y[:1])
    np.testing.assert_array_equal(twin.decision_function(x), clf.decision_function(x))
    again = LQFClassifier.load(saved(twin, tmp_path), backbone=backbone, device="cpu")
    assert np.array_equal(again.predict_proba(x), clf.predict_proba(x))


@pytest.mark.gpu
def test_between_devices(of_vectors, tmp_path):
    moved = LQFClassifier.load(saved(of_vectors, tmp_path), device="cuda")
    np.testing.assert_allclose(moved.predict_proba(VECTORS), of_vectors.predict_proba(VECTORS), rtol=1e-10)
    clf = classifier(execution={"device": "cuda"}, store_data=True).fit(X, Y)
    path = saved(clf, tmp_path)
    same = LQFClassifier.load(path, backbone=TinyNet)
    assert same.device_.startswith("cuda")
    assert np.array_equal(same.predict_proba(NEW), clf.predict_proba(NEW))
    back = LQFClassifier.load(path, backbone=TinyNet, device="cpu").forget([0])
    np.testing.assert_allclose(back.predict_proba(NEW), clf.forget([0]).predict_proba(NEW), rtol=1e-3)


# ------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_saved(fitted, of_vectors, tmp_path):
    with pytest.raises(NotFittedError):
        LQFClassifier().save(tmp_path / "f")
    clf = pickle.loads(pickle.dumps(of_vectors))
    clf.class_weight = KFold()
    with pytest.raises(TypeError, match=r"class_weight=KFold.*cannot be saved.*set_params\(class_weight=...\)"):
        clf.save(tmp_path / "f")
    clf.class_weight = None
    clf.classes_ = np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]")
    with pytest.raises(TypeError, match=r"classes_ is an array of dtype datetime64\[D\]"):
        clf.save(tmp_path / "f")
    assert not os.listdir(tmp_path)


class Deeper(TinyNet):
    def __init__(self):
        super().__init__()
        self.added = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return super().forward(self.added(x))


def test_another_architecture(fitted, of_vectors, tmp_path):
    path = saved(fitted, tmp_path)
    for backbone, message in (
        (None, r"backbone of type support.data.TinyNet.*give load a module"),
        (lambda: TinyNet(width=4), r"\d+ of \d+ weights are absent or of another shape or dtype: \['stem.0.weight'"),
        (lambda: tiny_net().half(), r"absent or of another shape or dtype"),
        (lambda: nn.Linear(3, 2), r"weights are absent"),
        (Deeper, r"has weights that the one of the fit had not: \['added.bias'"),
        ("vector", "takes vectors, but X holds images"),
    ):
        with pytest.raises(ValueError, match=message):
            LQFClassifier.load(path, backbone=backbone)
    with pytest.raises(ValueError, match="is not present"):
        LQFClassifier.load(saved(of_vectors, tmp_path), device="cuda:77")


ABSENT = object()


def put(value, *keys):
    """A change of the header: a value where these keys lead, or none."""

    def change(header, tensors):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value
        if value is ABSENT:
            del header[keys[-1]]

    return change


def short(header, tensors):
    """Weights on fewer features."""
    solution = dict(dict(header["model"]["dict"])["solution"]["dict"])
    name = solution["weight"]["array"]
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(ABSENT, "network"), "KeyError: 'network'"),
        (put(ABSENT, "parameters"), "KeyError"),
        (put({"eval": "1"}, "attributes", "coef_"), "unknown kind of value"),
        (put({"array": "absent"}, "attributes", "coef_"), "KeyError: 'absent'"),
        (put("x", "attributes", "fit"), "no fitted attributes"),
        (put("x", "attributes", "__class__"), "no fitted attributes"),
        (put("x", "attributes", "_model"), "no fitted attributes"),
        (put({"dict": [["memory", "folder"]]}, "parameters", "execution"), r"cannot take the parameters \['memory'\]"),
        (put(1, "parameters", "novelty"), r"cannot take the parameters \['novelty'\]"),
        (put(["absent"], "network", "weights"), "KeyError: 'weights.absent'"),
        (put("0", "network", "digest"), "its weights are others"),
        (short, "weights on .* features, and the network gives"),
        (put({"dict": []}, "model"), "its model cannot be built"),
    ],
)
def test_altered_with_a_right_digest(change, message, of_vectors, tmp_path):
    path = saved(of_vectors, tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        LQFClassifier.load(path)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------- pickles


def test_pickle_of_another_version(of_vectors, monkeypatch):
    content = pickle.dumps(of_vectors)
    monkeypatch.setattr(persistence, "__version__", "9.0")
    with pytest.warns(UserWarning, match=r"pickled by sklearn_lqf 0.*and is read by 9.0"):
        twin = pickle.loads(content)
    assert np.array_equal(twin.predict_proba(VECTORS), of_vectors.predict_proba(VECTORS))
    assert not [name for name in vars(twin) if "version" in name]
    state = twin.__getstate__()
    del state["execution"]  # parameters that it lacks have their defaults
    older = LQFClassifier.__new__(LQFClassifier)
    older.__setstate__(state)
    assert older.get_params() == of_vectors.get_params()


OTHERWISE = {"read_stages": ({}, False), "tangent_layers": ({"model": "paper", "tol": 0.1}, "all")}


@pytest.mark.parametrize("option", OTHERWISE)
def test_pickle_is_refused_where_the_network_is_prepared_otherwise(option, monkeypatch):
    options, value = OTHERWISE[option]
    content = pickle.dumps(classifier(**options).fit(X, Y))
    split = prepared.split_network  # as another version of torch might
    monkeypatch.setattr(prepared, "split_network", lambda *a, **k: split(*a, **{**k, option: value}))
    with pytest.raises(ValueError, match="prepared otherwise"):
        pickle.loads(content).predict(X)
