"""Vision models of Hugging Face's transformers, from its hub, its cache or a local folder.

Hides which class a configuration asks for, the tower for images of models of images and texts, and how an image
processor says what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .backbone import REMEDIES, Backbone, Wanted, downloaded, finished, not_here, own_generator
from .checkpoints import imported
from .preprocessing import Preprocessing

__all__ = ["from_huggingface", "image_tower"]

_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; others become bicubic


def from_huggingface(name: str, wanted: Wanted) -> Backbone:
    """A model of transformers, "hf:REPOSITORY" or "hf:FOLDER": a classifier if the weights have one, else the body."""
    transformers = imported("transformers", name, 'pip install "sklearn-lqf[hf]"')
    source = str(Path(name.removeprefix("hf:")).expanduser())
    choice = wanted.choose(name)
    where = {"local_files_only": not wanted.download or Path(source).is_dir()}
    config = _read(name, wanted, lambda: transformers.AutoConfig.from_pretrained(source, **where))
    maker = transformers.AutoModel
    if getattr(config, "vision_config", None) is not None:
        config = config.vision_config
    elif any(str(a).endswith("ForImageClassification") for a in config.architectures or ()):
        maker = transformers.AutoModelForImageClassification
    _refuse_other_models(name, config)
    if choice == "auto" and not wanted.architecture_only:

        def load() -> Any:
            with _quiet(transformers.utils.logging):
                return maker.from_pretrained(source, config=config, output_loading_info=True, **where)

        module, report = _read(name, wanted, load)
        _refuse_missing(name, module, report["missing_keys"])
    else:
        with own_generator(wanted.seed(choice)):
            module = maker.from_config(config)
        wanted.load(module, choice, name)
    channels = int(getattr(config, "num_channels", 3))
    processor = _read(name, wanted, lambda: _processor(transformers, source, where))
    return finished(name, module, _preprocessing(name, processor, config, channels), channels)


def _read(name: str, wanted: Wanted, build: Any) -> Any:
    """What is read from the hub, its cache or a folder; failure names the remedies."""
    folder = Path(name.removeprefix("hf:")).expanduser()
    if wanted.download and not folder.is_dir():
        return downloaded(name, build)
    try:
        return build()
    except (OSError, ValueError) as error:
        if not folder.is_dir():
            raise not_here(name, f"they are not in the cache of huggingface_hub ({type(error).__name__})") from error
        raise ValueError(
            f"The folder of {name!r} cannot be read as a vision model of transformers ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}). Save one there with save_pretrained. {REMEDIES}"
        ) from error


def _refuse_other_models(name: str, config: Any) -> None:
    """Raise for models of anything else than images."""
    if getattr(config, "num_frames", None) is not None:
        raise ValueError(f"{name!r} takes videos ({config.model_type}); supported are models of images.")
    if getattr(config, "vocab_size", None) is not None and getattr(config, "image_size", None) is None:
        raise ValueError(f"{name!r} takes texts ({config.model_type}); supported are models of images.")


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep transformers from printing bars, and tables of weights that belong to other parts of a model."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_missing(name: str, module: Any, missing: Any) -> None:
    """Raise for weights that are not in the file; a pooling layer that was never trained is taken away."""
    rest = [key for key in missing if key.partition(".")[0] != "classifier"]
    pooling = [key for key in rest if key.startswith("pooler.")]
    if pooling and hasattr(module, "pooler"):
        module.pooler = None
        rest = [key for key in rest if key not in pooling]
    if rest:
        raise ValueError(f"The weights of {name!r} lack {len(rest)} of the model's ({', '.join(sorted(rest)[:3])}).")


def _processor(transformers: Any, source: str, where: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the image processor."""
    found, _ = (
        transformers.AutoImageProcessor.get_image_processor_dict(source, **where)
        if hasattr(transformers.AutoImageProcessor, "get_image_processor_dict")
        else transformers.BaseImageProcessor.get_image_processor_dict(source, **where)
    )
    return found


def _preprocessing(name: str, config: Mapping[str, Any], model: Any, channels: int) -> Preprocessing:
    """What an image processor does."""
    if config.get("do_flip_channel_order"):
        raise ValueError(
            f"{name!r} takes images with blue first, which is not supported: pass a module that turns them."
        )
    size = config.get("size") or getattr(model, "image_size", None)
    if config.get("do_center_crop") and config.get("crop_size"):
        size = config["crop_size"]
    if isinstance(size, Mapping):
        sides = (size.get("height"), size.get("width"))
        size = sides if all(sides) else size.get("shortest_edge")
    pair = (int(size), int(size)) if isinstance(size, int) else tuple(size) if size else None
    mean, std = (0.0,) * channels, (1.0,) * channels
    if config.get("do_normalize", True) and config.get("image_mean") and config.get("image_std"):
        mean, std = tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"]))
        if config.get("include_top"):  # of EfficientNet: divided by the deviation once more
            std = tuple(value**2 for value in std)
    # Before that pixels in 0..1 are multiplied by a number, as a rule 1, and another is taken off.
    scale, offset = 255.0, 0.0
    if config.get("do_rescale", True):
        scale = round(255 * float(config.get("rescale_factor") or 1 / 255), 6)
        offset = 1.0 if config.get("rescale_offset") else 0.0
    mean, std = tuple((value + offset) / scale for value in mean), tuple(value / scale for value in std)
    resample = config.get("resample")  # 0 is a number of Pillow's, too
    return Preprocessing(pair, mean, std, _INTERPOLATIONS.get(3 if resample is None else int(resample), "bicubic"))


def image_tower(module: nn.Module) -> nn.Module:
    """The part for images of a model of images and texts (CLIP, SigLIP, open_clip); other modules as they are."""
    for method, name in (("encode_image", "visual"), ("get_image_features", "vision_model")):
        tower = getattr(module, name, None)
        if callable(getattr(module, method, None)) and isinstance(tower, nn.Module):
            return tower
    return module
