"""Speed: whole fits and predictions, how a fit grows, closed form against conjugate gradients, a grid search.

Every figure is seconds beside those of an opponent, taken in one run: contenders are timed in turns (a b c a b c ...),
so that other work on the machine meets all of them alike. Fits whose memory is reported have a process of their own.
Results are kept after each measurement, and a run that was stopped goes on where it was.

    python benchmarks/speed.py --data-dir FOLDER [--only fit growth solver search] [--device cuda]
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split, write_report
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn

from sklearn_lqf import LQFClassifier, LQFClassifierCV
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.engine.features import Group
from sklearn_lqf.engine.fitted import FeatureReader
from sklearn_lqf.engine.problem import Problem, Recipe, TrainingRows
from sklearn_lqf.network.prepared import PreparedNetwork

RESULTS = Path(__file__).parent / "results"
BACKBONE = "efficientnet_lite0"
PER_CLASS, PREDICTED = 50, 512
KINDS: dict[str, dict[str, Any]] = {
    "lqf": {},
    "lqf, no tangents": {"tangents": None},
    "lqf, mirrored": {"views": ("identity", "flip")},
    **{f"lqf, network tangents, {k}": {"tangents": "network", "n_directions": k} for k in (1, 4, 8)},
}
_ROUNDS_MIN, _ROUNDS_SECONDS = 3, 120  # rounds go on up to --repeats while they took less
GROWTH: tuple[dict[str, Any], ...] = (  # each varies one thing
    *({"varied": "images", "n": n, "size": 64, "classes": 10} for n in (200, 1000, 5000)),
    *({"varied": "many images", "n": n, "size": 32, "classes": 10} for n in (1000, 5000, 20000)),
    *({"varied": "classes", "n": 1000, "size": 32, "classes": c} for c in (2, 10, 100, 500)),
    *({"varied": "pixels", "n": 200, "size": s, "classes": 10} for s in (64, 96, 128, 224)),
)
_NOISE = 8  # gray levels, of repeated images
SOLVED, HELD_OUT, SOLVED_SIZE = (1000, 5000, 20000), 500, 32
_SOLVED_GROUPS = 4  # the last features, and groups of the last stages: about 4000 columns
_TOL = 1e-3  # the default of the estimators
SEARCH_ALPHAS, SEARCH_FOLDS, SEARCH_PER_CLASS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), 3, 20

Run = Callable[[], Any]


class Report:
    """Rows by section, written after each measurement."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"benchmark": "speed"}
        threads = self.content.get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():  # which also decides whose seconds are counted
            raise SystemExit(f"{path} was measured with {threads} threads: use --threads {threads}, or other --results")

    def has(self, section: str, **key: Any) -> bool:
        """Whether a row is there."""
        return any(key.items() <= row.items() for row in self._rows(section))

    def add(self, section: str, **row: Any) -> None:
        """Keep a row."""
        self._rows(section).append(row)
        write_report(self.path, self.content, self.device)
        print(section, json.dumps(row), flush=True)

    def _rows(self, section: str) -> list[dict[str, Any]]:
        return self.content.setdefault(section, [])


# ------------------------------------------------------------------------------------------------------ timing


def now(device: torch.device) -> float:
    """Seconds when all that was asked of the device is done; with one thread of a CPU, seconds of the processor.

    Those do not count other work on the machine; with several threads they would count waiting for each other.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(contenders: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= _ROUNDS_MIN and time.perf_counter() - begin > _ROUNDS_SECONDS:
            break
        for name, run in contenders.items():
            start = now(device)
            run()
            found[name].append(round(now(device) - start, 6))
    return found


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Medians over the rounds of what each takes over what ``base`` takes in the same round."""
    return {name: float(np.median(np.divide(s, seconds[base]))) for name, s in seconds.items()}


def peak_memory() -> int:
    """Most bytes of host memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins, on Linux, with that of the parent process
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)


def in_own_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function returns that runs in a fresh process, whose peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


# -------------------------------------------------------------------------------------------------- whole fits


def forward(module: nn.Module, preprocessing: Any, X: np.ndarray, device: torch.device) -> Tensor:
    """The network's own forward pass."""
    with torch.inference_mode():
        parts = torch.from_numpy(X).permute(0, 3, 1, 2).split(64)
        normalized = (
            preprocessing.normalize(x.to(device)).contiguous(memory_format=torch.channels_last) for x in parts
        )
        return torch.cat([module(x) for x in normalized]).cpu()


