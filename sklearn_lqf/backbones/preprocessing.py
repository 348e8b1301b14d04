"""What a backbone expects its images to be.

Hides where torchvision and timm say it, and which values a user may put in their place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = ["Preprocessing"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
# Of DINOv2, which was trained and evaluated at this size (Oquab et al., 2023) and has it on the hub of Hugging Face,
# too. timm says 518, the size of the last part of its training, at which an image takes sixteen times as long.
_DINOV2_SIZE = (224, 224)


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects its images to be.

    Attributes
    ----------
    size : tuple of int (H, W), or None
        Size that the backbone was trained at; None when it is not known.
    mean, std : tuple of float, one for each channel
        What is subtracted from pixels in [0, 1], and by what the difference is divided.
    interpolation : {"nearest", "bilinear", "bicubic"}
        How images were resized.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @classmethod
    def unknown(cls, channels: int) -> Preprocessing:
        """Of a network that says nothing: pixels stay in [0, 1]."""
        return cls(None, (0.0,) * channels, (1.0,) * channels)

    @classmethod
    def of_torchvision(cls, transforms: Any) -> Preprocessing:
        """From the transforms that belong to weights of torchvision."""
        height, width = (*transforms.crop_size, *transforms.crop_size)[:2]  # one number, or height and width
        return cls((height, width), tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value)

    @classmethod
    def of_timm(cls, config: Mapping[str, Any], channels: int) -> Preprocessing:
        """From timm's configuration of a model."""
        size = tuple(config["input_size"][-2:])
        if "dinov2" in str(config.get("architecture")):
            size = _DINOV2_SIZE
        mean, std = (
            # timm gives models of other channels the configuration for three.
            tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
            for values in (config["mean"], config["std"])
        )
        interpolation = config.get("interpolation")
        if interpolation not in _INTERPOLATIONS:  # "random", "lanczos"
            interpolation = "bicubic"
        return cls(size, mean, std, interpolation)

    def normalize(self, images: Tensor) -> Tensor:
        """Standardize the channels of images.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Of a floating-point dtype, pixels in [0, 1]; left as it is.

        Returns
        -------
        standardized : Tensor of shape (B, C, H, W)
            On the same device, of the same dtype.
        """
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean).div_(std)

    def override(self, overrides: Mapping[str, Any] | None) -> Preprocessing:
        """Replace some fields.

        Parameters
        ----------
        overrides : mapping or None
            Any of ``size`` (int, pair of int or None), ``mean``, ``std`` (a number, or one for each channel)
            and ``interpolation``.

        Returns
        -------
        preprocessing : Preprocessing

        Raises
        ------
        TypeError
            `overrides` is no mapping.
        ValueError
            An unknown key, or a value that its field cannot have.
        """
        if overrides is None:
            return self
        known = [field.name for field in fields(self)]
        if not isinstance(overrides, Mapping):
            raise TypeError(
                f"preprocessing must be None or a dict with any of the keys {known}, got {type(overrides).__name__}."
            )
        unknown = [key for key in overrides if key not in known]
        if unknown:
            raise ValueError(f"preprocessing has unknown keys {unknown}; allowed are {known}.")
        checked: dict[str, Any] = {}
        for key, value in overrides.items():
            if key == "size":
                checked[key] = _checked_size(value)
            elif key == "interpolation":
                checked[key] = _checked_interpolation(value)
            else:
                checked[key] = _checked_numbers(key, value, len(self.mean))
        return replace(self, **checked)


def _checked_size(size: Any) -> tuple[int, int] | None:
    """None, or (H, W) from one or two positive ints."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, Integral) else size
    pair = isinstance(sides, Sequence) and len(sides) == 2
    if not pair or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(f"preprocessing['size'] must be a positive int, a pair of them (H, W), or None; got {size!r}.")
    return int(sides[0]), int(sides[1])


def _checked_interpolation(interpolation: Any) -> str:
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"preprocessing['interpolation'] must be one of {list(_INTERPOLATIONS)}, got {interpolation!r}."
        )
    return str(interpolation)


def _checked_numbers(key: str, values: Any, channels: int) -> tuple[float, ...]:
    """One finite number for each channel, from as many or from a single one; positive for "std"."""
    try:
        each = [values] * channels if isinstance(values, Real) else values
        numbers = tuple(float(value) for value in each)
    except (TypeError, ValueError):
        numbers = ()
    usable = all(math.isfinite(number) and (key == "mean" or number > 0) for number in numbers)
    if len(numbers) != channels or not usable:
        kind = "finite" if key == "mean" else "finite and positive"
        raise ValueError(
            f"preprocessing[{key!r}] must be one number or {channels}, one for each channel, {kind}; got {values!r}."
        )
    return numbers
