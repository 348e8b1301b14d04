"""How much accuracy depends on what a user has to choose: NFT over learning rates, LQF over its parameters.

TrashNet, 20 images a class, one split, all other images for testing; every parameter over three decades, the others
at their defaults, and three seeds of whatever is random. One thread; a run that was stopped goes on.

    python benchmarks/robustness.py --data-dir FOLDER
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, scores, split, write_report
from sklearn.exceptions import ConvergenceWarning

from sklearn_lqf import LQFClassifier

RESULTS = Path(__file__).parent / "results"
DATASET, PER_CLASS, EPOCHS = "trashnet", 20, 25
SEED_RATE = 3e-3  # of the runs that differ in the seed
NFT_SETTINGS: list[dict[str, Any]] = [{"lr": r} for r in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
NFT_SETTINGS += [{"seed": s} for s in range(3)]
LQF_SETTINGS: list[dict[str, Any]] = [{"alpha": a} for a in (1e-3, 1e-2, 1e-1, 1.0)]
LQF_SETTINGS += [{"tail_weight": w} for w in (1e-3, 1e-2, 1e-1, 1.0)]
LQF_SETTINGS += [{"damping": d} for d in (1e-3, 1e-2, 1e-1, 1.0)]
LQF_SETTINGS += [{"tol": t} for t in (1e-3, 1e-2, 1e-1)]
LQF_SETTINGS += [{"random_state": s} for s in range(3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["lqf", "nft"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, codes = read_images(DATASET, args.data_dir, DEFAULT_SIZE)
    train, test = split(codes, PER_CLASS, 0)

    def lqf(parameters: dict[str, Any]) -> Callable:
        clf = LQFClassifier("efficientnet_lite0", **parameters).fit(X[train], codes[train])
        return clf.predict_log_proba

    def nft(parameters: dict[str, Any]) -> Callable:
        schedule = _nft.Schedule(parameters.get("lr", SEED_RATE), EPOCHS, frozen=True, flips=True)
        return _nft.train(X[train], codes[train], schedule, parameters.get("seed", 0))

    for method in args.methods:
        path = RESULTS / f"robustness-{method}.json"
        report = json.loads(path.read_text()) if path.exists() else {"benchmark": "robustness", "rows": []}
        report |= {"method": method, "dataset": DATASET, "per_class": PER_CLASS, "image_size": DEFAULT_SIZE}
        done = {(r["parameter"], r["value"]) for r in report["rows"]}
        settings, fit = (LQF_SETTINGS, lqf) if method == "lqf" else (NFT_SETTINGS, nft)
        for parameters in settings:
            ((parameter, value),) = parameters.items()
            if (parameter, value) in done:
                continue
            log_p = np.nan_to_num(fit(parameters)(X[test]), nan=-50.0)  # a diverged network says nothing
            report["rows"].append({"parameter": parameter, "value": value, **scores(log_p, codes[test])})
            write_report(path, report, "cpu")
            print(method, json.dumps(report["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
