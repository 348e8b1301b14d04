"""The study behind the defaults: how the prior is learned, what is read, and along which directions tangents count.

Nothing of it is chosen on test images of the data set that it is reported on: of the ways to learn the prior the best
on all other data sets is taken, and its accuracy on the one left out is reported. Features of an image depend on the
image alone, so that each network is evaluated once for all splits. One thread; results are kept after each data set,
and a run that was stopped goes on.

    python benchmarks/study.py --data-dir FOLDER [--sections prior groups directions] [--datasets monkeys]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, split, write_report
from accuracy import FAR, NEAR

from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.engine.features import Group, draw_directions, fit_standardization
from sklearn_lqf.engine.fitted import FeatureReader
from sklearn_lqf.engine.prior import Rows, learn_prior, scale_prior
from sklearn_lqf.engine.ridge import RowForm
from sklearn_lqf.network.prepared import PreparedNetwork

RESULTS = Path(__file__).parent / "results" / "study.json"
BACKBONE, N_TEST, PRIOR_ROWS = "efficientnet_lite0", 1000, 500
DIRECTIONS, SKETCH = 8, 16
# name -> (criterion, a-priori variance of the last features over that of all other statistics, deviation of its log)
PRIORS = {
    f"{kind}, last {last:g}, deviation {deviation:g}": (kind, last, deviation)
    for kind in ("leave-one-out", "evidence")
    for last, deviation in ((1, 0.5), (1, 1.0), (1, 1.5), (0.5, 1.0), (2, 1.0))
}
ALIGNED_FOLDS = 2


class Dataset:
    """Images of one folder, and the raw features that a reader makes of all of them."""

    def __init__(self, name: str, data_dir: Path | None, backbone: str):
        self.X, self.codes = read_images(name, data_dir, SIZES.get(name, DEFAULT_SIZE))
        self._backbone, self._shape = load_backbone(backbone), (3, *self.X.shape[1:3])

    def network(self, layers: Any) -> PreparedNetwork:
        return PreparedNetwork(
            self._backbone, self._shape, layers, 0.0, True, self._backbone.preprocessing, torch.float32,
            torch.device("cpu"),
        )  # fmt: skip

    def read(self, reader: FeatureReader, rows: np.ndarray | None = None) -> np.ndarray:
        X = self.X if rows is None else self.X[rows]
        read = reader.reading(None)
        return np.concatenate([read(x) for x in torch.from_numpy(X).permute(0, 3, 1, 2).split(64)])


class Task:
    """One split: standardized features in groups, and one-hot targets."""

    def __init__(self, features: np.ndarray, groups: Sequence[Group], codes: np.ndarray, train: int):
        ones = np.ones(train)
        z = fit_standardization(features[:train], ones, groups)(features)
        self.names, self.parts, start = [g.name for g in groups], [], 0
        for group in groups:
            self.parts.append(z[:, start : start + group.size])
            start += group.size
        self.train, self.codes = train, codes
        self.targets = np.eye(int(codes.max()) + 1)[codes[:train]]
        self._kernels = [p @ p[:train].T for p in self.parts]

    def accuracy(self, chosen: Sequence[int], prior: Callable[[Rows, list[str]], np.ndarray]) -> float:
        """Test accuracy with some of the groups, their prior from at most PRIOR_ROWS training images."""
        n, names = self.train, [self.names[i] for i in chosen]
        step = -(-n // PRIOR_ROWS)  # the images of a class lie side by side
        rows = np.arange(0, n, step)
        kernels = np.stack([self._kernels[i][np.ix_(rows, rows)] for i in chosen])
        ones = np.ones(len(rows))
        kernels, targets, ones = (torch.from_numpy(v) for v in (kernels, self.targets[rows], ones))
        theta = prior(Rows(kernels, targets, ones, ones, targets.shape[1] - 1), names)
        phi = np.concatenate([self.parts[i] * t**0.5 for i, t in zip(chosen, theta, strict=True)], 1)
        form = RowForm(torch.from_numpy(phi[:n]), torch.ones(n))
        coef, intercept = form.solve(torch.from_numpy(self.targets))
        found = (torch.from_numpy(phi[n:]) @ coef + intercept).numpy().argmax(1)
        return 100 * float((found == self.codes[n:]).mean())


def learned(kind: str, last: float, deviation: float) -> Callable[[Rows, list[str]], np.ndarray]:
    """A prior that is learned, as the estimators do; ``last`` times the a-priori variance of the last features."""

    def prior(rows: Rows, names: list[str]) -> np.ndarray:
        read = max(1, sum(not n.endswith(" directions") for n in names) - 1)
        expected = np.array([last * read if n == "last" else 1.0 for n in names])
        return learn_prior(rows, expected, kind=kind, deviation=deviation)

    return prior


def fixed(rows: Rows, names: list[str]) -> np.ndarray:
    """Equal variances."""
    shares = np.ones(len(names)) / len(names)
    return scale_prior(rows, shares, kind="leave-one-out") * shares


DEFAULT = learned("leave-one-out", 1, 1.0)


def chosen_groups(names: list[str], kinds: Sequence[str]) -> list[int]:
    """Groups of some kinds: "last", or the last word of a name."""
    return [i for i, name in enumerate(names) if name.rpartition(" ")[2] in kinds]


def splits(data: Dataset, counts: Sequence[int], n_splits: int) -> Any:
    """(images a class, number, rows of training and then test images, number of training images)."""
    for per_class in counts:
        if per_class >= np.bincount(data.codes).min():
            continue
        for number in range(n_splits):
            train, test = split(data.codes, per_class, number)
            test = np.random.default_rng(0).permutation(test)[:N_TEST]
            yield per_class, number, np.concatenate([train, test]), len(train)


def study_prior(data: Dataset, n_splits: int) -> list[dict[str, Any]]:
    """Ways to learn the prior of all groups of the default, beside the probe and equal variances."""
    reader = FeatureReader.draw(data.network("head"), 0, SKETCH, 0, ("identity",))
    features, rows = data.read(reader), []
    for per_class, number, chosen, n in splits(data, (5, 10, 30), n_splits):
        task = Task(features[chosen], reader.groups, data.codes[chosen], n)
        everything = range(len(task.names))
        found = {"last features alone": task.accuracy(chosen_groups(task.names, ("last",)), fixed)}
        found["equal variances"] = task.accuracy(everything, fixed)
        found |= {name: task.accuracy(everything, learned(*way)) for name, way in PRIORS.items()}
        rows.append({"per_class": per_class, "split": number, "accuracy": found})
    return rows


def study_groups(data: Dataset, n_splits: int) -> list[dict[str, Any]]:
    """What is read, with the default prior."""
    network = data.network("head")
    reader = FeatureReader.draw(network, 0, SKETCH, 0, ("identity",))
    mirrored = FeatureReader.draw(network, 0, SKETCH, 0, ("identity", "flip"))
    along = FeatureReader.draw(data.network(1), DIRECTIONS, SKETCH, 0, ("identity",))
    views, plain = data.read(mirrored), data.read(along)
    rows = []
    for per_class, number, chosen, n in splits(data, (10, 30, 80), n_splits):
        task = Task(plain[chosen], along.groups, data.codes[chosen], n)
        both = Task(views[chosen], reader.groups, data.codes[chosen], n)

        def of(*kinds: str, task: Task = task) -> float:
            return task.accuracy(chosen_groups(task.names, kinds), DEFAULT)

        rows.append({"per_class": per_class, "split": number, "accuracy": {
            "default": of("last", "tangents", "deviation"),
            "without tangents": of("last", "deviation"),
            "without deviations": of("last", "tangents"),
            "network tangents instead": of("last", "deviation", "directions"),
            "network tangents beside": of("last", "tangents", "deviation", "directions"),
            "last features and network tangents": of("last", "directions"),
            "last features alone": of("last"),
            "default, averaged over the mirrored image": of("last", "tangents", "deviation", task=both),
        }})  # fmt: skip
    return rows


def study_directions(data: Dataset, n_splits: int) -> list[dict[str, Any]]:
    """Directions of network tangents of the last stage, beside last features and deviations."""
    network = data.network(1)
    drawn = FeatureReader.draw(network, DIRECTIONS, SKETCH, 0, ("identity",))
    last = drawn.groups[0].size
    generator = torch.Generator().manual_seed(0)
    plain = data.read(drawn)

    def reader(directions: torch.Tensor) -> FeatureReader:
        return FeatureReader(network, directions.numpy(), SKETCH, 0, drawn.scales)

    rows = []
    for per_class, number, chosen, n in splits(data, (30,), n_splits):
        phi = torch.from_numpy(plain[chosen[:n], :last]).double()
        codes = data.codes[chosen]
        isotropic = torch.randn(DIRECTIONS, last, generator=generator, dtype=torch.float64) / last**0.5
        mixed = torch.randn(DIRECTIONS, int(codes.max()) + 1, generator=generator, dtype=torch.float64)

        def aligned(rows: np.ndarray, phi: Any = phi, codes: Any = codes, mixed: Any = mixed) -> torch.Tensor:
            means = torch.stack([phi[rows][codes[: len(phi)][rows] == c].mean(0) for c in np.unique(codes)])
            return mixed @ (means - means.mean(0))

        found = {
            "synthetic images": plain[chosen],
            "training images": data.read(reader(draw_directions(phi, DIRECTIONS, generator)), chosen),
            "isotropic": data.read(reader(isotropic), chosen),
            "class means, one for all": data.read(reader(aligned(np.arange(n))), chosen),
        }
        # Each half of the training images along the class means of the other half.
        half = np.arange(n) % ALIGNED_FOLDS
        crossed = found["class means, one for all"].copy()
        for k in range(ALIGNED_FOLDS):
            crossed[:n][half == k] = data.read(reader(aligned(np.flatnonzero(half != k))), chosen[:n][half == k])
        found["class means, cross-fitted"] = crossed
        accuracies = {}
        for name, features in found.items():
            task = Task(features, drawn.groups, codes, n)
            accuracies[name] = task.accuracy(chosen_groups(task.names, ("last", "deviation", "directions")), DEFAULT)
        accuracies["none"] = task.accuracy(chosen_groups(task.names, ("last", "deviation")), DEFAULT)
        rows.append({"per_class": per_class, "split": number, "accuracy": accuracies})
    return rows


SECTIONS = {"prior": study_prior, "groups": study_groups, "directions": study_directions}


def left_out(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each data set the way to learn the prior that is best on the others, and its accuracy there."""
    means: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row["accuracy"].items():
            means[row["dataset"]][name].append(value)
    found = {}
    for dataset, own in means.items():
        others = {p: np.mean([np.mean(means[d][p]) for d in means if d != dataset]) for p in PRIORS}
        best = max(others, key=lambda p: others[p])
        found[dataset] = {"chosen": best, "accuracy": float(np.mean(own[best]))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS))
    parser.add_argument("--datasets", nargs="+", default=[*NEAR, *FAR])
    parser.add_argument("--splits", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "study", "backbone": BACKBONE}
    report["image_size"] = {d: SIZES.get(d, DEFAULT_SIZE) for d in [*NEAR, *FAR]}
    for section in args.sections:
        rows = report.setdefault(section, [])
        for name in args.datasets:
            if any(row["dataset"] == name for row in rows):
                continue
            rows += [
                {"dataset": name, **row}
                for row in SECTIONS[section](Dataset(name, args.data_dir, BACKBONE), args.splits)
            ]
            if section == "prior" and len({row["dataset"] for row in rows}) > 1:
                report["prior, left out"] = left_out(rows)
            write_report(RESULTS, report, "cpu")
            means = defaultdict(list)
            for row in rows:
                if row["dataset"] == name:
                    for way, value in row["accuracy"].items():
                        means[way].append(value)
            print(section, name, {way: round(float(np.mean(v)), 1) for way, v in means.items()}, flush=True)


if __name__ == "__main__":
    main()
