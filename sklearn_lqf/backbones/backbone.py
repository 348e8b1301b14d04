"""A network with the preprocessing that belongs to it, and what was asked for it.

Hides the generator from which random weights are drawn, and how failures name their remedies.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.utils import check_random_state
from torch import nn

from ..runtime.arithmetic import GENERATOR
from .checkpoints import choose_weights, load_file
from .packages import LITE
from .preprocessing import Preprocessing

__all__ = [
    "REMEDIES", "SUPPORTED", "Backbone", "Wanted", "downloaded", "finished", "in_channels_of", "not_here",
    "own_generator", "seed_of", "unknown_name",
]  # fmt: skip

SUPPORTED = (
    "the name of a classification model of torchvision (such as 'resnet18'), 'timm:NAME', 'hf:NAME', "
    f"{', '.join(map(repr, LITE))}, 'vector', 'auto', an nn.Module, or a callable without arguments that "
    "returns one"
)
REMEDIES = (
    "Remedies: weights=\"path\" of a local file that holds them; backbone='efficientnet_lite0', whose weights are "
    "installed with the package; an nn.Module of your own as backbone. weights=None gives random weights."
)


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


@dataclass(frozen=True)
class Wanted:
    """Which weights are wanted; parameters of `load_backbone`."""

    weights: Any
    random_state: Any
    download: bool
    architecture_only: bool
    image_size: tuple[int, int] | None = None

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


def unknown_name(name: str, candidates: Iterable[str]) -> ValueError:
    """The error that suggests the nearest of the names."""
    lower = {candidate.lower(): candidate for candidate in candidates}
    near = [repr(lower[match]) for match in difflib.get_close_matches(name.lower(), lower, n=5)]
    hint = f" Nearest names: {', '.join(near)}." if near else ""
    return ValueError(f"Unknown backbone {name!r}.{hint} Supported: {SUPPORTED}.")


def downloaded(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` returns, which downloads weights at first use; its failure names the remedies."""
    try:
        with own_generator(0):
            return build()
    except Exception as error:  # urllib, the hub's client, a wrong hash, a broken file: each its own kind
        raise RuntimeError(
            f"The pre-trained weights of {name!r} could not be downloaded or read ({type(error).__name__}: "
            f"{error}). {REMEDIES}"
        ) from error


def not_here(name: str, where: str) -> RuntimeError:
    return RuntimeError(
        f"The pre-trained weights of {name!r} are needed, and download=False: {where}. Load the model once with "
        f"download=True where there is a connection. {REMEDIES}"
    )


def finished(name: str, module: nn.Module, preprocessing: Preprocessing, in_channels: int) -> Backbone:
    """The backbone of a private module."""
    module.cpu()
    module.eval()
    module.requires_grad_(False)
    return Backbone(name, module, preprocessing, in_channels)


def in_channels_of(module: nn.Module) -> int:
    """Input channels of the first convolution; 3 if there is none."""
    return next((layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)), 3)


@contextmanager
def own_generator(random_state: Any) -> Iterator[None]:
    """Seed torch's generator inside, on the CPU, and leave it as it was."""
    with GENERATOR, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which would seed the generators of the accelerators too.
        torch.default_generator.manual_seed(seed_of(random_state))
        yield


def seed_of(random_state: Any) -> int:
    """A seed drawn from `random_state`; from a copy of it when it is numpy's global generator."""
    source = check_random_state(random_state)
    if source is check_random_state(None):
        source = copy.deepcopy(source)
    return int(source.randint(2**31 - 1))
