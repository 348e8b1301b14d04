"""The network in bfloat16: accuracy and seconds beside full precision, on the same images.

One thread, seconds of the processor, the two in turns. Results are kept after each data set and split.

    python benchmarks/precision.py --data-dir FOLDER [--datasets trashnet monkeys seedlings dtd10]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split
from _timing import BACKBONE, RESULTS, Report

from sklearn_lqf import LQFClassifier

DATASETS, PER_CLASS, SPLITS = ("trashnet", "monkeys", "seedlings", "dtd10"), 30, 2
TOLERANCES = {"full": 0.0, "bfloat16": 0.1}


def measure(X: np.ndarray, codes: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Seconds and accuracy of each precision, and how often both predict the same class."""
    found: dict[str, Any] = {}
    predicted = {}
    for name, tolerance in TOLERANCES.items():
        clf = LQFClassifier(BACKBONE, execution={"device": "cpu", "tolerance": tolerance})
        clf.fit(X[train[:20]], np.arange(20) % 2)  # the network is prepared, and kept
        start = time.process_time()
        clf.fit(X[train], codes[train])
        fitted = time.process_time()
        predicted[name] = clf.predict(X[test])
        found[name] = {
            "precision": clf.precision_,
            "seconds_fit": round(fitted - start, 3),
            "seconds_predict": round(time.process_time() - fitted, 3),
            "accuracy": float((predicted[name] == codes[test]).mean()),
        }
    return {**found, "agreement": float((predicted["full"] == predicted["bfloat16"]).mean())}


def main() -> None:
    """Measure what is not yet in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--results", type=Path, default=RESULTS / "precision.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.results, torch.device("cpu"), "precision", backbone=BACKBONE, size=DEFAULT_SIZE)
    for dataset in args.datasets:
        X, codes = read_images(dataset, args.data_dir, DEFAULT_SIZE)
        for seed in range(SPLITS):
            case = {"dataset": dataset, "per_class": args.per_class, "split": seed}
            if not report.has("rows", **case):
                report.add("rows", **case, **measure(X, codes, *split(codes, args.per_class, seed)))


if __name__ == "__main__":
    main()
