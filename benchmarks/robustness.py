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

RESULTS = Path(__file__).parent / "results" / "robustness.json"
DATASET, PER_CLASS, EPOCHS = "trashnet", 20, 25
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "alpha": [{"alpha": a} for a in (1e-3, 1e-2, 1e-1, 1.0)],
    "tail_weight": [{"tail_weight": w} for w in (1e-3, 1e-2, 1e-1, 1.0)],
    "damping": [{"damping": d} for d in (1e-3, 1e-2, 1e-1, 1.0)],
    "tol": [{"tol": t} for t in (1e-3, 1e-2, 1e-1)],
    "seed": [{"random_state": s} for s in range(3)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    X, codes = read_images(DATASET, args.data_dir, DEFAULT_SIZE)
    train, test = split(codes, PER_CLASS, 0)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "robustness", "rows": []}
    report |= {"dataset": DATASET, "per_class": PER_CLASS, "image_size": DEFAULT_SIZE, "nft_epochs": EPOCHS}
    done = {(r["method"], r["parameter"], r["value"]) for r in report["rows"]}

    def record(method: str, parameter: str, value: float, fit: Callable[[], Callable]) -> None:
        if (method, parameter, value) in done:
            return
        row = {"method": method, "parameter": parameter, "value": value}
        log_p = np.nan_to_num(fit()(X[test]), nan=-50.0)  # a diverged network says nothing
        report["rows"].append({**row, **scores(log_p, codes[test])})
        write_report(RESULTS, report, "cpu")
        print(json.dumps(report["rows"][-1]), flush=True)

    def lqf(parameters: dict[str, Any]) -> Callable:
        clf = LQFClassifier("efficientnet_lite0", **parameters).fit(X[train], codes[train])
        return clf.predict_log_proba

    def nft(rate: float, seed: int) -> Callable:
        return _nft.train(X[train], codes[train], _nft.Schedule(rate, EPOCHS, True, True), seed)

    for parameter, settings in SETTINGS.items():
        for setting in settings:
            (value,) = setting.values()
            record("lqf", parameter, value, lambda setting=setting: lqf(setting))
    for seed in range(3):
        record("nft", "seed", seed, lambda seed=seed: nft(3e-3, seed))
    for rate in RATES:
        record("nft", "lr", rate, lambda rate=rate: nft(rate, 0))


if __name__ == "__main__":
    main()
