"""What the benchmarks share: image folders, splits, reports."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torchvision

import sklearn_lqf


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Paths and class names of a folder with one sub-folder for each class."""
    paths = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"no images in {folder}")
    return np.array([str(p) for p in paths], dtype=object), np.array([p.parent.name for p in paths])


def split(y: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of ``per_class`` random images of each class, and of all others."""
    rng = np.random.default_rng(seed)
    train = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:per_class] for c in np.unique(y)])
    return train, np.setdiff1d(np.arange(len(y)), train)


def write_report(path: Path, report: dict[str, Any], device: str) -> None:
    """Write results with what they were measured on."""
    report["versions"] = {
        "sklearn_lqf": sklearn_lqf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
    }
    report["device"] = device
    report["processor"] = platform.machine()
    report["threads"] = torch.get_num_threads()
    report["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
