"""How much accuracy depends on what a user has to choose: NFT over learning rates, LQF over its parameters.

TrashNet, 20 images a class, one split, all other images for testing; one parameter at a time, the others at their
defaults, and three seeds of whatever is random. `prior_rows` (from how many images the prior is learned) and
`group_columns` (to how many columns a group of features is projected) are constants of the package, no parameters;
`n_directions` and `sketch_size` count only with `tangents="both"`, at which they are measured. One thread; a run that
was stopped goes on.

    python benchmarks/robustness.py --data-dir FOLDER
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import _nft
import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, scores, split, write_report

from sklearn_lqf import LQFClassifier
from sklearn_lqf.engine import features as feature_groups
from sklearn_lqf.engine import problem

RESULTS = Path(__file__).parent / "results"
DATASET, PER_CLASS, EPOCHS = "trashnet", 20, 25
SEED_RATE = 3e-3  # of the runs that differ in the seed
NFT_SETTINGS: list[dict[str, Any]] = [{"lr": r} for r in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
NFT_SETTINGS += [{"seed": s} for s in range(3)]
LQF_SETTINGS: list[dict[str, Any]] = [{"prior": p} for p in ("leave-one-out", "evidence", "equal", "last")]
LQF_SETTINGS += [{"alpha": a} for a in (1e-3, 1e-2, 1e-1, 1.0)]
LQF_SETTINGS += [{"prior_rows": n} for n in (30, 60, 120)]
LQF_SETTINGS += [{"group_columns": n} for n in (64, 256, 1024, 4096)]
LQF_SETTINGS += [{"n_directions": k} for k in (2, 4, 8, 16)]
LQF_SETTINGS += [{"sketch_size": r} for r in (8, 16, 32)]
LQF_SETTINGS += [{"random_state": s} for s in range(3)]
_CONSTANTS = {  # where each stands that is no parameter
    "prior_rows": [(problem, "_PRIOR_ROWS"), (problem, "_PRIOR_ROWS_MAX")],
    "group_columns": [(feature_groups, "_GROUP_COLUMNS")],
}


def fit_lqf(X: np.ndarray, codes: np.ndarray, setting: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """The estimator at its defaults but for one setting; X -> log-probabilities."""
    ((name, value),) = setting.items()
    parameters = {} if name in _CONSTANTS else dict(setting)
    if name in ("n_directions", "sketch_size"):
        parameters["tangents"] = "both"
    with ExitStack() as stack:
        for module, constant in _CONSTANTS.get(name, []):
            stack.enter_context(mock.patch.object(module, constant, value))
        return LQFClassifier("efficientnet_lite0", **parameters).fit(X, codes).predict_log_proba


def fit_nft(X: np.ndarray, codes: np.ndarray, setting: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Fine-tuning; X -> log-probabilities."""
    schedule = _nft.Schedule(setting.get("lr", SEED_RATE), EPOCHS, frozen=True, flips=True)
    return _nft.train(X, codes, schedule, setting.get("seed", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["lqf", "nft"])
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--only", nargs="+", help="names of settings, default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    X, codes = read_images(DATASET, args.data_dir, DEFAULT_SIZE)
    train, test = split(codes, args.per_class, 0)
    for method in args.methods:
        path = args.results / f"robustness-{method}.json"
        report = json.loads(path.read_text()) if path.exists() else {"benchmark": "robustness", "rows": []}
        report |= {"method": method, "dataset": DATASET, "per_class": args.per_class, "image_size": DEFAULT_SIZE}
        done = {(r["parameter"], r["value"]) for r in report["rows"]}
        settings, fit = (LQF_SETTINGS, fit_lqf) if method == "lqf" else (NFT_SETTINGS, fit_nft)
        for setting in settings:
            ((parameter, value),) = setting.items()
            if (parameter, value) in done or (args.only and parameter not in args.only):
                continue
            log_p = np.nan_to_num(fit(X[train], codes[train], setting)(X[test]), nan=-50.0)  # a diverged network
            report["rows"].append({"parameter": parameter, "value": value, **scores(log_p, codes[test])})
            write_report(path, report, "cpu")
            print(method, json.dumps(report["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
