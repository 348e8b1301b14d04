"""Fits, predictions and searches of two versions of the package, in turns.

Each version runs in a process of its own, which imports the package from a checkout: this one, and the one given.
Both have the same network, the same images and their own defaults. Rounds are a b a b ...

    git worktree add ../other COMMIT
    python benchmarks/versions.py --data-dir FOLDER --other ../other
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
BACKBONE = "efficientnet_lite0"
SEARCHED = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
# Images, rounds, and what is timed.
CASES: tuple[dict[str, Any], ...] = (
    {"data": "trashnet", "per_class": 50, "size": 96, "rounds": 5, "work": ["fit", "predict"]},
    {"data": "digits", "n": 1000, "size": 64, "rounds": 3, "work": ["fit", "predict"]},
    {"data": "digits", "n": 5000, "size": 64, "rounds": 1, "work": ["fit", "predict"]},
    {"data": "trashnet", "per_class": 20, "size": 96, "rounds": 1, "work": ["search", "search with memory", "path"]},
)


# ------------------------------------------------------------------------------------------- in the other process


def serve() -> None:
    """Answer each line of standard input, a case and a work, with seconds of the processor and an accuracy."""
    import torch

    torch.set_num_threads(1)
    fitted: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        with open(order["path"], "rb") as file:
            case, X, y, X_test, y_test = pickle.load(file)
        start = time.process_time()
        score = perform(order["work"], case, fitted, X, y, X_test, y_test)
        seconds = time.process_time() - start
        print(json.dumps({"seconds": round(seconds, 3), "accuracy": score}), flush=True)


def perform(work: str, case: dict[str, Any], fitted: dict[str, Any], X: Any, y: Any, X_test: Any, y_test: Any) -> Any:
    """One fit, prediction or search; the accuracy of predictions."""
    from sklearn.model_selection import GridSearchCV

    from sklearn_lqf import LQFClassifier, LQFClassifierCV

    options = {"image_shape": (8, 8), "image_size": case["size"]} if case["data"] == "digits" else {}
    if work == "fit":
        fitted["model"] = LQFClassifier(BACKBONE, **options).fit(X, y)
    elif work == "predict":
        return float((fitted["model"].predict(X_test) == y_test).mean())
    elif work == "path":
        LQFClassifierCV(BACKBONE, alphas=SEARCHED, cv=3, **options).fit(X, y)
    else:
        with tempfile.TemporaryDirectory() as folder:
            memory = folder if work == "search with memory" else None
            estimator = LQFClassifier(BACKBONE, **options)
            if "memory" in estimator.get_params():  # version 0.1
                estimator.set_params(memory=memory)
            else:
                estimator.set_params(execution__memory=memory)
            GridSearchCV(estimator, {"alpha": list(SEARCHED)}, cv=3, refit=False).fit(X, y)
    return None


# ---------------------------------------------------------------------------------------------- in this process


class Version:
    """A process that runs the package of one checkout."""

    def __init__(self, checkout: Path):
        self.name = _version_of(checkout)
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE), "--serve"], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, cwd=checkout,
        )  # fmt: skip

    def ask(self, path: Path, work: str) -> dict[str, Any]:
        """Seconds and accuracy of one piece of work."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(path), "work": work}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _version_of(checkout: Path) -> str:
    text = (checkout / "sklearn_lqf" / "versions.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def images_of(case: dict[str, Any], data_dir: Path) -> tuple[np.ndarray, ...]:
    """Training images and labels, and 500 test images and theirs."""
    from _common import read_images, split
    from _timing import HELD_OUT, repeated_digits

    if case["data"] == "digits":
        return *repeated_digits(case["n"]), *repeated_digits(HELD_OUT, held_out=True)
    X, codes = read_images(case["data"], data_dir, case["size"])
    train, test = split(codes, case["per_class"], 0)
    test = np.random.default_rng(0).permutation(test)[:HELD_OUT]
    return X[train], codes[train], X[test], codes[test]


def main() -> None:
    from _timing import RESULTS, Report, torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="a checkout of the other version; nothing is measured without it")
    parser.add_argument("--results", type=Path, default=RESULTS / "versions.json")
    args = parser.parse_args()
    if args.other is None:
        print("nothing measured: --other names no checkout of another version")
        return
    torch.set_num_threads(1)
    report = Report(args.results, torch.device("cpu"), "versions")
    versions = [Version(HERE.parents[1]), Version(args.other)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pkl"
        for case in CASES:
            key = {k: v for k, v in case.items() if k not in ("rounds", "work")}
            if report.has("rows", **key):
                continue
            X, y, X_test, y_test = images_of(case, args.data_dir)
            path.write_bytes(pickle.dumps((case, X, y, X_test, y_test)))
            found = [
                {work: [v.ask(path, work) for v in versions] for work in case["work"]} for _ in range(case["rounds"])
            ]
            seconds = {
                work: {v.name: [r[work][i]["seconds"] for r in found] for i, v in enumerate(versions)}
                for work in case["work"]
            }
            ratio = {work: float(np.median(np.divide(*s.values()))) for work, s in seconds.items()}
            last = found[-1].get("predict", [])
            accuracy = {v.name: a["accuracy"] for v, a in zip(versions, last, strict=False)}
            report.add(
                "rows", **key, n_train=len(X), n_predicted=len(X_test), seconds=seconds, ratio=ratio, accuracy=accuracy
            )


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
