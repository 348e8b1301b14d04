"""Files of weights: what is found in them, and what is refused without being run."""

import copy
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from support.networks import IMAGENET, SMALL, Net, assert_same_state, built, saved
from torch import nn

from sklearn_lqf.backbones.loading import load_backbone

pytestmark = pytest.mark.usefixtures("global_generators_unchanged")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def trained(**options):
    return built(lambda: Net(**options), seed=2)


def different(module, state):
    """Entries of a module that are not those of a state dict."""
    return [key for key, value in module.state_dict().items() if not torch.equal(value, state[key])]


@pytest.mark.parametrize("name", [SMALL, "mnasnet0_5"])  # MNASNet insists on a version, which safetensors drops
def test_files_of_torchvision_models(name, path):
    module = built(lambda: torchvision.models.get_model(name, weights=None))
    saved(module.state_dict(), path)
    assert load_backbone(name, path).preprocessing == IMAGENET
    assert_same_state(load_backbone(name, str(path)).module, module)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(module.state_dict(), path.with_suffix(".safetensors"))
    assert_same_state(load_backbone(name, path.with_suffix(".safetensors")).module, module)


@pytest.mark.parametrize("suffix", ["", ".weights"])
def test_file_is_found_whatever_its_name(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(trained().state_dict(), Path(f"mine{suffix}"))
    assert_same_state(load_backbone(built(Net), f"mine{suffix}").module, trained())


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, "module."), ("state_dict", "model._orig_mod."), ("model_state_dict", "_orig_mod.module."), ("model", "")],
)
def test_wrappers_and_prefixes_are_stripped(wrapper, prefix, path):
    state = OrderedDict((f"{prefix}{key}", value) for key, value in trained().state_dict().items())
    saved({wrapper: state, "epoch": 3} if wrapper else state, path)
    module = built(Net)
    before = copy.deepcopy(module.state_dict())
    assert_same_state(load_backbone(module, path).module, trained())
    assert not different(module, before)
    wrapped = nn.Sequential(OrderedDict(module=built(Net)))  # has the prefix itself
    saved({f"module.{key}": value for key, value in trained().state_dict().items()}, path)
    assert_same_state(load_backbone(wrapped, path).module.module, trained())


def test_head_of_other_classes_or_none_is_skipped(path):
    head, module = ["fc.weight", "fc.bias"], built(Net)
    for state in (trained(classes=3).state_dict(), {k: v for k, v in trained().state_dict().items() if k not in head}):
        loaded = load_backbone(module, saved(state, path)).module
        assert different(loaded, module.state_dict() | {k: v for k, v in state.items() if k not in head}) == []
    # A convolution as head, and one that timm names.
    state = built(lambda: torchvision.models.squeezenet1_1(num_classes=3)).state_dict()
    assert different(load_backbone(SMALL, saved(state, path)).module, state) == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    timm = pytest.importorskip("timm")
    state = built(lambda: timm.create_model("mobilenetv3_small_050", num_classes=7)).state_dict()
    loaded = load_backbone("timm:mobilenetv3_small_050", saved(state, path)).module
    assert different(loaded, state) == ["classifier.weight", "classifier.bias"]


def test_a_network_without_classifier_has_no_entries_that_may_be_absent(path):
    timm = pytest.importorskip("timm")
    options = {"num_classes": 0, "depth": 1, "embed_dim": 12, "img_size": 32}
    net = built(lambda: timm.create_model("vit_tiny_patch16_224", **options))
    saved({k: v for k, v in net.state_dict().items() if not k.startswith("blocks.0.mlp.fc2")}, path)
    with pytest.raises(ValueError, match=r"2 missing \(blocks\.0\.mlp\.fc2\.weight"):
        load_backbone(net, path)


def test_what_older_versions_wrote(path):
    """Without counts of batches; the layers of DenseNet had other names."""
    state = trained().state_dict()
    del state["norm.num_batches_tracked"]
    assert torch.equal(load_backbone(Net, saved(dict(state), path)).module.conv.weight, state["conv.weight"])
    module = built(torchvision.models.densenet121)
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    state = OrderedDict((old.sub(r"\1.\2.", key), value) for key, value in module.state_dict().items())
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    assert_same_state(load_backbone("densenet121", saved(state, path)).module, module)


def test_files_of_networks_that_are_made_for_their_weights(path, monkeypatch):
    """GoogLeNet turns mean and deviation, and vision transformers have the size of their position embeddings."""
    options = {"init_weights": False, "aux_logits": True}
    state = built(lambda: torchvision.models.googlenet(**options)).state_dict()
    loaded = load_backbone("googlenet", saved(state, path)).module
    assert loaded.transform_input
    assert torch.equal(loaded.fc.weight, state["fc.weight"])

    def tiny(*args, **kwargs):
        return torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 16)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    assert load_backbone("vit_b_16", saved(built(tiny).state_dict(), path)).preprocessing.size == (64, 64)


def test_misfits_are_named(path):
    state = built(Net).state_dict()
    state["extra.weight"] = torch.ones(1)
    state["norm.bias"] = torch.ones(9)
    state["fc.weight"] = torch.ones(5, 8)  # not only another number of classes
    del state["conv.bias"], state["norm.weight"]
    with pytest.raises(ValueError, match=r"weights\.pth' does not fit 'Net'") as caught:
        load_backbone(Net, saved(state, path))
    assert "2 missing (conv.bias, norm.weight); 1 unexpected (extra.weight)" in str(caught.value)
    assert "norm.bias (9,) instead of (4,), fc.weight (5, 8) instead of (5, 4)" in str(caught.value)
    with pytest.raises(ValueError, match=r"9 unexpected \(key0, key1, key2, \.\.\.\)"):
        load_backbone(Net, saved({f"key{i}": torch.ones(1) for i in range(9)}, path))


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


def test_pickled_objects_are_refused_and_not_run(path, tmp_path):
    saved({"weight": Payload(tmp_path / "run")}, path)
    with pytest.raises(ValueError, match=r"weights\.pth' cannot be read .*Save module\.state_dict\(\): other objects"):
        load_backbone(Net, path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds no state dict, but Tensor"),
        ({}, "holds no state dict, but dict"),
        ({"weight": torch.ones(1), "epoch": 3}, r"these entries are no tensors: \['epoch'\]"),
        (None, "cannot be read as a state dict"),  # text
    ],
)
def test_file_without_state_dict(content, message, path):
    path.write_text("not weights") if content is None else saved(content, path)
    with pytest.raises(ValueError, match=message):
        load_backbone(Net, path)


def test_files_for_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_text("not weights")
    if pytest.importorskip("safetensors"):
        with pytest.raises(ValueError, match=re.escape(f"{str(path)!r} cannot be read as a state dict")):
            load_backbone(Net, path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"'weights\.safetensors' needs .*pip install safetensors"):
        load_backbone(Net, path)
