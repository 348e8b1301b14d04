"""Accuracy against images a class: linear probes, non-linear fine-tuning (NFT), LQF at its defaults and without parts.

Every method gets the same pixels and the same splits; all other images are the test set, which chooses
nothing. Hyper-parameters of the probes come from cross-validation on the training images, those of NFT from a
held-out part of them (see _nft.py), and LQF has one setting for all: its defaults. A data set "name:a+b" is the task
of the classes number a and b of a folder. One thread; seconds are of the processor, so that other work on the machine
does not count. Results are kept after each measurement, and a run that was stopped goes on where it was. The method
"version1" is the default of sklearn_lqf 0.1: its rows were measured with that version and cannot be measured with
this one.

    python benchmarks/accuracy.py --data-dir FOLDER [--methods lqf nft] [--datasets digits] [--backbone NAME]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, scores, split, write_report
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone

RESULTS = Path(__file__).parent / "results" / "accuracy"
PER_CLASS = (5, 10, 30, 80)
BACKBONE = "efficientnet_lite0"
NEAR = ("monkeys", "caltech101", "grocery", "intelscenes")
FAR = ("seedlings", "rsscn7", "neusteel", "trashnet", "dtd10", "digits")
VARIANTS: dict[str, dict[str, Any]] = {
    "lqf": {},
    "lqf-no-tangents": {"tangents": None},
    "lqf-network-tangents": {"tangents": "both"},
    "lqf-evidence": {"prior": "evidence"},
    "lqf-mirrored": {"views": ("identity", "flip")},
}
_INHERIT = 30  # images a class above which NFT takes the schedule found for this many

Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def features(X: np.ndarray, name: str = BACKBONE) -> np.ndarray:
    """Features of the backbone as it comes, for the probes."""
    backbone = load_backbone(name)
    module = backbone.module.to(memory_format=torch.channels_last)
    module.reset_classifier(0)
    with torch.inference_mode():
        parts = torch.from_numpy(X).permute(0, 3, 1, 2).split(64)
        return torch.cat([module(backbone.preprocessing.normalize(x).contiguous(memory_format=torch.channels_last))
                          for x in parts]).numpy()  # fmt: skip


def fit_ridge(X: np.ndarray, codes: np.ndarray) -> Any:
    """Ridge regression, penalty by leave-one-out; softmax of outputs as probabilities."""
    return RidgeClassifierCV(alphas=np.logspace(-2, 6, 33)).fit(X, codes)


def fit_logistic(X: np.ndarray, codes: np.ndarray) -> Any:
    """Logistic regression, penalty by cross-validation."""
    folds = min(5, int(np.bincount(codes).min()))
    scale = np.linalg.norm(X - X.mean(0), axis=1).mean()  # one scale for all features: their proportions carry meaning
    model = make_pipeline(FunctionTransformer(lambda F: F / scale), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": np.logspace(-1, 4, 6)}
    return GridSearchCV(model, grid, cv=StratifiedKFold(folds, shuffle=True, random_state=0)).fit(X, codes)


def read_task(task: str, data_dir: Path | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A data set, or with "name:a+b" its classes number a and b."""
    dataset, _, pair = task.partition(":")
    X, codes = read_images(dataset, data_dir, size)
    if pair:
        chosen = [int(c) for c in pair.split("+")]
        rows = np.isin(codes, chosen)
        X, codes = X[rows], np.searchsorted(chosen, codes[rows])
    return X, codes