def measure_fits(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Whole fits and predictions over the network's own forward passes of the same images."""
    key = {"dataset": "trashnet", "per_class": args.per_class, "size": DEFAULT_SIZE}
    if report.has("fit", **key):
        return
    X, codes = read_images("trashnet", args.data_dir, DEFAULT_SIZE)
    train, test = split(codes, args.per_class, 0)
    X_test = X[np.random.default_rng(0).permutation(test)[:PREDICTED]]
    X, codes = X[train], codes[train]
    backbone = load_backbone(BACKBONE)
    module = backbone.module.to(device, memory_format=torch.channels_last).eval()
    estimators = {name: LQFClassifier(BACKBONE, execution={"device": device}, **kind) for name, kind in KINDS.items()}

    def probe() -> None:
        loaded = load_backbone(BACKBONE)
        loaded.module.to(device, memory_format=torch.channels_last).reset_classifier(0)
        features = forward(loaded.module, loaded.preprocessing, X, device).numpy()
        LogisticRegression(max_iter=1000).fit(features, codes)

    fits: dict[str, Run] = {"forward": lambda: forward(module, backbone.preprocessing, X, device), "logistic": probe}
    fits |= {name: lambda e=e: e.fit(X, codes) for name, e in estimators.items()}
    seconds = interleaved(fits, args.repeats, device)
    predictions: dict[str, Run] = {"forward": lambda: forward(module, backbone.preprocessing, X_test, device)}
    predictions |= {name: lambda e=e: e.predict(X_test) for name, e in estimators.items()}
    predicted = interleaved(predictions, args.repeats, device)
    report.add(
        "fit", **key, n=len(X), n_predicted=len(X_test), seconds=seconds, ratio=ratios(seconds, "forward"),
        seconds_predict=predicted, ratio_predict=ratios(predicted, "forward"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ growth


def repeated_digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Raveled digits with a little noise, as often as it takes, and their labels."""
    X, y = load_digits(return_X_y=True)
    rows = np.arange(n) % len(X)
    noise = np.random.default_rng(0).integers(0, _NOISE, (n, X.shape[1]))
    return np.clip(X[rows] * (255 / 16) + noise, 0, 255).astype(np.uint8), y[rows]


def grow(case: dict[str, Any], threads: int, device_name: str) -> dict[str, Any]:
    """Seconds and memory of one fit, in a process of its own."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    X, y = repeated_digits(case["n"])
    if case["varied"] == "classes":
        y = np.random.default_rng(0).permutation(case["n"]) % case["classes"]
    estimator = LQFClassifier(BACKBONE, image_shape=(8, 8), image_size=case["size"], execution={"device": device})
    estimator.fit(X[:20], np.arange(20) % 2)  # what the first fit of a process alone takes
    before, start = peak_memory(), now(device)
    estimator.fit(X, y)
    found = {"seconds": round(now(device) - start, 3), "host_bytes": peak_memory() - before}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    start = now(device)
    estimator.predict(X[:200])
    found["ms_predict"] = round(1000 * (now(device) - start) / len(X[:200]), 3)
    return {**found, "solver": estimator.solver_, "n_features": estimator.coef_.shape[1]}


def measure_growth(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """One fit for each case, in fresh processes."""
    for case in GROWTH:
        if case["n"] <= args.most and not report.has("growth", **case):
            report.add("growth", **case, **in_own_process(grow, case, args.threads, str(device)))


# ------------------------------------------------------------------------------------------------------ solver


def read_features(n: int) -> tuple[np.ndarray, list[Group], np.ndarray]:
    """Features of repeated digits in the groups that are solved for, and their labels."""
    X, y = repeated_digits(n)
    backbone, shape = load_backbone(BACKBONE), (3, SOLVED_SIZE, SOLVED_SIZE)
    network = PreparedNetwork(
        backbone, shape, "head", 0.0, True, backbone.preprocessing, torch.float32, torch.device("cpu")
    )
    reader = FeatureReader.draw(network, 0, None, 0, ("identity",))
    groups, ends = reader.groups, np.cumsum([g.size for g in reader.groups])
    chosen = [0, *range(len(groups) - _SOLVED_GROUPS + 1, len(groups))]
    columns = np.concatenate([np.arange(ends[i] - groups[i].size, ends[i]) for i in chosen])
    read, parts = reader.reading(None), []
    for rows in torch.from_numpy(X.reshape(-1, 1, 8, 8)).split(256):
        pixels = nn.functional.interpolate(rows.float() / 255, size=SOLVED_SIZE, mode="bilinear").expand(-1, 3, -1, -1)
        parts.append(read(pixels)[:, columns])
    return np.concatenate(parts), [groups[i] for i in chosen], y


def solve(folder: str, groups: list[Group], case: dict[str, Any], threads: int) -> dict[str, Any]:
    """One solution for features that lie in a folder; seconds, memory, and outputs for held-out images."""
    torch.set_num_threads(threads)
    features = np.load(Path(folder) / "features.npy", mmap_mode="r")
    codes = np.load(Path(folder) / "codes.npy")
    n = case["n"]
    targets, ones = np.eye(10)[codes[:n]], np.ones(n)
    rows = TrainingRows(np.ascontiguousarray(features[:n]), targets, ones, _digests(n))
    solver = "closed" if case["form"] == "closed" else "pcg"
    recipe = Recipe("equal", solver, _TOL, 1000, 9, True, 1 << 40)
    problem = Problem(rows, groups, ones, np.ones(10), recipe)
    before, start = peak_memory(), time.process_time() if threads == 1 else time.perf_counter()
    form = problem.factorization(problem.variances)
    coef, intercept = form.solve(torch.from_numpy(targets))
    end = time.process_time() if threads == 1 else time.perf_counter()
    test = problem.scaled(np.asarray(features[-HELD_OUT:]), problem.variances)
    np.save(Path(folder) / f"{case['form']}.npy", (test @ coef + intercept).numpy())
    found = {"seconds": round(end - start, 3), "host_bytes": peak_memory() - before, "method": form.method}
    if form.course is not None:
        found |= {"n_iter": form.course.n_iter, "residual": form.course.residual_norms[-1]}
    return found


def _digests(n: int) -> np.ndarray:
    """Distinct digests of n rows, (n, 16)."""
    return np.random.default_rng(0).integers(0, 256, (n, 16), dtype=np.uint8)


def measure_solvers(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Closed form and conjugate gradients for the same objective on the same features, on the CPU."""
    wanted = [n for n in SOLVED if n <= args.most and not report.has("solver", n=n)]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        features, groups, y = read_features(max(wanted) + HELD_OUT)
        np.save(Path(folder) / "features.npy", features)
        np.save(Path(folder) / "codes.npy", y)
        for n in wanted:
            cases = [{"n": n, "form": form} for form in ("closed", "pcg")]
            found = {c["form"]: in_own_process(solve, folder, groups, c, args.threads) for c in cases}
            closed, pcg = (np.load(Path(folder) / f"{form}.npy") for form in ("closed", "pcg"))
            report.add(
                "solver", n=n, n_features=features.shape[1], tol=_TOL, **found,
                largest_difference=float(np.abs(closed - pcg).max() / np.abs(closed).max()),
                same_class=float((closed.argmax(1) == pcg.argmax(1)).mean()),
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ search


def measure_searches(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """A grid search with the trunk activations shared between its fits, and without, beside LQFClassifierCV."""
    X, codes = read_images("trashnet", args.data_dir, DEFAULT_SIZE)
    train, _ = split(codes, args.search_per_class, 0)
    for tangents in ("local", "network", None):
        key = {"dataset": "trashnet", "size": DEFAULT_SIZE, "n": len(train), "tangents": tangents}
        if report.has("search", **key):
            continue
        found: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, memory in (("shared", folder), ("alone", None)):
                estimator = LQFClassifier(BACKBONE, tangents=tangents, execution={"memory": memory, "device": device})
                search = GridSearchCV(estimator, {"alpha": list(SEARCH_ALPHAS)}, cv=SEARCH_FOLDS, refit=False)
                start = now(device)
                found[name] = search.fit(X[train], codes[train]).cv_results_["mean_test_score"]
                seconds[name] = now(device) - start
        start = now(device)
        path = LQFClassifierCV(
            BACKBONE, tangents=tangents, alphas=SEARCH_ALPHAS, cv=SEARCH_FOLDS, execution={"device": device}
        ).fit(X[train], codes[train])  # fmt: skip
        seconds["path"] = now(device) - start  # the final fit included
        found["path"] = path.cv_results_["mean_test_score"]
        report.add(
            "search", **key, fits=len(SEARCH_ALPHAS) * SEARCH_FOLDS, seconds=seconds,
            ratio=seconds["shared"] / seconds["alone"], ratio_path=seconds["path"] / seconds["alone"],
            largest_difference_of_scores=float(np.abs(found["shared"] - found["alone"]).max()),
            largest_difference_of_path=float(np.abs(found["path"] - found["alone"]).max()),
        )  # fmt: skip


MEASURES = {"fit": measure_fits, "growth": measure_growth, "solver": measure_solvers, "search": measure_searches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="images a class of the section fit")
    parser.add_argument("--search-per-class", type=int, default=SEARCH_PER_CLASS)
    parser.add_argument("--most", type=int, default=max(SOLVED), help="images; cases with more are left out")
    parser.add_argument(
        "--results", type=Path, help="file of the results, default: benchmarks/results/speed-DEVICE.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report = Report(args.results or RESULTS / f"speed-{args.device}.json", device)
    for section in args.only:
        MEASURES[section](report, args, device)


if __name__ == "__main__":
    main()
