"""Classification models of torchvision.

Hides the differences between its models with weights and without.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from torch import nn

from .backbone import Backbone, Wanted, downloaded, finished, in_channels_of, not_here, own_generator
from .checkpoints import AUXILIARY
from .packages import download_folder, torchvision_file
from .preprocessing import Preprocessing

__all__ = ["from_torchvision", "set_transformer_size", "torchvision_names"]

# Mean and standard deviation of ImageNet's pixels: torchvision.transforms._presets.ImageClassification.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = (224, 224)  # of most models, and of its transformers when they are new


def torchvision_names() -> list[str]:
    import torchvision

    # Segmentation, detection, video and quantized models are in modules of their own.
    return torchvision.models.list_models(module=torchvision.models)


def from_torchvision(name: str, wanted: Wanted) -> Backbone:
    """A classification model of torchvision."""
    from torchvision import models

    members = models.get_model_weights(name)
    if isinstance(wanted.weights, members):
        wanted = replace(wanted, weights=wanted.weights.name)
    choice = wanted.choose(name, [member.name for member in members])
    pretrained = members["DEFAULT" if not isinstance(choice, str) or choice == "auto" else choice]
    preprocessing = Preprocessing.of_torchvision(pretrained.transforms())
    if isinstance(choice, str) and not wanted.architecture_only:
        if not wanted.download and torchvision_file(pretrained) is None:
            raise not_here(name, f'they are not in "{download_folder()}"')
        module = downloaded(name, lambda: models.get_model(name, weights=pretrained, progress=False))
        for child in AUXILIARY.get(name, ()):
            setattr(module, child, None)
        set_transformer_size(module, wanted.image_size)
        return finished(name, module, preprocessing, in_channels_of(module))

    options: dict[str, Any] = {}
    if name in AUXILIARY:
        # With weights, torchvision has these two turn ImageNet's mean and std into 0.5 by themselves.
        options = {
            "aux_logits": False,
            "init_weights": choice is None,
            "transform_input": choice is not None,
        }
    if isinstance(choice, str) and name.startswith("vit_"):  # as many position embeddings as these weights have
        options["image_size"] = pretrained.meta["min_size"][0]
    with own_generator(wanted.seed(choice)):
        module = models.get_model(name, weights=None, **options)
    if choice is None:
        preprocessing = Preprocessing(_IMAGENET_SIZE, _IMAGENET_MEAN, _IMAGENET_STD)
    else:
        wanted.load(module, choice, name)
        if isinstance(module, models.VisionTransformer):  # its position embeddings have one size
            preprocessing = preprocessing.override({"size": module.image_size})
    set_transformer_size(module, wanted.image_size)
    return finished(name, module, preprocessing, in_channels_of(module))


def set_transformer_size(module: nn.Module, size: tuple[int, int] | None) -> None:
    """Let torchvision's vision transformer take square images of this size, in place; others are left as they are.

    Position embeddings are interpolated.
    """
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(module, VisionTransformer) or size is None or size[0] != size[1] or size[0] == module.image_size:
        return
    if size[0] % module.patch_size == 0:
        state: Any = OrderedDict({"encoder.pos_embedding": module.encoder.pos_embedding.data})
        resized = interpolate_embeddings(size[0], module.patch_size, state)["encoder.pos_embedding"]
        module.encoder.pos_embedding = nn.Parameter(resized)
        module.image_size = size[0]
