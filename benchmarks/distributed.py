"""What sharing a fit brings: seconds of a fit on one process and on two, and what each of several processes holds.

Section reading: both numbers of processes are measured in turn, fit by fit, so that whatever else the machine does
meets both alike; the second process sleeps while the first works alone. Processes share the reading of the features.

Section shared: one fit by 1, 2 and 4 processes, each number in processes of its own: the peak of memory of each, and
what differs of the models. A thread for each process. Results are kept after each measurement, and a run that was
stopped goes on where it was.

    python benchmarks/distributed.py [--only reading shared]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _common import DEFAULT_SIZE
from _timing import BACKBONE, HELD_OUT, RESULTS, Memory, Report, repeated_digits

from sklearn_lqf import LQFClassifier

N_CLASSES, IMAGES, SHARED_IMAGES, SHARED_SIZE, PROCESSES = 10, 384, 4000, 32, (1, 2, 4)
KINDS: dict[str, dict[str, Any]] = {"local": {}, "network": {"tangents": "network"}}
# More images than features, in closed form; and all groups of the defaults by conjugate gradients, which stop at a
# tolerance: at the default, and where nothing but rounding should be left of the difference.
SHARED: dict[str, dict[str, Any]] = {
    "last features": {"tangents": None},
    "all groups": {"solver": "pcg"},
    "all groups, `tol=1e-8`": {"solver": "pcg", "tol": 1e-8, "max_iter": 1000},
}
DECIDED = (
    "solver_", "n_iter_", "converged_", "residual_norms_", "alpha_", "prior_", "noise_variance_", "temperature_",
    "loo_score_", "intercept_", "coef_",
)  # fmt: skip


class _Classifier(LQFClassifier):
    """Knows how long its features took."""

    def _evaluate(self, *args: Any) -> Any:
        start = time.perf_counter()
        found = super()._evaluate(*args)
        self._reading = time.perf_counter() - start
        return found


def fit(X: np.ndarray, y: np.ndarray, distributed: bool, **parameters: Any) -> tuple[dict[str, float], _Classifier]:
    """Seconds of reading, and of the whole fit."""
    start = time.perf_counter()
    clf = _Classifier(BACKBONE, execution={"distributed": distributed, "device": "cpu"}, **parameters).fit(X, y)
    return {"read": clf._reading, "fit": time.perf_counter() - start}, clf


# ----------------------------------------------------------------------------------------------------- processes


def _in_group(rank: int, size: int, folder: str, link: Connection, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "group").as_uri(), rank=rank, world_size=size)
    link.send(work(rank, *args))
    dist.destroy_process_group()


def on_processes(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of some fresh processes, which are a group."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            mine, its = context.Pipe(duplex=False)
            process = context.Process(target=_in_group, args=(rank, size, folder, its, work, args), daemon=True)
            process.start()
            its.close()
            started.append((process, mine))
        found = [link.recv() for _, link in started]
        for process, _ in started:
            process.join()
    return found


# ------------------------------------------------------------------------------------------------------- reading


def read_in_turns(rank: int, kind: str, n_images: int, repeats: int) -> dict[str, Any] | None:
    """Fits alone and together; rank 0 returns what is to be reported."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (n_images, DEFAULT_SIZE, DEFAULT_SIZE, 3), dtype=np.uint8)
    y = np.arange(n_images) % N_CLASSES
    seconds: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    difference = 0.0
    for _ in range(repeats):
        if rank == 0:
            took, alone = fit(X, y, False, **KINDS[kind])
            seconds["one"].append(took)
        dist.barrier()
        took, shared = fit(X, y, True, **KINDS[kind])
        seconds["two"].append(took)
        dist.barrier()
        if rank == 0:
            difference = max(difference, _apart(shared.coef_, alone.coef_))
    if rank:
        return None
    medians = {
        name: {part: statistics.median(v[part] for v in values) for part in ("read", "fit")}
        for name, values in seconds.items()
    }
    speed_up = {part: medians["one"][part] / medians["two"][part] for part in ("read", "fit")}
    return {"seconds": medians, "speed_up": speed_up, "relative_difference": difference}


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def measure_reading(report: Report, args: argparse.Namespace) -> None:
    """One row for each kind of tangents."""
    for kind in KINDS:
        key = {"tangents": kind, "n_images": args.images}
        if not report.has("rows", tangents=kind):
            found = on_processes(2, read_in_turns, kind, args.images, args.repeats)[0]
            report.add("rows", **key, repeats=args.repeats, **found)


# -------------------------------------------------------------------------------------------------------- shared


def fit_measured(rank: int, kind: str, n: int, distributed: bool) -> dict[str, Any]:
    """One fit, its seconds and memory, the model, and its decision values of held-out images."""
    X, y = repeated_digits(n)
    parameters = {"image_shape": (8, 8), "image_size": SHARED_SIZE, **SHARED[kind]}
    fit(X[:20], np.arange(20) % 2, False, **parameters)  # what the first fit of a process alone takes
    with Memory() as memory:
        took, clf = fit(X, y, distributed, **parameters)
    X_test, y_test = repeated_digits(HELD_OUT, held_out=True)
    return {
        "seconds": took,
        "host_bytes": memory.peak,
        "anonymous_bytes": memory.anonymous,
        "decision": clf.decision_function(X_test),
        "accuracy": float((clf.predict(X_test) == y_test).mean()),
        **{name: getattr(clf, name) for name in DECIDED},
    }


def _same(values: list[Any]) -> bool:
    """Whether all are equal, to the last bit."""
    if isinstance(values[0], np.ndarray):
        return all(np.array_equal(values[0], v) for v in values)
    return all(v == values[0] for v in values)


def measure_shared(report: Report, args: argparse.Namespace) -> None:
    """One row for each fit and number of processes; models are compared with that of one process."""
    for kind in args.kinds:
        key = {"kind": kind, "n_images": args.shared_images, "size": SHARED_SIZE}
        wanted = [size for size in args.processes if not report.has("shared", **key, processes=size)]
        if not wanted:
            continue
        alone = on_processes(1, fit_measured, kind, args.shared_images, False)[0]
        for size in wanted:
            found = [alone] if size == 1 else on_processes(size, fit_measured, kind, args.shared_images, True)
            first = found[0]
            report.add(
                "shared", **key, processes=size, n_features=first["coef_"].shape[1], solver=first["solver_"],
                n_iter=first["n_iter_"], accuracy=first["accuracy"], seconds=[f["seconds"] for f in found],
                host_bytes=[f["host_bytes"] for f in found], anonymous_bytes=[f["anonymous_bytes"] for f in found],
                difference_of_coef=_apart(first["coef_"], alone["coef_"]),
                difference_of_decision=_apart(first["decision"], alone["decision"]),
                same_on_all={name: _same([f[name] for f in found]) for name in DECIDED},
                same_as_one={name: first[name] == alone[name] for name in ("solver_", "n_iter_", "converged_")},
            )  # fmt: skip


MEASURES = {"reading": measure_reading, "shared": measure_shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="not read, no image is a file; make bench gives it to all benchmarks")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--images", type=int, default=IMAGES, help="of the section reading")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared-images", type=int, default=SHARED_IMAGES, help="of the section shared")
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES), help="of the section shared")
    parser.add_argument("--kinds", nargs="+", choices=list(SHARED), default=list(SHARED), help="of the section shared")
    parser.add_argument("--results", type=Path, default=RESULTS / "distributed.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.results, torch.device("cpu"), "distributed", backbone=BACKBONE, backend="gloo")
    for section in args.only:
        MEASURES[section](report, args)


if __name__ == "__main__":
    main()
