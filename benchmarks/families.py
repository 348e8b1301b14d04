"""Every family of timm as a backbone: at least one small model of each of its files, with random weights.

Each is tried in a process of its own, with a time limit: is it taken, is it traced, how many stages are read, how long
does a fit of eight images take, and do its features equal timm's own. Seconds are those of one core. What was tried is
kept; the rest is tried.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--again PATTERN] [--only PATTERN] [--limit 120]
"""

import argparse
import fnmatch
import json
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from sklearn_lqf import LQFClassifier
from sklearn_lqf.backbones.loading import load_backbone
from sklearn_lqf.network.head import as_vectors
from sklearn_lqf.network.prepared import PreparedNetwork

RESULTS = Path(__file__).parent / "results" / "families.json"
SIZES = (64, 96, 128, 160, 192, 224, 256)  # the first that the network takes is used
IMAGES = 8
# The smallest model of each file of timm that is none of its own tests, by parameters, and models that are asked for.
SMALLEST = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "mobileone_s1", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m", "deit":
    "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c", "dpn": "dpn48b", "edgenext":
    "edgenext_xx_small", "efficientformer": "efficientformer_l1", "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035", "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb", "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny", "gemma4_vit":
    "gemma4_vit_167m", "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera":
    "hiera_tiny_224", "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2", "inception_v3":
    "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s", "lowformer":
    "lowformer_b0", "mambaout": "mambaout_femto", "maxxvit": "maxvit_pico_rw_256", "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224", "mobilenetv3": "mobilenetv3_small_050", "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny", "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge", "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "nf_regnet_b0", "pit":
    "pit_ti_224", "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m", "rdnet":
    "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net":
    "res2next50", "resnest": "resnest14d", "resnet": "resnet10t", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100",
    "selecsls": "selecsls42", "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1",
    "sknet": "skresnet18", "starnet": "starnet_s050", "swiftformer": "swiftformer_xs", "swin_transformer":
    "swin_tiny_patch4_window7_224", "swin_transformer_v2": "swinv2_tiny_window16_256", "swin_transformer_v2_cr":
    "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m",
    "twins": "twins_svt_small", "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer":
    "vit_tiny_patch16_224", "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224", "vision_transformer_relpos":
    "vit_srelpos_small_patch16_224", "vision_transformer_sam": "samvit_base_patch16_224", "vitamin":
    "vitamin_small_224", "volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
    "xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip
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
        start = time.process_time()
        backbone.module(x)
        row["forward_seconds"] = time.process_time() - start
        start = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PreparedNetwork(
            backbone, (3, size, size), "head", 0.0, True, backbone.preprocessing, torch.float32, torch.device("cpu")
        )
    row["prepare_seconds"] = time.process_time() - start
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
    start = time.process_time()
    clf = LQFClassifier(f"timm:{name}", weights=None, image_size=size, random_state=0).fit(X, [0, 1] * (IMAGES // 2))
    row["fit_seconds"] = time.process_time() - start
    start = time.process_time()
    finite = bool(np.isfinite(clf.decision_function(X)).all())
    row["predict_seconds"] = time.process_time() - start
    return row | {"taken": finite, "error": None if finite else "predictions are not finite"}


def run(name: str, limit: float) -> dict[str, Any]:
    """`try_one` in another process, a copy of this one that has imported the libraries already."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(name, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(limit) else None
    except EOFError:
        process.join()
        return {"taken": False, "error": f"the process ended with {process.exitcode}", "kind": "process"}
    if found is None:
        process.kill()
    process.join()
    return found or {"taken": False, "error": f"more than {limit:.0f} s", "kind": "timeout"}


def answer(name: str, there: Any) -> None:
    """Send the result of `try_one`, or its error."""
    try:
        row = try_one(name)
    except Exception as error:  # each is a result
        row = {"taken": False, "error": str(error), "kind": type(error).__name__}
    there.send(row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", help="a model, to be tried in this process")
    parser.add_argument("--again", default="", help="models that are tried although they were")
    parser.add_argument("--only", default="*")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(try_one(options.one)))
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
