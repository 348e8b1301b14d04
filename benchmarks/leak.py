"""A leak in activations that were trained without one, and a repair of it that sees no label.

The paper's networks have Leaky-ReLU. Weights that were trained without it do not expect a leak: what a layer gets
has another mean and another deviation. The repair scales and shifts each channel behind an activation with a leak so
that both are those of the original network on the training images, layer after layer, each with the layers before
already repaired. Two folders near to ImageNet and two far from it, 30 images a class, LQF at its defaults. One
thread; a run that was stopped goes on.

    python benchmarks/leak.py --data-dir FOLDER [--datasets trashnet]
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, scores, split, write_report
from torch import Tensor, nn

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.activations import leaky

RESULTS = Path(__file__).parent / "results" / "leak.json"
BACKBONE, PER_CLASS, SPLITS, N_TEST = "efficientnet_lite0", 30, 2, 1000
SLOPES = (0.0, 0.01, 0.1)
DATASETS = ("caltech101", "intelscenes", "trashnet", "rsscn7")
MATCHED = 300  # training images by which channels are matched
_LEAST = 1e-6  # deviation of a channel that says nothing


class Repaired(nn.Module):
    """An activation with a leak whose channels are scaled and shifted: ``scale * leak(x) + shift``."""

    def __init__(self, activation: nn.Module, n_channels: int):
        super().__init__()
        self.activation = activation
        self.register_buffer("scale", torch.ones(n_channels, 1, 1))
        self.register_buffer("shift", torch.zeros(n_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) * self.scale + self.shift


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of (B, C, H, W), (C, 1, 1)."""
    return x.mean((0, 2, 3))[:, None, None], x.std((0, 2, 3))[:, None, None]


def repaired(module: nn.Module, slope: float, x: Tensor) -> nn.Module:
    """A copy with leaks whose channels are matched to those of the module on inputs x, all of them at once."""
    names = [name for name, m in module.named_modules() if leaky(m, slope) is not None]
    for name in names:
        module.get_submodule(name).inplace = False  # a leak needs the input, too
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: targets.__setitem__(name, moments(out))
        )
        for name in names
    ]
    with torch.inference_mode():
        module(x)
    for handle in handles:
        handle.remove()
    twin = copy.deepcopy(module)
    for name in targets:
        new = leaky(module.get_submodule(name), slope)
        assert new is not None
        twin.set_submodule(name, Repaired(new, len(targets[name][0])).eval())

    def match(layer: Repaired, args: tuple[Tensor], out: Tensor, name: str) -> Tensor:
        mean, deviation = moments(out)
        goal_mean, goal_deviation = targets[name]
        layer.scale.copy_(torch.where(deviation > _LEAST, goal_deviation / deviation.clamp_min(_LEAST), 1.0))
        layer.shift.copy_(goal_mean - layer.scale * mean)
        return out * layer.scale + layer.shift

    handles = [
        twin.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: match(m, a, o, name))
        for name in targets
    ]
    with torch.no_grad():
        twin(x)
    for handle in handles:
        handle.remove()
    return twin


def measure(X: np.ndarray, codes: np.ndarray, seed: int, slope: float, repair: bool, per_class: int) -> dict[str, Any]:
    """Scores of LQF on one split."""
    train, test = split(codes, per_class, seed)
    test = np.random.default_rng(0).permutation(test)[:N_TEST]
    if repair:
        backbone = load_backbone(BACKBONE)
        matched = X[np.random.default_rng(seed).permutation(train)[:MATCHED]]
        x = backbone.preprocessing.normalize(torch.from_numpy(matched).permute(0, 3, 1, 2))
        module = repaired(backbone.module.eval(), slope, x)
        pixels = {"mean": backbone.preprocessing.mean, "std": backbone.preprocessing.std}
        clf = LQFClassifier(module, preprocessing=pixels)
    else:
        clf = LQFClassifier(BACKBONE, negative_slope=slope)
    clf.fit(X[train], codes[train])
    return {"n": len(train), "n_test": len(test), **scores(clf.predict_log_proba(X[test]), codes[test])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(args.results.read_text()) if args.results.exists() else {"benchmark": "leak", "rows": []}
    report |= {"per_class": args.per_class, "backbone": BACKBONE}
    done = {(r["dataset"], r["split"], r["slope"], r["repair"]) for r in report["rows"]}
    for dataset in args.datasets:
        X, codes = read_images(dataset, args.data_dir, SIZES.get(dataset, DEFAULT_SIZE))
        for seed in range(args.splits):
            for slope, repair in [(s, r) for s in SLOPES for r in (False, True) if s or not r]:
                if (dataset, seed, slope, repair) in done:
                    continue
                row = {"dataset": dataset, "split": seed, "slope": slope, "repair": repair}
                report["rows"].append(row | measure(X, codes, seed, slope, repair, args.per_class))
                write_report(args.results, report, "cpu")
                print(json.dumps(report["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
