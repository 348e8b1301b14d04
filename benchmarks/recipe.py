"""The study behind the defaults: every lever changed alone, on development data only (TrashNet and digits).

The cells are small on purpose, and the test images a fixed random thousand of the others. DTD has no part in it:
it confirms, in accuracy.py. One thread; results are kept after each fit, and a run that was stopped goes on.

    python benchmarks/recipe.py --data-dir FOLDER [--only ablation]
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, scores, split, write_report
from sklearn.exceptions import ConvergenceWarning

from sklearn_lqf import LQFClassifier

RESULTS = Path(__file__).parent / "results" / "recipe.json"
CELLS = [("trashnet", 10, 0), ("digits", 10, 0), ("trashnet", 50, 0)]
N_TEST = 1000
PAPER = {"readout": "last", "head": "random", "tail_weight": None, "center": False}

# group -> name -> parameters that differ from the defaults
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"default": {}},
    "readout": {
        "last features only": {"readout": "last"},
        "last features, head only (linear probe)": {"readout": "last", "tangent_layers": "head"},
        "stages, head only": {"tangent_layers": "head"},
    },
    "layers": {"two stages": {"tangent_layers": 2}, "all layers": {"tangent_layers": "all"}},
    "tail": {
        "tail weight 0.01": {"tail_weight": 0.01},
        "tail weight 0.1": {"tail_weight": 0.1},
        "tail weight 0.3": {"tail_weight": 0.3},
        "tail weight 1": {"tail_weight": 1.0},
    },
    "head": {
        "random head": {"head": "random"},
        "ridge head, its leave-one-out residuals": {"head": "ridge", "tail_weight": None},
        "the same on the last features, two stages": {
            "head": "ridge", "tail_weight": None, "readout": "last", "tangent_layers": 2, "alpha": 1.0,
        },
    },
    "seed": {"seed 1": {"random_state": 1}, "seed 2": {"random_state": 2}},
    "alpha": {f"alpha {a:g}": {"alpha": a} for a in (1e-3, 1e-2, 1e-1, 1.0)},
    "stopping": {
        "1 iteration": {"max_iter": 1}, "3 iterations": {"max_iter": 3}, "tol 1e-3": {"tol": 1e-3},
        "damping 0": {"damping": 0.0}, "damping 1": {"damping": 1.0},
    },
    "views": {"identity and flip": {"views": ("identity", "flip")}},
    "slope": {"slope 0.01": {"negative_slope": 0.01}, "slope 0.1": {"negative_slope": 0.1}},
    "target": {f"not centered, target scale {s:g}": {**PAPER, "target_scale": s} for s in (1.0, 5.0, 15.0)},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(LEVERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # some levers stop early on purpose
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "recipe", "rows": []}
    report["image_size"] = {d: SIZES.get(d, DEFAULT_SIZE) for d, _, _ in CELLS}
    data = {d: read_images(d, args.data_dir, size) for d, size in report["image_size"].items()}
    done = {(r["lever"], r["dataset"], r["per_class"], r["split"]) for r in report["rows"]}
    for group in args.only:
        for name, parameters in LEVERS[group].items():
            for dataset, per_class, seed in CELLS:
                if (name, dataset, per_class, seed) in done:
                    continue
                X, codes = data[dataset]
                train, test = split(codes, per_class, seed)
                test = np.random.default_rng(0).permutation(test)[:N_TEST]
                clf = LQFClassifier("efficientnet_lite0", **parameters)
                start = time.process_time()
                clf.fit(X[train], codes[train])
                row = {
                    "group": group, "lever": name, "dataset": dataset, "per_class": per_class, "split": seed,
                    "fit_cpu_seconds": time.process_time() - start,
                    "n_iter": clf.n_iter_, "relative_gradient": float(clf.residual_norms_[-1]),
                    **scores(clf.predict_log_proba(X[test]), codes[test]),
                }  # fmt: skip
                report["rows"].append(row)
                write_report(RESULTS, report, "cpu")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