def two_columns(decision: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Decision values of two classes as of more, one column for each class."""

    def values(F: np.ndarray) -> np.ndarray:
        found = decision(F)
        return found if found.ndim == 2 else np.column_stack([-found, found])

    return values


class Cell:
    """One data set at one number of images a class, with its splits."""

    def __init__(self, dataset: str, X: np.ndarray, codes: np.ndarray, per_class: int, n_splits: int):
        self.dataset, self.X, self.codes, self.per_class = dataset, X, codes, per_class
        self.splits = [split(codes, per_class, seed) for seed in range(n_splits)]

    def training(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        train, _ = self.splits[number]
        return self.X[train], self.codes[train]

    def schedule(self, cells: dict[int, "Cell"], report: dict[str, Any]) -> _nft.Schedule:
        """NFT's schedule for all splits, found on their training images."""
        source = cells[min(self.per_class, _INHERIT)]
        key = str(source.per_class)
        if key not in report["schedules"]:
            chosen, tried = _nft.search([source.training(0)], flips=self.dataset != "digits")
            report["schedules"][key] = {"chosen": asdict(chosen), "tried": tried}
        return _nft.Schedule(**report["schedules"][key]["chosen"])


def measure(
    method: str, cell: Cell, number: int, report: dict[str, Any], cells: dict[int, Cell], backbone: str
) -> dict[str, Any]:
    """One fit and its scores on the test images."""
    X, codes = cell.training(number)
    _, test = cell.splits[number]
    extra: dict[str, Any] = {}
    if method == "nft":
        schedule = cell.schedule(cells, report)
        extra = asdict(schedule)
    start = time.process_time()
    if method == "nft":
        log_p_of = _nft.train(X, codes, schedule, number)
    elif method in VARIANTS:
        clf = LQFClassifier(backbone, **VARIANTS[method]).fit(X, codes)
        log_p_of = clf.predict_log_proba
    else:
        F = features(X, backbone)
        model = (fit_ridge if method == "ridge" else fit_logistic)(F, codes)
        log_p_of = two_columns(model.decision_function) if method == "ridge" else model.predict_log_proba
    extra["fit_cpu_seconds"] = time.process_time() - start
    start = time.process_time()
    inputs = cell.X[test] if method == "nft" or method in VARIANTS else features(cell.X[test], backbone)
    found = scores(log_p_of(inputs), cell.codes[test])
    extra["predict_cpu_seconds"] = time.process_time() - start
    if method in VARIANTS:
        extra |= {"alpha": clf.alpha_, "prior": clf.prior_}
    if method == "ridge":  # its outputs are no log-probabilities
        found = {"accuracy": found["accuracy"]}
    return {"per_class": cell.per_class, "split": number, "n_train": len(X), "n_test": len(test), **found, **extra}


def missing(report: dict[str, Any], per_class: list[int], n_splits: int) -> Iterator[tuple[int, int]]:
    """Cells and splits that are not measured yet."""
    done = {(r["per_class"], r["split"]) for r in report["rows"]}
    yield from ((k, s) for k in per_class for s in range(n_splits) if (k, s) not in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", default=[*NEAR, *FAR])
    parser.add_argument("--methods", nargs="+", default=["ridge", "logistic", "lqf", "nft"])
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--per-class", nargs="+", type=int, default=list(PER_CLASS))
    parser.add_argument("--splits", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for dataset in args.datasets:
        size = SIZES.get(dataset, DEFAULT_SIZE)
        X, codes = read_task(dataset, args.data_dir, size)
        possible = [k for k in PER_CLASS if k < np.bincount(codes).min()]
        cells = {k: Cell(dataset, X, codes, k, args.splits) for k in possible}
        for method in args.methods:
            folder = RESULTS if args.backbone == BACKBONE else RESULTS.with_name(f"accuracy-{args.backbone}")
            path = folder / f"{dataset}-{method}.json"
            report = json.loads(path.read_text()) if path.exists() else {"rows": [], "schedules": {}}
            report |= {"benchmark": "accuracy", "dataset": dataset, "method": method, "image_size": size}
            for k, number in missing(report, [k for k in args.per_class if k in cells], args.splits):
                row = measure(method, cells[k], number, report, cells, args.backbone)
                report["rows"].append(row)
                write_report(path, report, "cpu")
                print(dataset, method, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
