"""Models of transformers, small and with random weights, from local folders."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.tracing import split_network

transformers = pytest.importorskip("transformers")

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TRANSFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_normalize": True,
}  # fmt: skip
# class and configuration, and the name of the output that is the vector
MODELS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", TRANSFORMER, "pooler_output"),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", TRANSFORMER, "pooler_output"),
    "vit": ("ViTModel", "ViTConfig", TRANSFORMER, "pooler_output"),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", TRANSFORMER, "pooler_output"),
    "clip projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", TRANSFORMER, "image_embeds"),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", TRANSFORMER, "pooler_output"),
    "swin": (
        "SwinModel", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "pooler_output",
    ),
    "resnet": (
        "ResNetModel", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, "pooler_output",
    ),
    "convnext": (
        "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}, "pooler_output",
    ),
}  # fmt: skip


def model(name="Dinov2Model", config="Dinov2Config", options=TRANSFORMER):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


def saved(folder, module, **processor):
    module.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return f"hf:{folder}"


@pytest.mark.parametrize(("name", "config", "options", "output"), MODELS.values(), ids=MODELS)
def test_pooled_vectors(name, config, options, output):
    net = model(name, config, options)
    with torch.no_grad():
        expected = net(IMAGES)[output].flatten(1)
        vectors = as_vectors(net, IMAGES)
        torch.testing.assert_close(vectors(IMAGES), expected)
        split = split_network(vectors, IMAGES, "head", read_stages=True)
        torch.testing.assert_close(split.tail(*split.trunk(IMAGES))[:, : expected.shape[1]], expected)
    assert split.traced
    assert len(split.parts) > 1


def test_classifiers_give_what_their_classifier_takes():
    net = model("ViTForImageClassification", "ViTConfig")
    with torch.no_grad():
        logits = net(IMAGES).logits
        classifier = net.classifier
        vectors = as_vectors(net, IMAGES)
        torch.testing.assert_close(classifier(vectors(IMAGES)), logits)


def test_tokens_without_a_pooled_vector():
    net = model("ViTModel", "ViTConfig")
    net.pooler = None
    with torch.no_grad():
        torch.testing.assert_close(as_vectors(net, IMAGES)(IMAGES), net(IMAGES).last_hidden_state[:, 0])


def test_the_size_of_the_images_may_be_another():
    net = model("ViTModel", "ViTConfig")
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(as_vectors(net, x)(x), expected)


def test_a_folder_with_its_preprocessing(tmp_path):
    net = model()
    loaded = load_backbone(saved(tmp_path, net), download=False)
    assert loaded.preprocessing.size == (32, 32)
    assert loaded.preprocessing.mean == (0.5, 0.4, 0.3)
    assert loaded.preprocessing.std == (0.2, 0.3, 0.4)
    assert loaded.preprocessing.interpolation == "bicubic"
    torch.testing.assert_close(loaded.module.state_dict(), net.state_dict())
    random = load_backbone(f"hf:{tmp_path}", None, random_state=0)
    assert not torch.equal(random.module.layernorm.weight, torch.zeros(16))
    assert random.module.state_dict().keys() == net.state_dict().keys()


def test_crop_of_a_processor(tmp_path):
    name = saved(
        tmp_path, model(), size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 24}
    )
    assert load_backbone(name).preprocessing.size == (32, 24)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_tower_for_images(tmp_path, kind):
    text = {k: v for k, v in TRANSFORMER.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 20}
    options = {"text_config": text, "vision_config": TRANSFORMER, "projection_dim": 8}
    if kind == "Siglip":
        del options["projection_dim"]
    net = model(f"{kind}Model", f"{kind}Config", options)
    with torch.no_grad():
        expected = net.vision_model(IMAGES).pooler_output
        for backbone in (saved(tmp_path, net), net):
            module = load_backbone(backbone).module
            torch.testing.assert_close(as_vectors(module, IMAGES)(IMAGES), expected)


def test_pooling_that_was_never_trained_is_left_out(tmp_path):
    net = model("ViTModel", "ViTConfig")
    net.pooler = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_backbone(saved(tmp_path, net))
    with torch.no_grad():
        torch.testing.assert_close(as_vectors(loaded.module, IMAGES)(IMAGES), net(IMAGES).last_hidden_state[:, 0])


def test_what_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match=r"'hf:facebook/absent' are needed, and download=False"):
        load_backbone("hf:facebook/absent", download=False)
    with pytest.raises(ValueError, match="cannot be read as a vision model of transformers"):
        load_backbone(f"hf:{tmp_path}")


def test_fit(tmp_path):
    X = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    name = saved(tmp_path, model())
    clf = LQFClassifier(name, image_size=32).fit(X, [0, 1] * 3)
    clf.save(tmp_path / "model.safetensors")
    again = LQFClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(again.decision_function(X), clf.decision_function(X), rtol=1e-5)
    assert any(group.endswith(" tangents") for group in clf.prior_)


class OpenClip(nn.Module):
    """As open_clip's models: towers for images and texts."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.visual.image_mean, self.visual.image_std, self.visual.image_size = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 32
        self.text = nn.Embedding(5, 4)

    def encode_image(self, x):
        return self.visual(x)


def test_the_tower_of_open_clip():
    loaded = load_backbone(OpenClip())
    assert isinstance(loaded.module, nn.Sequential)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.size == (32, 32)
    assert as_vectors(loaded.module, IMAGES)(IMAGES).shape == (2, 4)
