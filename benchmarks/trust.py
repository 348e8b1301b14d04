"""What only a linear model can say, and what it costs.

Mislabelled images: a tenth of the labels of 30 images a class is replaced by another class. Each method ranks the
images; the area under the ROC curve says how well the wrong ones come first. Removal: the change of the mean squared
loss of test images when one of 50 random training images is left out, predicted by `influence`, against the estimator
fitted again at its defaults without the image (to a tolerance at which one image is not lost in the solver's error).
Estimates: rank correlation of the effects by solves, and by the preconditioner, with the exact ones. Costs: what each
method takes beside the fit. Coverage: how often intervals of a regression of the number of the class hold the truth.
Regime: the gap between the linear model and the network at its weights. Seconds are of the processor, one thread.

    python benchmarks/trust.py --data-dir FOLDER [--datasets digits] [--only mislabelled removal estimates ...]
"""

import argparse
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
from scipy.stats import norm, spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor, uncertainty
from sklearn_lqf.head import fit_ridge_head
from sklearn_lqf.problem import _RIDGE_ALPHAS, Problem

RESULTS = Path(__file__).parent / "results" / "trust.json"
BACKBONE = "efficientnet_lite0"
PER_CLASS, WRONG, SPLITS = 30, 0.1, 3
N_REMOVED, N_TEST, REMOVAL_PER_CLASS, TOL = 50, 200, 20, 1e-4
NEIGHBORS = 10
N_QUERIES, N_FORGOTTEN, N_ALPHAS, FOLDS, ROUNDS = 10, 5, 20, 5, 3
LEVELS = (0.5, 0.9, 0.95)
NFT = _nft.Schedule(lr=3e-3, epochs=25, frozen=True, flips=False)  # a usual one: there is no clean label to tune it by


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), round(time.process_time() - start, 2)


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


def probe_leave_one_out(F: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Outputs of the ridge probe that did not see the image, in closed form."""
    ones = torch.ones(len(codes), dtype=torch.float64)
    targets = torch.eye(int(codes.max()) + 1, dtype=torch.float64)[codes]
    return fit_ridge_head(torch.from_numpy(F).unsqueeze(0), targets, ones, ones, _RIDGE_ALPHAS).held_out[0].numpy()


def neighbor_disagreement(F: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How many of the nearest other images have another label."""
    nearest = NearestNeighbors(n_neighbors=NEIGHBORS + 1).fit(F).kneighbors(F, return_distance=False)[:, 1:]
    return (codes[nearest] != codes[:, None]).mean(1)


def mislabelled(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Areas under the ROC curve, and what leave-one-out costs beside the fit."""
    train, _ = split(codes, PER_CLASS, seed)
    X, (given, wrong) = X[train], with_wrong_labels(codes[train], seed)
    clf, fit_seconds = timed(lambda: LQFClassifier(BACKBONE).fit(X, given))
    exact, exact_seconds = timed(lambda: clf.leave_one_out(X, given))
    head, head_seconds = timed(lambda: clf.leave_one_out(X, given, method="head"))
    F = features(X)
    log_p = _nft.train(X, given, NFT, seed)(X)
    ranks = {
        "leave_one_out": residual(exact, given),
        "leave_one_out_head": residual(head, given),
        "in_sample": residual(clf.decision_function(X), given),
        "probe_leave_one_out": residual(probe_leave_one_out(F, given), given),
        "nearest_neighbors": neighbor_disagreement(F, given),
        "nft_confidence": -log_p[np.arange(len(given)), given],
    }
    return {
        "n": len(given),
        "auc": {name: float(roc_auc_score(wrong, rank)) for name, rank in ranks.items()},
        "head_error": float(np.abs(exact - head).max() / np.abs(exact).max()),
        "seconds": {"fit": fit_seconds, "leave_one_out": exact_seconds, "leave_one_out_head": head_seconds},
    }


def removal(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Predicted and actual changes of the mean test loss when single images are removed."""
    train, test = split(codes, REMOVAL_PER_CLASS, seed)
    rng = np.random.default_rng(seed)
    test = rng.permutation(test)[:N_TEST]
    clf, fit_seconds = timed(lambda: LQFClassifier(BACKBONE, tol=TOL).fit(X[train], codes[train]))
    effect, seconds = timed(lambda: clf.influence(X[train], codes[train], X[test], codes[test]))
    before = residual(clf.decision_function(X[test]), codes[test]).mean()
    chosen = rng.permutation(len(train))[:N_REMOVED]
    actual = []
    for i in chosen:
        weights = np.where(np.arange(len(train)) == i, 0.0, 1.0)
        again = LQFClassifier(BACKBONE, tol=TOL).fit(X[train], codes[train], weights)
        actual.append(residual(again.decision_function(X[test]), codes[test]).mean() - before)
    predicted = effect.mean(0)[chosen]
    return {
        "n": len(train),
        "n_test": len(test),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]),
        "predicted": predicted.tolist(),
        "actual": [float(a) for a in actual],
        "seconds": {"fit": fit_seconds, "influence": seconds},
    }


