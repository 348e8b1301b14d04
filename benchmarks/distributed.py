"""What sharing a fit brings: seconds of a Gauss-Newton product on one process and on two, a thread each.

Both are measured in turn, product by product, so that whatever else the machine does meets both alike; the second
process sleeps while the first works alone. The products of both are compared, too.

    python benchmarks/distributed.py
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _common import DEFAULT_SIZE, write_report
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sklearn_lqf import LQFClassifier
from sklearn_lqf.objective import Quadratic

RESULTS = Path(__file__).parent / "results" / "distributed.json"
PROCESSES, N_CLASSES, TARGET = 2, 10, 1.6


class _Classifier(LQFClassifier):
    """Keeps its quadratic."""

    def _solve(self, quadratic: Quadratic, *args: Any) -> Any:
        self.quadratic = quadratic
        return super()._solve(quadratic, *args)


def quadratic_of(X: np.ndarray, y: np.ndarray, tangent_layers: Any, distributed: bool) -> Quadratic:
    """The quadratic of a fit, with the activations that it keeps between products."""
    clf = _Classifier("efficientnet_lite0", tangent_layers=tangent_layers, distributed=distributed, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return clf.fit(X, y).quadratic


def timed(product: Callable[[Tensor], Tensor], v: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = product(v)
    return time.perf_counter() - start, result


def measure(rank: int, folder: Path, n_images: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each choice of layers; called by every process, rank 0 returns what is to be reported."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "group").as_uri(), rank=rank, world_size=PROCESSES)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (n_images, DEFAULT_SIZE, DEFAULT_SIZE, 3), dtype=np.uint8)
    y = np.arange(n_images) % N_CLASSES
    found = []
    for tangent_layers in (1, 2):
        alone = quadratic_of(X, y, tangent_layers, False) if rank == 0 else None
        shared = quadratic_of(X, y, tangent_layers, True)
        v = torch.randn(shared.network.n_parameters, generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        difference = 0.0
        for _ in range(repeats):
            if alone is not None:
                took, one = timed(alone.matvec, v)
                seconds["one"].append(took)
            dist.barrier()
            took, two = timed(shared.matvec, v)
            seconds["two"].append(took)
            dist.barrier()
            if alone is not None:
                difference = max(difference, float((one - two).abs().max() / one.abs().max()))
        if alone is not None:
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            row = {"tangent_layers": tangent_layers, "n_parameters": shared.network.n_parameters, "seconds": medians}
            row |= {"speed_up": medians["one"] / medians["two"], "relative_difference": difference}
            print(row, flush=True)
            found.append(row)
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="not read, the images are synthetic; make bench gives it to all benchmarks")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
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
    write_report(args.output, report | {"target": TARGET, "rows": rows}, "cpu")


if __name__ == "__main__":
    main()
