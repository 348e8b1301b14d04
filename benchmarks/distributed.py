"""What sharing a fit brings: seconds of a fit on one process and on two, a thread each.

Both are measured in turn, fit by fit, so that whatever else the machine does meets both alike; the second process
sleeps while the first works alone. Processes share the reading of the features; prior and solution are computed by
each of them. The models are compared, too.

    python benchmarks/distributed.py
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _common import DEFAULT_SIZE, write_report

from sklearn_lqf import LQFClassifier

RESULTS = Path(__file__).parent / "results" / "distributed.json"
PROCESSES, N_CLASSES = 2, 10
KINDS: dict[str, dict[str, Any]] = {"local": {}, "network": {"tangents": "network"}}


class _Classifier(LQFClassifier):
    """Knows how long its features took."""

    def _evaluate(self, *args: Any) -> Any:
        start = time.perf_counter()
        found = super()._evaluate(*args)
        self._reading = time.perf_counter() - start
        return found


def fit(X: np.ndarray, y: np.ndarray, kind: str, distributed: bool) -> tuple[dict[str, float], _Classifier]:
    """Seconds of reading, and of the whole fit."""
    start = time.perf_counter()
    clf = _Classifier("efficientnet_lite0", execution={"distributed": distributed, "device": "cpu"}, **KINDS[kind]).fit(
        X, y
    )
    return {"read": clf._reading, "fit": time.perf_counter() - start}, clf


def measure(rank: int, folder: Path, n_images: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each kind of tangents; called by every process, rank 0 returns what is to be reported."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "group").as_uri(), rank=rank, world_size=PROCESSES)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (n_images, DEFAULT_SIZE, DEFAULT_SIZE, 3), dtype=np.uint8)
    y = np.arange(n_images) % N_CLASSES
    found = []
    for kind in KINDS:
        seconds: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
        difference = 0.0
        for _ in range(repeats):
            if rank == 0:
                took, alone = fit(X, y, kind, False)
                seconds["one"].append(took)
            dist.barrier()
            took, shared = fit(X, y, kind, True)
            seconds["two"].append(took)
            dist.barrier()
            if rank == 0:
                apart = np.abs(alone.coef_ - shared.coef_).max() / np.abs(alone.coef_).max()
                difference = max(difference, float(apart))
        if rank == 0:
            medians = {
                name: {part: statistics.median(v[part] for v in values) for part in ("read", "fit")}
                for name, values in seconds.items()
            }
            speed_up = {part: medians["one"][part] / medians["two"][part] for part in ("read", "fit")}
            found.append({"tangents": kind, "seconds": medians, "speed_up": speed_up})
            found[-1]["relative_difference"] = difference
            print(found[-1], flush=True)
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="not read, the images are synthetic; make bench gives it to all benchmarks")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = [
            multiprocessing.get_context("spawn").Process(
                target=measure, args=(rank, folder, args.images, args.repeats), daemon=True
            )
            for rank in range(1, PROCESSES)
        ]
        for process in others:
            process.start()
        rows = measure(0, folder, args.images, args.repeats)
        for process in others:
            process.join()
    report = {"benchmark": "distributed", "backbone": "efficientnet_lite0", "image_size": DEFAULT_SIZE}
    report |= {"n_images": args.images, "repeats": args.repeats, "processes": PROCESSES, "backend": "gloo"}
    write_report(args.results, report | {"rows": rows}, "cpu")


if __name__ == "__main__":
    main()