def estimates(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Effects on single test images by other ways than the exact one."""
    train, test = split(codes, REMOVAL_PER_CLASS, seed)
    test = np.random.default_rng(seed).permutation(test)[:N_QUERIES]
    X_train, y_train, X_test, y_test = X[train], codes[train], X[test], codes[test]
    clf = LQFClassifier(BACKBONE).fit(X_train, y_train)
    effects, seconds = {}, {}
    for method in ("exact", "cg", "kfac"):
        effects[method], seconds[method] = timed(
            lambda method=method: clf.influence(X_train, y_train, X_test, y_test, method=method)
        )
    correlations = {
        method: [float(spearmanr(a, b).statistic) for a, b in zip(effects["exact"], effects[method], strict=True)]
        for method in ("cg", "kfac")
    }
    return {
        "n": len(train),
        "n_test": len(test),
        "rank_correlation": {method: float(np.median(found)) for method, found in correlations.items()},
        "smallest": {method: float(np.min(found)) for method, found in correlations.items()},
        "seconds": seconds,
    }


def costs(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Seconds of each method, and in units of a fit; medians of rounds in which fits and methods alternate."""
    train, test = split(codes, PER_CLASS, seed)
    X_train, y_train, X_test, y_test = X[train], codes[train], X[test[:N_QUERIES]], codes[test[:N_QUERIES]]
    alphas = np.logspace(-3, 1, N_ALPHAS)
    gone = np.arange(N_FORGOTTEN) * (PER_CLASS // N_FORGOTTEN)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        clf, seconds = timed(lambda: LQFClassifier(BACKBONE, store_data=True).fit(X_train, y_train))
        found["fit"].append(seconds)
        for name, work in (
            ("leave_one_out", clf.leave_one_out),
            ("leave_one_out_head", lambda clf=clf: clf.leave_one_out(method="head")),
            ("influence", lambda clf=clf: clf.influence(None, None, X_test, y_test)),
            ("influence_cg", lambda clf=clf: clf.influence(None, None, X_test, y_test, method="cg")),
            ("influence_kfac", lambda clf=clf: clf.influence(None, None, X_test, y_test, method="kfac")),
            ("path", lambda clf=clf: path_on_stored(clf, alphas)),
            ("forget_warm", lambda clf=clf: clf.forget(gone, warm_start=True)),
            ("forget", lambda clf=clf: clf.forget(gone)),
        ):
            found[name].append(timed(work)[1])
        found["path_of_folds"].append(
            timed(lambda: LQFClassifierCV(BACKBONE, alphas=alphas, cv=FOLDS).fit(X_train, y_train))[1]
        )
    medians = {name: float(np.median(values)) for name, values in found.items()}
    fits = {name: value / medians["fit"] for name, value in medians.items()}
    return {"n": len(train), "seconds": medians, "fits": fits}


def path_on_stored(clf: LQFClassifier, alphas: np.ndarray) -> list[Any]:
    """Solutions for all penalties on the stored activations."""
    stored = clf._stored_data()
    model = clf._model.again()
    data = clf._training_rows(clf._stored_batches(stored, model), stored.targets, stored.weights, stored.weights)
    problem = Problem(model, data, clf._recipe())
    return list(problem.path([problem.alpha(a) for a in sorted(alphas, reverse=True)], clf.tol, clf.max_iter))


def coverage(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """Coverage of intervals of a regression on images, exact and by the preconditioner."""
    train, test = split(codes, PER_CLASS, seed)
    test = np.random.default_rng(seed).permutation(test)[:N_TEST]
    y = codes.astype(np.float64)
    model = LQFRegressor(BACKBONE, store_data=True).fit(X[train], y[train])
    found = {"n": len(train), "r2": float(model.score(X[test], y[test]))}
    limit = uncertainty.DUAL_MAX
    try:
        for name, most in (("exact", limit), ("kfac", 0)):
            uncertainty.DUAL_MAX = most
            (mean, std), seconds = timed(lambda: model.predict(X[test], return_std=True))
            for level in LEVELS:
                inside = np.abs(mean - y[test]) <= norm.ppf((1 + level) / 2) * std
                found[f"{name}_{level:g}"] = float(inside.mean())
            found[f"{name}_seconds"] = seconds
    finally:
        uncertainty.DUAL_MAX = limit
    return found


def regime(X: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """The network at w0 + d beside the linear model, on test images."""
    train, test = split(codes, PER_CLASS, seed)
    test = np.random.default_rng(seed).permutation(test)[:N_TEST]
    found: dict[str, Any] = {"n": len(train)}
    for layers in (1, "all"):
        clf = LQFClassifier(BACKBONE, tangent_layers=layers).fit(X[train], codes[train])
        linear, network = clf.decision_function(X[test]), clf.network_outputs(X[test])
        head = LQFClassifier(BACKBONE, tangent_layers="head").fit(X[train], codes[train]).decision_function(X[test])
        found[str(layers)] = {
            "gap_over_change_by_the_tail": float(np.abs(network - linear).mean() / np.abs(linear - head).mean()),
            "same_prediction": float((network.argmax(1) == linear.argmax(1)).mean()),
            "accuracy_linear": float((linear.argmax(1) == codes[test]).mean()),
            "accuracy_network": float((network.argmax(1) == codes[test]).mean()),
        }
    return found


SECTIONS = {
    "mislabelled": (mislabelled, SPLITS), "removal": (removal, 1), "estimates": (estimates, 1), "costs": (costs, 1),
    "coverage": (coverage, SPLITS), "regime": (regime, 1),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["digits", "trashnet"])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "trust", "rows": []}
    done = {(r["section"], r["dataset"], r["split"]) for r in report["rows"]}
    for section in args.only:
        measure, splits = SECTIONS[section]
        for dataset in args.datasets:
            size = SIZES.get(dataset, DEFAULT_SIZE)
            X, codes = read_images(dataset, args.data_dir, size)
            for seed in range(splits):
                if (section, dataset, seed) in done:
                    continue
                row = {"section": section, "dataset": dataset, "split": seed, "image_size": size}
                report["rows"].append(row | measure(X, codes, seed))
                write_report(RESULTS, report, "cpu")
                print(json.dumps(report["rows"][-1])[:600], flush=True)


if __name__ == "__main__":
    main()
