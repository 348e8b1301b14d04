"""A fit of 20 images: where its seconds go, in a fresh process and when it is repeated.

Each phase is timed inside a whole fit, in a process of its own with one thread; the median of several processes.

    python benchmarks/small.py [--processes 5]
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import BACKBONE, RESULTS, Report, in_own_process

from sklearn_lqf import LQFClassifier

N, SIZE = 20, 96
# What is timed: module, class or None, function, phase. Phases do not contain each other.
PHASES = (
    ("sklearn_lqf.estimators.data", None, "load_backbone", "loading the weights"),
    ("sklearn_lqf.estimators.data", None, "PreparedNetwork", "tracing and folding"),
    ("sklearn_lqf.engine.fitted", "FeatureReader", "draw", "scales of features, on synthetic images"),
    ("sklearn_lqf.estimators.data", None, "evaluate_rows", "reading the images"),
    ("sklearn_lqf.estimators.fitting", None, "Problem", "the prior"),
    ("sklearn_lqf.engine.problem", "Problem", "solve", "the solution"),
)


def profile() -> dict[str, Any]:
    """Seconds of each phase of a first fit and of a second one."""
    torch.set_num_threads(1)
    import_it = "import time; t = time.perf_counter(); import sklearn_lqf; print(time.perf_counter() - t)"
    said = subprocess.run([sys.executable, "-c", import_it], check=True, capture_output=True, text=True).stdout
    seconds: dict[str, dict[str, float]] = {"first": {"import": float(said)}, "second": {}}
    now = "first"

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[now][phase] = seconds[now].get(phase, 0.0) + time.perf_counter() - begin

        return run

    for module, owner, name, phase in PHASES:
        place = importlib.import_module(module)
        place = getattr(place, owner) if owner else place
        setattr(place, name, timed(getattr(place, name), phase))
    X = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3)).astype(np.uint8)
    for now in ("first", "second"):
        begin = time.perf_counter()
        LQFClassifier(BACKBONE, execution={"device": "cpu"}).fit(X, np.arange(N) % 2)
        seconds[now]["whole fit"] = time.perf_counter() - begin
    return seconds


def main() -> None:
    """Measure; the results before are replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="not read; make bench gives it to all benchmarks")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / "small.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.unlink(missing_ok=True)
    report = Report(args.results, torch.device("cpu"), "small", backbone=BACKBONE, n=N, size=SIZE)
    found = [in_own_process(profile) for _ in range(args.processes)]
    phases = ["import", *(phase for *_, phase in PHASES), "whole fit"]
    for phase in phases:
        medians = {k: float(np.median([f[k].get(phase, 0.0) for f in found])) for k in ("first", "second")}
        report.add("rows", phase=phase, **{k: round(v, 3) for k, v in medians.items()})


if __name__ == "__main__":
    main()
