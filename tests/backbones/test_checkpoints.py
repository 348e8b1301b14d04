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


def test_a_network_without_classifier_has_no_entries_that_may_be_absent(tmp_path):
    timm = pytest.importorskip("timm")
    options = {"num_classes": 0, "depth": 1, "embed_dim": 12, "img_size": 32}
    net = built(lambda: timm.create_model("vit_tiny_patch16_224", **options))
    state = net.state_dict()
    path = saved({k: v for k, v in state.items() if not k.startswith("blocks.0.mlp.fc2")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"2 missing \(blocks\.0\.mlp\.fc2\.weight"):
        load_backbone(net, path)
