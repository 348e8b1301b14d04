"""Pre-trained weights of a network: what is asked for, and files of state dicts.

Hides what such files look like, and every way in which reading one fails. Nothing that a file holds is run.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import LITE

__all__ = ["AUXILIARY", "choose_weights", "imported", "load_file"]

# Classifiers that torchvision's weights contain, and that only training uses.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
# Old names in torchvision's files of DenseNet: torchvision.models.densenet._load_state_dict.
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep a state dict
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning


def choose_weights(
    name: str, weights: Any, named: Sequence[str] = (), hint: str = "", must_exist: bool = True
) -> Path | str | None:
    """What `weights` asks for: "auto", one of the `named`, an existing file, or None for random weights."""
    if weights is None:
        return None
    if isinstance(weights, str) and weights in ("auto", "DEFAULT"):
        return "auto"
    if isinstance(weights, str) and weights in named:
        return weights
    allowed = ", ".join(["'auto'", "None", *map(repr, named), "the path of a local file"])
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights of {name!r} must be one of {allowed}; got {weights!r}.")
    path = Path(weights).expanduser()
    if path.is_file() or not must_exist:
        return path
    if isinstance(weights, os.PathLike) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file.")
    raise ValueError(f"{name!r} has no weights {weights!r}; it takes {allowed}.{hint}")


def load_file(module: nn.Module, path: Path, name: str) -> None:
    """Load a state dict into a private module; the head's entries may be absent or of other classes."""
    own = module.state_dict()
    state = _with_own_names(_read_state(path), own, name)
    head = {key for key in own if key.rpartition(".")[0] in _head_names(module)}
    resized = {key for key in own if key in state and state[key].shape != own[key].shape}
    shapes = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in resized
        # A head may have another number of outputs; the rest of its shape is the network's.
        if key not in head or state[key].shape[1:] != own[key].shape[1:]
    }
    for key in resized:
        del state[key]
    # The layers' own hooks translate older formats, so the names are compared by torch, not before.
    found = module.load_state_dict(state, strict=False)
    # Files older than PyTorch 0.4.1 do not count batches; in evaluation mode nothing depends on it.
    optional = head | resized | {key for key in own if key.endswith(".num_batches_tracked")}
    problems = {
        "missing": [key for key in found.missing_keys if key not in optional],
        "unexpected": found.unexpected_keys,
        "of another shape": [shapes[key] for key in own if key in shapes],
    }
    listed = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if listed:
        raise ValueError(f"The weights file {str(path)!r} does not fit {name!r}: {'; '.join(listed)}.")


def _read_state(path: Path) -> Any:
    """The state dict of a file, as an OrderedDict of tensors on the CPU."""
    try:
        if path.suffix == ".safetensors":
            content = imported("safetensors.torch", path.name, "pip install safetensors").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # broken files raise errors of many kinds
        raise ValueError(
            f"The weights file {str(path)!r} cannot be read as a state dict of tensors "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Save module.state_dict(): other "
            "objects are refused, because loading them can run code."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"The weights file {str(path)!r} holds no state dict, but {type(content).__name__}.")
    others = [k for k, value in content.items() if not (isinstance(k, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(
            f"The weights file {str(path)!r} holds no state dict: these entries are no tensors: {others[:3]}."
        )
    return content if isinstance(content, OrderedDict) else OrderedDict(content)


def _with_own_names(state: Any, own: Any, name: str) -> Any:
    """The state dict under the names that the network has for it."""
    further = [prefix for prefix in _PREFIXES if not any(key.startswith(prefix) for key in own)]
    while found := [prefix for prefix in further if all(key.startswith(prefix) for key in state)]:  # in any order
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, found[0])
    if name in LITE and "_conv_stem.weight" in state and len(state) == len(own):
        # The original implementation's names. timm's network has the same entries in the same order.
        state = OrderedDict(zip(own, state.values(), strict=True))
    for key in list(state):
        if key.startswith(tuple(f"{child}." for child in AUXILIARY.get(name, ()))):
            del state[key]
        elif match := _OLD_DENSENET_KEY.match(key):
            state["".join(match.groups())] = state.pop(key)
    if not hasattr(state, "_metadata"):
        # The versions of the layers' formats, without which some layers refuse; safetensors keeps none.
        state._metadata = own._metadata
    return state


def _head_names(module: nn.Module) -> list[str]:
    """Where timm or transformers say that the head is; else the last Linear, or 1x1 convolution where there is none."""
    if getattr(module, "num_classes", None) == 0:
        return []
    if hasattr(module, "main_input_name"):
        return ["classifier"] if isinstance(getattr(module, "classifier", None), nn.Linear) else []
    config = getattr(module, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, Mapping) else None
    if named:
        return [named] if isinstance(named, str) else list(named)
    layers = list(module.named_modules())
    heads = [name for name, layer in layers if isinstance(layer, nn.Linear)] or [
        name for name, layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    ]
    return heads[-1:]


def imported(package: str, name: str, remedy: str) -> Any:
    """An optional package."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{name!r} needs the package {package} ({error}): {remedy}") from error
