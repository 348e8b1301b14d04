"""What only a linear model can say, and what it costs.

Mislabelled images: a tenth of the labels of 30 images a class is replaced by another class. Each method ranks the
images; the area under the ROC curve says how well the wrong ones come first. Removal: the change of the mean squared
loss of test images when one of 50 random training images is left out, predicted by `influence`, against the estimator
without the image, whose scale, prior and penalty are fitted again at the defaults (by `forget`, which for some of them
is compared with `fit`). Costs: what each method takes beside a fit of 300 images. Many: the same for 5,000 synthetic
images of 100 classes. Coverage: how often intervals of a regression of the number of the class hold the truth. Seconds
are of the processor, one thread. Results are kept after each measurement, and a run that was stopped goes on.

    python benchmarks/trust.py --data-dir FOLDER [--datasets digits] [--only mislabelled removal costs many coverage]
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, split, write_report
from accuracy import features
from scipy.stats import norm
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from speed import in_own_process, peak_memory

from sklearn_lqf import LQFClassifier, LQFRegressor

RESULTS = Path(__file__).parent / "results" / "trust.json"
BACKBONE = "efficientnet_lite0"
PER_CLASS, WRONG, SPLITS = 30, 0.1, 3
N_REMOVED, N_TEST, REMOVAL_PER_CLASS, N_REFITTED = 50, 200, 20, 3
NEIGHBORS = 10
N_COSTS, N_QUERIES, N_FORGOTTEN, ROUNDS = 300, 10, 5, 3
MANY, MANY_CLASSES, MANY_SIZE, _NOISE = 5000, 100, 32, 0.25
LEVELS = (0.5, 0.9, 0.95)
NFT = _nft.Schedule(lr=3e-3, epochs=25, frozen=True, flips=False)  # a usual one: there is no clean label to tune it by


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), round(time.process_time() - start, 3)


def with_wrong_labels(codes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of which a part is another class, and which are."""
    rng, n_classes = np.random.default_rng(seed), int(codes.max()) + 1
    wrong = np.zeros(len(codes), bool)
    wrong[rng.permutation(len(codes))[: round(WRONG * len(codes))]] = True
    other = (codes + rng.integers(1, n_classes, len(codes))) % n_classes
    return np.where(wrong, other, codes), wrong


