"""Speed: whole fits and predictions, how a fit grows, closed form against conjugate gradients, a grid search.

Every figure is seconds beside those of an opponent, taken in one run: contenders are timed in turns (a b c a b c ...),
so that other work on the machine meets all of them alike. Fits whose memory is reported have a process of their own.
Results are kept after each measurement, and a run that was stopped goes on where it was.

    python benchmarks/speed.py --data-dir FOLDER [--only fit growth solver search] [--device cuda]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split
from _timing import (
    BACKBONE,
    HELD_OUT,
    Memory,
    Report,
    Run,
    forward,
    in_own_process,
    interleaved,
    now,
    ratios,
    repeated_digits,
    run_sections,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_lqf import LQFClassifier, LQFClassifierCV
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.engine.features import Group
from sklearn_lqf.engine.fitted import FeatureReader
from sklearn_lqf.engine.problem import Problem, Recipe, TrainingRows
from sklearn_lqf.network.prepared import PreparedNetwork
from sklearn_lqf.runtime.memory import memory_budget

PER_CLASS, PREDICTED = 50, 512
KINDS: dict[str, dict[str, Any]] = {
    "lqf": {},
    "lqf, no tangents": {"tangents": None},
    "lqf, mirrored": {"views": ("identity", "flip")},
    **{f"lqf, network tangents, {k}": {"tangents": "network", "n_directions": k} for k in (1, 4, 8)},
}
IMAGES, ALL_LAYERS = (1000, 5000, 20000, 50000), 5000
GROWTH: tuple[dict[str, Any], ...] = (  # beside those that grow with the images; each varies one thing
    *({"varied": "classes", "n": 1000, "size": 32, "classes": c} for c in (2, 10, 100, 500)),
    *({"varied": "pixels", "n": 200, "size": s, "classes": 10} for s in (64, 96, 128, 224)),
)
SOLVED, SOLVED_SIZE = (1000, 5000, 20000), 32
_SOLVED_GROUPS = 4  # the last features, and groups of the last stages: about 4000 columns
_TOL = 1e-3  # the default of the estimators
SEARCH_ALPHAS, SEARCH_FOLDS, SEARCH_PER_CLASS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), 3, 20


# -------------------------------------------------------------------------------------------------- whole fits


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


def growth_cases(images: list[int], all_layers: int) -> list[dict[str, Any]]:
    """What is fitted: digits of one size, more and more of them; all layers read; and one thing varied of the rest."""
    base = {"size": 64, "classes": 10}
    kinds = [{"tangents": kind, "tangent_layers": "all"} for kind in ("network", "both")]
    return [
        *({"varied": "images", "n": n, **base} for n in images),
        *({"varied": "tangents", "n": all_layers, **base, **kind} for kind in kinds),
        *GROWTH,
    ]


def grow(case: dict[str, Any], threads: int, device_name: str) -> dict[str, Any]:
    """Seconds, memory and accuracy of one fit, in a process of its own."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    X, y = repeated_digits(case["n"])
    if case["varied"] == "classes":
        y = np.random.default_rng(0).permutation(case["n"]) % case["classes"]
    estimator = LQFClassifier(
        BACKBONE, image_shape=(8, 8), image_size=case["size"], execution={"device": device},
        **{name: case[name] for name in ("tangents", "tangent_layers") if name in case},
    )  # fmt: skip
    estimator.fit(X[:20], np.arange(20) % 2)  # what the first fit of a process alone takes
    with Memory() as memory:
        start = now(device)
        estimator.fit(X, y)
        found = {"seconds": round(now(device) - start, 3)}
    found |= {"host_bytes": memory.peak, "anonymous_bytes": memory.anonymous, "budget": memory_budget()}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    X_test, y_test = repeated_digits(HELD_OUT, held_out=True)
    start = now(device)
    predicted = estimator.predict(X_test)
    found["ms_predict"] = round(1000 * (now(device) - start) / len(X_test), 3)
    if case["varied"] != "classes":  # whose labels are random
        found["accuracy"] = float((predicted == y_test).mean())
    return {**found, "solver": estimator.solver_, "n_features": estimator.coef_.shape[1]}


def measure_growth(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """One fit for each case, in fresh processes."""
    for case in growth_cases(args.images, args.all_layers):
        if (args.most is None or case["n"] <= args.most) and not report.has("growth", **case):
            report.add("growth", **case, **in_own_process(grow, case, args.threads, str(device)))


# ------------------------------------------------------------------------------------------------------ solver


def read_features(n: int) -> tuple[np.ndarray, list[Group], np.ndarray]:
    """Features of repeated digits in the groups that are solved for, and their labels; the last digits are held out."""
    both = [repeated_digits(n), repeated_digits(HELD_OUT, held_out=True)]
    X, y = (np.concatenate(part) for part in zip(*both, strict=True))
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
    recipe = Recipe(
        prior="equal", alpha="auto", solver=solver, tol=_TOL, max_iter=1000, free=9, stratified=True, budget=1 << 40
    )
    problem = Problem(rows, groups, ones, np.ones(10), recipe)
    with Memory() as memory:
        start = now(torch.device("cpu"))
        form = problem.factorization(problem.variances)
        optimum = form.solve(torch.from_numpy(targets))
        seconds = now(torch.device("cpu")) - start
    test = problem.scaled(np.asarray(features[-HELD_OUT:]), problem.variances)
    np.save(Path(folder) / f"{case['form']}.npy", (test @ optimum.coef + optimum.intercept).numpy())
    found = {"seconds": round(seconds, 3), "host_bytes": memory.peak, "method": form.method}
    if optimum.course is not None:
        found |= {"n_iter": optimum.course.n_iter, "residual": optimum.course.errors[-1]}
    return found


def _digests(n: int) -> np.ndarray:
    """Distinct digests of n rows, (n, 16)."""
    return np.random.default_rng(0).integers(0, 256, (n, 16), dtype=np.uint8)


def measure_solvers(report: Report, args: argparse.Namespace, device: torch.device) -> None:
    """Closed form and conjugate gradients for the same objective on the same features, on the CPU."""
    wanted = [n for n in args.solved if not report.has("solver", n=n)]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        features, groups, y = read_features(max(wanted))
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
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="images a class of the section fit")
    parser.add_argument("--search-per-class", type=int, default=SEARCH_PER_CLASS)
    parser.add_argument("--images", type=int, nargs="*", default=list(IMAGES), help="of the section growth")
    parser.add_argument("--all-layers", type=int, default=ALL_LAYERS, help="images of its fits that read all layers")
    parser.add_argument("--most", type=int, help="images; cases of the section growth with more are left out")
    parser.add_argument("--solved", type=int, nargs="*", default=list(SOLVED), help="images of the section solver")
    run_sections(parser, "speed", MEASURES)


if __name__ == "__main__":
    main()
