"""The paper's ablation on one linearized network: Leaky-ReLU, squared loss and K-FAC, each alone and together.

TrashNet, 20 images a class, one split, a fixed random thousand of the other images for testing. All eight
combinations minimize their objective by the same method, (preconditioned) nonlinear conjugate gradients with an
exact line search, which for squared loss is linear conjugate gradients; accuracy is taken along the way. For
cross-entropy the outputs are divided by the temperature of the leave-one-out outputs, and the penalty is that of
squared loss over twice the variance of the leave-one-out residuals: the same prior.

    python benchmarks/ablation.py --data-dir FOLDER
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, read_images, split, write_report
from scipy.optimize import minimize_scalar
from torch import Tensor

from sklearn_lqf.backbones import load_backbone
from sklearn_lqf.classifier import _fit_temperature
from sklearn_lqf.head import fit_ridge_head, orthogonal_head
from sklearn_lqf.model import LinearModel
from sklearn_lqf.objective import build_kfac, weigh_tail
from sklearn_lqf.problem import _RIDGE_ALPHAS, probe_outputs

RESULTS = Path(__file__).parent / "results" / "ablation.json"
DATASET, PER_CLASS, SPLITS, N_TEST = "trashnet", 20, 1, 1000
LEAK, TAIL_WEIGHT, DAMPING = 0.01, 0.03, 0.1
REPORTED = (1, 3, 10, 30)  # iterations


class Problem:
    """One linearized network on one split, with the penalty and the prior that the estimator would take."""

    def __init__(self, X: np.ndarray, codes: np.ndarray, seed: int, slope: float):
        backbone = load_backbone("efficientnet_lite0")
        size = X.shape[1:3]
        model = LinearModel(
            backbone, (3, *size), 1, slope, True, backbone.preprocessing, torch.float32, torch.device("cpu")
        )
        train, test = split(codes, PER_CLASS, seed)
        test = np.random.default_rng(0).permutation(test)[:N_TEST]
        self.codes, self.test_codes, n_classes = codes[train], codes[test], int(codes.max()) + 1
        self.batches, self.test_batches = (
            [model.activations(x) for x in torch.from_numpy(X[rows]).permute(0, 3, 1, 2).split(64)]
            for rows in (train, test)
        )
        ones = torch.ones(len(train), dtype=torch.float64)
        features = model.standardize(torch.cat([model.features(z) for z in self.batches]), ones)
        targets = torch.eye(n_classes, dtype=torch.float64)[self.codes]
        ridge = fit_ridge_head(features.unsqueeze(0), targets, ones, ones, _RIDGE_ALPHAS)
        held_out = ridge.held_out[0]
        self.temperature = _fit_temperature(held_out.numpy(), targets.numpy(), ones.numpy(), len(train))
        self.noise = float((targets - held_out).square().mean())
        head = orthogonal_head(n_classes, features.shape[1], torch.Generator().manual_seed(0))
        self.network = model.set_head(head, torch.zeros(n_classes))
        self.kfac = build_kfac(self.network, self.batches, ones.float(), probe_outputs(*targets.shape).float())
        weigh_tail(self.network, self.kfac, TAIL_WEIGHT)
        unit = self.kfac.output_trace / len(train)  # of alpha, in which damping was when this was measured
        self.alpha, self.mean = ridge.alpha, targets.mean(0).float()
        self.targets = targets.float()
        self.kfac.factorize(self.alpha, torch.float32, DAMPING * unit)

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

    def minimize(self, loss: str, with_kfac: bool) -> dict[str, float]:
        """Test accuracy after some iterations."""
        d = direction = torch.zeros(self.network.n_parameters)
        outputs, penalty = self.mean.expand_as(self.targets), self.penalty(loss)
        previous = z_previous = None
        found = {}
        for i in range(1, REPORTED[-1] + 1):
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
                predicted = (self.mean + self.jvp(d, self.test_batches)).argmax(1).numpy()
                found[str(i)] = float((predicted == self.test_codes).mean())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    X, codes = read_images(DATASET, args.data_dir, DEFAULT_SIZE)
    report: dict[str, Any] = {"benchmark": "ablation", "dataset": DATASET, "per_class": PER_CLASS, "rows": []}
    report |= {"image_size": DEFAULT_SIZE, "leak": LEAK, "n_test": N_TEST}
    for seed, slope in itertools.product(range(SPLITS), (0.0, LEAK)):
        problem = Problem(X, codes, seed, slope)
        for loss, with_kfac in itertools.product(("squared", "cross-entropy"), (True, False)):
            start = time.process_time()
            row = {"split": seed, "slope": slope, "loss": loss, "kfac": with_kfac}
            row["accuracy"] = problem.minimize(loss, with_kfac)
            row["cpu_seconds"] = time.process_time() - start
            report["rows"].append(row)
            write_report(RESULTS, report, "cpu")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
