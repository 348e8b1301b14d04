"""Accuracy of a ridge linear probe and of LQF at its defaults on TrashNet, EfficientNet-Lite0.

50 images of each class to learn from, all others to test on, images resized to 128 px, three splits. Writes one
JSON with the accuracies, iterations, seconds, versions, device and date.

    python benchmarks/probe_vs_lqf.py --data-dir FOLDER        (FOLDER/trashnet/CLASS/*.jpg)
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from _common import read_folder, split, write_report
from sklearn.linear_model import RidgeClassifierCV

from sklearn_lqf import LQFClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="trashnet")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probe_vs_lqf.json")
    args = parser.parse_args()
    X, y = read_folder(args.data_dir / args.dataset)
    rows = []
    for seed in range(args.splits):
        train, test = split(y, args.per_class, seed)
        clf = LQFClassifier("efficientnet_lite0", image_size=args.size)
        start = time.perf_counter()
        clf.fit(X[train], y[train])
        seconds = time.perf_counter() - start
        probe = RidgeClassifierCV(alphas=np.logspace(-2, 6, 33)).fit(clf.features(X[train]), y[train])
        row = {
            "seed": seed,
            "n_train": len(train),
            "n_test": len(test),
            "probe_accuracy": float(probe.score(clf.features(X[test]), y[test])),
            "lqf_accuracy": float(clf.score(X[test], y[test])),
            "lqf_fit_seconds": seconds,
            "lqf_iterations": clf.n_iter_,
            "lqf_relative_gradient": float(clf.residual_norms_[-1]),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    report = {
        "benchmark": "probe_vs_lqf",
        "settings": {"dataset": args.dataset, "per_class": args.per_class, "image_size": args.size},
        "parameters": {k: repr(v) for k, v in clf.get_params().items()},
        "splits": rows,
        "probe_accuracy_mean": float(np.mean([r["probe_accuracy"] for r in rows])),
        "lqf_accuracy_mean": float(np.mean([r["lqf_accuracy"] for r in rows])),
    }
    write_report(args.out, report, clf.device_)
    print(f"probe {report['probe_accuracy_mean']:.4f}  LQF {report['lqf_accuracy_mean']:.4f}  -> {args.out}")


if __name__ == "__main__":
    main()
