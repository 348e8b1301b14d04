"""Every family of timm as a backbone: at least one small model of each of its files, with random weights.

Each is tried in a process of its own, with a time limit: is it taken, is it traced, how many stages are read, how long
does a fit of eight images take, and do its features equal timm's own. What was tried is kept; the rest is tried.

    python benchmarks/families.py [--again PATTERN] [--only PATTERN] [--limit 120]
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "families.json"
SIZES = (64, 96, 128, 160, 192, 224, 256)  # the first that the network takes is used
IMAGES = 8
# The smallest model of each file of timm that is none of its own tests, by parameters, and models that are asked for.
SMALLEST: dict[str, str] = {}
ALSO = {
    "vision_transformer": [
        "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch32_clip_224", "vit_tiny_patch16_224",
    ],
    "eva": ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"],
    "byobnet": ["resnet50_clip"],
    "deit": ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"],
    "convnext": ["convnextv2_atto"],
    "cspnet": ["cspresnet50", "cspresnext50", "cspdarknet53", "darknet53", "darknetaa53"],
    "levit": ["levit_conv_128s"],
    "nfnet": ["dm_nfnet_f0"],
    "metaformer": ["caformer_s18"],
    "efficientnet": ["tf_efficientnet_lite0", "efficientnet_b0"],
    "resnet": ["resnet18"],
    "vision_transformer_sam": ["samvit_base_patch16"],
}  # fmt: skip


def wanted() -> list[tuple[str, str]]:
    """Pairs of a file of timm and a model."""
    return [
        (file, name) for file, smallest in SMALLEST.items() for name in dict.fromkeys([smallest, *ALSO.get(file, [])])
    ]


def try_one(name: str) -> dict[str, Any]:
    """What happens when a model is taken as backbone."""
    import numpy as np
    import timm
    import torch

    from sklearn_lqf import LQFClassifier
    from sklearn_lqf.backbones.loading import load_backbone
    from sklearn_lqf.network.head import as_vectors
    from sklearn_lqf.network.prepared import PreparedNetwork

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    native = timm.models.get_pretrained_cfg(name).input_size[-1]
    for size in dict.fromkeys((*(s for s in SIZES if s < native), native)):
        try:
            backbone = load_backbone(f"timm:{name}", None, random_state=0, image_size=size)
            x = torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                if bool(torch.isfinite(backbone.module(x[:2])).all()):
                    break
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):  # of timm, for most sizes
            if size == native:
                raise
    row: dict[str, Any] = {"size": size, "parameters": sum(p.numel() for p in backbone.module.parameters())}
    with torch.no_grad():
        expected = backbone.module.forward_head(backbone.module.forward_features(x[:2]), pre_logits=True)
        start = time.perf_counter()
        backbone.module(x)
        row["forward_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PreparedNetwork(
            backbone, (3, size, size), "head", 0.0, True, backbone.preprocessing, torch.float32, torch.device("cpu")
        )
    row["prepare_seconds"] = time.perf_counter() - start
    row["warnings"] = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
    with torch.no_grad():
        features = as_vectors(backbone.module, x[:2])(x[:2])  # the copy is changed
    expected = expected.flatten(1) if expected.ndim == 4 and expected.shape[2:] == (1, 1) else expected
    same = features.shape == expected.shape
    row["difference"] = float((features - expected).abs().max() / expected.abs().max()) if same else None
    names = {part.name.rpartition(" ")[0] for part in network.split.parts} - {""}
    row |= {"traced": network.split.traced, "stages": len(network.split.stages), "read": len(names)}
    row["features"] = network.split.n_features
    X = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    start = time.perf_counter()
    clf = LQFClassifier(f"timm:{name}", weights=None, image_size=size, random_state=0).fit(X, [0, 1] * (IMAGES // 2))
    row["fit_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    finite = bool(np.isfinite(clf.decision_function(X)).all())
    row["predict_seconds"] = time.perf_counter() - start
    return row | {"taken": finite, "error": None if finite else "predictions are not finite"}


def run(name: str, limit: float) -> dict[str, Any]:
    """`try_one` in another process."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"taken": False, "error": f"more than {limit:.0f} s", "kind": "timeout"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"taken": False, "error": f"the process ended with {done.returncode}: {last[:300]}", "kind": "process"}
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", help="a model, to be tried in this process")
    parser.add_argument("--again", default="", help="models that are tried although they were")
    parser.add_argument("--only", default="*")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each")
    options = parser.parse_args()
    if options.one:
        try:
            row = try_one(options.one)
        except Exception as error:  # each is a result
            row = {"taken": False, "error": str(error), "kind": type(error).__name__}
        print(json.dumps(row))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for file, name in wanted():
        if not fnmatch.fnmatch(name, options.only) or (name in results and not fnmatch.fnmatch(name, options.again)):
            continue
        results[name] = {"file": file, **run(name, options.limit)}
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        row = results[name]
        what = f"{row['fit_seconds']:.1f} s" if row["taken"] else row["error"]
        print(f"{file:28} {name:40} {'taken' if row['taken'] else 'REFUSED'} {what}", flush=True)


if __name__ == "__main__":
    main()
