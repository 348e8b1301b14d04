"""What is worth reading: ridge regressions, penalty by leave-one-out, on different readouts of one network.

Nothing is linearized but the head, so that many readouts can be compared in minutes: pooled statistics of the
stages, finer ones, mirrored images averaged, BatchNorm statistics taken from the training images. Beside the
accuracy stands the squared leave-one-out error on the training images, by which a fit could choose. Development
data only; 3 splits, a fixed random thousand of the other images for testing.

    python benchmarks/readout.py --data-dir FOLDER
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEFAULT_SIZE, SIZES, read_images, split, write_report
from torch import Tensor, nn

from sklearn_lqf.backbones import load_backbone
from sklearn_lqf.head import fit_ridge_head
from sklearn_lqf.preprocessing import Preprocessing
from sklearn_lqf.problem import _RIDGE_ALPHAS
from sklearn_lqf.readout import fit_standardization

RESULTS = Path(__file__).parent / "results" / "readout.json"
DATASETS, PER_CLASS, SPLITS, N_TEST = ("trashnet", "digits"), (5, 20, 50), 3, 1000
STAGES = [f"b{i}" for i in range(7)]
DEFAULT = ("mean", "std")
# Name -> statistics of the stages that are read beside the last features.
READOUTS: dict[str, tuple[str, ...]] = {
    "last features": (),
    "and means of stages": ("mean",),
    "and deviations of stages": ("std",),
    "and means and deviations (the default)": DEFAULT,
    "and maxima, too": (*DEFAULT, "max"),
    "and means over quarters, too": (*DEFAULT, "quarters"),
    "means and deviations inside the blocks, too": (*DEFAULT, "inside"),
}


def extract(
    module: nn.Module, preprocessing: Preprocessing, X: np.ndarray, mirrored: bool = False
) -> dict[str, Tensor]:
    """Statistics of the stages and last features, (n, ...), of EfficientNet-Lite0 as timm builds it."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, inside: bool) -> Any:
        def see(_: nn.Module, __: Any, x: Tensor) -> None:
            pair = [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt()]
            if inside:
                found[f"{name}.inside"].append(torch.cat(pair, 1))
                return
            found[f"{name}.mean"].append(pair[0])
            found[f"{name}.std"].append(pair[1])
            found[f"{name}.max"].append(x.amax((2, 3)))
            found[f"{name}.quarters"].append(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

        return see

    hooks = []
    for name, stage in zip(STAGES, module.blocks, strict=True):
        last = stage[-1]
        hooks.append(stage.register_forward_hook(watch(name, False)))
        hooks.append((last.bn2 if hasattr(last, "bn3") else last.bn1).register_forward_hook(watch(name, True)))
    with torch.inference_mode():
        for x in torch.from_numpy(X).permute(0, 3, 1, 2).split(64):
            x = preprocessing.normalize(x.flip(-1) if mirrored else x)
            found["last"].append(module(x.contiguous(memory_format=torch.channels_last)))
    for hook in hooks:
        hook.remove()
    return {k: torch.cat(v) for k, v in found.items()}


def with_statistics_of(preprocessing: Preprocessing, X: np.ndarray) -> nn.Module:
    """The network with BatchNorm statistics of these images; labels are not seen."""
    again = load_backbone("efficientnet_lite0").module.to(memory_format=torch.channels_last)
    again.reset_classifier(0)
    for m in again.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None  # the mean over all batches
            m.train()
    with torch.inference_mode():
        for x in torch.from_numpy(X).permute(0, 3, 1, 2).split(64):
            again(preprocessing.normalize(x).contiguous(memory_format=torch.channels_last))
    return again.eval()


def evaluate(parts: list[Tensor], codes: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Test accuracy and leave-one-out error of a ridge regression on parts of mean squared norm 1."""
    features, sizes = torch.cat(parts, 1), [p.shape[1] for p in parts]
    ones = torch.ones(len(train), dtype=torch.float64)
    standardize = fit_standardization(features[train], ones, sizes)
    targets = torch.eye(int(codes.max()) + 1, dtype=torch.float64)[codes[train]]
    ridge = fit_ridge_head(standardize(features[train]).unsqueeze(0), targets, ones, ones, _RIDGE_ALPHAS)
    outputs = standardize(features[test]).double() @ ridge.weight.T + ridge.bias
    return {
        "accuracy": float((outputs.argmax(1).numpy() == codes[test]).mean()),
        "leave_one_out_error": float((targets - ridge.held_out[0]).square().sum(1).mean()),
    }


def chosen(found: dict[str, Tensor], statistics: tuple[str, ...]) -> list[Tensor]:
    """The last features, and one part for each stage; quarters and the inside of blocks are parts of their own."""
    parts = [found["last"]]
    together = [s for s in statistics if s in ("mean", "std", "max")]
    for name in STAGES if statistics else []:
        parts.append(torch.cat([found[f"{name}.{s}"] for s in together], 1))
        parts += [found[f"{name}.{s}"] for s in statistics if s not in together]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"benchmark": "readout", "rows": []}
    backbone = load_backbone("efficientnet_lite0")
    module, preprocessing = backbone.module.to(memory_format=torch.channels_last), backbone.preprocessing
    module.reset_classifier(0)
    for dataset in DATASETS:
        X, codes = read_images(dataset, args.data_dir, SIZES.get(dataset, DEFAULT_SIZE))
        plain, mirrored = extract(module, preprocessing, X), extract(module, preprocessing, X, mirrored=True)
        both = {k: (plain[k] + mirrored[k]) / 2 for k in plain}
        for per_class in PER_CLASS:
            for seed in range(SPLITS):
                train, test = split(codes, per_class, seed)
                test = np.random.default_rng(0).permutation(test)[:N_TEST]
                results = {n: evaluate(chosen(plain, s), codes, train, test) for n, s in READOUTS.items()}
                results["default, averaged over the mirrored image"] = evaluate(
                    chosen(both, DEFAULT), codes, train, test
                )
                adapted = with_statistics_of(preprocessing, X[train])
                rows = np.concatenate([train, test])
                found = extract(adapted, preprocessing, X[rows])
                order = np.arange(len(rows))
                results["default, BatchNorm statistics of the training images"] = evaluate(
                    chosen(found, DEFAULT), codes[rows], order[: len(train)], order[len(train) :]
                )
                for name, result in results.items():
                    key = {"readout": name, "dataset": dataset, "per_class": per_class, "split": seed}
                    report["rows"].append({**key, **result})
                write_report(RESULTS, report, "cpu")
                print(dataset, per_class, seed, json.dumps({k: v["accuracy"] for k, v in results.items()}), flush=True)


if __name__ == "__main__":
    main()
