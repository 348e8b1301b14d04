"""Measurements behind defaults: directions of K-FAC, damping, leaky activations.

TrashNet, EfficientNet-Lite0, 128 px, one split. Convergence is that of the default solver on 10 images of each class;
the slope is judged by a ridge linear probe with its penalty by leave-one-out.

    python benchmarks/decisions.py --data-dir FOLDER        (FOLDER/trashnet/CLASS/*.jpg)
"""

import argparse
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
from _common import read_folder, split, write_report
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifierCV
from sklearn.utils._testing import ignore_warnings

from sklearn_lqf import LQFClassifier, estimators

ITERATIONS = 15


@ignore_warnings(category=ConvergenceWarning)
def convergence(X: np.ndarray, y: np.ndarray, exact: bool = False, **parameters: object) -> dict[str, object]:
    """Relative gradients of a fixed number of iterations."""
    clf = LQFClassifier("efficientnet_lite0", image_size=128, max_iter=ITERATIONS, tol=0, **parameters)
    with mock.patch.object(estimators, "_EXACT_MAX", 10**9 if exact else estimators._EXACT_MAX):
        start = time.perf_counter()
        clf.fit(X, y)
    return {
        "directions": "all outputs" if exact else "random signs",
        "parameters": parameters,
        "fit_seconds": time.perf_counter() - start,
        "relative_gradients": clf.residual_norms_.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decisions.json")
    args = parser.parse_args()
    X, y = read_folder(args.data_dir / "trashnet")
    train, _ = split(y, 10, 0)
    runs = [convergence(X[train], y[train], exact=True), convergence(X[train], y[train])]
    runs += [convergence(X[train], y[train], damping=d) for d in (0.0, 1.0, 10.0)]
    for run in runs:
        gradients = run["relative_gradients"]
        print(
            run["directions"],
            run["parameters"],
            f"{run['fit_seconds']:.0f} s",
            f"{gradients[-1]:.1e}",
            flush=True,
        )
    slopes = []
    train, test = split(y, 50, 0)
    for slope in (0.0, 0.01, 0.1):
        clf = LQFClassifier(
            "efficientnet_lite0",
            image_size=128,
            negative_slope=slope,
            tangent_layers="head",
            max_iter=1,
            tol=1.0,
        ).fit(X[train], y[train])
        probe = RidgeClassifierCV(alphas=np.logspace(-2, 6, 33)).fit(clf.features(X[train]), y[train])
        slopes.append({"negative_slope": slope, "probe_accuracy": probe.score(clf.features(X[test]), y[test])})
        print(json.dumps(slopes[-1]), flush=True)
    write_report(args.out, {"benchmark": "decisions", "convergence": runs, "leaky_slopes": slopes}, clf.device_)


if __name__ == "__main__":
    main()
