"""Models of transformers, small and with random weights, from local folders."""

import json

import numpy as np
import pytest
import torch
from support.networks import assert_same_state, built
from torch import nn

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.tracing import split_network

transformers = pytest.importorskip("transformers")

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMER = {**BLOCKS, "image_size": 32, "patch_size": 8}
PYRAMID = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_normalize": True,
}  # fmt: skip
# Class, options of its configuration, and the name of the output that is the vector; None: what the classifier takes.
MODELS = {
    "Dinov2Model": (TRANSFORMER, "pooler_output"),
    "DINOv3ViTModel": (TRANSFORMER, "pooler_output"),
    "ViTModel": (TRANSFORMER, "pooler_output"),
    "CLIPVisionModelWithProjection": (TRANSFORMER, "image_embeds"),
    "SiglipVisionModel": (TRANSFORMER, "pooler_output"),
    "SwinModel": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "pooler_output",
    ),
    "ResNetModel": (
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, "pooler_output",
    ),
    "ConvNextModel": (PYRAMID, "pooler_output"),
    "ViTForImageClassification": (TRANSFORMER, None),
    "PvtV2ForImageClassification": (  # blocks that return tuples within tuples
        {**PYRAMID, "num_attention_heads": [1, 1, 1, 1], "image_size": 32}, None,
    ),
}  # fmt: skip


def model(name="Dinov2Model", options=TRANSFORMER):
    kind = next(
        name.removesuffix(end)
        for end in ("ModelWithProjection", "Model", "ForImageClassification")
        if name.endswith(end)
    )
    config = getattr(transformers, f"{kind}Config")(**options)
    return built(lambda: getattr(transformers, name)(config)).eval()


def saved(folder, module, **processor):
    module.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return f"hf:{folder}"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_vector_for_each_image(name):
    options, output = MODELS[name]
    net = model(name, options)
    plain = net(IMAGES)
    classifier = getattr(net, "classifier", nn.Identity())
    vectors = as_vectors(net, IMAGES)
    expected = vectors(IMAGES) if output is None else plain[output].flatten(1)
    torch.testing.assert_close(classifier(vectors(IMAGES)), plain.logits if output is None else expected)
    split = split_network(vectors, IMAGES, "head", read_stages=True)
    torch.testing.assert_close(split.tail(*split.trunk(IMAGES))[:, : expected.shape[1]], expected)
    assert split.traced
    assert len(split.parts) > 1


@torch.no_grad()
def test_two_classifiers_on_one_vector():
    net = model("SwiftFormerForImageClassification", {"embed_dims": [4, 8, 8, 8], "depths": [1] * 4}).eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, heads = net(x).logits, (net.head, net.dist_head)
    vectors = as_vectors(net, x)(x)
    torch.testing.assert_close((heads[0](vectors) + heads[1](vectors)) / 2, logits)


@torch.no_grad()
def test_tokens_and_sizes():
    """Without a pooled vector the class token is it; images may have another size than the embeddings."""
    net = model("ViTModel")
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = net(x, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(as_vectors(net, x)(x), expected)
    net.pooler = None
    torch.testing.assert_close(as_vectors(net, IMAGES)(IMAGES), net(IMAGES).last_hidden_state[:, 0])


def test_a_folder(tmp_path, capfd):
    net = model()
    name = saved(tmp_path, net)
    capfd.readouterr()
    loaded = load_backbone(name, download=False)
    assert capfd.readouterr() == ("", "")
    assert_same_state(loaded.module, net)
    random = load_backbone(name, None, random_state=0).module.state_dict()
    assert random.keys() == net.state_dict().keys()
    assert not torch.equal(random["embeddings.cls_token"], net.state_dict()["embeddings.cls_token"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False, "resample": 0},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True},  # pixels in -1..1
        {"include_top": True},  # divided by the deviation once more
    ],
)
def test_preprocessing_is_that_of_the_image_processor(tmp_path, options):
    options = {"image_processor_type": "EfficientNetImageProcessor", "include_top": False, **options}
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    processor = transformers.EfficientNetImageProcessor(**{**PROCESSOR, **options})
    expected = np.array(processor(list(images), return_tensors="np")["pixel_values"])
    found = load_backbone(saved(tmp_path, model(), **options)).preprocessing
    assert (found.size, found.interpolation) == ((32, 32), "nearest" if "resample" in options else "bicubic")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(found.normalize(pixels), expected, rtol=1e-4, atol=1e-4)


def test_crop_of_a_processor(tmp_path):
    options = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 24}}
    assert load_backbone(saved(tmp_path, model(), **options)).preprocessing.size == (32, 24)
    assert load_backbone(saved(tmp_path, model(), size={"shortest_edge": 40})).preprocessing.size == (40, 40)
    with pytest.raises(ValueError, match="blue first"):
        load_backbone(saved(tmp_path, model(), do_flip_channel_order=True))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_the_tower_for_images(tmp_path, kind):
    options = {"text_config": {**BLOCKS, "vocab_size": 20}, "vision_config": TRANSFORMER}
    net = model(f"{kind}Model", options | ({"projection_dim": 8} if kind == "CLIP" else {}))
    expected = net.vision_model(IMAGES).pooler_output
    for backbone in (saved(tmp_path, net), net):
        module = load_backbone(backbone).module
        torch.testing.assert_close(as_vectors(module, IMAGES)(IMAGES), expected)


@torch.no_grad()
def test_weights_that_are_not_in_the_file(tmp_path):
    """A pooling layer that was never trained is left out; anything else is an error."""
    net = model("ViTModel")
    net.pooler = None
    module = load_backbone(saved(tmp_path, net)).module
    torch.testing.assert_close(as_vectors(module, IMAGES)(IMAGES), net(IMAGES).last_hidden_state[:, 0])
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("layernorm")}
    net.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"weights of .* lack 2 of the model's \(layernorm\.bias, layernorm\.weight\)"):
        load_backbone(f"hf:{tmp_path}")


def test_what_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match=r"'hf:facebook/absent' are needed, and download=False"):
        load_backbone("hf:facebook/absent", download=False)
    with pytest.raises(ValueError, match="cannot be read as a vision model of transformers"):
        load_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [("VideoMAEModel", TRANSFORMER, "videos"), ("BertModel", {**BLOCKS, "vocab_size": 20}, "texts")],
)
def test_models_of_videos_and_texts_are_refused(tmp_path, name, options, kind):
    with pytest.raises(ValueError, match=f"takes {kind} .*; supported are models of images"):
        load_backbone(saved(tmp_path, model(name, options)))


def test_a_model_that_hides_patches_at_random_is_refused():
    X = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"others each time it is evaluated.*'timm:vit_base_patch16_224\.mae'"):
        LQFClassifier(model("ViTMAEModel")).fit(X, [0, 1, 0, 1])


def test_fit(tmp_path):
    X = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    clf = LQFClassifier(saved(tmp_path, model()), image_size=32).fit(X, [0, 1] * 3)
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
    assert (loaded.preprocessing.mean, loaded.preprocessing.size) == ((0.1, 0.2, 0.3), (32, 32))
    assert as_vectors(loaded.module, IMAGES)(IMAGES).shape == (2, 4)