def residual(outputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Squared residual of outputs (n, C) from their one-hot targets."""
    return ((outputs - np.eye(outputs.shape[1])[codes]) ** 2).sum(1)


def probe_residual(F: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Squared leave-one-out residual of the ridge probe, in closed form, at the best penalty."""
    alphas = np.logspace(-2, 6, 33)
    probe = RidgeCV(alphas, store_cv_results=True).fit(F, np.eye(int(codes.max()) + 1)[codes])
    return probe.cv_results_.sum(1)[:, int(np.flatnonzero(alphas == probe.alpha_)[0])]


def neighbor_disagreement(F: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How many of the nearest other images have another label."""
    nearest = NearestNeighbors(n_neighbors=NEIGHBORS + 1).fit(F).kneighbors(F, return_distance=False)[:, 1:]
    return (codes[nearest] != codes[:, None]).mean(1)


def mislabelled(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Areas under the ROC curve."""
    train, _ = split(codes, PER_CLASS, seed)
    X, (given, wrong) = X[train], with_wrong_labels(codes[train], seed)
    clf = LQFClassifier(BACKBONE, store_data=True).fit(X, given)
    F = features(X)
    log_p = _nft.train(X, given, NFT, seed)(X)
    ranks = {
        "leave_one_out": residual(clf.leave_one_out(), given),
        "in_sample": residual(clf.decision_function(X), given),
        "probe_leave_one_out": probe_residual(F, given),
        "nearest_neighbors": neighbor_disagreement(F, given),
        "nft_confidence": -log_p[np.arange(len(given)), given],
    }
    return {"n": len(given), "auc": {name: float(roc_auc_score(wrong, rank)) for name, rank in ranks.items()}}


def removal(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Predicted and actual changes of the mean test loss when single images are removed."""
    train, test = split(codes, REMOVAL_PER_CLASS, seed)
    rng = np.random.default_rng(seed)
    test = rng.permutation(test)[:N_TEST]
    clf = LQFClassifier(BACKBONE, store_data=True).fit(X[train], codes[train])
    effect = clf.influence(None, None, X[test], codes[test])
    before = clf.decision_function(X[test])
    raw = clf._raw_features(clf._read_new_data(X[test]))  # of which each refit has its own scale
    chosen = rng.permutation(len(train))[:N_REMOVED]
    actual, differences = [], []
    for number, i in enumerate(chosen):
        without = copy.deepcopy(clf).forget(i)
        outputs = without._model.outputs(raw)
        if number < N_REFITTED:
            rest = np.delete(train, i)
            again = LQFClassifier(BACKBONE).fit(X[rest], codes[rest])
            differences.append(float(np.abs(again._model.outputs(raw) - outputs).max()))
        actual.append(residual(outputs, codes[test]).mean() - residual(before, codes[test]).mean())
    predicted = effect.mean(0)[chosen]
    return {
        "n": len(train),
        "n_test": len(test),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]),
        "slope": float(np.dot(predicted, actual) / np.dot(predicted, predicted)),
        "largest_difference_of_refits": max(differences),
        "predicted": predicted.tolist(),
        "actual": [float(a) for a in actual],
    }


def answers_of(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> dict[str, float]:
    """Seconds of a fit and of each answer."""
    clf, fit = timed(lambda: LQFClassifier(BACKBONE, store_data=True).fit(X, y))
    found = {"fit": fit, "leave_one_out": timed(clf.leave_one_out)[1]}
    found["influence"] = timed(lambda: clf.influence(None, None, X_test, y_test))[1]
    found["posterior"] = timed(lambda: clf.decision_function(X_test, return_std=True))[1]
    gone = np.arange(N_FORGOTTEN) * (len(X) // N_FORGOTTEN)
    found["forget"] = timed(lambda: clf.forget(gone))[1]
    return found


def costs(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Seconds of each answer, and in units of a fit; medians of rounds in which fits and answers alternate."""
    train, test = split(codes, N_COSTS // (int(codes.max()) + 1), seed)
    test = test[:N_QUERIES]
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, seconds in answers_of(X[train], codes[train], X[test], codes[test]).items():
            found[name].append(seconds)
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return {"n": len(train), "seconds": medians, "fits": {k: v / medians["fit"] for k, v in medians.items()}}


def many() -> dict[str, Any]:
    """The same once, for many images of many classes: a pattern for each class, and noise. In its own process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    patterns = rng.random((MANY_CLASSES, MANY_SIZE // 4, MANY_SIZE // 4, 3)).repeat(4, 1).repeat(4, 2)
    y = np.arange(MANY + N_QUERIES) % MANY_CLASSES
    X = np.empty((len(y), MANY_SIZE, MANY_SIZE, 3), dtype=np.uint8)
    for i, c in enumerate(y):
        X[i] = 255 * np.clip(patterns[c] + _NOISE * rng.standard_normal(X.shape[1:]), 0, 1)
    before = peak_memory()
    seconds = answers_of(X[:MANY], y[:MANY], X[MANY:], y[MANY:])
    fits = {k: v / seconds["fit"] for k, v in seconds.items()}
    found = {"n": MANY, "n_classes": MANY_CLASSES, "host_bytes": peak_memory() - before}
    return {**found, "seconds": seconds, "fits": fits}


def coverage(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Coverage of intervals of a regression on images."""
    train, test = split(codes, PER_CLASS, seed)
    test = np.random.default_rng(seed).permutation(test)[:N_TEST]
    y = codes.astype(np.float64)
    model = LQFRegressor(BACKBONE, store_data=True).fit(X[train], y[train])
    mean, std = model.predict(X[test], return_std=True)
    found: dict[str, Any] = {"n": len(train), "r2": float(model.score(X[test], y[test]))}
    for level in LEVELS:
        found[f"{level:g}"] = float((np.abs(mean - y[test]) <= norm.ppf((1 + level) / 2) * std).mean())
    return found


SECTIONS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "mislabelled": (mislabelled, SPLITS, ("digits", "trashnet", "caltech101")),
    "removal": (removal, 1, ("digits", "trashnet", "caltech101")),
    "costs": (costs, 1, ("digits", "trashnet")),
    "coverage": (coverage, SPLITS, ("digits", "trashnet")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", help="of all sections; default: those of each section")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "many"], default=[*SECTIONS, "many"])
    parser.add_argument("--splits", type=int, default=SPLITS, help="at most")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(args.results.read_text()) if args.results.exists() else {"benchmark": "trust", "rows": []}
    done = {(r["section"], r["dataset"], r["split"]) for r in report["rows"]}

    def keep(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        write_report(args.results, report, "cpu")
        print(json.dumps(row)[:600], flush=True)

    for section in [name for name in SECTIONS if name in args.only]:
        measure, splits, datasets = SECTIONS[section]
        for dataset in args.datasets or datasets:
            wanted = [s for s in range(min(splits, args.splits)) if (section, dataset, s) not in done]
            if not wanted:
                continue
            size = SIZES.get(dataset, DEFAULT_SIZE)
            X, codes = read_images(dataset, args.data_dir, size)
            for seed in wanted:
                row = {"section": section, "dataset": dataset, "split": seed, "image_size": size}
                keep(row | measure(X, codes, seed))
    if "many" in args.only and ("many", "synthetic", 0) not in done:
        keep({"section": "many", "dataset": "synthetic", "split": 0, "image_size": MANY_SIZE} | in_own_process(many))


if __name__ == "__main__":
    main()
