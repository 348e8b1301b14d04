"""What the benchmarks share: data sets, splits, scores, reports."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss

import sklearn_lqf
from sklearn_lqf.images.reading import ImageInputs

SIZES = {"digits": 64}  # pixels; the others are measured at DEFAULT_SIZE
DEFAULT_SIZE = 96
_BINS = 15  # of the calibration error


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Paths and class names of a folder with one sub-folder for each class."""
    paths = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"no images in {folder}")
    return np.array([str(p) for p in paths], dtype=object), np.array([p.parent.name for p in paths])


def read_images(dataset: str, data_dir: Path | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, size, size, 3), float32 in 0..1, and class codes (n,): every method gets the same pixels."""
    if dataset == "digits":
        X, codes = load_digits(return_X_y=True)
        inputs = ImageInputs((X * (255 / 16)).astype(np.uint8), image_shape=(8, 8), image_size=size,
                             in_channels=3, interpolation="bicubic")  # fmt: skip
    else:
        if data_dir is None:
            raise SystemExit(f"--data-dir is needed for {dataset}")
        X, names = read_folder(data_dir / dataset)
        codes = np.unique(names, return_inverse=True)[1]
        inputs = ImageInputs(X, image_size=size, in_channels=3, interpolation="bicubic")
    parts = [inputs.batch(i, min(i + 256, len(X))) for i in range(0, len(X), 256)]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy(), codes


def split(y: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of ``per_class`` random images of each class, and of all others."""
    rng = np.random.default_rng(seed)
    train = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:per_class] for c in np.unique(y)])
    return train, np.setdiff1d(np.arange(len(y)), train)


def scores(log_p: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    """Accuracy, log-loss and expected calibration error (15 equal bins of confidence)."""
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == codes
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs((right[bins == b] - confidence[bins == b]).sum()) for b in np.unique(bins)]
    return {
        "accuracy": float(right.mean()),
        "log_loss": float(log_loss(codes, p, labels=np.arange(p.shape[1]))),
        "ece": float(sum(gaps) / len(codes)),
    }


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
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    part.replace(path)  # a killed run leaves the results before
