"""The paper's ablation on the paper's model: Leaky-ReLU, squared loss and K-FAC, each alone and together.

TrashNet, 20 images a class, one split, a fixed random thousand of the other images for testing. The network is
linearized at a random head, with one change of the weights of the last stage for all classes (`model="paper"`). All
combinations minimize their objective by the same method, (preconditioned) nonlinear conjugate gradients with an exact
line search, which for squared loss is linear conjugate gradients; accuracy is taken along the way. For cross-entropy
the outputs are divided by the temperature of leave-one-out outputs, and the penalty is that of squared loss over
twice the variance of leave-one-out residuals, both of the ridge regression on the last features: the same prior.
Results are kept after each measurement, and a run that was stopped goes on.

    python benchmarks/ablation.py --data-dir FOLDER
"""

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split, write_report
from accuracy import features
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from torch import Tensor

from sklearn_lqf import LQFClassifier
from sklearn_lqf.paper.model import TARGET_SCALE
from sklearn_lqf.paper.objective import build_kfac

RESULTS = Path(__file__).parent / "results" / "ablation.json"
DATASET, PER_CLASS, SPLITS, N_TEST = "trashnet", 20, 1, 1000
LEAK, DAMPING = 0.01, 0.1
REPORTED = (1, 3, 10, 30)  # iterations


class Problem:
    """The paper's model on one split, at the head and with the penalty that the estimator takes."""

    def __init__(self, X: np.ndarray, codes: np.ndarray, seed: int, slope: float, per_class: int):
        train, test = split(codes, per_class, seed)
        test = np.random.default_rng(0).permutation(test)[:N_TEST]
        self.codes, self.test_codes, n_classes = codes[train], codes[test], int(codes.max()) + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration: what comes before the solver is wanted
            clf = LQFClassifier(
                "efficientnet_lite0", model="paper", negative_slope=slope, max_iter=1, execution={"device": "cpu"}
            )
            clf.fit(X[train], self.codes)
        model = clf._model
        self.network = model.linearized
        self.batches, self.test_batches = (
            [model.network.activations(x) for x in torch.from_numpy(X[rows]).permute(0, 3, 1, 2).split(64)]
            for rows in (train, test)
        )
        one_hot = np.eye(n_classes)[self.codes]
        ridge = RidgeCV(np.logspace(-2, 6, 33), store_cv_results=True).fit(features(X[train]), one_hot)
        noise = float(ridge.cv_results_.mean((0, 1)).min())  # of leave-one-out residuals, in units of y
        self.noise, self.temperature = noise * TARGET_SCALE**2, clf.temperature_ * TARGET_SCALE
        self.start, self.test_start = self.outputs(self.batches), self.outputs(self.test_batches)
        self.targets = TARGET_SCALE * torch.from_numpy(one_hot).float()
        signs = torch.randint(0, 2, (1, *one_hot.shape), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self.kfac = build_kfac(self.network, self.batches, torch.ones(len(train)), signs)
        self.alpha = clf.alpha_ * self.kfac.output_trace / len(train)
        self.kfac.factorize(self.alpha, torch.float32, DAMPING * self.kfac.output_trace)

    def outputs(self, batches: list) -> Tensor:
        """Of the network at its pre-trained weights."""
        return torch.cat([self.network.at(z, gradients=False).outputs for z in batches])

    def jvp(self, d: Tensor, batches: list) -> Tensor:
        return torch.cat([self.network.at(z, gradients=False).jvp(d) for z in batches])

    def vjp(self, u: Tensor) -> Tensor:
        parts = u.split([z[0].shape[0] for z in self.batches])
        return sum(self.network.at(z).vjp(p) for z, p in zip(self.batches, parts, strict=True))

    def loss(self, name: str, outputs: Tensor) -> Tensor:
        """Data term of the objective; the penalty is ``penalty(name) |d|^2``."""
        if name == "squared":
            return (outputs - self.targets).square().sum()
        codes = torch.from_numpy(self.codes)
        return torch.nn.functional.cross_entropy(outputs / self.temperature, codes, reduction="sum")

    def penalty(self, name: str) -> float:
        return self.alpha if name == "squared" else self.alpha / (2 * self.noise)

    def _line_search(self, loss: str, outputs: Tensor, slope: Tensor, d: Tensor, direction: Tensor) -> float:
        """The step to the minimum of the objective: outputs are linear in it, so that no pass over images is needed."""
        penalty, d_dot, dd = self.penalty(loss), float(d @ direction), float(direction @ direction)

        def objective(step: float) -> float:
            value = float(self.loss(loss, (outputs + step * slope).double()))
            return value + penalty * (2 * step * d_dot + step * step * dd)

        first = 1e-3 / (1e-12 + float(slope.abs().max()))
        return float(minimize_scalar(objective, bracket=(0.0, first)).x)

    def minimize(self, loss: str, with_kfac: bool, iterations: int) -> dict[str, float]:
        """Test accuracy after some iterations."""
        d = direction = torch.zeros(self.network.n_parameters)
        outputs, penalty = self.start, self.penalty(loss)
        previous = z_previous = None
        found = {}
        for i in range(1, iterations + 1):
            leaf = outputs.detach().requires_grad_()
            (u,) = torch.autograd.grad(self.loss(loss, leaf), leaf)
            gradient = self.vjp(u) + 2 * penalty * d
            z = self.kfac(gradient) if with_kfac else gradient
            beta = 0.0
            if previous is not None:  # Polak-Ribiere
                beta = max(0.0, float((z @ (gradient - previous)) / (z_previous @ previous)))
            direction = beta * direction - z
            previous, z_previous = gradient, z
            slope = self.jvp(direction, self.batches)
            step = self._line_search(loss, outputs, slope, d, direction)
            d, outputs = d + step * direction, outputs + step * slope
            if i in REPORTED:
                predicted = (self.test_start + self.jvp(d, self.test_batches)).argmax(1).numpy()
                found[str(i)] = float((predicted == self.test_codes).mean())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--iterations", type=int, default=REPORTED[-1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    X, codes = read_images(DATASET, args.data_dir, DEFAULT_SIZE)
    report: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {"rows": []}
    report |= {"benchmark": "ablation", "dataset": DATASET, "per_class": args.per_class, "image_size": DEFAULT_SIZE}
    report |= {"leak": LEAK, "n_test": N_TEST}
    ways = list(itertools.product(("squared", "cross-entropy"), (True, False)))
    for seed, slope in itertools.product(range(SPLITS), (0.0, LEAK)):
        done = {(r["loss"], r["kfac"]) for r in report["rows"] if (r["split"], r["slope"]) == (seed, slope)}
        if done == set(ways):
            continue
        problem = Problem(X, codes, seed, slope, args.per_class)
        for loss, with_kfac in [way for way in ways if way not in done]:
            start = time.process_time()
            row = {"split": seed, "slope": slope, "loss": loss, "kfac": with_kfac}
            row["accuracy"] = problem.minimize(loss, with_kfac, args.iterations)
            row["cpu_seconds"] = time.process_time() - start
            report["rows"].append(row)
            write_report(args.results, report, "cpu")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
