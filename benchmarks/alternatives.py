"""LQF beside what a user would take instead: seconds of a fit, and accuracy on the same test images.

Fine-tuning of the whole network (25 epochs, frozen BatchNorm), fine-tuning of its last stage with the activations
before it computed once, and a logistic regression on the last features whose penalty is found by cross-validation.
The learning rates of fine-tuning are chosen on a fifth of the training images of the first split; the test images
choose nothing. A fit that diverges is repeated at a third of the rate, and takes as much longer. Seconds are those of
the fit at the chosen rate, loading the network included; those of the search for the rate are reported apart. Methods
follow each other within a split, each in a process of its own, one thread, seconds of the processor. Results are kept
after each measurement, and a run that was stopped goes on where it was.

    python benchmarks/alternatives.py --data-dir FOLDER [--only lqf nft] [--datasets trashnet monkeys seedlings]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split
from _timing import BACKBONE, RESULTS, Report, in_own_process
from accuracy import features, fit_logistic

from sklearn_lqf import LQFClassifier

DATASETS, PER_CLASS, SPLITS, EPOCHS = ("trashnet", "monkeys", "seedlings"), 30, 2, 25
RATES = {"nft": (1e-3, 3e-3, 1e-2), "nft-last-stage": (1e-3, 3e-3, 1e-2)}
TRAIN: dict[str, _nft.Train] = {"nft": _nft.train, "nft-last-stage": _nft.train_last_stage}

Case = dict[str, Any]
Predict = Callable[[np.ndarray], np.ndarray]


def fit_lqf(X: np.ndarray, codes: np.ndarray) -> Predict:
    """LQF at its defaults; X -> codes."""
    return LQFClassifier(BACKBONE, execution={"device": "cpu"}).fit(X, codes).predict


def fit_probe(X: np.ndarray, codes: np.ndarray) -> Predict:
    """Logistic regression on the last features; X -> codes."""
    model = fit_logistic(features(X), codes)
    return lambda images: model.predict(features(images))


def fine_tune(method: str, schedule: _nft.Schedule, seed: int) -> Callable[[np.ndarray, np.ndarray], Predict]:
    """Fine-tuning by a schedule; X, codes -> X -> codes.

    Where it diverges, which the loss of the training images tells, it is repeated at a third of the learning rate.
    """

    def fit(X: np.ndarray, codes: np.ndarray) -> Predict:
        tried, loss = schedule, np.inf
        while not loss < np.log(codes.max() + 1) / 2:  # half the loss of a guess
            log_p_of = TRAIN[method](X, codes, tried, seed)
            loss = -float(log_p_of(X)[np.arange(len(codes)), codes].mean())
            tried = replace(tried, lr=tried.lr / 3)
        return lambda images: log_p_of(images).argmax(1)

    return fit


def training_images(case: Case, data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and codes of a data set, and which are for training and for tests."""
    X, codes = read_images(case["dataset"], data_dir, case["size"])
    return X, codes, *split(codes, case["per_class"], case["split"])


def search(case: Case, data_dir: Path, epochs: int) -> dict[str, Any]:
    """The schedule of a kind of fine-tuning, by held-out training images."""
    torch.set_num_threads(1)
    X, codes, train, _ = training_images(case, data_dir)
    schedules = [_nft.Schedule(rate, epochs, True, True) for rate in RATES[case["method"]]]
    start = time.process_time()
    chosen, tried = _nft.best_rate(X[train], codes[train], schedules, TRAIN[case["method"]])
    return {"chosen": asdict(chosen), "tried": tried, "cpu_seconds": round(time.process_time() - start, 3)}


def measure(case: Case, data_dir: Path, schedule: dict[str, Any] | None) -> dict[str, Any]:
    """Seconds of one fit, and its accuracy on the test images."""
    torch.set_num_threads(1)
    X, codes, train, test = training_images(case, data_dir)
    fits = {"lqf": fit_lqf, "logistic": fit_probe}
    if schedule is not None:
        fits[case["method"]] = fine_tune(case["method"], _nft.Schedule(**schedule), case["split"])
    start = time.process_time()
    predict = fits[case["method"]](X[train], codes[train])
    seconds = time.process_time() - start
    accuracy = float((predict(X[test]) == codes[test]).mean())
    return {"n_train": len(train), "n_test": len(test), "cpu_seconds": round(seconds, 3), "accuracy": accuracy}


def schedule_of(report: Report, case: Case, args: argparse.Namespace) -> dict[str, Any] | None:
    """The schedule for all splits, found on the first; None for what is no fine-tuning."""
    if case["method"] not in TRAIN:
        return None
    key = {**case, "split": 0}
    if not report.has("search", **key):
        report.add("search", **key, **in_own_process(search, key, args.data_dir, args.epochs))
    return next(row["chosen"] for row in report.rows("search") if key.items() <= row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    methods = ("lqf", "logistic", "nft-last-stage", "nft")
    parser.add_argument("--only", nargs="+", choices=methods, default=methods)
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="pixels")
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of fine-tuning")
    parser.add_argument("--results", type=Path, default=RESULTS / "alternatives.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.results, torch.device("cpu"), "alternatives", backbone=BACKBONE, epochs=args.epochs)
    for dataset in args.datasets:
        for number in range(args.splits):
            for method in args.only:
                case = {"dataset": dataset, "per_class": args.per_class, "size": args.size}
                case |= {"split": number, "method": method}
                if not report.has("rows", **case):
                    schedule = schedule_of(report, case, args)
                    report.add("rows", **case, **in_own_process(measure, case, args.data_dir, schedule))


if __name__ == "__main__":
    main()
